"""Which number format a model is loaded in, decided before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from llmos.drivers.protocols import DeviceInfo

Precision = Literal["float32", "bfloat16", "float16"]

_NATIVE = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Processor flags that mean arithmetic in bfloat16 (x86-64, then 64-bit Arm)."""


def cpu_computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU computes in bfloat16; without it every step would convert."""
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip().lower() in ("flags", "features"):
                    return not _NATIVE.isdisjoint(value.split())
    except OSError:
        return False
    return False


def resolve_precision(
    dtype: Literal["auto", "float32", "bfloat16", "float16"], engine: str, info: DeviceInfo
) -> Precision:
    """What ``auto`` means on a device.

    An encoder stays in float32 everywhere: vectors made on several machines are compared.
    """
    if dtype != "auto":
        return dtype
    if engine == "encoder":
        return "float32"
    if info.kind == "cuda":
        native = (info.compute_capability or (0, 0)) >= (8, 0)
    else:
        native = cpu_computes_bfloat16()
    return "bfloat16" if native else "float32"
