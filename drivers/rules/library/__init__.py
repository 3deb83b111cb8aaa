"""Rule files that others may use.

A line ``; uses: certainty`` in a CLIPS file stands for the library of that name. The
library takes the place of the line and is itself one line, so the lines of the file
keep their numbers, and the digest of what is loaded covers both.
"""

from __future__ import annotations

import re
from importlib import resources

from llmos.drivers.errors import RuleSyntaxError

NAMES = ("certainty",)
"""The libraries there are."""

_USES = re.compile(r"^[ \t]*;+[ \t]*uses:[ \t]*(\S+)[ \t]*$", re.MULTILINE)


def with_libraries(name: str, source: str) -> str:
    """The source with its libraries. Raises RuleSyntaxError: there is no such library."""

    def replace(found: re.Match[str]) -> str:
        library = found.group(1)
        if library not in NAMES:
            line = source.count("\n", 0, found.start()) + 1
            raise RuleSyntaxError(
                name, f"there is no library {library!r}; there are: {', '.join(NAMES)}", line
            )
        return _one_line(library)

    return _USES.sub(replace, source)


def _one_line(library: str) -> str:
    text = resources.files(__name__).joinpath(f"{library}.clp").read_text("utf-8")
    # No string of a library holds a semicolon or a line break.
    return " ".join(line.partition(";")[0].strip() for line in text.splitlines())
