"""Noise schedules: how much signal and how much noise a checkpoint has at time t in [0, 1], 1 = prior.

`x_t = alpha(t) x0 + sigma(t) eps`. All coefficients are computed in float64. Half log-SNR is
`lam(t) = log(alpha / sigma)`; `log_snr(t) = 2 lam(t)`. For discrete (masked) data `alpha(t)` is the
probability that a token is kept, and `sigma(t) = 1 - alpha(t)` that it is not.
"""

from __future__ import annotations

import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from suite import untrusted
from suite.errors import ConfigError
from suite.plugin import convert
from suite.untrusted import Items, Number, Section, Text, shown

#: sigma / alpha, and its inverse, between which grids spread their stops with Laplace's noise: flow's at t = 0.98.
LAPLACE_RATIO = 49.0


def as_time(t: Tensor | float | Sequence[float]) -> Tensor:
    """Times as float64."""
    return torch.as_tensor(t, dtype=torch.float64)


class NoiseSchedule(ABC):
    """What the checkpoint was trained with; it knows no number of steps."""

    discrete: ClassVar[bool] = False
    family: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal coefficient at `t`, float64, same shape as `t`."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise coefficient at `t`, float64, same shape as `t`."""

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha^2 / sigma^2); +inf where sigma = 0, -inf where alpha = 0."""
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    @property
    def ends(self) -> tuple[float, float] | None:
        """First and last time between which grids spread their stops, where the family has its own; t = 0 follows.

        None where any time is sensible: each grid then has a default of its own.
        """
        return None

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        """Inverse of `log_snr`: the time in [0, 1], float64. Bisection unless a family knows better."""
        return bisect_time(self.log_snr, as_time(log_snr))

    def time_input(self, t: Tensor) -> Tensor:
        """What the network wants to be told instead of `t`; 1000 t by default."""
        return 1000.0 * t


def bisect_time(log_snr: Callable[[Tensor], Tensor], target: Tensor, iterations: int = 80) -> Tensor:
    """Solve log_snr(t) = target for a decreasing log_snr on [0, 1], to 2^-53."""
    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(iterations):
        middle = (low + high) / 2
        less_noise_wanted = log_snr(middle) < target
        high = torch.where(less_noise_wanted, middle, high)
        low = torch.where(less_noise_wanted, low, middle)
    return (low + high) / 2


class _VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1, given by log(alpha)."""

    @abstractmethod
    def log_alpha(self, t: Tensor | float) -> Tensor:
        """log alpha(t), float64."""

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.exp(self.log_alpha(t))

    @staticmethod
    def log_alpha_at(log_snr: Tensor | float) -> Tensor:
        """log alpha of a log-SNR: -softplus(-log_snr) / 2."""
        target = as_time(log_snr)
        return -torch.logaddexp(-target, torch.zeros_like(target)) / 2

    def sigma(self, t: Tensor | float) -> Tensor:
        # expm1 keeps the relative accuracy of sigma near t = 0, where 1 - alpha^2 cancels.
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))


@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    """Continuous limit of DDPM's linear beta (Ho 2020; Song 2021, VP-SDE): beta(t) = b0 + t (b1 - b0)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    family: ClassVar[str] = "vp-linear"

    def log_alpha(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        c = -2 * self.log_alpha_at(log_snr)  # the root of a quadratic, in its stable form
        slope = self.beta_max - self.beta_min
        return (2 * c / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * c))).clamp(max=1)


@dataclass(frozen=True)
class Cosine(_VariancePreserving):
    """IDDPM's cosine schedule (Nichol & Dhariwal 2021), alpha_bar(t) = f(t)/f(0), without the clip."""

    offset: float = 0.008
    family: ClassVar[str] = "cosine"

    def log_alpha(self, t: Tensor | float) -> Tensor:
        angle = (as_time(t) + self.offset) / (1 + self.offset) * math.pi / 2
        first = math.cos(self.offset / (1 + self.offset) * math.pi / 2)
        return torch.log(torch.cos(angle).clamp(min=0.0) / first)

    def alpha(self, t: Tensor | float) -> Tensor:
        # cos(pi/2) is 6e-17, not 0: at the prior there is no signal at all.
        return torch.where(as_time(t) >= 1, 0.0, super().alpha(t))

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        first = math.cos(self.offset / (1 + self.offset) * math.pi / 2)
        angle = torch.acos(self.log_alpha_at(log_snr).exp() * first)
        return (angle * 2 / math.pi * (1 + self.offset) - self.offset).clamp(0, 1)


