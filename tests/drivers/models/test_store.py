"""The store against real folders, wheels, processes and locks; no network, no torch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmos.drivers.errors import (
    DigestMismatch,
    ModelBusy,
    ModelConflict,
    ModelDamaged,
    ModelUnusable,
    SourceUnavailable,
    UnknownModel,
    UnsafeModel,
)
from llmos.drivers.models.catalogue import CATALOGUE, CatalogueEntry
from llmos.drivers.models.manifest import MANIFEST, digest_of
from llmos.drivers.models.store import ModelStore
from tests.drivers.models import tiny


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.encoder(tmp_path / "tiny")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pip sees this folder and no index, through the user's own kind of configuration."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def leftovers(store: ModelStore) -> list[Path]:
    incoming = store.root / ".incoming"
    return list(incoming.iterdir()) if incoming.exists() else []


# ------------------------------------------------------------ path:


def test_a_folder_is_copied_with_a_manifest(store: ModelStore, folder: Path) -> None:
    (folder / "README.md").write_text("not needed")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    model = store.pull(f"path:{folder}")
    assert (model.name, model.kind, model.source) == ("tiny", "encoder", f"path:{folder}")
    files = sorted(p.name for p in model.path.iterdir())
    assert files == [
        "config.json",
        MANIFEST,
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    names = [n for n in files if n != MANIFEST]
    assert model.digest == digest_of({n: tiny.sha256(model.path / n) for n in names})
    assert model.size_bytes == sum((model.path / n).stat().st_size for n in names)
    manifest = json.loads((model.path / MANIFEST).read_text())
    assert manifest["files"]["config.json"]["sha256"] == tiny.sha256(folder / "config.json")
    assert store.get("tiny") == model == store.verify("tiny")
    assert store.list() == [model]
    assert store.path("tiny") == model.path
    assert leftovers(store) == []


def test_the_original_may_change_without_touching_the_store(
    store: ModelStore, folder: Path
) -> None:
    store.pull(f"path:{folder}")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    store.verify("tiny")


def test_a_second_pull_does_nothing(store: ModelStore, folder: Path) -> None:
    first = store.pull(f"path:{folder}")
    stages: list[str] = []
    started = time.perf_counter()
    again = store.pull(f"path:{folder}", progress=lambda s, d, t: stages.append(s))
    assert again == first
    assert stages == []
    assert time.perf_counter() - started < 0.1


def test_symbolic_links_in_the_source_become_files(
    store: ModelStore, folder: Path, tmp_path: Path
) -> None:
    # A snapshot in a hub's cache is a folder of links into its blobs.
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    model = store.pull(f"path:{snapshot}")
    assert not any(p.is_symlink() for p in model.path.iterdir())


@pytest.mark.parametrize(
    "text", ["path:/nowhere/at/all", "path:", "hf:justname", "pypi:x", "pypi:x>1"]
)
def test_sources_that_are_not_there_or_not_sources(store: ModelStore, text: str) -> None:
    with pytest.raises(SourceUnavailable) as caught:
        store.pull(text, name="m")
    assert caught.value.remedy
    assert not (store.root / "m").exists()


# ------------------------------------------------------------ unsafe and broken


def test_pickled_weights_are_refused(store: ModelStore, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeModel, match="pickled"):
        store.pull(f"path:{folder}")
    with pytest.raises(UnsafeModel, match="pickled"):
        store.pull(f"path:{folder}/pytorch_model.bin", name="one")
    assert store.list() == []


def test_pickles_beside_safetensors_stay_outside(store: ModelStore, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    model = store.pull(f"path:{folder}")
    assert not (model.path / "pytorch_model.bin").exists()


@pytest.mark.parametrize("head", [pickle.dumps({"a": 1}), b"PK\x03\x04" + b"0" * 40])
def test_a_pickle_under_a_false_name_is_refused(
    store: ModelStore, folder: Path, head: bytes
) -> None:
    (folder / "model.safetensors").write_bytes(head)
    with pytest.raises(UnsafeModel, match="another name"):
        store.pull(f"path:{folder}")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(store: ModelStore, folder: Path, file: str) -> None:
    content = json.loads((folder / file).read_text())
    content["auto_map"] = {"AutoModel": "modeling_x.X"}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UnsafeModel, match="auto_map"):
        store.pull(f"path:{folder}")
    assert leftovers(store) == []
    assert not (store.root / "tiny").exists()


def test_sentence_transformers_with_classes_of_their_own_are_refused(
    store: ModelStore, folder: Path
) -> None:
    (folder / "modules.json").write_text(json.dumps([{"type": "custom_st.Transformer"}]))
    with pytest.raises(UnsafeModel, match="custom_st"):
        store.pull(f"path:{folder}")


def test_broken_weights_are_refused(store: ModelStore, folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for broken in (b"", whole[:6], whole[:-1], whole + b"x", b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(broken)
        with pytest.raises(ModelUnusable):
            store.pull(f"path:{folder}")
    assert store.list() == []


def test_a_missing_shard_and_a_shard_elsewhere_are_refused(
    store: ModelStore, folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    for shard in ("model-00001-of-00001.safetensors", "../model-00001-of-00001.safetensors"):
        index = {"weight_map": {"a": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelUnusable, match="not there"):
            store.pull(f"path:{folder}")


def test_models_no_engine_runs_are_refused(store: ModelStore, tmp_path: Path) -> None:
    for config in ({"is_encoder_decoder": True}, {"architectures": []}):
        folder = tiny.encoder(tmp_path / "odd", config=config)
        with pytest.raises(ModelUnusable, match="no engine"):
            store.pull(f"path:{folder}")


def test_a_gguf_file_that_is_none_is_refused(store: ModelStore, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "fake.gguf").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(ModelUnusable, match=r"fake\.gguf: cannot be converted"):
        store.pull(f"path:{tmp_path}/fake.gguf")
    assert store.list() == []
    assert leftovers(store) == []


# ------------------------------------------------------------ pypi:


def test_a_model_is_read_out_of_a_wheel(store: ModelStore, folder: Path, wheels: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit")
    made = tiny.wheel(wheels, folder)
    model = store.pull("pypi:tinymodel==1.0")
    assert (model.name, model.source) == ("tinymodel", "pypi:tinymodel==1.0")
    assert tiny.sha256(model.path / "model.safetensors") == tiny.sha256(
        folder / "model.safetensors"
    )
    manifest = json.loads((model.path / MANIFEST).read_text())
    assert manifest["source_sha256"] == tiny.sha256(made)
    assert not list(model.path.rglob("*.py"))
    assert "tinymodel" not in sys.modules
    assert leftovers(store) == []


def test_a_package_that_is_not_there(store: ModelStore, wheels: Path) -> None:
    with pytest.raises(SourceUnavailable, match="No matching distribution") as caught:
        store.pull("pypi:tinymodel==1.0")
    assert "path:" in caught.value.remedy
    assert leftovers(store) == []


def test_a_wheel_is_compared_with_the_pin(
    store: ModelStore, folder: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.wheel(wheels, folder)

    def entry(sha256: str) -> CatalogueEntry:
        return CatalogueEntry(
            "pinned", "pypi:tinymodel==1.0", "encoder", "test", "MIT", 1000, sha256=sha256
        )

    monkeypatch.setitem(CATALOGUE, "pinned", entry("0" * 64))
    with pytest.raises(DigestMismatch) as caught:
        store.pull("pinned")
    assert caught.value.expected == "0" * 64
    assert caught.value.found == tiny.sha256(made)
    with pytest.raises(UnknownModel):
        store.get("pinned")
    monkeypatch.setitem(CATALOGUE, "pinned", entry(tiny.sha256(made)))
    assert store.pull("pinned").name == "pinned"
    # The same source by its text is the same model under the same pin.
    assert store.pull("pypi:tinymodel==1.0").name == "pinned"


def test_what_came_first_is_trusted_and_nothing_else_after(
    store: ModelStore, folder: Path, wheels: Path, tmp_path: Path
) -> None:
    tiny.wheel(wheels, folder)
    store.pull("pypi:tinymodel==1.0")
    assert store.remove("tinymodel")
    tiny.wheel(wheels, tiny.encoder(tmp_path / "other", seed=1))
    with pytest.raises(DigestMismatch):
        store.pull("pypi:tinymodel==1.0")
    assert store.list() == []
    # Somebody who wants the new one says so.
    (wheels / "tinymodel-1.0-py3-none-any.whl").unlink()
    tiny.wheel(wheels, folder)
    store.pull("pypi:tinymodel==1.0")
    assert store.remove("tinymodel", forget=True)
    tiny.wheel(wheels, tiny.encoder(tmp_path / "other", seed=1))
    store.pull("pypi:tinymodel==1.0")


def test_a_broken_list_of_known_digests_stops_pulls(
    store: ModelStore, folder: Path, wheels: Path
) -> None:
    tiny.wheel(wheels, folder)
    store.root.mkdir()
    (store.root / ".known-digests.json").write_text("{")
    with pytest.raises(ModelUnusable, match="known-digests"):
        store.pull("pypi:tinymodel==1.0")
    assert store.list() == []


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "a\\..\\evil", "C:/evil"])
def test_a_wheel_that_writes_outside_is_refused(
    store: ModelStore, folder: Path, tmp_path: Path, name: str
) -> None:
    from llmos.drivers.models.fetch import Job, unpack_wheel
    from llmos.drivers.models.sources import parse_source

    made = tiny.wheel(tmp_path / "w", folder, extra={name: b"evil"})
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    job = Job("m", parse_source("pypi:x==1"), target, target, 1.0, lambda s, d, t: None)
    with pytest.raises(UnsafeModel, match="outside"):
        unpack_wheel(job, made)
    assert list(target.iterdir()) == []
    assert not list(tmp_path.rglob("evil*"))


def test_a_wheel_of_pickles_is_refused(store: ModelStore, folder: Path, wheels: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    tiny.wheel(wheels, folder)
    with pytest.raises(UnsafeModel, match="pickled"):
        store.pull("pypi:tinymodel==1.0")


def test_a_wheel_with_two_models_is_refused(store: ModelStore, folder: Path, wheels: Path) -> None:
    tiny.wheel(wheels, folder, extra={"tinymodel/other.gguf": b"GGUF"})
    with pytest.raises(ModelUnusable, match="holds 2 models"):
        store.pull("pypi:tinymodel==1.0")


def test_a_step_that_hangs_ends_at_its_deadline(tmp_path: Path, wheels: Path) -> None:
    store = ModelStore(tmp_path / "store", fetch_timeout_s=0.05)
    with pytest.raises(SourceUnavailable, match="still running"):
        store.pull("pypi:tinymodel==1.0")
    assert leftovers(store) == []


# ------------------------------------------------------------ names, damage, removal


def test_unknown_models_say_what_to_do(store: ModelStore) -> None:
    with pytest.raises(UnknownModel) as caught:
        store.get("minilm-l6")
    assert "llmos models pull minilm-l6" in caught.value.remedy
    for name in ("no-such-model", "../etc", ".hidden", "", "a/b"):
        with pytest.raises(UnknownModel):
            store.pull(name)
        with pytest.raises(UnknownModel):
            store.get(name)
        assert store.remove(name) is False
    assert not store.root.exists()


def test_a_name_belongs_to_one_source(store: ModelStore, folder: Path, tmp_path: Path) -> None:
    store.pull(f"path:{folder}", name="mine")
    other = tiny.encoder(tmp_path / "other", seed=1)
    with pytest.raises(ModelConflict) as caught:
        store.pull(f"path:{other}", name="mine")
    assert caught.value.stored_source == f"path:{folder}"
    assert store.pull("mine").source == f"path:{folder}"


def test_damage_is_found_and_mended(store: ModelStore, folder: Path) -> None:
    model = store.pull(f"path:{folder}")
    weights = model.path / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-4] + b"\1\2\3\4")
    assert store.get("tiny") == model  # same size: only reading it shows
    with pytest.raises(ModelDamaged) as caught:
        store.verify("tiny")
    assert isinstance(caught.value, DigestMismatch)
    assert caught.value.file == "model.safetensors"

    weights.write_bytes(whole)
    (model.path / "evil.py").write_text("")
    with pytest.raises(ModelDamaged, match=r"evil\.py"):
        store.verify("tiny")
    (model.path / "evil.py").unlink()
    store.verify("tiny")

    weights.write_bytes(whole[:-1])
    with pytest.raises(ModelDamaged):
        store.get("tiny")
    assert store.list() == []
    assert store.names() == ("tiny",)
    assert store.pull(f"path:{folder}") == model  # a damaged model is pulled again
    store.verify("tiny")

    content = json.loads((model.path / MANIFEST).read_text())
    content["files"]["model.safetensors"]["sha256"] = "0" * 64
    (model.path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ModelDamaged, match=MANIFEST):
        store.get("tiny")


def test_errors_survive_pickling(store: ModelStore) -> None:
    for error in (
        ModelDamaged("m", "f", "a", "b"),
        ModelBusy("m", "process 1", 2.0),
        ModelConflict("m", "a", "b"),
        ModelUnusable("m", "f", "why", remedy="do"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert str(copy) == str(error)
        assert copy.facts == error.facts


def test_removal(store: ModelStore, folder: Path) -> None:
    store.pull(f"path:{folder}")
    assert store.remove("tiny") is True
    assert store.remove("tiny") is False
    assert store.list() == []
    assert leftovers(store) == []


def test_a_store_that_cannot_be_written(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelUnusable, match="cannot be written") as caught:
        ModelStore(tmp_path / "file").pull(f"path:{folder}")
    assert "LLMOS_MODELS" in caught.value.remedy


# ------------------------------------------------------------ processes


def test_a_second_puller_waits_and_finds_the_model(store: ModelStore, folder: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()
    results, stages = [], []

    def slow(stage: str, done: int, total: int) -> None:
        inside.set()
        assert go_on.wait(20)

    def pull(progress) -> None:  # type: ignore[no-untyped-def]
        results.append(store.pull(f"path:{folder}", progress=progress))

    first = threading.Thread(target=pull, args=(slow,))
    first.start()
    assert inside.wait(20)
    busy = ModelStore(store.root, lock_timeout_s=0.1)
    with pytest.raises(ModelBusy) as caught:
        busy.pull(f"path:{folder}")
    assert f"process {os.getpid()} " in caught.value.holder
    assert store.list() == []  # nothing half-written to be seen
    second = threading.Thread(target=pull, args=(lambda s, d, t: stages.append(s),))
    second.start()
    go_on.set()
    first.join(20)
    second.join(20)
    assert len(results) == 2
    assert results[0] == results[1]
    assert set(stages) <= {"waiting"}


def test_what_a_killed_puller_left_is_cleaned_up(store: ModelStore, folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from llmos.drivers.models.store import ModelStore\n"
        "def stop(*a): print('in', flush=True); time.sleep(60)\n"
        "ModelStore(Path(sys.argv[1])).pull(sys.argv[2], progress=stop)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root), f"path:{folder}"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    busy = ModelStore(store.root, lock_timeout_s=0.1)
    with pytest.raises(ModelBusy, match=f"process {process.pid} "):
        busy.pull(f"path:{folder}")
    process.kill()
    process.wait()
    process.stdout.close()
    assert store.list() == []
    assert [p.name for p in leftovers(store)] == ["tiny"]
    # A pull of any model sweeps up; the lock of a dead process is free.
    store.pull(f"path:{folder}", name="another")
    assert leftovers(store) == []
    store.pull(f"path:{folder}")
    store.verify("tiny")


def test_a_failed_pull_of_a_damaged_model_keeps_what_was_there(
    store: ModelStore, folder: Path
) -> None:
    model = store.pull(f"path:{folder}")
    (model.path / "vocab.txt").unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelUnusable):
        store.pull(f"path:{folder}")
    assert (model.path / "model.safetensors").exists()


def test_the_store_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import llmos.drivers.models.store, llmos.drivers.models.footprint\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'gguf')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
