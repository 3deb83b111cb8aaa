"""A folder of packages as on a machine with torch and transformers alone."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def needed(*names: str) -> list[Distribution]:
    """The distributions of these names and all that they cannot be without."""
    found: dict[str, Distribution] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # For another platform, or an optional one.
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return list(found.values())


def make_bare(folder: Path, *names: str) -> Path:
    """Link the packages of :func:`needed` into a folder that may be the whole ``PYTHONPATH``."""
    for package in needed(*names):
        for file in package.files or []:
            top = file.parts[0]
            if top in ("..", "__pycache__") or (folder / top).exists():
                continue
            (folder / top).symlink_to(Path(str(package.locate_file(top))))
    return folder