@dataclass(frozen=True)
class Sqrt(_VariancePreserving):
    """Diffusion-LM's schedule (Li 2022): alpha_bar(t) = 1 - sqrt(t + s); noise 0.1 already at t = 0."""

    offset: float = 1e-4
    family: ClassVar[str] = "sqrt"

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return 0.5 * torch.log((1 - torch.sqrt(as_time(t) + self.offset)).clamp(min=0.0))

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        return (torch.sigmoid(-as_time(log_snr)) ** 2 - self.offset).clamp(0, 1)


@dataclass(frozen=True)
class Sigmoid(_VariancePreserving):
    """Sigmoid alpha_bar (Jabri 2022): from sigmoid(-start) to sigmoid(-end), rescaled to [0, 1]."""

    start: float = -3.0
    end: float = 3.0
    family: ClassVar[str] = "sigmoid"

    def log_alpha(self, t: Tensor | float) -> Tensor:
        low, high = torch.sigmoid(as_time(-self.end)), torch.sigmoid(as_time(-self.start))
        here = torch.sigmoid(-(self.start + as_time(t) * (self.end - self.start)))
        return 0.5 * torch.log(((here - low) / (high - low)).clamp(0.0, 1.0))

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        low, high = torch.sigmoid(as_time(-self.end)), torch.sigmoid(as_time(-self.start))
        here = low + torch.sigmoid(as_time(log_snr)) * (high - low)
        return ((-torch.logit(here) - self.start) / (self.end - self.start)).clamp(0, 1)


@dataclass(frozen=True)
class Laplace(_VariancePreserving):
    """Laplace schedule (Hang & Gu 2024): log-SNR is Laplace(mu, b) for uniform t; alpha_bar = sigmoid(log-SNR)."""

    mu: float = 0.0
    b: float = 0.5
    family: ClassVar[str] = "laplace"

    @property
    def ends(self) -> tuple[float, float]:
        # Nearly all of its times are near log-SNR = mu: at t = 0.02 sigma / alpha is 0.45, far from clean.
        reach = 2 * math.log(LAPLACE_RATIO)
        first, last = (float(self.time_at(value)) for value in (-reach, reach))
        return first, last

    def log_snr(self, t: Tensor | float) -> Tensor:
        # Not by |1/2 - t| and its sign: neither has a derivative at 1/2, where log-SNR itself has one.
        t = as_time(t)
        return self.mu + self.b * torch.where(t < 0.5, -torch.log(2 * t), torch.log(2 * (1 - t)))

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return 0.5 * torch.nn.functional.logsigmoid(self.log_snr(t))

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        y = (as_time(log_snr) - self.mu) / self.b
        return torch.where(y >= 0, 0.5 * torch.exp(-y.abs()), 1 - 0.5 * torch.exp(-y.abs()))


