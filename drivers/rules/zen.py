"""Decision tables that business people edit, as JSON Decision Models, through zen-engine.

What a model is given and what it makes of it: :mod:`llmos.drivers.rules.zen_engine`.
Like CLIPS it is evaluated in a child process with a deadline.
"""

from __future__ import annotations

from llmos.drivers.rules.isolated import IsolatedRuleBase


class ZenRuleBase(IsolatedRuleBase):
    """A decision model. Evaluations share nothing."""

    def __init__(self, name: str, source: str) -> None:
        """Read the model.

        Raises:
            RuleSyntaxError: not a JSON Decision Model, an expression that cannot be read,
                or a node that runs code or reads other models.
            RuleTimeout: reading it does not come to an end.
        """
        # Asked for here, so that a missing package is noticed where the driver is.
        import zen  # noqa: F401

        super().__init__("llmos.drivers.rules.zen_engine:ZenProgram", name, source)
