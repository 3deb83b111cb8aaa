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

    def test_texts_of_many_lengths_share_a_pass_without_padding(self, engine, minilm):
        import torch
        from transformers import AutoModel, AutoTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
        texts = [" ".join(["refund of an invoice"] * n) for n in (1, 9, 2, 9, 30, 1)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(engine.embed(texts), expected, atol=1e-5)

    @pytest.mark.parametrize(("weights", "least"), [("int8", 0.99), ("int4", 0.95)])
    def test_narrow_weights_keep_the_neighbours(self, engine, make_engine, weights, least):
        narrow = make_engine(weights=weights)
        rows, exact = narrow.embed(TEXTS), engine.embed(TEXTS)
        assert (rows * exact).sum(axis=1).min() > least
        assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.1
        narrow.close()
