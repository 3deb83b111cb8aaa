"""Which linear layers are kept in int8 or int4, and how many bytes that takes.

One rule for two readers: the prediction, which sees names and shapes in files and never
loads torch, and the engines, which replace the layers of a loaded model.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Weights: TypeAlias = Literal["plain", "int8", "int4"]

GROUP = 32
"""Weights of a row that share one scale and one zero in int4. The smallest the kernels take:
the scales cost an eighth of a byte per weight, and models of this size suffer in larger ones."""
LEAST_OUT = 16
"""A layer with fewer outputs (a classification head) stays as it is: it costs nothing."""
_SCALE_BYTES = 4
_INT4_SCALE_BYTES = 2 * 2
"""Scale and zero of a group, in bfloat16."""
_NO_LINEAR = ("embed", "wte", "wpe", "shared.", "relative_attention_bias", ".experts.")
"""In names of two-dimensional tensors that are not weights of a linear layer."""
_CONV1D = frozenset({"gpt2", "openai-gpt", "ctrl", "gpt_bigcode"})
"""Their layers are not ``nn.Linear`` and stay as they are."""


def layer_form(weights: Weights, out_features: int, in_features: int, output: bool) -> Weights:
    """How a layer is kept in a model that asks for ``weights``.

    The output layer of a language model stays in int8 where the others are in int4: its
    errors go straight into the choice of the token.
    """
    if weights == "plain" or out_features < LEAST_OUT:
        return "plain"
    if weights == "int8" or output:
        return "int8"
    # What the int4 kernels cannot cut into groups and blocks is kept a byte each.
    return "int4" if in_features % GROUP == 0 and out_features % 16 == 0 else "int8"


def layer_bytes(form: Weights, out_features: int, in_features: int, plain_size: int) -> int:
    """Bytes of a layer's weight in that form; ``plain_size`` is that of a plain number."""
    count = out_features * in_features
    if form == "int8":
        return count + out_features * _SCALE_BYTES
    if form == "int4":
        return count // 2 + count // GROUP * _INT4_SCALE_BYTES
    return count * plain_size


def is_linear(name: str, shape: tuple[int, ...], model_type: str) -> bool:
    """Whether a tensor of a file is the weight of a linear layer that may be narrowed."""
    return (
        len(shape) == 2
        and name.endswith(".weight")
        and model_type not in _CONV1D
        and not any(part in name for part in _NO_LINEAR)
    )
