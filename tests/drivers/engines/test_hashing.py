import subprocess
import sys
from pathlib import Path

import pytest

from llmos.drivers.engines.hashing import HashEncoder
from llmos.drivers.protocols import EngineOptions
from tests.drivers.engines.encoder_suite import EncoderSuite


@pytest.fixture(scope="module")
def engine():
    return HashEncoder(EngineOptions("hash", Path()))


@pytest.fixture
def make_engine():
    return lambda: HashEncoder(EngineOptions("hash", Path()))


class TestHashEncoder(EncoderSuite):
    def test_the_same_in_every_process(self, engine):
        code = (
            "from pathlib import Path; from llmos.drivers.engines.hashing import HashEncoder;"
            "from llmos.drivers.protocols import EngineOptions;"
            "print(HashEncoder(EngineOptions('h', Path())).embed(['refund']).tobytes().hex())"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert other.stdout.decode().strip() == engine.embed(["refund"]).tobytes().hex()

    def test_word_forms_are_near(self, engine):
        singular, plural, other = engine.embed(["refund", "refunds", "giraffe"])
        assert singular @ plural > 0.4 > singular @ other
