"""Load a network of a diffusers or transformers class from a sub-folder, with errors that name the file."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from suite.errors import ConfigError
from suite.files import untrusted
from suite.files.inputs import check, read_json
from suite.files.untrusted import NAME, Items, Number, Section, Table, Text, scalars, shown
from suite.network.patches_as_products import patches_as_products
from suite.observe.finite import load_finite

INDEX = Section({"weight_map": Table(Text(200, r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", "a file beside it"), 10**6)})
"""An index of weights: the files lie beside it, and nowhere else."""
CONFIG = Section({}, {"_class_name": NAME, "architectures": Items(NAME, 1, 16)})
"""What of a network's description is ours to read."""
FACTORIES = ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "arange", "linspace", "eye")
ROOM = 512 * 2**20
"""Bytes that a network may take beside its weights: tables of positions and masks."""
FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def load_network(folder: Path, device: str, dtype: torch.dtype, given: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network in `folder` (config.json and one safetensors file), in eval mode, without gradients.

    Args:
        given: tensors that the folder leaves out, because an installed package holds them.

    Raises:
        ConfigError: a file is missing, truncated, or its tensors do not fit the configuration.
    """
    config = _config(folder)
    with torch.random.fork_rng(devices=[]):  # classes draw weights, which are then replaced
        module = _build(folder, config)
    for name in FILES:
        if (folder / name).is_file():
            load_weights(module, folder / name, type(module).__name__, given)
            break
        if (folder / f"{name}.index.json").is_file():
            load_weights(module, folder / f"{name}.index.json", type(module).__name__, given)
            break
    else:
        raise ConfigError(f"{folder} has no weights; expected {FILES[0]}")
    kept = {} if config.get("_class_name") else _constants(module)
    # nn.Module's own `to`: diffusers' override logs advice that is meant for from_pretrained.
    module = nn.Module.to(module, device=device, dtype=dtype).eval().requires_grad_(False)
    for name, constant in kept.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, constant.to(device))
    return patches_as_products(module)


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not saved, such as rotary frequencies: transformers computes with them in float32."""
    saved = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name not in saved}


def load_weights(module: nn.Module, weights: Path, owner: str, given: Mapping[str, Tensor] | None = None) -> None:
    """Fill `module` from a safetensors file, or the index of several; `owner` is what the messages call it.

    `given` are tensors that the files leave out.

    Raises:
        ConfigError: the file is missing, truncated, not finite, or its tensors are not the module's.
    """
    tensors: dict[str, Tensor] = dict(given or {})
    for part in _parts(weights):
        check(part, "weights")
        try:
            tensors |= load_finite(part)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{part} cannot be read, it is damaged or incomplete: {error}") from error
    wanted = module.state_dict()
    # A tied weight is saved once; the module has it under both names.
    there = {wanted[name].data_ptr() for name in wanted.keys() & tensors.keys()}
    if missing := [n for n in sorted(wanted.keys() - tensors.keys()) if wanted[n].data_ptr() not in there]:
        raise ConfigError(f"{weights} lacks {len(missing)} tensors of {owner}, first {missing[0]}")
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise ConfigError(f"{weights} has {len(extra)} tensors that {owner} has not, first {extra[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ConfigError(
                f"{weights}: {name} has shape {tuple(tensor.shape)}, {owner} expects {tuple(wanted[name].shape)}"
            )
    module.load_state_dict(tensors, strict=False)  # all that may be missing is tied


def _parts(weights: Path) -> list[Path]:
    """The safetensors files that hold the weights: one, or those of an index."""
    if weights.suffix != ".json":
        return [weights]
    content = untrusted.check(read_json(weights, "index of weights"), INDEX, f"{weights} is not an index of weights")
    return [weights.parent / name for name in sorted(set(content["weight_map"].values()))]


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} is not a network folder: it has no config.json")
    config = untrusted.check(read_json(file, "network description"), CONFIG, str(file))
    if not config.get("_class_name") and not config.get("architectures"):
        raise ConfigError(f"{file} names neither _class_name (diffusers) nor architectures (transformers)")
    for number in scalars(config):
        if type(number) in (int, float):
            untrusted.check(number, Number(-(2**31), 2**31), f"{file} holds too large a number")
    return config


def _build(folder: Path, config: dict) -> nn.Module:
    library = "diffusers" if config.get("_class_name") else "transformers"
    name = config["_class_name"] if library == "diffusers" else config["architectures"][0]
    try:
        package = importlib.import_module(library)
    except ImportError as error:
        extra = "image" if library == "diffusers" else "text"
        raise ConfigError(f"{library} is missing; pip install 'efficient-diffusion-suite[{extra}]'") from error
    cls = getattr(package, name, None)
    makes = "from_config" if library == "diffusers" else "config_class"
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and getattr(cls, makes, None)):
        raise ConfigError(f"{folder / 'config.json'}: {library} has no network {shown(name)}")
    return built(lambda: _made(cls, library, config), folder / "config.json", _bytes(folder))


def _made(cls: Any, library: str, config: dict) -> nn.Module:
    return cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))


def built(make: Callable[[], nn.Module], config: Path, held: int) -> nn.Module:
    """The network that a description gives, as long as it is not far larger than the `held` bytes of its weights.

    Raises:
        ConfigError: it is, or the library refuses the description.
    """
    try:
        with Allowance(4 * held + ROOM):
            return make()
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}") from error
    except Exception as error:  # the libraries check little of a description, and fail anywhere
        raise ConfigError(
            f"{config}: no network can be made of it: {type(error).__name__}: {shown(str(error))[1:-1]}"
        ) from error


class Allowance(TorchDispatchMode):
    """Refuses tensors that take more bytes in all than a network of these weights can need, before they are made."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.made = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in FACTORIES:
            size = args[0] if args and isinstance(args[0], list | tuple) else ()
            count = math.prod(size) if size else _length(args) if name == "arange" else 1
            self.made += 4 * count + 64
            if self.made > self.most:
                raise ConfigError("it describes a network far larger than its weights")
        return func(*args, **(kwargs or {}))


def _length(args: Any) -> int:
    """Of `arange(end)` or `arange(start, end, step)`."""
    numbers = [a for a in args if isinstance(a, int | float)]
    low, high, step = (0, *numbers[:1], 1) if len(numbers) == 1 else (*numbers, 1)[:3] if numbers else (0, 0, 1)
    return max(0, int((high - low) / (step or 1)))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
