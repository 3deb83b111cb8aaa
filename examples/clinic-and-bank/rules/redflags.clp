;;; Red flags. An emergency is answered by these texts alone; no model is asked.
;;; A general question ("What are the signs of a stroke?") is no emergency: a flag needs
;;; somebody who has it. When in doubt the rules warn.

(deftemplate term
  (slot text (type SYMBOL STRING))
  (slot denied (type SYMBOL) (default FALSE)))

(deftemplate flag
  (slot name (type SYMBOL))
  (slot level (type SYMBOL) (allowed-symbols emergency refer urgent))
  (slot priority (type INTEGER) (default 0))
  (slot text (type STRING)))

(deftemplate sign
  (slot name (type SYMBOL)))

;;; ------------------------------------------------------------ who and what

(defrule somebody
  "The text is about a person, not about a word."
  (term (text i|i'm|i've|my|me|he|he's|she|she's|his|her|him|we|our|they|mum|mom|dad|father|mother
             |wife|husband|son|daughter|baby|child|friend|grandmother|grandfather|now|suddenly))
  (not (sign (name somebody)))
  =>
  (assert (sign (name somebody))))

(defrule chest
  "Pain or pressure in the chest."
  (term (text chest-pain|chest-pains|chest-hurts|pain-in-chest|chest-pressure|tight-chest|chest-tightness
             |my-chest|the-chest|crushing-pain|pressure-in-my) (denied FALSE))
  (not (sign (name chest)))
  =>
  (assert (sign (name chest))))