@dataclass(frozen=True)
class VPTable(_VariancePreserving):
    """A table of betas, as diffusers checkpoints carry it; log alpha is linear in t between the entries.

    Entry k (0-based) of T lies at t = (k + 1) / T, and t = 0 is clean data; the network is told k.
    """

    betas: tuple[float, ...] = field(repr=False)
    family: ClassVar[str] = "vp-table"

    @cached_property
    def _hash(self) -> int:
        return hash(self.betas)

    def __hash__(self) -> int:  # a thousand numbers, and coefficients are looked up by it at every step
        return self._hash

    @staticmethod
    def named(name: str, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VPTable:
        """`linear` (DDPM), `scaled_linear` (linear in sqrt(beta), LDM) or `cosine` (IDDPM with its 0.999 clip)."""
        if name == "linear":
            betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        elif name == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2
        elif name in ("cosine", "squaredcos_cap_v2"):
            bar = Cosine().alpha(torch.arange(timesteps + 1, dtype=torch.float64) / timesteps) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            raise ConfigError(f"unknown beta table {name!r}; expected linear, scaled_linear or cosine")
        return VPTable(tuple(betas.tolist()))

    @cached_property
    def _nodes(self) -> Tensor:
        """log alpha at t = 0, 1/T, ..., 1."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.log1p(-as_time(self.betas)).cumsum(0)])

    def log_alpha(self, t: Tensor | float) -> Tensor:
        t, nodes = as_time(t), self._nodes
        position = (t * len(self.betas)).clamp(0, len(self.betas))
        left = position.floor().long().clamp(max=len(self.betas) - 1)
        part = position - left
        return nodes[left] * (1 - part) + nodes[left + 1] * part

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        target, nodes = self.log_alpha_at(log_snr), self._nodes
        left = (torch.searchsorted(-nodes, -target.contiguous()) - 1).clamp(0, len(self.betas) - 1)
        part = (target - nodes[left]) / (nodes[left + 1] - nodes[left])
        return ((left + part) / len(self.betas)).clamp(0, 1)

    def time_input(self, t: Tensor) -> Tensor:
        return (t * len(self.betas) - 1).clamp(min=0)


@dataclass(frozen=True)
class VPGamma(_VariancePreserving):
    """DDPM's linear table at real-valued steps, where its product is a quotient of Gammas (FastDPM, 2106.00132).

    alpha_bar(u) = step^u Gamma(b + 1) / Gamma(b + 1 - u) with u = T t and b = (1 - beta_1) / step. At whole u it is
    the table's product, bit for bit; between them the quotient of two Gammas whose arguments differ by less than 1
    is taken from Stirling's series, so that nothing cancels.
    """

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    family: ClassVar[str] = "vp-gamma"

    def __post_init__(self) -> None:
        if not (self.timesteps > 1 and 0 < self.beta_start < self.beta_end < 1):
            raise ConfigError("vp-gamma: expected timesteps > 1 and 0 < beta_start < beta_end < 1")
        if (1 - self.beta_end) / self._step < 10:  # Stirling's series needs large arguments
            raise ConfigError(f"vp-gamma: {self.timesteps} timesteps are too few for betas up to {self.beta_end}")

    @property
    def _step(self) -> float:
        return (self.beta_end - self.beta_start) / (self.timesteps - 1)

    @cached_property
    def _nodes(self) -> Tensor:
        betas = torch.linspace(self.beta_start, self.beta_end, self.timesteps, dtype=torch.float64)
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])

    def log_alpha(self, t: Tensor | float) -> Tensor:
        u = (as_time(t) * self.timesteps).clamp(0, self.timesteps)
        # 0.29 of 1000 is 290 to rounding, and is meant as that.
        whole = torch.where((u - u.round()).abs() < 1e-12 * self.timesteps, u.round(), u.floor())
        whole = whole.clamp(max=self.timesteps)
        part = u - whole
        part = part - part.clamp(max=0).detach()  # not below 0, and with a derivative at 0 too
        z = (1 - self.beta_start) / self._step + 1 - whole - part
        # log Gamma(z + part) - log Gamma(z)
        quotient = (z - 0.5) * torch.log1p(part / z) + part * torch.log(z + part) - part
        for power, factor in ((1, 1 / 12), (3, -1 / 360), (5, 1 / 1260), (7, -1 / 1680)):
            quotient = quotient + factor * ((z + part) ** -power - z**-power)
        return 0.5 * (self._nodes[whole.long()] + quotient + part * math.log(self._step))

    def time_input(self, t: Tensor) -> Tensor:
        return (t * self.timesteps - 1).clamp(min=0)


@dataclass(frozen=True)
class VE(NoiseSchedule):
    """Variance exploding, EDM's coordinates (Karras 2022): alpha = 1, sigma = sigma_max t^power.

    sigma_min is where grids end before they go to clean data (EDM, table 1; for data of deviation 0.5): below it a
    step changes nothing that can be seen, and costs as much as any other.
    """

    sigma_max: float = 80.0
    power: float = 7.0
    sigma_min: float = 0.002
    family: ClassVar[str] = "ve"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"ve: sigma_min = {self.sigma_min}, sigma_max = {self.sigma_max}: expected 0 < sigma_min < sigma_max"
            )

    @property
    def ends(self) -> tuple[float, float]:
        return 1.0, float(self.time_at(-2 * math.log(self.sigma_min)))

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return self.sigma_max * as_time(t) ** self.power

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        return ((torch.exp(-as_time(log_snr) / 2) / self.sigma_max) ** (1 / self.power)).clamp(max=1)

    def time_input(self, t: Tensor) -> Tensor:
        # EDM's c_noise = log(sigma) / 4; the floor keeps t = 0 finite.
        return (self.sigma(t).clamp(min=1e-10).log() / 4).to(t.dtype)


@dataclass(frozen=True)
class SubVP(NoiseSchedule):
    """Sub-VP (Song 2021, 2011.13456): alpha of VP-linear, sigma = 1 - alpha^2, less noise on the way."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    family: ClassVar[str] = "sub-vp"

    @property
    def _vp(self) -> VPLinear:
        return VPLinear(self.beta_min, self.beta_max)

    def alpha(self, t: Tensor | float) -> Tensor:
        return self._vp.alpha(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return -torch.expm1(2 * self._vp.log_alpha(t))

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        # sigma / alpha = 2 sinh(-log alpha), and VP-linear knows the time of an alpha.
        ratio = torch.exp((-as_time(log_snr) / 2).clamp(-300, 300))
        log_alpha = -torch.asinh(ratio / 2)
        return self._vp.time_at(2 * log_alpha - torch.log(-torch.expm1(2 * log_alpha)))


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """Rectified flow (Liu 2022; Lipman 2022): alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t).

    The shift is of models whose training times were shifted (SD3, Esser 2024); the network is told 1000 u.
    """

    shift: float = 1.0
    family: ClassVar[str] = "flow"

    def __post_init__(self) -> None:
        if not 0 < self.shift <= 100:
            raise ConfigError(f"flow: shift = {self.shift}: expected a number in (0, 100]; 1 is no shift")

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

    def log_snr(self, t: Tensor | float) -> Tensor:
        return -2 * torch.logit(as_time(t)) - 2 * math.log(self.shift)

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-as_time(log_snr) / 2 - math.log(self.shift))

    def time_input(self, t: Tensor) -> Tensor:
        return 1000.0 * (t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t))


