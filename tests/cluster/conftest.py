"""One kernel on a real local Ray for the whole module, with engines that need no weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmos.kernel.client import Kernel
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig


def own_processes(title: str) -> list[psutil.Process]:
    """Processes of the Ray that this test run has started, by what they call themselves."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


SYSTEM = """
[system]
name = "test"
metrics_port = 0
hang_timeout_s = 5

[[devices]]
driver = "cpu"
memory = "2GiB"
threads = 1

[hosts]
count = 2

[models.chat]
source = "built-in"
engine = "echo"

[models.embed]
source = "built-in"
engine = "hash"

[models.missing]
source = "no-such-model"
engine = "causal"

[corpora.help]
tenant = "acme"
path = "help"
embedder = "embed"
driver = "memory"

[corpora.empty]
path = "empty"
embedder = "embed"
driver = "memory"

[corpora.gone]
path = "nowhere"
embedder = "embed"
driver = "memory"

[rules.good]
path = "good.clp"

[rules.broken]
path = "broken.clp"
"""

GOOD = """
(deftemplate request (slot amount (type INTEGER)))
(deftemplate decision (slot action))
(defrule small "Small amounts are paid back" (request (amount ?a&:(< ?a 50)))
  => (assert (decision (action refund))))
(defrule large "Large ones are looked at" (request (amount ?a&:(>= ?a 50)))
  => (assert (decision (action escalate))))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("system")
    (base / "help").mkdir()
    (base / "help" / "cards.md").write_text("# Cards\n\nA lost card is blocked at once.\n")
    (base / "help" / "fees.md").write_text("# Fees\n\nTransfers within the country are free.\n")
    (base / "help" / "photo.md").write_bytes(b"\x89PNG\r\n\x00\xff\xfe")
    (base / "help" / "old.txt").write_bytes("Gebühren".encode("latin-1"))
    (base / "empty").mkdir()
    (base / "good.clp").write_text(GOOD)
    (base / "broken.clp").write_text("(defrule broken (request (amount ?a)) => (assert (x)")
    return base


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), log_level="DEBUG")


@pytest.fixture(scope="module")
def kernel(folder: Path, settings: Settings) -> Iterator[Kernel]:
    system = SystemConfig.parse(SYSTEM, "system.toml", folder)
    with Kernel.boot(system, settings=settings) as booted:
        yield booted
