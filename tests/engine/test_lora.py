"""The network of the present views: adapters learn, the copy they sit on does not change."""

import sys

import pytest
import torch

from suite.call import Call
from suite.diffusion.denoiser import Counter, NetworkDenoiser
from suite.diffusion.noise import Flow
from suite.diffusion.prediction import Prediction
from suite.diffusion.rng import SampleRng
from suite.engine.lora import lora
from suite.errors import ConfigError
from suite.network import Network
from suite.testing.tiny import TEXT, WORDS, forward, pixart


def score(module, **options):
    counter = Counter()
    bare = NetworkDenoiser(module, forward, Flow(), Prediction.SAMPLE, torch.float32, counter)
    return lora(Network(module), bare, **options), counter


def cond(rows):
    states = torch.randn(1, WORDS, TEXT, generator=torch.Generator().manual_seed(3)).expand(rows, -1, -1)
    branch = {"encoder_hidden_states": states, "encoder_attention_mask": torch.ones(rows, WORDS)}
    return {"cond": branch, "uncond": branch}


def test_it_starts_as_the_teacher_learns_the_views_and_keeps_the_base():
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    t = torch.tensor(0.4, dtype=torch.float64)
    teacher = pixart()
    plain = NetworkDenoiser(teacher, forward, Flow(), Prediction.SAMPLE, torch.float32, Counter())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    expected = plain.denoise(x, t, cond(2)["cond"], Call(0, 1, 0.4, 0.0))
    student, counter = score(pixart(), lr=1e-2, seed=5)
    torch.testing.assert_close(student.denoise(x, t, cond(2)), expected, atol=1e-6, rtol=0)
    losses = [student.fit(x, cond(2), SampleRng([i])) for i in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert counter.depth == 61
    base = {
        n.replace(".base_layer", ""): v for n, v in student.denoiser.module.state_dict().items() if "lora_" not in n
    }
    assert all(torch.equal(base[name], value) for name, value in before.items())


def test_same_seed_same_adapters():
    one, two, other = (score(pixart(), seed=s)[0] for s in (1, 1, 2))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = [[s.fit(x, cond(1), SampleRng([i])) for i in range(2)] for s in (one, two, other)]
    assert losses[0] == losses[1]
    weights = [dict(s.denoiser.module.named_parameters()) for s in (one, two, other)]
    name = next(n for n in weights[0] if "lora_A" in n)
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match="no linear layers"):
        score(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        score(pixart())
