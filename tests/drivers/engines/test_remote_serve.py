"""The remote engine against a real server: ``transformers serve``, in a process of its own.

The conformance suite runs on a tiny random model, since that server answers one request at a
time; SmolLM2 shows that it is the same with a real one.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from llmos.drivers.engines.remote import RemoteEngine
from llmos.drivers.errors import InvalidParams, PromptTooLong, RemoteError
from llmos.drivers.protocols import EngineOptions, RemoteOptions
from tests.drivers.engines.causal_suite import QUESTION, CausalSuite, Listener, ask, job

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
START_S = 180
"""Importing torch takes seconds, and on a busy machine many."""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A running server; which model a request is for is in the request."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        until = time.monotonic() + START_S
        while not _healthy(port):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        # It waits for open connections when asked politely.
        process.kill()
        process.wait(10)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A small random Llama that writes whole words: they are read back as the same tokens, which
    bytes chosen at random are not."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words")
    text = "".join(f" {a}{b}{c}" for a in "bdfglm" for b in "aeiou" for c in "nrstxz")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(c, special=True) for c in ("<|start|>", "<|stop|>")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|stop|>",
        pad_token="<|stop|>",
        chat_template=CHAT,
    ).save_pretrained(folder)
    stop = tokenizer.token_to_id("<|stop|>")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=stop,
        eos_token_id=stop,
        pad_token_id=stop,
        tie_word_embeddings=False,
        # Wide enough for distinct logits: ties would make equal tokens a matter of luck.
        initializer_range=0.25,
    )
    model = LlamaForCausalLM(config)
    whole = tokenizer.encode(text).ids
    assert len(whole) == 180
    with torch.no_grad():
        # All else gets a logit of 0, below the best of the words.
        for token in set(range(config.vocab_size)) - {*whole, stop}:
            model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    return folder


def engine_for(url: str, model: Path, *, tokenizer: bool = True, **options):
    remote = RemoteOptions(url, str(model), server="transformers", context_tokens=1024)
    folder = model if tokenizer else Path()
    return RemoteEngine(EngineOptions("served", folder, remote=remote, **options))


@pytest.fixture(scope="module")
def make_engine(url, words):
    return lambda **options: engine_for(url, words, **options)


@pytest.fixture(scope="module")
def engine(make_engine):
    engine = make_engine()
    yield engine
    engine.close()


class TestRemoteEngine(CausalSuite):
    # A remote model has no KV memory here: three tests of the suite mean something else.

    def test_too_long_for_the_kv_budget(self, engine):
        assert engine.statistics().kv_tokens == 0
        with pytest.raises(PromptTooLong) as caught:
            engine.submit(job("one two three", max_new_tokens=1022), Listener())
        assert (caught.value.limit, caught.value.limit_tokens) == ("context", 1024)

    def test_a_prefix_counts_against_the_context_alone(self, engine):
        got = ask(engine, max_new_tokens=5, ignore_eos=True, prefix="one two three four five six")
        assert got.tokens == 5
        assert got.chunks[-1].prompt_tokens >= engine.count_tokens(QUESTION) + 6
        new = engine.context_tokens - engine.count_tokens(QUESTION)
        with pytest.raises(PromptTooLong):
            engine.submit(job(max_new_tokens=new, prefix="one"), Listener())

    def test_cancel_ends_a_running_job(self, engine):
        before = engine.statistics()
        listener = Listener()
        engine.submit(job(job_id="c", max_new_tokens=400, ignore_eos=True), listener)
        assert listener.first.wait(60)
        assert engine.cancel("c")
        last = listener.wait(30)
        assert last.finish == "cancelled"
        assert last.new_tokens == listener.tokens < 400
        assert not engine.cancel("c")
        assert engine.statistics().cancelled == before.cancelled + 1

    @pytest.mark.parametrize("field", ["seed", "logprobs"])
    def test_what_this_server_would_leave_out_is_refused(self, engine, field):
        with pytest.raises(InvalidParams) as caught:
            engine.submit(job(max_new_tokens=4, **{field: 1}), Listener())
        assert caught.value.field == field

    def test_sampling_is_really_done(self, engine):
        greedy = {ask(engine, max_new_tokens=12).text for _ in range(2)}
        params = {"max_new_tokens": 12, "temperature": 5.0}
        assert len(greedy) == 1
        assert len({ask(engine, **params).text for _ in range(4)}) > 1
        assert {ask(engine, **params, top_k=1).text for _ in range(2)} == greedy

    def test_a_model_that_the_server_does_not_have(self, url):
        engine = engine_for(url, Path("/nowhere/at/all"), tokenizer=False)
        try:
            last = ask(engine, max_new_tokens=4).chunks[-1]
            assert isinstance(last.error, RemoteError)
        finally:
            engine.close()

    def test_without_the_tokenizer_counts_are_the_servers_and_a_prefix_is_refused(
        self, url, words, engine
    ):
        bare = engine_for(url, words, tokenizer=False)
        try:
            got, exact = (ask(e, max_new_tokens=6) for e in (bare, engine))
            assert got.text == exact.text
            assert got.chunks[-1].prompt_tokens == exact.chunks[-1].prompt_tokens
            with pytest.raises(InvalidParams) as caught:
                bare.submit(job(prefix="ban", max_new_tokens=4), Listener())
            assert caught.value.field == "prefix"
        finally:
            bare.close()


@pytest.fixture(scope="module")
def smol(url, smollm2):
    engine = engine_for(url, smollm2)
    yield engine
    engine.close()


@pytest.mark.models
class TestRealModel:
    def test_it_answers_and_goes_on_after_a_break(self, smol):
        whole = ask(smol, max_new_tokens=12)
        assert "rainbow" in whole.text
        assert whole.chunks[-1].prompt_tokens == smol.count_tokens(QUESTION)
        assert whole.tokens == 12
        for cut in (1, 6):
            text = "".join(c.text for c in whole.chunks[:cut])
            told = sum(c.tokens for c in whole.chunks[:cut])
            rest = ask(smol, max_new_tokens=12 - told, prefix=text)
            assert text + rest.text == whole.text

    def test_the_server_stops_writing_when_a_job_is_cancelled(self, smol):
        began = time.monotonic()
        ask(smol, max_new_tokens=8, ignore_eos=True)
        eight_s = time.monotonic() - began
        listener = Listener()
        # The server answers one at a time: the next would wait for all 800.
        smol.submit(job(job_id="c", max_new_tokens=800, ignore_eos=True), listener)
        assert listener.first.wait(60)
        assert smol.cancel("c")
        assert listener.wait(30).finish == "cancelled"
        began = time.monotonic()
        ask(smol, max_new_tokens=2)
        assert time.monotonic() - began < 30 * eight_s
