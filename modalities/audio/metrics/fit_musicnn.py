"""Make `weights/musicnn.safetensors` from the TensorFlow checkpoint in the package musicnn (ISC).

python -m suite.modalities.audio.metrics.fit_musicnn

The package is fetched as an archive, not installed: it asks for a TensorFlow of 2019. The checkpoint's index is a
table of sorted keys in the format of LevelDB whose values are protocol buffers; both are read here.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from suite.errors import ConfigError
from suite.files.output import write
from suite.modalities.audio.metrics.musicnn import WEIGHTS
from suite.modalities.shared.fetch import Archive, cache_dir, fetch, members

PACKAGE = Archive("pip", "musicnn", "0.1.0", "ISC", "f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa")
_FOLDER = "musicnn/MTT_musicnn/"
_TYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64}
_EPS = 1e-3  # of TensorFlow's batch norm


def convert(checkpoint: dict[str, NDArray]) -> dict[str, Tensor]:
    """Kernels in PyTorch's order as float16, and each batch norm as a scale and a shift in float32."""
    tensors = {}
    for k in range(8):
        name = _numbered("conv2d", k)
        kernel = torch.from_numpy(checkpoint[f"{name}/kernel"].copy()).permute(3, 2, 0, 1)
        tensors[f"conv.{k}.kernel"] = kernel.contiguous().half()
        tensors[f"conv.{k}.bias"] = torch.from_numpy(checkpoint[f"{name}/bias"].copy())
    for k in range(11):
        gamma, beta, mean, variance = (
            torch.from_numpy(checkpoint[f"{_numbered('batch_normalization', k)}/{part}"].copy())
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / (variance + _EPS).sqrt()
        tensors[f"norm.{k}.scale"], tensors[f"norm.{k}.shift"] = scale, beta - mean * scale
    for k in range(2):
        name = _numbered("dense", k)
        tensors[f"dense.{k}.kernel"] = torch.from_numpy(checkpoint[f"{name}/kernel"].copy()).T.contiguous().half()
        tensors[f"dense.{k}.bias"] = torch.from_numpy(checkpoint[f"{name}/bias"].copy())
    return tensors


def read_checkpoint(index: bytes, data: bytes) -> dict[str, NDArray]:
    """The arrays of a TensorFlow V2 checkpoint of one shard, by name."""
    footer, at = index[-48:], 0
    for _ in range(2):  # the handle of the index of meta blocks
        _, at = _varint(footer, at)
    offset, at = _varint(footer, at)
    length, at = _varint(footer, at)
    found = {}
    for _, handle in _entries(index, offset, length):
        begin, at = _varint(handle, 0)
        size, _ = _varint(handle, at)
        for key, value in _entries(index, begin, size):
            if not key:  # the header of the checkpoint
                continue
            numbers, parts = _fields(value)
            shape = [_fields(size)[0].get(1, 0) for size in _fields(parts.get(2, [b""])[0])[1].get(2, [])]
            start, count = numbers.get(4, 0), numbers.get(5, 0)
            found[key.decode()] = np.frombuffer(data[start : start + count], _TYPES[numbers.get(1, 1)]).reshape(shape)
    return found


def _numbered(name: str, k: int) -> str:
    return f"{name}_{k}" if k else name


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A little-endian base-128 number, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _entries(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one uncompressed block of the table; a key shares a prefix with the one before."""
    block = data[offset : offset + size]
    if data[offset + size]:
        raise ConfigError("the checkpoint's index is compressed; expected that of musicnn 0.1.0")
    end = len(block) - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + fresh]
        at += fresh
        yield key, block[at : at + length]
        at += length


def _fields(message: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """The numbers of a protocol buffer by field, and its strings, which may repeat; checksums are left out."""
    numbers: dict[int, int] = {}
    parts: dict[int, list[bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            numbers[tag >> 3], at = _varint(message, at)
        elif tag & 7 == 2:
            size, at = _varint(message, at)
            parts.setdefault(tag >> 3, []).append(message[at : at + size])
            at += size
        else:
            at += 4 if tag & 7 == 5 else 8
    return numbers, parts


def main() -> None:
    """Fetch, convert, write."""
    parser = argparse.ArgumentParser(description="Convert the weights of the music features.")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="folder of the archives")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write")
    given = parser.parse_args()
    files = {Path(name).name: content for name, content in members(fetch(PACKAGE, given.cache), f"^{_FOLDER}")}
    tensors = convert(read_checkpoint(files[".index"], files[".data-00000-of-00001"]))
    write(given.out, lambda made: save_file(tensors, made))
    print(f"Wrote {given.out}")


if __name__ == "__main__":
    main()
