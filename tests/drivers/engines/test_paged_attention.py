"""Attention over blocks, grouped or one by one, against attention written out plainly."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from llmos.drivers.engines import paged_attention as paged  # noqa: E402

PAGE = 16
KV_HEADS, DIM = 2, 8


def exact(query, keys, values, past):
    """(heads, q, dim) over (kv_heads, keys, dim) in double precision; causal."""
    repeat = query.shape[0] // keys.shape[0]
    k, v = (t.double().repeat_interleave(repeat, 0) for t in (keys, values))
    scores = query.double() @ k.transpose(1, 2) * DIM**-0.5
    unseen = ~torch.ones(scores.shape[1:], dtype=torch.bool).tril(past)
    return scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v


def check(lengths, group, scatter=False):
    """One layer, one step; all rows that belong to nobody hold NaN."""
    torch.manual_seed(len(lengths))
    heads = KV_HEADS * group
    blocks = torch.randperm(400).tolist() if scatter else list(range(400))
    keys, values = torch.full((2, KV_HEADS, 400 * PAGE, DIM), torch.nan)
    tables, whole, write = [], [], []
    for past, new in lengths:
        table = [blocks.pop(0) for _ in range(-(-(past + new) // PAGE) + 1)]
        k, v = torch.randn(2, KV_HEADS, past + new, DIM)
        at = torch.tensor([table[t // PAGE] * PAGE + t % PAGE for t in range(past + new)])
        keys[:, at[:past]], values[:, at[:past]] = k[:, :past], v[:, :past]
        tables.append(table)
        whole.append((k, v))
        write.append(at[past:])
    total = sum(new for _, new in lengths)
    query = torch.randn(1, heads, total, DIM)
    new_k, new_v = (
        torch.cat(
            [kv[i][:, past:] for kv, (past, _) in zip(whole, lengths, strict=True)], 1
        ).unsqueeze(0)
        for i in (0, 1)
    )
    plan = paged.Plan(lengths, tables, PAGE)
    with torch.inference_mode():
        out, weights = paged.paged_attention(
            SimpleNamespace(layer_idx=0),
            query,
            new_k,
            new_v,
            None,
            scaling=DIM**-0.5,
            llmos_plan=plan,
            llmos_layers={0: (keys, values)},
            llmos_rows=torch.cat(write),
        )
    assert weights is None
    assert out.shape == (1, total, heads, DIM)
    start = 0
    for (past, new), (k, v) in zip(lengths, whole, strict=True):
        expected = exact(query[0, :, start : start + new], k, v, past).transpose(0, 1)
        got = out[0, start : start + new].double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        start += new
    return plan


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_every_kind_of_step(group, scatter):
    decode = [(p, 1) for p in (5, 15, 16, 17, 31, 40, 300, 310, 290, 900)]
    plan = check(decode, group, scatter)
    assert sorted(g.count for g in plan.groups) == [4, 4]
    assert sorted(s.key_tokens for s in plan.sequences) == [311, 901]
    # Prompts, pieces of prompts and decoding tokens in one step.
    mixed = [(0, 20), (50, 1), (33, 7), (60, 1), (0, 1), (0, 2), (49, 1), (48, 1)]
    plan = check(mixed, group, scatter)
    assert [g.count for g in plan.groups] == [5]
    assert all(g.queries is not None for g in plan.groups)


def test_equal_lengths_need_no_mask():
    plan = check([(47, 1)] * 4, 3)
    assert [g.mask for g in plan.groups] == [None]
    assert plan.groups[0].queries is None
    assert not plan.sequences


def test_few_sequences_make_no_group():
    assert not check([(9, 1), (10, 1)], 3).groups


def test_groups_are_bounded():
    plan = check([(500, 1)] * 10, 1)
    assert sorted(g.count for g in plan.groups) == [8]
    assert len(plan.sequences) == 2
    assert all(g.count * g.longest <= paged.GROUP_TOKENS for g in plan.groups)
    plan = check([(p, 1) for p in range(0, 400, 25)], 1)
    for g in plan.groups:
        hidden = 0 if g.mask is None else int((g.mask == -torch.inf).sum())
        assert hidden <= paged.PADDING_TOKENS
