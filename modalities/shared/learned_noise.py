"""A noise schedule that is learned with the model (VDM): log-SNR as a monotone network between two fixed ends.

In continuous time the diffusion part of the evidence bound is int E |x0 - D|^2 dSNR / 2 over the range of SNR, so only
the ends of the schedule count for its value. The shape in between decides the variance of an estimate of it, and is
what is learned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from suite.diffusion.noise import VPTable


class LearnedSNR(nn.Module):
    """log-SNR(t), falling from `first` at t = 0 to `last` at t = 1 (Kingma 2021, 2107.00630).

    g(t) = a t + sum_k c_k sigmoid(b_k t + d_k) with a, b, c > 0, rescaled to the ends.
    """

    def __init__(self, first: float = 13.3, last: float = -5.0, hidden: int = 64) -> None:
        super().__init__()
        if not first > last:
            raise ValueError(f"log-SNR must fall: first = {first}, last = {last}")
        self.first, self.last = first, last
        self.slope = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.steepness = nn.Parameter(torch.linspace(0, 3, hidden, dtype=torch.float64))
        self.height = nn.Parameter(torch.full((hidden,), -6.0, dtype=torch.float64))
        self.place = nn.Parameter(torch.linspace(0, 1, hidden, dtype=torch.float64))

    def forward(self, t: Tensor) -> Tensor:
        """log-SNR at times of any shape, float64."""
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device)
        low, high = self._raw(ends).unbind(-1)
        part = (self._raw(t.double()) - low) / (high - low)
        return self.first + (self.last - self.first) * part

    def _raw(self, t: Tensor) -> Tensor:
        steep = 10 * nn.functional.softplus(self.steepness)
        bumps = torch.sigmoid(steep * (t[..., None] - self.place)) * nn.functional.softplus(self.height)
        return nn.functional.softplus(self.slope) * t + bumps.sum(-1)

    @torch.no_grad()
    def table(self, timesteps: int = 1000) -> VPTable:
        """The schedule as betas of a checkpoint: alpha_bar at k / timesteps is that of the network.

        At t = 0 a table is clean, whatever `first` is: its first beta holds all the noise there.
        """
        t = torch.arange(1, timesteps + 1, dtype=torch.float64, device=self.slope.device) / timesteps
        bar = torch.cat([self.slope.new_ones(1), torch.sigmoid(self(t))])
        return VPTable(tuple((1 - bar[1:] / bar[:-1]).tolist()))


def bound(log_snr: Callable[[Tensor], Tensor], error: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The integrand of the bound at each time: -SNR'(t) error(SNR(t)) / 2, whose mean over even t estimates it.

    Differentiable in the schedule. Its square's mean is what the schedule is trained on: the bound itself does not
    depend on the shape, so only the variance does.
    """
    t = t.detach().double().requires_grad_()
    ratio = log_snr(t).exp()
    (slope,) = torch.autograd.grad(ratio.sum(), t, create_graph=True)
    return -slope * error(ratio) / 2
