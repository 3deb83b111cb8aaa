"""``python -m tests.chaos``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.chaos.run import Options, run


def main() -> int:
    """Run, print what was found; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many faults")
    parser.add_argument("--seed", type=int, default=1, help="of faults and work")
    parser.add_argument("--store", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--nodes", type=int, default=1, help="of Ray, on this machine")
    parser.add_argument("--rate", type=float, default=Options.rate, help="notes told a second")
    parser.add_argument("--no-kernel", action="store_true", help="spare the kernel actor")
    parser.add_argument("--kinds", default="", help="faults, in this order: host,journal,…")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    given = parser.parse_args()
    options = Options(
        kills=given.kills,
        seed=given.seed,
        store=given.store,
        nodes=given.nodes,
        kernel=not given.no_kernel,
        rate=given.rate,
        kinds=tuple(filter(None, given.kinds.split(","))),
        folder=given.keep,
    )
    result = run(options)
    for text in result.stories:
        print(text)
    for finding in result.evidence.broken:
        print(f"broken chain: {finding}")
    for letter in result.evidence.dead:
        mail = letter.mail
        print(f"dead letter: {mail.stream}#{mail.seq} to {mail.receiver}: {letter.reason}")
        print(f"    {letter.story}")
    for agent in result.evidence.agents:
        if agent.hold:
            print(f"held: {agent.agent} ({agent.hold}): {agent.story}")
    summary = result.summary()
    if given.json:
        print(json.dumps(summary))
    else:
        for name, value in summary.items():
            print(f"{name:26} {value}")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
