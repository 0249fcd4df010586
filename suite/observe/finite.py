"""Finite or refused: a NaN that is not found where it enters comes out as a black picture with exit code 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suite.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from suite.call import Call
    from suite.diffusion.denoiser import Cond, Denoiser


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; a sum, which is, says so in one pass and without memory."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor if tensor.dtype in (torch.float64, torch.complex128) else tensor.detach().float()
    # A sum of finite numbers may overflow; only then every element is looked at.
    return bool(wide.sum().isfinite()) or bool(wide.isfinite().all())


def load_finite(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all finite.

    Raises:
        ConfigError: one is not.
        SafetensorError, OSError: the file cannot be read.
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    check_tensors(tensors, path)
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse tensors of a file that are not finite.

    Raises:
        ConfigError: names the file and the first such tensor.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            bad = int((~tensor.isfinite()).sum())
            raise ConfigError(
                f"{source}: tensor {name} has {bad} of {tensor.numel()} numbers that are NaN or infinite; the file is "
                "damaged or training diverged: take another copy"
            )


@dataclass
class Watch:
    """The guided estimates of one run: the last one, and at which step one was not finite.

    Sums are looked at after the run: on a GPU each look would wait for everything before it.
    """

    x0: Tensor | None = None
    sums: list[tuple[Call, Tensor]] = field(default_factory=list)

    def around(self, inner: Denoiser) -> Denoiser:
        """The denoiser, watched."""
        return _Watched(inner, self)

    def check(self, x0: Tensor, dtype: str) -> None:
        """Refuse a run whose result, or any estimate on the way, is not finite.

        Raises:
            NumericsError: names the step.
        """
        if self.sums:
            known = torch.stack([total for _, total in self.sums]).isfinite()
            if not bool(known.all()):
                call, _ = self.sums[int((~known).nonzero()[0])]
                raise _not_finite(f"at step {call.step + 1} of {call.steps} (t = {call.t:.4g})", dtype)
        if not is_finite(x0):
            raise _not_finite("in the last step", dtype)


@dataclass(frozen=True)
class _Watched:
    """A Denoiser around another one."""

    inner: Denoiser
    watch: Watch

    def denoise(self, x: Tensor, t: Tensor, cond: Cond, call: Call) -> Tensor:
        out = self.inner.denoise(x, t, cond, call)
        self.watch.x0 = out
        # Chances of tokens are a softmax over the last axis: where one is NaN, all of its place are.
        seen = out if x.is_floating_point() else out[..., 0]
        self.watch.sums.append((call, seen.sum(dtype=torch.float32)))
        return out


def _not_finite(where: str, dtype: str) -> NumericsError:
    wider = ", --dtype fp32" if dtype != "fp32" else ""
    return NumericsError(
        f"the result is not finite: NaN or infinity {where}; try less --guidance, another --solver{wider}"
    )


def check_state(state: Mapping[str, Any], iteration: int, dtype: str) -> None:
    """Refuse what distillation has made when it is not finite.

    Raises:
        NumericsError: names the iteration and the tensor.
    """
    for name, value in state.items():
        finite = is_finite(value) if isinstance(value, Tensor) else value == value and abs(value) != float("inf")
        if not finite:
            raise _not_finite(f"in {name} after iteration {iteration + 1}", dtype)
