"""Linear layers in int8 or int4: half and a quarter of the memory of bfloat16.

On the CPU two kernels of PyTorch are called directly. torchao's tensors were measured on
the same layers: they spend 0.1 to 0.4 ms on each call outside of the kernel, which is more
than a layer of a small model takes. On CUDA torchao has the kernels, and is used.

- int8: weights have a scale per row, inputs a scale per token that is found as they come.
  Products of integers are exact, so that a token's result does not depend on what else is
  in its batch. A scale for the whole batch (torch's own dynamic quantization) was rejected
  for that, and because one large input would coarsen everybody's. SmolLM2 decodes 1.2
  times as fast as in bfloat16, alone and in a batch of 32.
- int4: weights alone, in groups of 32; inputs stay in bfloat16. Alone 1.9 times as fast as
  bfloat16, but half as fast in a batch of 32: the kernel is made for few rows.

How much the answers suffer is measured by ``benchmarks/perplexity.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from llmos.drivers.errors import WeightsUnsupported
from llmos.drivers.models.narrow import GROUP, Weights, layer_form

_ROWS = 256
"""Rows of one int8 product: at a thousand oneDNN took ten times as long for some shapes."""
_TINIEST = 1e-12
"""Largest input of a token, at least: one of zeros alone has no scale."""


class Int8Linear(nn.Module):
    """What ``linear`` computes, in products of int8. For inference on the CPU only."""

    _bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_(min=_TINIEST).div_(127)
        self._scale = nn.Buffer(scale, persistent=False)
        narrow = (weight / scale.unsqueeze(1)).round_().to(torch.int8)
        self._weight = nn.Buffer(narrow, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("_bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input (…, in_features), output (…, out_features) in the input's number format."""
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] <= _ROWS:
            return self._rows(rows).view(*x.shape[:-1], self.out_features)
        out = x.new_empty(rows.shape[0], self.out_features)
        for start in range(0, rows.shape[0], _ROWS):
            out[start : start + _ROWS] = self._rows(rows[start : start + _ROWS])
        return out.view(*x.shape[:-1], self.out_features)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        scale = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=_TINIEST).div_(127)
        narrow = (x / scale).round_().to(torch.int8)
        product = torch.mul(torch._int_mm(narrow, self._weight.t()), self._scale)
        if self._bias is None:
            return product.mul_(scale).to(x.dtype)
        return torch.addcmul(self._bias, product, scale).to(x.dtype)


class Int4Linear(nn.Module):
    """What ``linear`` computes, from weights in int4. For inference on the CPU only."""

    _bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        narrow, scale, zero = _int4(linear.weight.detach().float())
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(narrow, 1)
        self._packed = nn.Buffer(packed, persistent=False)
        # As the kernel reads them: (groups, out_features, 2).
        scales = torch.stack((scale, zero), dim=2).transpose(0, 1).contiguous()
        self._scales = nn.Buffer(scales.to(torch.bfloat16), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("_bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input (…, in_features), output (…, out_features) in the input's number format."""
        rows = x.reshape(-1, self.in_features)
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], self.out_features)
        # In float32 the kernel is a plain loop, 30 times slower; beside the error of the
        # weights that of the inputs in bfloat16 is nothing.
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.to(torch.bfloat16), self._packed, GROUP, self._scales
        ).to(x.dtype)
        if self._bias is not None:
            out = out + self._bias
        return out.view(*x.shape[:-1], self.out_features)


_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a group's range that are tried; cutting its ends off may round the rest better."""


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers 0 to 15 (out, in) as int32, and scales and zeros (out, groups): a weight is
    ``(number - 8) * scale + zero``. The range with the least squared error is taken."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    middle = (low + high) / 2
    best = torch.full_like(middle, torch.inf)
    numbers, scale = torch.zeros_like(groups), torch.ones_like(middle)
    zero = middle
    for part in _SHRINK:
        # Rounded as the kernel will have them, so that the error is the one it will make.
        tried = ((high - low) * (part / 15)).clamp_(min=_TINIEST).bfloat16().float()
        offset = (middle + tried / 2).bfloat16().float()
        found = ((groups - offset) / tried).round_().add_(8).clamp_(0, 15)
        error = ((found - 8) * tried + offset - groups).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        numbers = torch.where(better, found, numbers)
        scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    return numbers.view_as(weight).to(torch.int32), scale.squeeze(2), zero.squeeze(2)


