"""What every encoder must do. Subclass and provide ``engine`` and ``make_engine``."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llmos.drivers.errors import EngineFailed, NoHead

TEXTS = [
    "The invoice is wrong, I want a refund.",
    "Please give me my money back for the wrong invoice.",
    "The patient has a fever and a cough.",
]


class EncoderSuite:
    def test_rows_have_length_one_and_keep_the_order(self, engine):
        rows = engine.embed(TEXTS)
        assert rows.shape == (3, engine.dimension)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        for text, row in zip(TEXTS, rows, strict=True):
            np.testing.assert_allclose(engine.embed([text])[0], row, atol=1e-5)

    def test_like_texts_are_near(self, engine):
        a, b, c = engine.embed(TEXTS)
        assert a @ b > a @ c + 0.1

    def test_no_texts(self, engine):
        assert engine.embed([]).shape == (0, engine.dimension)

    @pytest.mark.parametrize("text", ["", " ", "\n", "🌈", "a\ud800b", "\x00", "日本語"])
    def test_odd_texts_have_a_direction(self, engine, text):
        row = engine.embed([text])[0]
        assert np.isfinite(row).all()
        assert abs(float(np.linalg.norm(row)) - 1) < 1e-5

    def test_long_texts_are_cut(self, engine):
        words = [f"word{i}" for i in range(engine.max_tokens)]
        kept = " ".join(words)
        cut = engine.embed([kept, kept + " and something else entirely" * 5])
        np.testing.assert_allclose(cut[0], cut[1], atol=1e-4)

    def test_mixed_lengths_in_one_call(self, engine):
        texts = [" ".join(["token"] * n) for n in (1, 90, 3, 40, 0, 7)] * 13
        rows = engine.embed(texts)
        for i in (0, 1, 4, 77):
            np.testing.assert_allclose(rows[i], engine.embed([texts[i]])[0], atol=1e-4)

    def test_threads_may_share_it(self, engine):
        expected = engine.embed(TEXTS)
        with ThreadPoolExecutor(4) as pool:
            for rows in pool.map(lambda _: engine.embed(TEXTS), range(8)):
                np.testing.assert_allclose(rows, expected, atol=1e-5)

    def test_statistics_count_texts(self, engine):
        before = engine.statistics()
        engine.embed(TEXTS)
        after = engine.statistics()
        assert after.finished == before.finished + 3
        assert after.prompt_tokens > before.prompt_tokens + 10

    def test_what_it_keeps_is_told_and_stays_the_same(self, engine):
        before = engine.memory_bytes()
        assert set(before) <= {"weights"}
        engine.embed(TEXTS)
        assert engine.memory_bytes() == before

    def test_without_a_head_nothing_is_classified(self, engine):
        assert engine.labels == ()
        with pytest.raises(NoHead):
            engine.classify(TEXTS)

    def test_closed_is_closed(self, make_engine):
        engine = make_engine()
        engine.close()
        engine.close()
        assert engine.memory_bytes() == {}
        with pytest.raises(EngineFailed):
            engine.embed(["x"])
