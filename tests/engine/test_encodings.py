"""What an engine remembers between requests: encoded prompts; and what calibration sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from suite import Engine
from suite.engine import encodings
from suite.modality import Modality

RECIPE = {"steps": 8, "guidance": 2.0, "solver": "ddim", "dtype": "fp32"}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests that were encoded in earnest."""
    seen: list[Any] = []
    from suite.modalities.image import Image

    plain: Any = Image.encode

    def encode(self: Modality, request: Any) -> Any:
        seen.append(request.prompts)
        return plain(self, request)

    monkeypatch.setattr(Image, "encode", encode)
    return seen


def test_equal_requests_are_encoded_once(counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.from_recipe(RECIPE) as it:
        fresh = it.generate("a red apple", seed=1)
        other = it.generate("a blue car", seed=1)
        again = it.generate("a red apple", seed=1)
        assert counted == [("a red apple",), ("a blue car",)]
        assert fresh.artifacts[0].tobytes() == again.artifacts[0].tobytes() != other.artifacts[0].tobytes()
        assert [r.report.encoding["reused"] for r in (fresh, other, again)] == [False, False, True]
        assert again.report.encoding["bytes_held"] == other.report.encoding["bytes_held"] > 0
        # Another batch, negative prompt, or more than may be held: anew.
        it.generate(["a red apple", "a blue car"], seed=1)
        it.generate("a red apple", seed=1, negative="blue")
        assert len(counted) == 4
        monkeypatch.setattr(encodings, "LIMIT", 1)
        last = it.generate("a house with a garden", seed=1)
        it.generate("a red apple", seed=1)
        assert len(counted) == 6 and len(it._encoded.kept) == 1
        assert 0 < last.report.encoding["bytes_held"] <= fresh.report.encoding["bytes_held"]


def test_calibration_has_the_cache_on() -> None:
    """C16: what is recorded is what the network will compute, with the cache of the recipe."""
    steps: dict[str, list[int]] = {}
    for name, caches in {"plain": [], "cached": ["text-kv", "fora:interval=2"]}.items():
        with Engine.from_recipe({**RECIPE, "guidance": 1.0, "cache": caches}) as it:
            seen: list[int] = []
            part: Any = it.network.blocks("mlp")[0].module
            forward = part.forward

            def counted(*args: Any, forward: Any = forward, seen: list[int] = seen, **kwargs: Any) -> Any:
                seen.append(1)
                return forward(*args, **kwargs)

            part.forward = counted
            records = it._record(("a red apple",))
            del part.__dict__["forward"]
            steps[name] = seen
            assert len(records) == 8 and all(isinstance(r.x, torch.Tensor) for r in records)
            assert not any("forward" in m.__dict__ for m in it.network.module.modules())
    assert (len(steps["plain"]), len(steps["cached"])) == (8, 4)
