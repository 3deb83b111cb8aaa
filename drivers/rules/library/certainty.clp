;;; Certainty factors, as in EMYCIN (Shortliffe and Buchanan; van Melle): numbers from -1,
;;; certainly not, over 0, unknown, to 1, certainly.
;;;
;;; A rule file that says "; uses: certainty" has these. What is told, and what each rule
;;; concludes, is evidence; the evidence for one statement together makes one finding, which
;;; the conditions of rules look at:
;;;
;;;   (defrule r75
;;;     (finding (of ?o) (parameter gram) (value neg) (cf ?a&:(cf-holds ?a)))
;;;     (finding (of ?o) (parameter morphology) (value rod) (cf ?b&:(cf-holds ?b)))
;;;     =>
;;;     (conclude r75 ?o identity pseudomonas 0.6 ?a ?b))
;;;
;;; A rule gives one piece of evidence for a statement; when its premises change it gives a
;;; new one in place of the old. Evidence of a premise that ceased to hold stays.

(deftemplate evidence
  (slot of)
  (slot parameter)
  (slot value)
  (slot cf (type FLOAT INTEGER) (range -1.0 1.0) (default 1.0))
  (slot rule (default told)))

(deftemplate finding
  (slot of)
  (slot parameter)
  (slot value)
  (slot cf (type FLOAT INTEGER) (range -1.0 1.0)))

(deffunction cf-holds (?cf)
  (> ?cf 0.2))

(deffunction cf-combine (?a ?b)
  (if (and (> ?a 0) (> ?b 0))
    then (return (- (+ ?a ?b) (* ?a ?b))))
  (if (and (< ?a 0) (< ?b 0))
    then (return (+ ?a ?b (* ?a ?b))))
  (bind ?rest (- 1 (min (abs ?a) (abs ?b))))
  ;; Certainly so and certainly not: nothing is known.
  (if (= ?rest 0) then (return 0.0))
  (/ (+ ?a ?b) ?rest))

(deffunction conclude (?rule ?of ?parameter ?value ?strength $?premises)
  (bind ?cf ?strength)
  (if (> (length$ ?premises) 0)
    then (bind ?least 1.0)
         (foreach ?premise ?premises (bind ?least (min ?least ?premise)))
         (bind ?cf (* ?strength ?least)))
  (do-for-all-facts ((?old evidence))
    (and (eq ?old:rule ?rule) (eq ?old:of ?of) (eq ?old:parameter ?parameter)
         (eq ?old:value ?value) (neq ?old:cf ?cf))
    (retract ?old))
  (assert (evidence (of ?of) (parameter ?parameter) (value ?value) (cf ?cf) (rule ?rule))))

(defrule weigh
  "All evidence for a statement makes one finding"
  (declare (salience 100))
  (evidence (of ?of) (parameter ?parameter) (value ?value))
  =>
  (bind ?cf 0.0)
  (do-for-all-facts ((?e evidence))
    (and (eq ?e:of ?of) (eq ?e:parameter ?parameter) (eq ?e:value ?value))
    (bind ?cf (cf-combine ?cf ?e:cf)))
  (bind ?known FALSE)
  (do-for-all-facts ((?f finding))
    (and (eq ?f:of ?of) (eq ?f:parameter ?parameter) (eq ?f:value ?value))
    (if (= ?f:cf ?cf) then (bind ?known TRUE) else (retract ?f)))
  (if (not ?known)
    then (assert (finding (of ?of) (parameter ?parameter) (value ?value) (cf ?cf)))))
