"""Our Muon against torch's own, and the iteration against what it is for."""

from __future__ import annotations

import pytest
import torch

from suite.training import muon
from suite.training.muon import Muon, orthogonal

SHAPES = [(16, 16), (16, 48), (48, 16), (16, 16), (8, 8)]


def trained(kind: type, dtype: torch.dtype = torch.float32, steps: int = 6, **options) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=rng, dtype=dtype)) for s in SHAPES]
    targets = [torch.randn(s, generator=rng, dtype=dtype) for s in SHAPES]
    optimizer = kind(parameters, lr=0.02, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p - t).square().sum() for p, t in zip(parameters[:-1], targets, strict=False)).backward()
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.0}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 2}],
)
def test_equals_torch_in_bfloat16(options, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(muon, "native_bf16", lambda device: True)
    for ours, theirs in zip(trained(Muon, **options), trained(torch.optim.Muon, **options), strict=True):
        # Products of stacks may sum in another order: one rounding of bfloat16, over six steps.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=6 * 0.02 * 2**-7 * 3)


def test_float32_is_nearer_to_exact_than_bfloat16(monkeypatch: pytest.MonkeyPatch):
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(1))
    exact = orthogonal(matrices.double())
    single = (orthogonal(matrices) - exact).abs().max()
    half = (orthogonal(matrices.bfloat16()) - exact).abs().max()
    assert single < 1e-5 < half


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)])
def test_singular_values_go_by_the_polynomial_and_directions_stay(shape: tuple[int, int]):
    matrices = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.square().sum(dim=1, keepdim=True).sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(matrices), left @ torch.diag_embed(values) @ right)
    assert values.median() > 0.7 and values.max() < 1.25


def test_a_matrix_without_gradient_stays_and_state_travels():
    before = trained(Muon, steps=0)
    after = trained(Muon, steps=3)
    assert torch.equal(before[-1], after[-1])
    assert all(not torch.equal(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))
    parameter = torch.nn.Parameter(torch.eye(4))
    ours, theirs = Muon([parameter], lr=0.1), torch.optim.Muon([parameter], lr=0.1)
    parameter.grad = torch.ones(4, 4)
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.state[parameter]["momentum_buffer"], ours.state[parameter]["momentum_buffer"])
    assert ours.step(lambda: parameter.sum()) is not None
