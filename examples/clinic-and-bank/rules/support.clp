;;; What customer service does with a request. The decision of the highest priority counts.
;;; Words are stated by the program as (term (text stolen) (denied FALSE)); amount and days
;;; are -1 where they are not known.

(deftemplate request
  (slot intent (type SYMBOL STRING) (default unknown))
  (slot confidence (type FLOAT INTEGER) (default 0.0))
  (slot margin (type FLOAT INTEGER) (default 0.0))
  (slot passage-score (type FLOAT INTEGER) (default 0.0))
  (slot amount (type FLOAT INTEGER) (default -1.0))
  (slot days (type FLOAT INTEGER) (default -1.0)))

(deftemplate term
  (slot text (type SYMBOL STRING))
  (slot denied (type SYMBOL) (default FALSE)))

(deftemplate decision
  (slot action (type SYMBOL))
  (slot reason (type STRING) (default ""))
  (slot policy (type STRING) (default ""))
  (slot case (type SYMBOL STRING) (default ""))
  (slot priority (type INTEGER) (default 0)))

(deftemplate mood
  (slot name (type SYMBOL)))

;;; ------------------------------------------------------------ what is urgent

(defrule stolen-or-fraud
  "A theft or fraud goes to a person at once, after the advice to block the card."
  (term (text fraud|fraudulent|scam|scammed|hacked|phishing|stolen|stole|robbed|unauthorised|unauthorized)
        (denied FALSE))
  (not (decision (case fraud)))
  =>
  (assert (decision (action escalate) (case fraud) (priority 100)
    (policy "card lost or stolen, block it at once; payments you did not make")
    (reason "Please block your card in the app under Cards now, or call the card line, which is open day and night. Your case is one for a person in our security team, who has to look at it today"))))

(defrule payment-not-recognised
  "A payment that the customer did not make is treated like fraud."
  (request (intent card_payment_not_recognised) (confidence ?c&:(>= ?c 0.5)))
  (not (decision (case fraud)))
  =>
  (assert (decision (action escalate) (case fraud) (priority 90)
    (policy "payments you did not make: block your card first; unauthorised payment refund")
    (reason "Please block your card in the app first. A person in our security team checks the payment today; an unauthorised payment is refunded by the end of the next working day"))))

;;; ------------------------------------------------------------ mood

(defrule angry
  "Words that show anger."
  (or (term (text unacceptable|furious|angry|outrageous|disgusting|ridiculous|terrible|ombudsman|lawyer) (denied FALSE))
      (term (text speak-to-a|talk-to-a|real-person|human) (denied FALSE)))
  (not (mood (name angry)))
  =>
  (assert (mood (name angry))))

(defrule complaint-to-a-person
  "A complaint, or an angry customer without a clear request, is answered by a person."
  (request (intent ?i))
  (or (test (eq ?i complaint))
      (and (mood (name angry)) (test (eq ?i unknown))))
  (not (decision (action escalate) (case complaint)))
  =>
  (assert (decision (action escalate) (case complaint) (priority 60)
    (reason "I am sorry that we let you down. Your complaint is one for a person, who has to answer by the end of the next working day"))))

;;; ------------------------------------------------------------ refunds

(defrule duplicate-too-early
  "A second charge within 3 days is often a reservation only."
  (request (intent charged_twice) (confidence ?c&:(>= ?c 0.4)) (days ?d&:(and (>= ?d 0) (< ?d 3))))
  =>
  (assert (decision (action wait) (priority 52)
    (policy "charged twice for the same purchase, wait 3 working days, reservation")
    (reason "Please wait until 3 working days after the payment: one of the two charges is often only a reservation that disappears by itself. If both are still there then, write to us again and we refund it"))))

(defrule duplicate-small
  "A duplicate charge of up to 100 is refunded at once."
  (request (intent charged_twice) (confidence ?c&:(>= ?c 0.4))
           (amount ?a&:(and (> ?a 0) (<= ?a 100))) (days ?d&:(>= ?d 3)))
  =>
  (assert (decision (action refund) (priority 50)
    (policy "charged twice for the same purchase: we refund duplicate charges at once")
    (reason (format nil "The second charge of %.2f is one we refund: duplicate charges of up to 100 euros are refunded at once" ?a)))))

