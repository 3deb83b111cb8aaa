"""How many bytes an engine's tensors take, told by the tensors themselves.

The growth of the process was measured before, and counted whatever else happened in it
meanwhile: twice the size of a small model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from llmos.drivers.engines.packing import PackedLinear


def weights_bytes(model: nn.Module) -> int:
    """Parameters, buffers and packed weights of a model."""
    return held_bytes(_tensors(model))


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind tensors; what several of them share counts once."""
    found: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        for part in _parts(tensor):
            if part.is_mkldnn:
                # oneDNN shows neither pointer nor size. It may fill up to whole blocks of 16 to
                # 64 rows or columns, which is nothing where a layer is large.
                found["mkldnn", id(part)] = part.numel() * part.element_size()
            else:
                storage = part.untyped_storage()
                found[str(part.device), storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield from module.tensors


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor that is made of others (torchao's are) has no memory of its own."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor
