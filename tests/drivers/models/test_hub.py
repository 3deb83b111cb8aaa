"""``hf:`` against a hub on this machine, spoken to by the real huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from llmos.drivers.errors import DigestMismatch, SourceUnavailable, UnsafeModel
from llmos.drivers.models.store import ModelStore
from tests.drivers.models import tiny

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of a hub's HTTP interface as a download needs."""

    folder: Path
    gated = False
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.asked.append(path)
        files = {p.name: p for p in self.folder.iterdir()}
        if path.startswith("/api/models/org/tiny/tree/"):
            self._json(
                [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                    for n, p in files.items()
                ]
            )
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": n, "size": p.stat().st_size} for n, p in files.items()]
            self._json({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/") and not self.gated:
            self._send(200, files[path.rsplit("/", 1)[1]].read_bytes())
        elif self.gated and path.startswith("/org/tiny/"):
            self._send(403, b"", ("X-Error-Code", "GatedRepo"))
        else:
            self._send(404, b"", ("X-Error-Code", "RepoNotFound"))

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), ("Content-Type", "application/json"))

    def _send(self, code: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(code)
        etag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        for name, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{etag}"'), *headers):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("TestHub", (Hub,), {"folder": tiny.encoder(tmp_path / "repo"), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_only_wanted_files_are_downloaded(hub: type[Hub], tmp_path: Path) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"pickled")
    (hub.folder / "modeling_x.py").write_text("raise SystemExit")
    store = ModelStore(tmp_path / "store")
    model = store.pull("hf:org/tiny")
    assert (model.name, model.source) == ("tiny", "hf:org/tiny")
    manifest = json.loads((model.path / "llmos-model.json").read_text())
    assert manifest["revision"] == COMMIT
    assert set(manifest["files"]) == {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.txt",
    }
    assert tiny.sha256(model.path / "config.json") == tiny.sha256(hub.folder / "config.json")
    assert not any(p.endswith((".bin", ".py")) for p in hub.asked)
    store.verify("tiny")


def test_a_branch_that_moved_is_not_trusted(hub: type[Hub], tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    store.pull("hf:org/tiny@main")
    assert store.remove("tiny")
    tiny.encoder(hub.folder, seed=1)
    with pytest.raises(DigestMismatch):
        store.pull("hf:org/tiny@main")
    assert store.list() == []


def test_a_repository_of_pickles_costs_no_download(hub: type[Hub], tmp_path: Path) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    with pytest.raises(UnsafeModel, match="pickled"):
        ModelStore(tmp_path / "store").pull("hf:org/tiny")
    assert not any("/resolve/" in p for p in hub.asked)


def test_gated_and_missing_repositories_say_so(hub: type[Hub], tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    with pytest.raises(SourceUnavailable) as missing:
        store.pull("hf:org/nothing")
    assert "private repository" in missing.value.remedy
    hub.gated = True
    with pytest.raises(SourceUnavailable) as gated:
        store.pull("hf:org/tiny")
    assert "Accept the licence" in gated.value.remedy


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    store = ModelStore(tmp_path / "store")
    with pytest.raises(SourceUnavailable) as caught:
        store.pull("hf:org/tiny")
    assert "path:" in caught.value.remedy
    assert store.list() == []
