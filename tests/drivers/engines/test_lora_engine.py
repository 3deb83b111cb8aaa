"""Adapters in the real engine: who asks with an adapter is answered by it, and by no other."""

import random
import threading

import pytest

from llmos.drivers.engines import causal
from llmos.drivers.engines.causal import TransformersCausalEngine
from llmos.drivers.errors import (
    AdaptersFull,
    AdapterUnusable,
    EngineFailed,
    PromptTooLong,
    UnknownAdapter,
)
from llmos.drivers.protocols import EngineOptions, GenerationJob, SamplingParams
from tests.drivers.engines.causal_suite import Listener
from tests.drivers.engines.lora_files import Peft, make_adapter, make_adapters, tiny_llama

MANY = 64
NEW = 12


@pytest.fixture(scope="module", autouse=True)
def no_calibration():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "CALIBRATION_S", 0.0)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def paths(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for part, rank in enumerate((8, 4, 2, 8)):
        make_adapters(base, {n: folder / f"a{n}" for n in range(part, MANY, 4)}, r=rank)
    return {f"a{n}": folder / f"a{n}" for n in range(MANY)}


@pytest.fixture(scope="module")
def peft(base, paths):
    return Peft(base, paths)


@pytest.fixture(scope="module")
def answers(peft):
    """What peft answers, remembered."""
    known: dict[tuple[str, str], str] = {}

    def answer(prompt, adapter):
        if (prompt, adapter) not in known:
            known[prompt, adapter] = peft.answer(prompt, adapter, NEW)
        return known[prompt, adapter]

    return answer


@pytest.fixture
def make_engine(base):
    made = []

    def make(**options):
        settings = {"dtype": "float32", "threads": 1, "kv_tokens": 8192, "max_batch_tokens": 128}
        settings |= {"max_adapters": 4, "max_adapter_rank": 8}
        engine = TransformersCausalEngine(EngineOptions("tiny", base, **(settings | options)))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine._shelf.validate()
        engine.close()


_serial = iter(range(10**9))


def job(prompt, adapter="", **params):
    settings = {"max_new_tokens": NEW, "ignore_eos": True} | params
    return GenerationJob(
        f"job-{next(_serial)}", prompt, SamplingParams(**settings), adapter=adapter
    )


def start(engine, prompt, adapter="", **params):
    listener = Listener()
    engine.submit(job(prompt, adapter, **params), listener)
    return listener


def text_of(listener):
    last = listener.wait()
    assert last.error is None, last.error
    assert last.new_tokens == NEW
    return listener.text


class Gate:
    """A listener that holds the engine's thread at its first chunk."""

    def __init__(self, engine, prompt, adapter=""):
        self.inside, self.open = threading.Event(), threading.Event()
        self.listener = Listener()

        def deliver(chunk):
            self.listener(chunk)
            self.inside.set()
            assert self.open.wait(60)

        engine.submit(job(prompt, adapter), deliver)
        assert self.inside.wait(60)


def test_64_adapters_and_none_in_one_batch_answer_as_peft_does_with_each_alone(
    make_engine, paths, answers
):
    engine = make_engine(max_adapters=MANY)
    sizes = {name: engine.load_adapter(name, path) for name, path in paths.items()}
    # Rank 8 of q, k, v and o of two layers, 4 bytes: in 64; out 64, 32, 32, 64.
    assert sizes["a0"] == sizes["a3"] == 2 * 8 * 4 * (4 * 64 + 192)
    assert sizes["a2"] * 4 == sizes["a0"]
    assert engine.statistics().adapters == tuple(sorted(paths))
    prompts = ["The sea", "Once upon a time there was " * 3, "1, 2, 3,", "x"]
    asked = [(prompts[n % 4], name) for n, name in enumerate(["", *paths, "", "a7", "a7"])]
    listeners = [start(engine, prompt, name) for prompt, name in asked]
    wrong = [
        (prompt, name)
        for (prompt, name), listener in zip(asked, listeners, strict=True)
        if text_of(listener) != answers(prompt, name)
    ]
    assert not wrong
    # The adapters matter: no two of the first prompt's answers are alike.
    assert len({answers(prompts[1], f"a{n}") for n in range(0, MANY, 4)}) == MANY // 4
    digests = {listener.chunks[-1].adapter_digest for listener in listeners}
    assert len(digests) == MANY + 1
    assert listeners[0].chunks[-1].adapter_digest == ""


def test_equal_prompts_share_nothing_across_adapters(make_engine, paths, answers):
    engine = make_engine()
    prompt = "A prompt of several blocks. " * 5
    for name in ("a0", "a1"):
        engine.load_adapter(name, paths[name])
    for name in ("a0", "", "a1", "a0", ""):
        assert text_of(start(engine, prompt, name)) == answers(prompt, name)
    engine.unload_adapter("a0")
    engine.load_adapter("a0", paths["a2"])
    # Another version of the same name: what the first one read is of no use to it.
    again = start(engine, prompt, "a0")
    assert text_of(again) == answers(prompt, "a2")
    assert again.chunks[-1].cached_tokens == 0


def test_an_unknown_adapter_is_refused_before_anything(make_engine, paths):
    engine = make_engine()
    engine.load_adapter("a1", paths["a1"])
    with pytest.raises(UnknownAdapter) as refused:
        start(engine, "Hi", "a2")
    assert (refused.value.adapter, refused.value.known) == ("a2", ("a1",))
    with pytest.raises(UnknownAdapter):
        engine.unload_adapter("a2")
    assert engine.statistics().waiting == 0


def test_a_refused_job_holds_no_adapter(make_engine, paths):
    engine = make_engine(max_adapters=1)
    engine.load_adapter("a1", paths["a1"])
    with pytest.raises(PromptTooLong):
        start(engine, "x" * 2000, "a1")
    engine.unload_adapter("a1")
    engine.load_adapter("a2", paths["a2"])


def test_unloading_refuses_new_jobs_and_lets_the_old_end(make_engine, paths, answers):
    engine = make_engine(max_adapters=1)
    engine.load_adapter("a1", paths["a1"])
    gate = Gate(engine, "The sea", "a1")
    engine.unload_adapter("a1")
    with pytest.raises(UnknownAdapter):
        start(engine, "The sea", "a1")
    assert engine.statistics().adapters == ()
    # Its place is not free while a job is answered by it.
    refusals = []
    loading = threading.Thread(target=lambda: refusals.append(refused(engine, "a2", paths["a2"])))
    loading.start()
    gate.open.set()
    loading.join(60)
    assert text_of(gate.listener) == answers("The sea", "a1")
    if isinstance(refusals[0], AdaptersFull):
        # It was asked for before the job had ended.
        engine.load_adapter("a2", paths["a2"])
    assert text_of(start(engine, "The sea", "a2")) == answers("The sea", "a2")


def refused(engine, name, path):
    try:
        engine.load_adapter(name, path)
    except AdaptersFull as error:
        return error
    return None


def test_a_new_version_is_for_later_jobs(make_engine, paths, answers):
    engine = make_engine(max_adapters=2)
    engine.load_adapter("tone", paths["a1"])
    gate = Gate(engine, "The sea", "tone")
    loading = threading.Thread(target=engine.load_adapter, args=("tone", paths["a2"]))
    loading.start()
    gate.open.set()
    loading.join(60)
    later = start(engine, "The sea", "tone")
    assert text_of(gate.listener) == answers("The sea", "a1")
    assert text_of(later) == answers("The sea", "a2")
    assert later.chunks[-1].adapter_digest != gate.listener.chunks[-1].adapter_digest
    assert engine.statistics().adapters == ("tone",)


def test_a_new_version_takes_the_place_of_one_that_nobody_uses(make_engine, paths, answers):
    engine = make_engine(max_adapters=1)
    for name in ("a1", "a2", "a3"):
        engine.load_adapter("tone", paths[name])
        assert text_of(start(engine, "The sea", "tone")) == answers("The sea", name)


def test_more_than_there_is_room_for(make_engine, base, paths, tmp_path):
    engine = make_engine(max_adapters=2)
    engine.load_adapter("a0", paths["a0"])
    engine.load_adapter("a1", paths["a1"])
    with pytest.raises(AdaptersFull) as full:
        engine.load_adapter("a2", paths["a2"])
    assert full.value.limit == 2
    assert engine.statistics().adapters == ("a0", "a1")
    wide = make_adapter(base, tmp_path / "wide", 1, r=16)
    with pytest.raises(AdapterUnusable, match="rank"):
        engine.load_adapter("wide", wide)
    with pytest.raises(AdaptersFull):
        make_engine(max_adapters=0).load_adapter("a0", paths["a0"])


def test_a_closed_engine_loads_nothing(make_engine, paths):
    engine = make_engine()
    engine.close()
    with pytest.raises(EngineFailed):
        engine.load_adapter("a0", paths["a0"])


def test_a_broken_step_ends_who_waits_to_load(make_engine, paths, monkeypatch):
    engine = make_engine()
    gate = Gate(engine, "The sea")
    failures = []

    def load():
        try:
            engine.load_adapter("a0", paths["a0"])
        except EngineFailed as error:
            failures.append(error)

    def breaks():
        loading.start()
        while not engine._chores:
            threading.Event().wait(0.001)
        raise ValueError("no step")

    loading = threading.Thread(target=load)
    monkeypatch.setattr(engine._stepper, "step", breaks)
    gate.open.set()
    assert isinstance(gate.listener.wait().error, EngineFailed)
    loading.join(60)
    assert len(failures) == 1


@pytest.mark.parametrize("seed", range(3))
def test_coming_and_going_at_random_never_gives_a_wrong_token(make_engine, paths, answers, seed):
    """Names change what they mean all the time; each job is answered by one meaning of its
    name that held while it was submitted."""
    chance = random.Random(seed)
    # Little room, so that jobs wait and give way while adapters come and go.
    engine = make_engine(max_adapters=5, kv_tokens=1024, max_batch_tokens=48)
    names = [f"n{n}" for n in range(4)]
    means: dict[str, str] = {}
    prompts = ["The sea", "Once upon a time ", "x y z " * 9]
    asked = []
    for _ in range(150):
        name = chance.choice(names)
        act = chance.random()
        if act < 0.25:
            path = chance.choice(sorted(paths))
            try:
                engine.load_adapter(name, paths[path])
            except AdaptersFull:
                continue
            means[name] = path
        elif act < 0.35 and name in means:
            engine.unload_adapter(name)
            del means[name]
        elif name in means or act < 0.5:
            name = name if name in means else ""
            prompt = chance.choice(prompts)
            listener = Listener()
            task = job(prompt, name)
            engine.submit(task, listener)
            if chance.random() < 0.15:
                engine.cancel(task.id)
            else:
                asked.append((prompt, means.get(name, ""), listener))
        else:
            with pytest.raises(UnknownAdapter):
                start(engine, "x", name)
        engine._shelf.validate()
    assert len(asked) > 40
    for prompt, meaning, listener in asked:
        assert text_of(listener) == answers(prompt, meaning)


@pytest.mark.models
def test_on_smollm2(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol")
    kinds = ({"r": 8}, {"r": 4, "target_modules": "all-linear"})
    paths = {
        f"s{n}": make_adapter(smollm2, folder / f"s{n}", n, std=0.03, **kind)
        for n, kind in enumerate(kinds)
    }
    reference = Peft(smollm2, paths)
    engine = TransformersCausalEngine(
        EngineOptions(
            "smol",
            smollm2,
            dtype="float32",
            threads=1,
            kv_tokens=2048,
            max_batch_tokens=256,
            max_adapters=3,
            max_adapter_rank=8,
        )
    )
    try:
        for name, path in paths.items():
            engine.load_adapter(name, path)
        asked = [("The sea is", n) for n in ("", *paths)] + [("Once upon a time", "s1")]
        listeners = [start(engine, prompt, name, max_new_tokens=6) for prompt, name in asked]
        assert all(listener.wait().new_tokens == 6 for listener in listeners)
        found = [listener.text for listener in listeners]
        assert found == [reference.answer(prompt, name, 6) for prompt, name in asked]
        assert len(set(found)) == len(found)
    finally:
        engine.close()
