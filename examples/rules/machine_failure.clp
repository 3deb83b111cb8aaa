;;; When a milling machine fails, and of what: the published rules of the AI4I 2020 data set
;;; (Matzka, UCI 601). Heat cannot leave (HDF), power out of range (PWF), overstrain (OSF).

(deftemplate machine
  (slot id (type INTEGER))
  (slot quality (type SYMBOL) (allowed-values L M H))
  (slot temperature_gap (type FLOAT))  ; process minus air, K
  (slot speed (type INTEGER FLOAT))    ; rpm
  (slot torque (type FLOAT))           ; Nm
  (slot wear (type INTEGER FLOAT)))    ; minutes

(deftemplate failure
  (slot id (type INTEGER))
  (slot mode (type SYMBOL)))

(deffunction power (?torque ?speed)
  (/ (* ?torque ?speed 2 (pi)) 60))

(deffunction strain-limit (?quality)
  (switch ?quality (case L then 11000) (case M then 12000) (default 13000)))

(defrule heat
  "Air is nearly as warm as the process, and the tool turns slowly"
  (machine (id ?id) (temperature_gap ?gap&:(< ?gap 8.6)) (speed ?speed&:(< ?speed 1380)))
  =>
  (assert (failure (id ?id) (mode HDF))))

(defrule power
  "Less than 3,500 W or more than 9,000 W"
  (machine (id ?id) (speed ?speed) (torque ?torque))
  (test (or (< (power ?torque ?speed) 3500) (> (power ?torque ?speed) 9000)))
  =>
  (assert (failure (id ?id) (mode PWF))))

(defrule strain
  "Wear times torque is more than the quality bears"
  (machine (id ?id) (quality ?quality) (torque ?torque) (wear ?wear))
  (test (> (* ?torque ?wear) (strain-limit ?quality)))
  =>
  (assert (failure (id ?id) (mode OSF))))
