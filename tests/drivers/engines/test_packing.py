"""Packed linear layers against the plain ones they replace."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from llmos.drivers.engines.packing import PackedLinear, can_pack, pack_linears  # noqa: E402

needs_kernels = pytest.mark.skipif(not can_pack(), reason="no oneDNN bfloat16 on this processor")


class Special(nn.Linear):
    """A subclass that may mean something else."""


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 32, 200])
def test_the_same_product(bias, rows):
    torch.manual_seed(rows)
    linear = nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        exact = nn.functional.linear(
            x.double(), linear.weight.double(), linear.bias.double() if bias else None
        )
        packed = PackedLinear(linear)(x)
    assert packed.dtype == torch.bfloat16
    torch.testing.assert_close(packed.double(), exact, rtol=1e-2, atol=1e-2)


@needs_kernels
def test_no_rows_give_no_rows():
    with torch.inference_mode():
        packed = PackedLinear(nn.Linear(8, 5, dtype=torch.bfloat16))
        assert packed(torch.empty(1, 0, 8, dtype=torch.bfloat16)).shape == (1, 0, 5)


@needs_kernels
def test_only_plain_bfloat16_layers_are_replaced():
    model = nn.ModuleDict(
        {
            "low": nn.Linear(8, 8, dtype=torch.bfloat16),
            "full": nn.Linear(8, 8),
            "special": Special(8, 8, dtype=torch.bfloat16),
            "deep": nn.Sequential(nn.ReLU(), nn.Linear(8, 4, dtype=torch.bfloat16)),
        }
    ).requires_grad_(False)
    assert pack_linears(model) == 2
    assert type(model["low"]) is PackedLinear
    assert type(model["full"]) is nn.Linear
    assert type(model["special"]) is Special
    assert type(model["deep"][1]) is PackedLinear
    assert pack_linears(model) == 0


@needs_kernels
def test_a_tied_weight_stays_with_the_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(16, 8), "head": nn.Linear(8, 16, bias=False)}).to(
        torch.bfloat16
    )
    model["head"].weight = model["embed"].weight
    pack_linears(model)
    assert model["embed"].weight.shape == (16, 8)
    with torch.inference_mode():
        x = model["embed"](torch.tensor([[3]]))
        expected = x.double() @ model["embed"].weight.double().T
        torch.testing.assert_close(model["head"](x).double(), expected, rtol=1e-2, atol=1e-2)
