;;; How a risk case is weighed. Each rule adds points with its reason; the sum decides.
;;; Nationality, religion, health, sex and family status are not weighed.

(deftemplate case
  (slot kind (type SYMBOL STRING))
  (slot amount (type FLOAT INTEGER) (default 0.0))
  (slot currency (type SYMBOL STRING) (default EUR)))

(deftemplate known
  (slot name (type SYMBOL STRING))
  (slot number (type FLOAT INTEGER) (default 0.0))
  (slot text (type STRING SYMBOL) (default "")))

(deftemplate term
  (slot text (type SYMBOL STRING))
  (slot denied (type SYMBOL) (default FALSE)))

(deftemplate points
  (slot points (type INTEGER))
  (slot reason (type STRING)))

(deftemplate must-review
  (slot reason (type STRING)))

(deftemplate outcome
  (slot decision (type SYMBOL))
  (slot score (type INTEGER FLOAT))
  (slot advice (type STRING)))

;;; ------------------------------------------------------------ income and debt

(defrule debt-low
  "Payments for debts below 35 % of the income count for the case."
  (case (kind loan|limit-increase))
  (known (name income) (number ?i&:(> ?i 0)))
  (known (name debt) (number ?d))
  (test (< (/ ?d ?i) 0.35))
  =>
  (assert (points (points 2) (reason (format nil "Payments for debts are %.0f %% of the monthly income, below 35 %%" (* 100 (/ ?d ?i)))))))

(defrule debt-high
  "Payments for debts of 35 to 50 % of the income count against the case."
  (case (kind loan|limit-increase))
  (known (name income) (number ?i&:(> ?i 0)))
  (known (name debt) (number ?d))
  (test (and (>= (/ ?d ?i) 0.35) (< (/ ?d ?i) 0.5)))
  =>
  (assert (points (points -2) (reason (format nil "Payments for debts are %.0f %% of the monthly income, more than 35 %%" (* 100 (/ ?d ?i)))))))

(defrule debt-too-high
  "From 50 % on no further credit is given."
  (case (kind loan|limit-increase))
  (known (name income) (number ?i&:(> ?i 0)))
  (known (name debt) (number ?d))
  (test (>= (/ ?d ?i) 0.5))
  =>
  (assert (points (points -10) (reason (format nil "Payments for debts are %.0f %% of the monthly income; from 50 %% on no further credit is given" (* 100 (/ ?d ?i)))))))

(defrule income-unknown
  "Without an income a person reviews the case."
  (case (kind loan|limit-increase))
  (not (known (name income) (number ?i&:(> ?i 0))))
  =>
  (assert (must-review (reason "the monthly income is not known"))))

;;; ------------------------------------------------------------ size

(defrule size-small
  "Up to two monthly incomes."
  (case (kind loan|limit-increase) (amount ?a))
  (known (name income) (number ?i&:(> ?i 0)))
  (test (<= ?a (* 2 ?i)))
  =>
  (assert (points (points 2) (reason "The request is not more than two monthly incomes"))))

(defrule size-large
  "More than six monthly incomes."
  (case (kind loan|limit-increase) (amount ?a))
  (known (name income) (number ?i&:(> ?i 0)))
  (test (> ?a (* 6 ?i)))
  =>
  (assert (points (points -2) (reason "The request is more than six monthly incomes"))))

(defrule size-over-bound
  "Above 25,000 a person always reviews."
  (case (kind loan|limit-increase) (amount ?a&:(> ?a 25000)))
  =>
  (assert (must-review (reason "the request is above 25,000 euros"))))

(defrule currency-other
  "The bounds are in euros; other currencies are reviewed by a person."
  (case (currency ?c&~EUR&~"EUR"))
  =>
  (assert (must-review (reason "the amount is not in euros"))))

;;; ------------------------------------------------------------ history

(defrule late-none
  "No late payment in twelve months."
  (known (name late-payments) (number ?n&:(= ?n 0)))
  =>
  (assert (points (points 1) (reason "No late payment in the last 12 months"))))

