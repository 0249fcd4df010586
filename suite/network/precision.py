"""Which number format a device computes fastest in."""

from __future__ import annotations

import torch

PROBES = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "VNNI": "_is_vnni_supported",
    "bf16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}
"""Instructions of a CPU that matter here, and torch's name of the question whether it has them."""


def cpu_has(*instructions: str) -> list[str]:
    """Those of the named `PROBES` (all by default) that this CPU has, by torch's own account."""
    return [name for name in instructions or PROBES if getattr(torch.cpu, PROBES[name], lambda: False)()]


def native_bf16(device: str) -> bool:
    """Whether bf16 products beat fp32 ones on this device; a CPU without them emulates, many times slower."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return bool(cpu_has("bf16", "AMX"))


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is bf16 where the hardware multiplies it natively, else fp32."""
    if dtype != "auto":
        return dtype
    return "bf16" if native_bf16(device) else "fp32"