@dataclass(frozen=True)
class ResShift(NoiseSchedule):
    """ResShift (Yue 2023, 2307.12348), of the residual x - y of a picture x and its degraded self y.

    x_t = x0 + eta (y - x0) + kappa sqrt(eta) eps is, less y, alpha (x0 - y) + sigma eps with alpha = 1 - eta and
    sigma = kappa sqrt(eta): the prior is y with noise on it. sqrt(eta_k) = sqrt(eta_1) (eta_T / eta_1)^(u / 2),
    u = ((k - 1) / (T - 1))^power, at t = k / T; below 1 / T sqrt(eta) falls to 0 in a line.
    """

    kappa: float = 2.0
    steps: int = 15
    eta_first: float = 4e-4
    eta_last: float = 0.999
    power: float = 0.3
    family: ClassVar[str] = "resshift"

    def __post_init__(self) -> None:
        if not (self.kappa > 0 and self.steps > 1 and self.power > 0 and 0 < self.eta_first < self.eta_last < 1):
            raise ConfigError("resshift: expected kappa, power > 0, steps > 1 and 0 < eta_first < eta_last < 1")

    def eta(self, t: Tensor | float) -> Tensor:
        """Part of the way from x0 to y."""
        k = as_time(t) * self.steps
        part = ((k - 1) / (self.steps - 1)).clamp(min=0) ** self.power
        return self.eta_first * (self.eta_last / self.eta_first) ** part * k.clamp(max=1) ** 2

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - self.eta(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return self.kappa * self.eta(t).sqrt()

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        # With r = sigma / alpha, sqrt(eta) is the root of r eta + kappa sqrt(eta) - r = 0; then the sequence, inverted.
        ratio = torch.exp((-as_time(log_snr) / 2).clamp(-300, 300))
        root = 2 * ratio / (self.kappa + (self.kappa**2 + 4 * ratio**2).sqrt())
        grown = (root**2 / self.eta_first).log() / math.log(self.eta_last / self.eta_first)
        above = 1 + (self.steps - 1) * grown.clamp(min=0) ** (1 / self.power)
        return (torch.where(grown > 0, above, root / self.eta_first**0.5) / self.steps).clamp(0, 1)

    def time_input(self, t: Tensor) -> Tensor:
        return (t * self.steps - 1).clamp(min=0)


@dataclass(frozen=True)
class TrigFlow(NoiseSchedule):
    """TrigFlow (Lu & Song 2024): alpha = cos(pi t / 2), sigma = sin(pi t / 2); the network is told the angle."""

    family: ClassVar[str] = "trigflow"

    def alpha(self, t: Tensor | float) -> Tensor:
        # cos(pi/2) is 6e-17 in floating point; at the prior there is no signal.
        return torch.where(as_time(t) >= 1, 0.0, torch.cos(as_time(t) * math.pi / 2))

    def sigma(self, t: Tensor | float) -> Tensor:
        return torch.sin(as_time(t) * math.pi / 2)

    def time_at(self, log_snr: Tensor | float) -> Tensor:
        return torch.atan(torch.exp(-as_time(log_snr) / 2)) * 2 / math.pi

    def time_input(self, t: Tensor) -> Tensor:
        return t * math.pi / 2


class _Discrete(NoiseSchedule):
    """Tokens: alpha(t) = P(token kept), sigma(t) = P(token not kept)."""

    discrete: ClassVar[bool] = True

    def sigma(self, t: Tensor | float) -> Tensor:
        return 1 - self.alpha(t)


@dataclass(frozen=True)
class Masked(_Discrete):
    """Absorbing state (MDLM, LLaDA): linear alpha = 1 - t, or cosine alpha = 1 - cos(pi/2 (1 - t))."""

    shape: str = "linear"
    family: ClassVar[str] = "masked"

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine"):
            raise ConfigError(f"masked noise shape {self.shape!r}: expected linear or cosine")

    def alpha(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return 1 - t if self.shape == "linear" else 1 - torch.cos(math.pi / 2 * (1 - t))


@dataclass(frozen=True)
class Uniform(_Discrete):
    """Uniform noise: a token that is not kept is drawn from the whole vocabulary; alpha = 1 - t."""

    family: ClassVar[str] = "uniform"

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - as_time(t)


FAMILIES: dict[str, type[NoiseSchedule]] = {
    c.family: c
    for c in (
        VPLinear, Cosine, Sqrt, Sigmoid, Laplace, VPTable, VPGamma, SubVP, VE, Flow, TrigFlow, ResShift,
        Masked, Uniform,
    )
}  # fmt: skip


def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """A noise schedule from a model folder's description, e.g. {"family": "flow"}.

    Raises:
        ConfigError: unknown family or option.
    """
    options = dict(config)
    name = options.pop("family", None)
    if not isinstance(name, str) or name not in FAMILIES:
        said, known = "None" if name is None else shown(name), ", ".join(sorted(FAMILIES))
        raise ConfigError(f"unknown noise family {said}; expected one of {known}")
    cls, where = FAMILIES[name], f"noise family {name}"
    for key, value in options.items():
        kind = Items(Number(-1e6, 1e6), 1) if isinstance(value, list) else Number(-1e6, 1e6)
        untrusted.check({key: value}, Section({key: Text(100) if isinstance(value, str) else kind}), where)
    table = options.pop("table", None) if cls is VPTable else None
    wanted = typing.get_type_hints(cls if table is None else VPTable.named)
    wanted = {k: v for k, v in wanted.items() if k not in ("family", "discrete", "name", "return")}
    if unknown := sorted(set(options) - set(wanted)):
        raise ConfigError(f"{where}: unknown option {unknown[0]!r}; expected {sorted(wanted)}")
    try:
        options = {key: convert(value, wanted[key]) for key, value in options.items()}
        made = cls(**options) if table is None else VPTable.named(table, **options)
        middle = [float(made.alpha(0.5)), float(made.sigma(0.5))]
    except (ValueError, TypeError, ArithmeticError, IndexError, RuntimeError) as error:
        raise ConfigError(f"{where}: {shown(options)}: {error}") from error
    if not all(math.isfinite(m) and m > 0 for m in middle):
        raise ConfigError(f"{where}: {shown(options)}: signal and noise at t = 0.5 are {middle}, expected above 0")
    return made
