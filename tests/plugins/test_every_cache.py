"""What holds of every cache on every class of network: it acts or says why not, and keeps the common promises.

A new cache is one line in `CACHES`, and one in `REFUSES` for each class that it cannot serve.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from suite.call import Call
from suite.errors import ConfigError
from suite.plugin import Plugin
from suite.plugins.cache.deepcache import DeepCache
from suite.plugins.cache.delta_dit import DeltaDiT
from suite.plugins.cache.diffusers_cache import DiffusersCache
from suite.plugins.cache.first_block import FirstBlock
from suite.plugins.cache.fora import FORA
from suite.plugins.cache.pab import PAB
from suite.plugins.cache.t_gate import TGate

sys.path.insert(0, str(Path(__file__).parent))
import _tiny
from _tiny import EVERY, Setup

#: Name -> the plugin with options with which it acts on these networks in eight steps.
CACHES: dict[str, Plugin] = {
    "fora": FORA(3),
    "first-block": FirstBlock(0.3),
    "deepcache": DeepCache(3),
    "deepcache-centred": DeepCache(2, 1, center=0.4),
    "delta-dit": DeltaDiT(2),
    "pab": PAB(),
    "t-gate": TGate(0.5, interval=2, warmup=1),
    "diffusers-cache": DiffusersCache("taylorseer", interval=3, order=0),
}
UNETS = ("unet", "unet-deep", "unet-bare", "unet-motion")
TRANSFORMERS = tuple(name for name in EVERY if name not in UNETS)
CROSSLESS = ("dit", "sd3", "sd3.5", "flux", "cogvideox", "masked-lm", "unet-bare")
NESTED = dict.fromkeys(UNETS, "nested in the stages of a U-Net")
#: Cache -> class -> why it does not serve it.
REFUSES: dict[str, dict[str, str]] = {
    "fora": {"unet-bare": "looked for attention"},
    "first-block": NESTED,
    "deepcache": dict.fromkeys(TRANSFORMERS, "looked for a U-Net"),
    "deepcache-centred": dict.fromkeys(TRANSFORMERS, "looked for a U-Net"),
    "delta-dit": NESTED,
    "pab": {"unet-bare": "looked for attention"},
    "t-gate": dict.fromkeys(CROSSLESS, "looked for cross_attention"),
    "diffusers-cache": {"unet-bare": "found nothing to hook", "masked-lm": "hook does not fit ModernBert"},
}
#: Caches that join branches on purpose, and why.
JOINS = {"t-gate": "it keeps the mean over both"}
PAIRS = [(cache, name) for cache in CACHES for name in EVERY]
ACTING = [(cache, name) for cache, name in PAIRS if name not in REFUSES[cache]]
#: Rounding of sums in another order, relative to x0 of order 4.
ROUNDING = 2e-5

pairs = pytest.mark.parametrize(("cache", "name"), ACTING, ids=lambda v: v)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= ROUNDING


def structure(setup: Setup) -> dict[str, object]:
    """Everything a cache may touch: forwards, hooks, attributes and children of every part."""
    return {
        name: (id(part), part.__dict__.get("forward"), set(part.__dict__), [id(c) for c in part.children()],
               list(part._forward_hooks), list(part._forward_pre_hooks))
        for name, part in setup.module.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize(("cache", "name"), [p for p in PAIRS if p not in ACTING], ids=lambda v: v)
def test_says_why_not(cache: str, name: str) -> None:
    with pytest.raises(ConfigError, match=REFUSES[cache][name]) as raised:
        Setup(name).cached(CACHES[cache])
    assert cache.removesuffix("-centred") in str(raised.value)


@pairs
def test_acts_and_leaves_no_trace(cache: str, name: str) -> None:
    """It changes something, twice the same, with guidance; afterwards everything is as it was."""
    setup, plugin = Setup(name, guidance=3.0), CACHES[cache]
    before, weights = structure(setup), {k: v.clone() for k, v in setup.module.state_dict().items()}
    plain = setup.generate((0, 1))
    one, two = (setup.cached(plugin, (0, 1)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1] == two[1], "a second run differs"
    assert one[1].did > 0 and not one[1].reason and not torch.equal(one[0], plain)
    assert 0 < one[1].facts["skipped_share"] < 1 and one[1].facts.get("bytes_held", 1) > 0
    assert structure(setup) == before
    after = setup.module.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[k], weights[k]) for k in weights)
    assert torch.equal(setup.generate((0, 1)), plain)
    off, report = setup.cached(replace(plugin, **plugin.noop_options), (0, 1))
    assert torch.equal(off, plain) and report.did == 0 and report.reason, "off is not the plain run"


@pairs
def test_a_batch_of_two_is_two_singles(cache: str, name: str) -> None:
    setup, plugin = Setup(name, guidance=3.0), CACHES[cache]
    both, _ = setup.cached(plugin, (3, 4))
    assert close(both, torch.cat([setup.cached(plugin, (seed,))[0] for seed in (3, 4)]))


@pairs
def test_branches_are_apart(cache: str, name: str) -> None:
    """What `cond` answers does not depend on what else is asked, and one batch is two calls."""
    setup, plugin = Setup(name, guidance=3.0), CACHES[cache]
    together, _ = setup.cached(plugin)
    apart, _ = replace(setup, batched=False).cached(plugin)
    assert close(together, apart)
    if cache in JOINS:
        return
    start, way = torch.randn(2, 1, *EVERY[name].shape, generator=torch.Generator().manual_seed(0))
    path = [start + 0.1 * step * way for step in range(8)]
    cond = {"cond": _tiny.conditioning((1,)), "uncond": _tiny.conditioning((900,))}
    (alone,), (report,) = setup.script(plugin, path, ["cond"], **cond)
    assert report.did > 0
    for order in (["cond", "uncond"], ["uncond", "cond"]):
        answers, _ = setup.script(plugin, path, order, **cond)
        assert all(torch.equal(a, b) for a, b in zip(alone, answers[order.index("cond")], strict=True))


@pairs
def test_two_evaluations_a_step(cache: str, name: str) -> None:
    """Heun: each of its evaluations reuses its own, and the run is the same twice."""
    setup, plugin = Setup(name, solver="heun"), CACHES[cache]
    one, two = (setup.cached(plugin) for _ in range(2))
    assert torch.equal(one[0], two[0]) and one[1] == two[1] and one[1].did > 0
    assert not torch.equal(one[0], Setup(name, solver="ddim").cached(plugin)[0])
    if cache in JOINS:
        return
    # Each evaluation is asked the same at every step, so that whatever is its own is right.
    cond, time = _tiny.conditioning((0,)), torch.tensor(0.5, dtype=torch.float64)
    x = torch.randn(2, 1, *EVERY[name].shape, generator=torch.Generator().manual_seed(0))
    with setup.applied(plugin) as wraps, torch.inference_mode():
        denoiser = setup.denoiser(wraps)
        for step in range(8):
            answers = [denoiser.denoise(x[e], time, cond, Call(step, 8, 0.5, 0.4, evaluation=e)) for e in (0, 1)]
    assert wraps[0].report().did > 0
    plain = [setup.denoiser().denoise(state, time, cond, Call(7, 8, 0.5, 0.4)) for state in x]
    assert all(close(a, b) for a, b in zip(answers, plain, strict=True))
    assert not close(*plain), "the two evaluations must differ for this to say anything"
