"""Muon with its orthogonalisation in a precision that the machine multiplies fast, many matrices at once.

torch.optim.Muon rounds every update to bfloat16 and takes matrix by matrix. On a CPU without bfloat16 products that is
most of a training step (39 of 44 s for the video model, AVX2, one core), so here they are taken in float32 there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from suite.network.precision import native_bf16


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan 2024; its options and state), with `orthogonal` on stacks of equal matrices.

    In bfloat16 where the device multiplies it natively, else in float32.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every matrix that has a gradient."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.device].append(parameter)
            for parameters in alike.values():
                self._step(group, parameters)
        return value

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """The same of matrices of one shape."""
        momentum, lr = group["momentum"], float(group["lr"])
        updates = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(average, momentum) if group["nesterov"] else average)
        stack = torch.stack(updates)
        dtype = torch.bfloat16 if native_bf16(str(stack.device)) else torch.float32
        stack = orthogonal(stack.to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameters[0].shape
        length = lr * _ratio(group["adjust_lr_fn"], rows, columns)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, list(stack.to(parameters[0].dtype)), alpha=-length)


def orthogonal(
    stack: Tensor,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> Tensor:
    """Matrices [N, R, C] with their singular values brought near 1, by the quintic Newton-Schulz iteration of Muon.

    X <- a X + (b X X' + c (X X')^2) X from X / |X|; singular values end in about [0.7, 1.2], not at 1.
    """
    a, b, c = coefficients
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps).view(-1, 1, 1)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _ratio(rule: str | None, rows: int, columns: int) -> float:
    """torch's `adjust_lr_fn`."""
    if rule == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5
