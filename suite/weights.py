"""Load a network of a diffusers or transformers class from a sub-folder, with errors that name the file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from suite.errors import ConfigError
from suite.finite import load_finite
from suite.input_file import check, read_json
from suite.patches_as_products import patches_as_products

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
    kept = {} if "_class_name" in config else _constants(module)
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
    content = read_json(weights, "index of weights")
    try:
        names = content["weight_map"].values()
        return [weights.parent / name for name in sorted(set(names))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{weights} is not an index of weights: {error!r}") from error


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} is not a network folder: it has no config.json")
    config = read_json(file, "network description")
    if "_class_name" not in config and not config.get("architectures"):
        raise ConfigError(f"{file} names neither _class_name (diffusers) nor architectures (transformers)")
    return config


def _build(folder: Path, config: dict) -> nn.Module:
    library = "diffusers" if "_class_name" in config else "transformers"
    name = config["_class_name"] if library == "diffusers" else config["architectures"][0]
    try:
        package = importlib.import_module(library)
    except ImportError as error:
        extra = "image" if library == "diffusers" else "text"
        raise ConfigError(f"{library} is missing; pip install 'efficient-diffusion-suite[{extra}]'") from error
    cls = getattr(package, name, None)
    if cls is None:
        raise ConfigError(f"{folder / 'config.json'}: {library} has no class {name!r}")
    try:
        return cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'}: {name} refuses it: {error}") from error
