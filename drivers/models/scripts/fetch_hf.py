"""Download the listed files of one repository of a Hugging Face hub.

Run by path with one JSON argument: ``{"repo", "revision", "out", "patterns"}``. Prints
``{"total": bytes}`` when the sizes are known, and last ``{"commit": …}`` or
``{"error", "reason"}``. Endpoint, token, proxies and offline mode are huggingface_hub's
own settings, taken from its environment.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from fnmatch import fnmatchcase
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Download; returns the commit that the revision stood for."""
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    from huggingface_hub import HfApi, snapshot_download

    repo, patterns = request["repo"], request["patterns"]
    info = HfApi().model_info(
        repo, revision=request["revision"] or None, files_metadata=True, timeout=30
    )
    files = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    sizes = [n for f, n in files.items() if any(fnmatchcase(f, p) for p in patterns)]
    pickled = [f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not any(f.endswith(".safetensors") for f in files) and pickled:
        return {"error": "pickled", "reason": f"it has pickled weights only ({pickled[0]})"}
    tell({"total": sum(sizes)})
    # By commit: the branch may move between the two calls.
    snapshot_download(
        repo, revision=info.sha, local_dir=request["out"], allow_patterns=patterns, max_workers=4
    )
    return {"commit": info.sha}


def tell(line: dict[str, Any]) -> None:
    """Print one line for the parent."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def watch() -> None:
    """End when the parent has ended: its end of our standard input is closed then."""
    while os.read(0, 1024):
        pass
    os._exit(3)


if __name__ == "__main__":
    try:
        answer = main(json.loads(sys.argv[1]))
    except Exception as error:  # noqa: BLE001  classified here, raised by the parent
        names = {cls.__name__ for cls in type(error).__mro__}
        kind = next(
            (
                k
                for k, found in {
                    "gated": {"GatedRepoError"},
                    "missing": {"RepositoryNotFoundError", "RevisionNotFoundError"},
                    "disk": {"OSError"} if getattr(error, "errno", None) == 28 else set(),
                }.items()
                if names & found
            ),
            "network",
        )
        answer = {"error": kind, "reason": f"{type(error).__name__}: {error}"[:1000]}
    tell(answer)
    sys.exit(0 if "commit" in answer else 1)
