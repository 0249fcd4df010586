"""DDIM for tokens: uniform noise with leave-one-out correctors, and masks that may come back (ReMDM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from suite.diffusion.solver import Denoise, Solver, SolverFacts
from suite.errors import ConfigError
from suite.hookspecs import hookimpl
from suite.plugin import Plugin
from suite.plugins.solvers._tokens import Draw, by_row, is_open

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule
    from suite.diffusion.rng import SampleRng
    from suite.run import Run


@dataclass(frozen=True)
class UniformDDIMSolver(Solver):
    """x0 ~ p(x0 given x_t), then x_s is x0, x_t, or a token drawn from the whole vocabulary.

    With chance eta the exact posterior q(x_s given x_t, x0) of uniform noise decides (D3PM), else Song's rule that
    draws no new noise: x0 with chance (alpha_s - alpha_t) / (1 - alpha_t), else x_t. Both, and so every mixture,
    turn q(x_t given x0) into q(x_s given x0).
    """

    noise: NoiseSchedule
    draw: Draw
    eta: float
    corrector: int
    places: int
    select: str

    @property
    def facts(self) -> SolverFacts:  # pyright: ignore[reportIncompatibleVariableOverride]
        return SolverFacts(order=1, evaluations=1 + self.corrector, stochastic=True, discrete=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        import torch

        probabilities = denoise(x, t)
        vocabulary = probabilities.shape[-1]
        x0 = self.draw(probabilities, lambda: rng.uniform(x.shape[1:]).to(x.device))
        alpha_t, alpha_s = (by_row(self.noise.alpha(time), x) for time in (t, s))
        clean, stay = routes(alpha_t, alpha_s, x == x0, vocabulary, self.eta)
        route, token = (rng.uniform(x.shape[1:]).to(x.device).double() for _ in range(2))
        anything = (token * vocabulary).long().clamp(max=vocabulary - 1)
        x = torch.where(route < clean, x0, torch.where(route < clean + stay, x, anything))
        # At s = 0 nothing is noise, so there is nothing to correct.
        for _ in range(self.corrector if float(self.noise.sigma(s).max()) > 0 else 0):
            x = self._corrected(denoise(x, s), x, alpha_s, rng)
        return x, state

    def _corrected(self, probabilities: Tensor, x: Tensor, alpha: Tensor, rng: SampleRng) -> Tensor:
        """One sweep of Gibbs sampling: some places are drawn anew from p_s(token given all others)."""
        import torch

        others = given_others(probabilities, x, alpha)
        if self.select == "random":
            score = rng.uniform(x.shape[1:]).to(x.device).double()
        else:
            now = others.gather(-1, x[..., None])
            best = others.scatter(-1, x[..., None], 0).amax(-1)
            score = now[..., 0].log() - best.log()
        chosen = score.argsort(dim=-1, stable=True).argsort(dim=-1) < self.places
        return torch.where(chosen, Draw()(others, lambda: rng.uniform(x.shape[1:]).to(x.device)), x)

    def evaluations(self, steps: int) -> int:
        return steps + self.corrector * (steps - 1)


def routes(alpha_t: Tensor, alpha_s: Tensor, same: Tensor, vocabulary: int, eta: float) -> tuple[Tensor, Tensor]:
    """Chances that x_s is x0, and that it is x_t; the rest is for a token from the whole vocabulary.

    `same` says where x_t = x0. With a = alpha_t / alpha_s and b = alpha_s the posterior's are proportional to
    b (1 - a) / V + a b [same], a (1 - b) / V and (1 - a) (1 - b) / V.
    """
    a, b = alpha_t / alpha_s, alpha_s
    clean, stay, fresh = b * (1 - a) / vocabulary + a * b * same, a * (1 - b) / vocabulary, (1 - a) * (1 - b)
    total = clean + stay + fresh / vocabulary
    jump = (alpha_s - alpha_t) / (1 - alpha_t)
    return (1 - eta) * jump + eta * clean / total, (1 - eta) * (1 - jump) + eta * stay / total


def given_others(probabilities: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """[B, L, V] p_t(x^l given the other tokens of x_t) from p(x0^l given x_t), for uniform noise.

    The denoiser's answer at a place has seen that place's own noisy token; dividing by its likelihood
    1 + V alpha / (1 - alpha) leaves what the others say (2605.22765, eq. 13), and noise is put on that.
    """
    vocabulary = probabilities.shape[-1]
    alpha = alpha[..., None]
    seen = probabilities.double().scatter(-1, x[..., None], 0)
    own = probabilities.double() - seen
    clean = seen + own * (1 - alpha) / (1 - alpha + vocabulary * alpha)
    return alpha * clean / clean.sum(-1, keepdim=True) + (1 - alpha) / vocabulary


@dataclass(frozen=True)
class _Kept:
    """Which places were known at the first step, [B, L], and the mask's token."""

    given: Tensor
    mask: Tensor


