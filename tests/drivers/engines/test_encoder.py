import numpy as np
import pytest

from llmos.drivers.protocols import EngineOptions
from tests.drivers.engines.encoder_suite import TEXTS, EncoderSuite

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def make_engine(minilm):
    from llmos.drivers.engines.encoder import TransformersEncoderEngine

    return lambda **o: TransformersEncoderEngine(
        EngineOptions("minilm", minilm, **{"threads": 1, "max_batch_texts": 16, **o})
    )


@pytest.fixture(scope="module")
def engine(make_engine):
    engine = make_engine()
    yield engine
    engine.close()


class TestTransformersEncoderEngine(EncoderSuite):
    def test_it_is_what_the_folder_says(self, engine):
        assert engine.dimension == 384
        assert engine.max_tokens == 256

    def test_it_is_the_mean_over_the_texts_own_tokens(self, engine, minilm):
        import torch
        from transformers import AutoModel, AutoTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
        rows = engine.embed(TEXTS)
        for text, row in zip(TEXTS, rows, strict=True):
            with torch.inference_mode():
                hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            mean = hidden.mean(dim=0).numpy()
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