def quantize(model: nn.Module, weights: Weights, name: str) -> int:
    """Keep the model's linear layers in int8 or int4, one by one so that memory peaks by one.

    Subclasses of ``nn.Linear`` and layers with hooks are left alone, since they may compute
    something else, and so are those that :func:`~llmos.drivers.models.narrow.layer_form`
    leaves out. An output layer tied to the input embedding gets a narrow copy of its own.

    Args:
        model: on its device already.
        weights: what is asked for; ``plain`` does nothing.
        name: the system's name of the model, for errors.

    Returns:
        How many layers were replaced.

    Raises:
        WeightsUnsupported: this device has no kernel for it, or the model no such layer.
    """
    if weights == "plain":
        return 0
    device = next(model.parameters()).device
    make = _cpu(weights, name) if device.type == "cpu" else _cuda(weights, name, device)
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    vocabulary = int(getattr(text, "vocab_size", 0) or 0)
    replaced = 0
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child._forward_hooks:
                continue
            output = child.out_features == vocabulary
            form = layer_form(weights, child.out_features, child.in_features, output)
            if form != "plain":
                setattr(parent, child_name, make(child, form))
                replaced += 1
    if not replaced:
        raise WeightsUnsupported(name, weights, "it has no linear layers that could be narrowed")
    return replaced


def _cpu(weights: Weights, name: str) -> Callable[[nn.Linear, Weights], nn.Module]:
    if not int8_is_exact():
        raise WeightsUnsupported(name, weights, "this processor has no exact products of int8")
    if weights == "int4" and not has_int4():
        raise WeightsUnsupported(name, weights, "this PyTorch has no int4 kernel for the CPU")

    def make(linear: nn.Linear, form: Weights) -> nn.Module:
        return Int8Linear(linear) if form == "int8" else Int4Linear(linear)

    return make


def int8_is_exact() -> bool:
    """Whether int8 products add up without loss: without the instructions for them (VNNI),
    some processors add pairs in 16 bits, and saturate."""
    wide = torch.full((4, 64), 127, dtype=torch.int8)
    try:
        product = torch._int_mm(wide, wide.t())
    except RuntimeError:
        return False
    return bool((product == 127 * 127 * 64).all())


def has_int4() -> bool:
    """Whether PyTorch has the kernel that multiplies bfloat16 with packed int4 on the CPU."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return False
    numbers = torch.full((16, GROUP), 9, dtype=torch.int32)
    scales = torch.tensor([1.0, 0.0]).repeat(1, 16, 1).bfloat16()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        ones = torch.ones(1, GROUP, dtype=torch.bfloat16)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(ones, packed, GROUP, scales)
    except RuntimeError:
        return False
    return bool((product == GROUP).all())


def _cuda(
    weights: Weights, name: str, device: torch.device
) -> Callable[[nn.Linear, Weights], nn.Module]:
    try:
        from torchao.quantization import (
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
        from torchao.quantization.quantize_.workflows import Int4PackingFormat
    except ImportError as error:
        raise WeightsUnsupported(
            name, weights, f"{error.name or error} is missing; install llmos[quantized]"
        ) from error
    if device.type != "cuda":
        raise WeightsUnsupported(name, weights, f"no kernel is known for {device.type}")
    if weights == "int4" and torch.cuda.get_device_capability(device) < (8, 0):
        raise WeightsUnsupported(name, weights, "int4 needs compute capability 8.0")
    configs = {
        "int8": Int8WeightOnlyConfig(version=2),
        # The packing whose kernel is PyTorch's own.
        "int4": Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D
        ),
    }

    def make(linear: nn.Linear, form: Weights) -> nn.Module:
        if form == "int4" and linear.weight.dtype != torch.bfloat16:
            raise WeightsUnsupported(name, weights, "int4 on CUDA computes in bfloat16 only")
        # In a holder: torchao replaces the weight of what is inside. A tied embedding keeps
        # its own, since the parameter is replaced and not changed.
        holder = nn.Sequential(linear)
        quantize_(holder, configs[form], device=device)
        return holder[0]

    return make
