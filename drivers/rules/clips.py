"""Rules in CLIPS.

A rule file is checked (:mod:`llmos.drivers.rules.clips_source`) and then loaded and
evaluated in a child process with a deadline (:mod:`llmos.drivers.rules.isolated`).
Programs of one's own, which may do anything, are run by
:mod:`llmos.drivers.rules.clips_run`.
"""

from __future__ import annotations

from llmos.drivers.rules.isolated import IsolatedRuleBase
from llmos.drivers.rules.library import with_libraries


class ClipsRuleBase(IsolatedRuleBase):
    """A CLIPS program. Each evaluation begins with a reset: deffacts and nothing else."""

    def __init__(self, name: str, source: str) -> None:
        """Read the source.

        Raises:
            RuleSyntaxError: CLIPS does not accept some construct of it, or it calls a
                function that a rule file may not call.
            RuleTimeout: loading it does not come to an end.
        """
        # Asked for here, so that a missing package is noticed where the driver is.
        import clips  # noqa: F401

        whole = with_libraries(name, source)
        super().__init__("llmos.drivers.rules.clips_engine:ClipsProgram", name, whole)
