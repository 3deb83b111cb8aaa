;;; Six rules of MYCIN as printed in P. Norvig, Paradigms of AI Programming, chapter 16.
;;; Organisms are part of cultures, cultures of patients.
; uses: certainty

(deftemplate part-of (slot part) (slot whole))

(defrule r52
  "Gram-negative rods in the blood of a burnt patient: perhaps pseudomonas"
  (part-of (part ?o) (whole ?c))
  (part-of (part ?c) (whole ?p))
  (finding (of ?c) (parameter site) (value blood) (cf ?a&:(cf-holds ?a)))
  (finding (of ?o) (parameter gram) (value neg) (cf ?b&:(cf-holds ?b)))
  (finding (of ?o) (parameter morphology) (value rod) (cf ?d&:(cf-holds ?d)))
  (finding (of ?p) (parameter burn) (value serious) (cf ?e&:(cf-holds ?e)))
  =>
  (conclude r52 ?o identity pseudomonas 0.4 ?a ?b ?d ?e))

(defrule r71
  "Gram-positive cocci in clumps: staphylococcus"
  (finding (of ?o) (parameter gram) (value pos) (cf ?a&:(cf-holds ?a)))
  (finding (of ?o) (parameter morphology) (value coccus) (cf ?b&:(cf-holds ?b)))
  (finding (of ?o) (parameter growth-conformation) (value clumps) (cf ?d&:(cf-holds ?d)))
  =>
  (conclude r71 ?o identity staphylococcus 0.7 ?a ?b ?d))

(defrule r73
  "Anaerobic gram-negative rods in the blood: bacteroides"
  (part-of (part ?o) (whole ?c))
  (finding (of ?c) (parameter site) (value blood) (cf ?a&:(cf-holds ?a)))
  (finding (of ?o) (parameter gram) (value neg) (cf ?b&:(cf-holds ?b)))
  (finding (of ?o) (parameter morphology) (value rod) (cf ?d&:(cf-holds ?d)))
  (finding (of ?o) (parameter aerobicity) (value anaerobic) (cf ?e&:(cf-holds ?e)))
  =>
  (conclude r73 ?o identity bacteroides 0.9 ?a ?b ?d ?e))

(defrule r75
  "Gram-negative rods in a compromised host: pseudomonas"
  (part-of (part ?o) (whole ?c))
  (part-of (part ?c) (whole ?p))
  (finding (of ?o) (parameter gram) (value neg) (cf ?a&:(cf-holds ?a)))
  (finding (of ?o) (parameter morphology) (value rod) (cf ?b&:(cf-holds ?b)))
  (finding (of ?p) (parameter compromised-host) (value yes) (cf ?d&:(cf-holds ?d)))
  =>
  (conclude r75 ?o identity pseudomonas 0.6 ?a ?b ?d))

(defrule r107
  "Aerobic gram-negative rods: enterobacteriaceae"
  (finding (of ?o) (parameter gram) (value neg) (cf ?a&:(cf-holds ?a)))
  (finding (of ?o) (parameter morphology) (value rod) (cf ?b&:(cf-holds ?b)))
  (finding (of ?o) (parameter aerobicity) (value aerobic) (cf ?d&:(cf-holds ?d)))
  =>
  (conclude r107 ?o identity enterobacteriaceae 0.8 ?a ?b ?d))

(defrule r165
  "Gram-positive cocci in chains: streptococcus"
  (finding (of ?o) (parameter gram) (value pos) (cf ?a&:(cf-holds ?a)))
  (finding (of ?o) (parameter morphology) (value coccus) (cf ?b&:(cf-holds ?b)))
  (finding (of ?o) (parameter growth-conformation) (value chains) (cf ?d&:(cf-holds ?d)))
  =>
  (conclude r165 ?o identity streptococcus 0.7 ?a ?b ?d))

;;; Three more of the book, which conclude what the patient was asked above.

(defrule r1
  (finding (of ?p) (parameter immunosuppressed) (value yes) (cf ?a&:(cf-holds ?a)))
  =>
  (conclude r1 ?p compromised-host yes 1.0 ?a))

(defrule r2
  (finding (of ?p) (parameter leukopenia) (value yes) (cf ?a&:(cf-holds ?a)))
  =>
  (conclude r2 ?p immunosuppressed yes 1.0 ?a))

(defrule r3
  (finding (of ?p) (parameter wbc) (value ?count&:(numberp ?count)&:(< ?count 2.5)) (cf ?a&:(cf-holds ?a)))
  =>
  (conclude r3 ?p leukopenia yes 0.9 ?a))
