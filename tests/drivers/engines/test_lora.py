"""The stacked weights against peft with one adapter at a time. No engine: plain forwards."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmos.drivers.engines.adapter_files import read_adapter
from llmos.drivers.engines.lora import AdapterBank, ResidentAdapter
from llmos.drivers.engines.packing import can_pack, pack_linears
from llmos.drivers.models.footprint import predict_footprint
from tests.drivers.engines.lora_files import Peft, make_adapter, tiny_llama

KINDS = [
    {},
    {"r": 4, "use_rslora": True, "target_modules": "all-linear"},
    {"r": 16, "target_modules": ["down_proj", "v_proj"]},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 40}},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"r": 1, "exclude_modules": ["o_proj"]},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def paths(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        f"a{n}": make_adapter(base, folder / f"a{n}", n, **kind) for n, kind in enumerate(KINDS)
    }


@pytest.fixture(scope="module")
def peft(base, paths):
    return Peft(base, paths)


class Stacked:
    """Our model with a bank, filled by hand."""

    def __init__(self, base, paths, *, places=8, max_rank=16, dtype=torch.float32, pack=False):
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        self.model.requires_grad_(False)
        self.bank = AdapterBank(self.model, places, max_rank)
        if pack:
            assert pack_linears(self.model)
        self.paths = paths
        self.here: dict[str, ResidentAdapter] = {}

    def load(self, *names):
        for name in names:
            path = self.paths[name]
            weights = read_adapter("m", name, path, self.bank.layers, self.bank.max_rank)
            self.here[name] = ResidentAdapter(name, 0, weights.digest, 0)
            self.bank.write(self.here[name], weights)
        self.bank.validate()

    def unload(self, name):
        self.bank.free_place(self.here.pop(name))

    def logits(self, sequences):
        """Of [(ids, adapter name)], each by itself in attention and together in the layers."""
        # One row per sequence, cut to one length: attention then needs no mask.
        ids = torch.tensor([ids for ids, _ in sequences])
        self.bank.set_step([(self.here.get(name), len(ids)) for ids, name in sequences])
        with torch.inference_mode():
            out = self.model(ids).logits
        self.bank.clear_step()
        return out


def sequences(names, length, seed=0):
    chance = random.Random(seed)
    return [([chance.randrange(1, 96) for _ in range(length)], name) for name in names]


def agrees(stacked, peft, asked):
    for (ids, name), found in zip(asked, stacked.logits(asked), strict=True):
        torch.testing.assert_close(found, peft.logits(ids, name), atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def stacked(base, paths):
    """With all of them."""
    stacked = Stacked(base, paths)
    stacked.load(*paths)
    return stacked


class TestEqualsPeft:
    @pytest.mark.parametrize("name", [f"a{n}" for n in range(len(KINDS))])
    def test_alone_with_and_without_neighbours_that_have_none(self, stacked, peft, name):
        agrees(stacked, peft, sequences([name], 9))
        agrees(stacked, peft, sequences(["", name, ""], 5))

    @pytest.mark.parametrize("length", [1, 40])
    def test_all_kinds_together(self, stacked, peft, length):
        agrees(stacked, peft, sequences(["a3", "", *stacked.here, "a1", "a1", ""], length))

    def test_one_adapter_with_far_more_tokens_than_the_others(self, stacked, peft):
        agrees(stacked, peft, sequences(["a2"] * 40 + ["a1", "", "a6"], 3))

    def test_without_any_the_model_is_what_it_was(self, stacked, base):
        asked = sequences(["", ""], 6)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = plain(torch.tensor([ids for ids, _ in asked])).logits
        assert torch.equal(stacked.logits(asked), expected)


def test_places_are_reused_moved_and_widened_without_a_trace(base, paths, peft):
    stacked = Stacked(base, paths, places=5)
    chance = random.Random(7)
    for _ in range(40):
        out = [n for n in paths if n not in stacked.here]
        if stacked.here and (len(stacked.here) == 5 or chance.random() < 0.4):
            stacked.unload(chance.choice(sorted(stacked.here)))
        else:
            stacked.load(chance.choice(out))
        stacked.bank.validate()
        some = sorted(stacked.here)
        asked = chance.sample(some, chance.randint(0, len(some)))
        if asked:
            agrees(stacked, peft, sequences([*asked, "", asked[0]], chance.choice([1, 2, 7])))
        stacked.bank.validate()


def test_a_step_passes_over_few_places_that_it_does_not_need(base, paths):
    stacked = Stacked(base, paths, places=8)
    stacked.load(*paths)
    stacked.bank.set_step([(stacked.here["a5"], 1), (stacked.here["a6"], 1)])
    assert {stacked.here["a5"].place, stacked.here["a6"].place} == {0, 1}
    assert stacked.bank.step is not None
    assert stacked.bank.step.front == 2
    stacked.bank.validate()


def test_the_same_step_again_is_not_sorted_again(base, paths):
    stacked = Stacked(base, paths)
    stacked.load("a0", "a1")
    step = [(stacked.here["a0"], 1), (None, 1), (stacked.here["a1"], 1)]
    stacked.bank.set_step(step)
    first = stacked.bank.step
    stacked.bank.clear_step()
    assert stacked.bank.step is None
    stacked.bank.set_step(step)
    assert stacked.bank.step is first


def test_padding_is_bounded_whatever_the_lengths(base, paths):
    stacked = Stacked(base, paths, places=8)
    stacked.load(*paths)
    chance = random.Random(3)
    for _ in range(200):
        names = [chance.choice(["", *paths]) for _ in range(chance.randint(1, 30))]
        tokens = [(stacked.here.get(n), chance.choice([1, 1, 1, 50, 300])) for n in names]
        stacked.bank.set_step(tokens)
        step = stacked.bank.step
        if step is None:
            assert not any(names)
            continue
        total = sum(count for _, count in tokens)
        assert step.tokens == total
        assert step.gather.numel() <= 3 * (total + 8)
        rows = range(total) if step.rows is None else step.rows.tolist()
        assert step.gather[step.back].tolist() == list(rows)


def test_tokens_that_do_not_fit_the_step_are_refused(base, paths):
    stacked = Stacked(base, paths)
    stacked.load("a0")
    stacked.bank.set_step([(stacked.here["a0"], 3)])
    with pytest.raises(RuntimeError, match="got 2 tokens of a step with 3"):
        stacked.model(torch.tensor([[1, 2]]))
    stacked.unload("a0")
    stacked.bank.clear_step()


def test_an_adapter_that_is_gone_is_never_left_out(base, paths):
    stacked = Stacked(base, paths)
    stacked.load("a0")
    gone = stacked.here["a0"]
    stacked.unload("a0")
    with pytest.raises(RuntimeError, match="not resident"):
        stacked.bank.set_step([(gone, 1)])


@pytest.mark.skipif(not can_pack(), reason="this processor has no bfloat16 kernels")
def test_beside_packed_weights(base, paths, peft):
    stacked = Stacked(base, paths, dtype=torch.bfloat16, pack=True)
    stacked.load(*paths)
    asked = sequences([*paths, ""], 6)
    for (ids, name), found in zip(asked, stacked.logits(asked), strict=True):
        expected = peft.logits(ids, name)
        # bfloat16 has 8 bits; another adapter's logits are an order of magnitude further away.
        error = (found.float() - expected).norm() / expected.norm()
        assert error < 0.1, (name, error)
        others = [peft.logits(ids, n) for n in paths if n != name]
        assert min((found.float() - o).norm() / o.norm() for o in others) > 2 * error


def test_the_memory_is_what_was_predicted(base, paths):
    places, rank = 3, 16
    limits = {"kv_tokens": 16, "max_batch_tokens": 16, "max_batch_texts": 1}
    predicted = predict_footprint(
        base, kind="causal", dtype="float32", max_adapters=places, max_adapter_rank=rank, **limits
    )
    plain = predict_footprint(base, kind="causal", dtype="float32", **limits)
    assert plain.adapters_bytes == 0
    assert plain.workspace_bytes < predicted.workspace_bytes
    stacked = Stacked(base, paths, places=places, max_rank=rank)
    stacked.load("a1")  # It changes all layers there are.
    kept = [m for layer in stacked.bank._layers.values() for m in layer._memory or ()]
    assert sum(m.numel() * m.element_size() for m in kept) == predicted.adapters_bytes
