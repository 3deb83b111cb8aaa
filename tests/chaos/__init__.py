"""Random kills of a real system under work, and a checker of what came of it.

``python -m tests.chaos --kills N --seed S --store sqlite|postgres [--nodes K] [--json]``
"""