(defrule breathless
  "Trouble with breathing."
  (or (term (text breathless|breathlessness|short-of-breath|shortness-of-breath|trouble-breathing
                 |difficulty-breathing|hard-to-breathe|struggling-to-breathe|gasping) (denied FALSE))
      (term (text can't-breathe|cannot-breathe|cant-breathe|not-breathe|barely-breathe|can-hardly-breathe)))
  (not (sign (name breathless)))
  =>
  (assert (sign (name breathless))))

;;; ------------------------------------------------------------ emergencies

(defrule heart-attack
  "Chest pain with breathlessness, sweat, sickness or pain in the arm or jaw."
  (sign (name somebody))
  (sign (name chest))
  (or (sign (name breathless))
      (term (text sweating|sweaty|sweat|nausea|nauseous|vomiting|jaw|arm|left-arm|shoulder|dizzy|faint|fainted)
            (denied FALSE)))
  (not (flag (name heart-attack)))
  =>
  (assert (flag (name heart-attack) (level emergency) (priority 100)
    (text "Call the emergency number now: chest pain together with breathlessness, sweating, sickness or pain in an arm or the jaw can be a heart attack. Sit up, rest, loosen tight clothes and do not drive yourself. If the person becomes unconscious and does not breathe normally, begin chest compressions."))))

(defrule chest-alone
  "Chest pain without another sign still needs a doctor today."
  (sign (name somebody))
  (term (text chest-pain|chest-pains|chest-hurts|pain-in-chest|chest-pressure|chest-tightness|crushing-pain) (denied FALSE))
  (not (flag (name heart-attack)))
  (not (flag (name chest-pain)))
  =>
  (assert (flag (name chest-pain) (level urgent) (priority 60)
    (text "Chest pain should be looked at by a doctor today. Call the emergency number at once if it lasts longer than five minutes, gets worse, or if you become short of breath, sweaty or sick."))))

(defrule stroke
  "A drooping face, a weak arm or trouble speaking that has come suddenly."
  (sign (name somebody))
  (term (text face-drooping|face-droops|drooping-face|face-is-drooping|mouth-droops|side-of-face|one-side-of
             |slurred|slurring|slurred-speech|slurs|can't-speak|cannot-speak|trouble-speaking|arm-is-weak|weak-arm
             |can't-lift-his|can't-lift-her|arm-went-numb|stroke-now|having-a-stroke) (denied FALSE))
  (not (flag (name stroke)))
  =>
  (assert (flag (name stroke) (level emergency) (priority 100)
    (text "Call the emergency number now: these can be signs of a stroke, and every minute counts. Note the time at which it began. Give nothing to eat or drink, and stay with the person."))))

(defrule suicidal
  "Thoughts of suicide or of harming oneself."
  (term (text suicidal|kill-myself|killing-myself|end-my-life|ending-my-life|want-to-die|wanna-die|take-my-own
             |hurt-myself|harm-myself|better-off-dead|end-it-all|don't-want-to-live|no-reason-to))
  (not (flag (name suicidal)))
  =>
  (assert (flag (name suicidal) (level emergency) (priority 110)
    (text "I am glad that you say this. You do not have to go through it alone. If you might act on these thoughts, call the emergency number now or go to the nearest emergency department. You can also call a crisis line, day or night, and talk to somebody you trust. If somebody is with you, tell them what you just told me."))))

(defrule not-wanting-to-live
  "The denial is part of the meaning here."
  (term (text to-live|live-anymore|be-alive))
  (term (text don't|not|no))
  (sign (name somebody))
  (not (flag (name suicidal)))
  =>
  (assert (flag (name suicidal) (level emergency) (priority 110)
    (text "I am glad that you say this. You do not have to go through it alone. If you might act on these thoughts, call the emergency number now or go to the nearest emergency department. You can also call a crisis line, day or night, and talk to somebody you trust."))))

(defrule anaphylaxis
  "Swelling of face, tongue or throat, or an allergic reaction with trouble breathing."
  (sign (name somebody))
  (or (term (text anaphylaxis|anaphylactic|throat-is-swelling|throat-swelling|tongue-is-swelling|swollen-tongue
                 |tongue-swelling|throat-is-closing|throat-closing) (denied FALSE))
      (and (sign (name breathless))
           (term (text allergic|allergy|sting|stung|hives|peanut|peanuts|swollen|swelling) (denied FALSE))))
  (not (flag (name anaphylaxis)))
  =>
  (assert (flag (name anaphylaxis) (level emergency) (priority 105)
    (text "Call the emergency number now: this can be a severe allergic reaction. Use an adrenaline pen at once if there is one. Lie down with raised legs, or sit up if breathing is hard."))))

(defrule breathing-now
  "Somebody cannot breathe."
  (sign (name somebody))
  (or (term (text can't-breathe|cannot-breathe|cant-breathe|barely-breathe|struggling-to-breathe|gasping|not-breathing|stopped-breathing|choking|lips-are-blue|blue-lips|lips-turned-blue)))
  (not (flag (name breathing)))
  =>
  (assert (flag (name breathing) (level emergency) (priority 95)
    (text "Call the emergency number now: severe trouble breathing is an emergency. Sit up and lean forward a little; use a reliever inhaler if there is one. If the person does not breathe normally and is unconscious, begin chest compressions."))))

(defrule meningitis
  "Fever with a stiff neck."
  (sign (name somebody))
  (term (text stiff-neck|neck-is-stiff|neck-stiffness) (denied FALSE))
  (term (text fever|high-temperature|headache|rash) (denied FALSE))
  (not (flag (name meningitis)))
  =>
  (assert (flag (name meningitis) (level emergency) (priority 95)
    (text "Call the emergency number or go to the emergency department now: fever or headache with a stiff neck can be meningitis, which must be treated within hours."))))

(defrule thunderclap
  "The worst headache of one's life."
  (term (text worst-headache|thunderclap|thunderclap-headache|sudden-severe-headache|worst-headache-of) (denied FALSE))
  (sign (name somebody))
  (not (flag (name thunderclap)))
  =>
  (assert (flag (name thunderclap) (level emergency) (priority 95)
    (text "Call the emergency number now: a sudden, very severe headache can be a bleeding in the head."))))

(defrule overdose
  "Too many tablets or something poisonous."
  (sign (name somebody))
  (term (text overdose|overdosed|too-many-pills|too-many-tablets|swallowed-bleach|poisoned|drank-bleach
             |took-too-many|all-the-pills|whole-pack) (denied FALSE))
  (not (flag (name overdose)))
  =>
  (assert (flag (name overdose) (level emergency) (priority 100)
    (text "Call the emergency number or the poison line now, even if there are no symptoms yet. Keep the packet at hand. Do not make the person vomit."))))

(defrule unconscious-or-bleeding
  "Loss of consciousness, a fit, or heavy bleeding."
  (sign (name somebody))
  (term (text unconscious|unresponsive|passed-out|won't-wake|won't-wake-up|seizure|convulsing|heavy-bleeding
             |bleeding-heavily|won't-stop-bleeding|vomiting-blood|coughing-blood|coughing-up-blood))
  (not (term (text unconscious|unresponsive|seizure|heavy-bleeding|vomiting-blood) (denied TRUE)))
  (not (flag (name unconscious)))
  =>
  (assert (flag (name unconscious) (level emergency) (priority 95)
    (text "Call the emergency number now. Lay an unconscious person who breathes on the side; press firmly on a heavy bleeding. Stay there until help comes."))))

(defrule spine
  "Back pain with numbness or loss of control."
  (sign (name somebody))
  (term (text back-pain|lower-back|back-hurts|my-back))
  (term (text incontinent|numb-between|hold-my-urine|control-my-bladder|wet-myself|numb-legs|leg-weakness|leg-is-weak))
  (not (flag (name spine)))
  =>
  (assert (flag (name spine) (level emergency) (priority 90)
    (text "Go to the emergency department at once: back pain with numbness between the legs, a weak leg or loss of control over urine or stool can be a pressed nerve that must be treated within hours."))))

(defrule breathless-alone
  "New shortness of breath needs a doctor today."
  (sign (name somebody))
  (sign (name breathless))
  (not (flag (level emergency)))
  (not (flag (name breathless)))
  =>
  (assert (flag (name breathless) (level urgent) (priority 55)
    (text "Shortness of breath that is new should be looked at by a doctor today. Call the emergency number at once if it gets worse quickly, if you cannot finish a sentence, or if the lips turn blue."))))

;;; ------------------------------------------------------------ not for documents

(defrule dose
  "How much of a medicine somebody should take is for a doctor or pharmacist."
  (term (text dose|dosage|how-many-tablets|how-many-pills|how-much-ibuprofen|how-much-paracetamol|how-much-insulin|how-many-mg|milligrams|mg))
  (term (text take|give|child|baby|old|i|my|should))
  (not (flag (name dose)))
  =>
  (assert (flag (name dose) (level refer) (priority 40)
    (text "I do not say how much of a medicine to take, because that depends on age, weight, kidneys and other medicines. Please follow the leaflet, or ask a pharmacist or a doctor. If somebody has already taken too much, call the poison line or the emergency number."))))

(defrule change-medicine
  "Stopping or combining medicines is for a doctor."
  (term (text stop-taking|stop-my|combine|together-with|mix|interact|interaction))
  (term (text medicine|medication|tablets|pills|insulin|metformin|ibuprofen|antibiotics|warfarin|statin))
  (sign (name somebody))
  (not (flag (name change-medicine)))
  =>
  (assert (flag (name change-medicine) (level refer) (priority 35)
    (text "Please do not stop, change or combine medicines on the word of a program. Ask your doctor or pharmacist, who knows your other medicines."))))

(defrule blood-in-stool
  "Blood in stool or urine."
  (sign (name somebody))
  (term (text blood-in-stool|bloody-stool|blood-in-urine|bloody-diarrhoea|bloody-diarrhea|blood-in-my|black-stool) (denied FALSE))
  (not (flag (name blood)))
  =>
  (assert (flag (name blood) (level urgent) (priority 50)
    (text "Please have blood in stool or urine looked at by a doctor within a day."))))
