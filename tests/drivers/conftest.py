from pathlib import Path

import pytest


def _model(name: str) -> Path:
    # Imported here, so that the drivers' own tests collect without the kernel.
    from llmos.kernel.settings import Settings

    folder = Path(Settings().models_dir) / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"model {name} is not in the model store ({folder.parent}); add it first")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct."""
    return _model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2."""
    return _model("minilm-l6")