@dataclass(frozen=True)
class MaskedDDIMSolver(Solver):
    """Known tokens are masked again with chance tau = eta tau_max, and masks uncovered so much the more.

    tau_max = min(1, (1 - alpha_s) / alpha_t); a mask is uncovered with chance (alpha_s - (1 - tau) alpha_t) /
    (1 - alpha_t). At tau = 0 that is MDLM's rule. What was known at the first step stays.
    """

    noise: NoiseSchedule
    draw: Draw
    eta: float
    facts = SolverFacts(order=1, stochastic=True, discrete=True)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, state: Any, rng: SampleRng) -> tuple[Tensor, Any]:
        import torch

        probabilities = denoise(x, t)
        masked = is_open(probabilities, x)
        if state is None:
            state = _Kept(~masked, torch.where(masked, x, -1).amax())
        alpha_t, alpha_s = (by_row(self.noise.alpha(time), x) for time in (t, s))
        tau = self.eta * ((1 - alpha_s) / alpha_t.clamp(min=1e-300)).clamp(max=1)
        chance = (alpha_s - (1 - tau) * alpha_t) / (1 - alpha_t)
        moved = rng.uniform(x.shape[1:]).to(x.device) < torch.where(masked, chance, tau)
        drawn = self.draw(probabilities, lambda: rng.uniform(x.shape[1:]).to(x.device))
        return torch.where(moved & ~state.given, torch.where(masked, drawn, state.mask), x), state


@dataclass(frozen=True)
class DiscreteDDIM(Plugin):
    """Song 2020, appendix A, for uniform and for masked tokens; the family of samplers that keep q(x_t given x0).

    Independent tokens come out with their exact distribution at any number of steps and any eta.

    Args:
        eta: how much is noised anew. Uniform noise: 0 draws no new noise, 1 is the ancestral posterior of D3PM.
            Masked: 0 is `mdlm`, 1 masks as many known tokens again as the marginals allow (ReMDM's rescaled rule).
        corrector: uniform noise: sweeps of Gibbs sampling after each step but the last, an evaluation each.
        places: tokens that one sweep draws anew.
        select: which: `random` ones, which leaves the distribution as it is, or those of least `margin`.
        temperature: of the draw of x0; below 1 prefers probable tokens.
        top_p: draw only from the most probable tokens that have this chance together.
    """

    eta: float = 0.0
    corrector: int = 0
    places: int = 1
    select: Literal["random", "margin"] = "random"
    temperature: float = 1.0
    top_p: float = 1.0

    summary = "tokens: DDIM and D3PM for uniform noise, with correctors; for masked tokens, masks that come back"
    paper = "DDIM (2010.02502), appendix A; D3PM (2107.03006); ReMDM (2503.00307), section 3; correctors: 2605.22765"

    def __post_init__(self) -> None:
        Draw(self.temperature, self.top_p).check("discrete-ddim")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"discrete-ddim: eta = {self.eta}: expected a number from 0 to 1")
        if self.corrector < 0 or self.places < 1:
            raise ConfigError(
                f"discrete-ddim: corrector = {self.corrector}, places = {self.places}: expected 0 or more sweeps "
                "over 1 or more tokens"
            )

    @property
    def effects(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"stochastic-step"} | ({"repeated-evaluations"} if self.corrector else set()))

    @hookimpl
    def solver(self, noise: NoiseSchedule, run: Run) -> Solver:
        del run
        draw = Draw(self.temperature, self.top_p)
        if noise.family == "uniform":
            return UniformDDIMSolver(noise, draw, self.eta, self.corrector, self.places, self.select)
        if noise.family != "masked":
            raise ConfigError(
                f"discrete-ddim steps tokens under uniform noise or masks, not real vectors under {noise.family} "
                "noise; --solver ddim is for those"
            )
        if self.corrector:
            raise ConfigError(
                f"discrete-ddim: corrector = {self.corrector} is for uniform noise, but the model's tokens are "
                "masked; with eta above 0 they are masked again, or see --solver block-refinement:edits=1"
            )
        return MaskedDDIMSolver(noise, draw, self.eta)