(defrule duplicate-days-unknown
  "The date decides whether a small duplicate can be refunded, so we ask for it."
  (request (intent charged_twice) (confidence ?c&:(>= ?c 0.4)) (amount ?a&:(<= ?a 100)) (days ?d&:(< ?d 0)))
  =>
  (assert (decision (action ask-details) (priority 48)
    (policy "charged twice for the same purchase, wait 3 working days, reservation")
    (reason "Please tell us the amount and the day of the payment. Up to 100 euros we refund a duplicate charge at once if it is at least 3 working days old"))))

(defrule duplicate-amount-unknown
  "The amount decides who checks a duplicate, so we ask for it."
  (request (intent charged_twice) (confidence ?c&:(>= ?c 0.4)) (amount ?a&:(<= ?a 0)) (days ?d&:(>= ?d 3)))
  =>
  (assert (decision (action ask-details) (priority 48)
    (policy "charged twice for the same purchase: we refund duplicate charges at once")
    (reason "Please tell us the amount. Up to 100 euros we refund a duplicate charge at once; larger ones are checked by a person"))))

(defrule duplicate-large
  "A larger duplicate charge is checked by a person."
  (request (intent charged_twice) (confidence ?c&:(>= ?c 0.4)) (amount ?a&:(> ?a 100)))
  =>
  (assert (decision (action escalate) (case duplicate) (priority 50)
    (policy "larger duplicate charges are checked by a person")
    (reason "A person checks the double charge, because it is more than 100 euros. This takes up to 5 working days"))))

(defrule fee-refund
  "A fee of up to 30 that is at most 60 days old is given back; a person checks the others."
  (request (intent fee_refund) (confidence ?c&:(>= ?c 0.5)) (amount ?a&:(> ?a 0)) (days ?d&:(>= ?d 0)))
  =>
  (if (and (<= ?a 30) (<= ?d 60))
   then
    (assert (decision (action refund) (priority 45)
      (policy "we refund a fee that was charged by mistake; claimed back for 60 days")
      (reason (format nil "The fee of %.2f is one we refund, within 2 working days" ?a))))
   else
    (assert (decision (action escalate) (case fee) (priority 45)
      (policy "we refund a fee that was charged by mistake; claimed back for 60 days")
      (reason "A person checks whether we can give this fee back, because of its amount or because it is older than 60 days"))))) 

;;; ------------------------------------------------------------ to finance

(defrule loan
  "A loan is weighed by finance."
  (request (intent loan_request) (confidence ?c&:(>= ?c 0.5)) (amount ?a&:(> ?a 0)))
  =>
  (assert (decision (action hand-over) (case loan) (priority 40)
    (policy "applying for a loan, monthly income, risk policy")
    (reason "Our finance team has weighed your loan request"))))

(defrule limit
  "A higher limit is weighed by finance."
  (request (intent limit_increase) (confidence ?c&:(>= ?c 0.5)) (amount ?a&:(> ?a 0)))
  =>
  (assert (decision (action hand-over) (case limit-increase) (priority 40)
    (policy "raising a limit: our finance team weighs your income and debts")
    (reason "Our finance team has weighed your request for a higher limit"))))

(defrule large-dispute
  "A dispute over more than 500 is weighed by finance."
  (request (intent dispute_payment) (confidence ?c&:(>= ?c 0.5)) (amount ?a&:(> ?a 500)))
  =>
  (assert (decision (action hand-over) (case dispute) (priority 40)
    (policy "disputes over more than 500 euros are weighed by our finance team")
    (reason "Our finance team has weighed your dispute"))))

;;; ------------------------------------------------------------ answers

(defrule known-question
  "The help pages have something near: answer from them."
  (request (passage-score ?s&:(>= ?s 0.45)))
  =>
  (assert (decision (action answer) (priority 10))))

(defrule understood-only
  "The wish is clear though no page is very near: try the help pages."
  (request (intent ?i&~unknown) (confidence ?c&:(>= ?c 0.6)) (passage-score ?s&:(< ?s 0.45)))
  =>
  (assert (decision (action answer) (priority 8))))

(defrule unclear
  "Neither the wish nor a page is clear, but something is near: ask back."
  (request (intent ?i) (confidence ?c&:(< ?c 0.6)) (passage-score ?s&:(and (>= ?s 0.25) (< ?s 0.45))))
  =>
  (assert (decision (action clarify) (priority 5)
    (reason "I am not sure that I understood you. Could you say it in other words?"))))

(defrule nothing-near
  "Nothing fits: the answer says so."
  (request (confidence ?c&:(< ?c 0.6)) (passage-score ?s&:(< ?s 0.25)))
  =>
  (assert (decision (action answer) (priority 1))))
