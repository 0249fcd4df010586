"""What the solvers of masked tokens have in common: which places are open, and drawing tokens for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from suite.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from suite.diffusion.noise import NoiseSchedule

#: What says which place is uncovered first.
By = Literal["confidence", "margin", "entropy", "random"]


def require_masks(name: str, noise: NoiseSchedule) -> None:
    """Refuse a noise schedule whose tokens are not masked, in words that name the plugin."""
    if noise.family != "masked":
        raise ConfigError(
            f"{name} uncovers masked tokens, but the model's noise is {noise.family}; leave --solver out for the "
            "model's own, or see `suite plugins list`"
        )


def check_block(name: str, block: int) -> None:
    """Refuse a length of blocks that is none, in words that name the plugin."""
    if block < 0:
        raise ConfigError(f"{name}: block = {block}: expected a number of tokens; 0 is the whole text")


def unmasking_effects(temperature: float, by: By, variable: bool = False) -> frozenset[str]:
    """Words of a plugin that uncovers places in an order of their own."""
    out = {"stochastic-step"} if temperature > 0 or by == "random" else set()
    return frozenset(out | ({"variable-evaluations"} if variable else set()))


def is_open(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """[B, L], true where a token is masked: a denoiser gives a known token all the chance, and the mask none."""
    return probabilities.gather(-1, tokens[..., None])[..., 0] < 0.5


def by_row(value: Tensor, x: Tensor) -> Tensor:
    """A float64 chance of shape [] or [B] ready to be compared with tokens [B, L], on their device."""
    return (value if value.ndim == 0 else value.reshape(-1, 1)).to(x.device)


@dataclass(frozen=True)
class Draw:
    """Tokens drawn from p(x0 given x_t), sharpened or cut.

    Attributes:
        temperature: p^(1/temperature), normalised; 0 takes the most probable token.
        top_p: only the most probable tokens whose chances reach `top_p` together (Holtzman 2020).
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def check(self, name: str) -> None:
        """Refuse options out of range, in words that name the plugin."""
        if not 0 <= self.temperature <= 10:
            raise ConfigError(f"{name}: temperature = {self.temperature}: expected 0 to 10; 1 changes nothing")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"{name}: top_p = {self.top_p}: expected a number in (0, 1]; 1 keeps every token")

    def __call__(self, probabilities: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """Tokens [B, L] by inversion: one uniform number in [0, 1), from `uniform()` [B, L], decides each."""
        if self.temperature == 0:
            return probabilities.argmax(-1)
        p = probabilities.double()  # sums over a large vocabulary lose chances in float32
        if self.temperature != 1:
            p = (p / p.amax(-1, keepdim=True)) ** (1 / self.temperature)
        if self.top_p < 1:
            p = self._cut(p / p.sum(-1, keepdim=True))
        total = p.cumsum(-1)
        # Strictly above, so that a token without a chance is never drawn; u < 1 keeps it inside.
        return (total <= uniform().to(total)[..., None] * total[..., -1:]).sum(-1).clamp(max=p.shape[-1] - 1)

    def _cut(self, p: Tensor) -> Tensor:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        kept = ordered * (ordered.cumsum(-1) - ordered < self.top_p)
        return p.new_zeros(p.shape).scatter(-1, index, kept)
