"""Linear layers on the CPU with their weights laid out once for the matrix kernels.

In bfloat16, ``torch.nn.Linear`` has oneDNN read a plain weight, which at the few rows
of a decode step costs up to twice the time of a weight in oneDNN's own blocked layout
(measured at 1 to 32 rows; at hundreds of rows both take the same). Transposing the
weights instead was tried: it is no faster. In float32 the plain path is left alone.
"""

from __future__ import annotations

import torch
from torch import nn

_ROWS_HINT = 32
"""Rows that the layout is chosen for; oneDNN chose the same one for 1 and for 128."""


class PackedLinear(nn.Module):
    """What ``linear`` computes, from a packed copy of its weight. For inference only.

    The packed weight is no parameter: it cannot be moved, cast, trained or saved.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What it keeps: the packed weight, and the bias if there is one."""
        return [self._packed] if self._bias is None else [self._packed, self._bias]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input (…, in_features), output (…, out_features)."""
        if not x.numel():
            # A step of prompt pieces alone asks for no logits, and oneDNN for some rows.
            return x.new_empty(*x.shape[:-1], self.out_features)
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return packed


def can_pack() -> bool:
    """Whether this PyTorch and this processor have the kernels."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(model: nn.Module) -> int:
    """Replace the model's bfloat16 CPU linear layers, one by one so that memory peaks by one layer.

    Plain weights are freed, except where something else holds them too: an output layer
    tied to the input embedding keeps both forms, which costs its size once more.
    Subclasses of ``nn.Linear`` are left alone, since they may compute something else.

    Returns:
        How many layers were replaced; 0 where the kernels are missing.
    """
    if not can_pack():
        return 0
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child.weight.device.type != "cpu":
                continue
            if child.weight.dtype != torch.bfloat16 or child._forward_hooks:
                continue
            setattr(parent, name, PackedLinear(child))
            replaced += 1
    return replaced
