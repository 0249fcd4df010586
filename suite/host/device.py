"""Which device a model is opened on, and whether it is here. No torch until it is asked for."""

from __future__ import annotations

import re
from typing import Any

from suite.errors import ConfigError

DEVICE = re.compile(r"(cpu|mps|cuda(:\d+)?|xpu(:\d+)?)")


def check_device(device: str | None) -> None:
    """ConfigError if this is no device's name; whether it is here is for `resolve_device`."""
    if device is not None and not DEVICE.fullmatch(device):
        raise ConfigError(f"--device {device!r}: expected cpu, cuda, cuda:N or mps")


def resolve_device(device: Any = None) -> str:
    """The device's name; without one, a GPU if there is one.

    Raises:
        ConfigError: no device's name, or it is not here.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device):
        raise ConfigError(f"device {device!r}: expected a text such as 'cpu' or 'cuda:1', or a torch.device")
    name = str(device)
    check_device(name)
    if name != "cpu":
        try:
            torch.empty(1, device=name)
        # Torch's three ways to say so: no driver, a build without the backend, a backend without the operator.
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"--device {name} is not here: {reason}; try --device cpu") from error
    return name