(defrule late-some
  "One or two late payments."
  (known (name late-payments) (number ?n&:(and (>= ?n 1) (<= ?n 2))))
  =>
  (assert (points (points -1) (reason "One or two late payments in the last 12 months"))))

(defrule late-many
  "Three or more late payments."
  (known (name late-payments) (number ?n&:(>= ?n 3)))
  =>
  (assert (points (points -3) (reason "Three or more late payments in the last 12 months"))))

(defrule account-old
  "24 months or older."
  (known (name account-months) (number ?n&:(>= ?n 24)))
  =>
  (assert (points (points 1) (reason "The account is 24 months old or older"))))

(defrule account-young
  "Younger than 6 months."
  (known (name account-months) (number ?n&:(< ?n 6)))
  =>
  (assert (points (points -1) (reason "The account is younger than 6 months"))))

(defrule residence-elsewhere
  "Residents outside the euro area are reviewed by a person."
  (known (name country) (text ?t&~""&~AT&~BE&~BG&~HR&~CY&~DE&~EE&~ES&~FI&~FR&~GR&~IE&~IT&~LT&~LU&~LV&~MT&~NL&~PT&~SI&~SK))
  =>
  (assert (must-review (reason "the customer does not live in the euro area"))))

;;; ------------------------------------------------------------ disputes

(defrule dispute-proof
  "Written proof counts for a dispute."
  (case (kind dispute))
  (known (name proof) (text yes|"yes"))
  =>
  (assert (points (points 3) (reason "There is written proof for the dispute"))))

(defrule dispute-many
  "More than three disputes in a year."
  (case (kind dispute))
  (known (name disputes) (number ?n&:(> ?n 3)))
  =>
  (assert (points (points -3) (reason "More than three disputes in the last 12 months"))))

(defrule dispute-late
  "Later than 120 days after the payment."
  (case (kind dispute))
  (known (name payment-days) (number ?n&:(> ?n 120)))
  =>
  (assert (points (points -10) (reason "The payment is more than 120 days old, and a dispute must be opened within 120 days"))))

(defrule dispute-large
  "Over 2,000 a person always reviews."
  (case (kind dispute) (amount ?a&:(> ?a 2000)))
  =>
  (assert (must-review (reason "the dispute is over more than 2,000 euros"))))

(defrule fraud-suspected
  "Nothing is decided by rules alone while fraud is suspected."
  (term (text fraud|stolen|scam|hacked) (denied FALSE))
  (not (must-review (reason "fraud is suspected")))
  =>
  (assert (must-review (reason "fraud is suspected"))))

;;; ------------------------------------------------------------ the sum

(deffunction total ()
  (bind ?sum 0)
  (do-for-all-facts ((?p points)) TRUE (bind ?sum (+ ?sum ?p:points)))
  ?sum)

(deffunction reasons ()
  (bind ?all "")
  (do-for-all-facts ((?m must-review)) TRUE
    (bind ?all (if (eq ?all "") then ?m:reason else (str-cat ?all ", and because " ?m:reason))))
  ?all)

(defrule decide
  "A review where a rule asks for it; else 3 points approve, fewer than 0 decline."
  (declare (salience -100))
  (case (kind ?kind))
  (not (outcome))
  =>
  (bind ?score (total))
  (bind ?why (reasons))
  (if (neq ?why "")
   then
    (assert (outcome (decision review) (score ?score)
      (advice (str-cat "A person reviews the case, because " ?why))))
   else
    (if (>= ?score 3)
     then
      (assert (outcome (decision approve) (score ?score) (advice "The request is approved")))
     else
      (if (< ?score 0)
       then
        (assert (outcome (decision decline) (score ?score)
          (advice "The request is declined; you may ask for a person to look at the case again within 30 days")))
       else
        (assert (outcome (decision review) (score ?score)
          (advice "A person reviews the case, because the score is from 0 to below 3")))))))
