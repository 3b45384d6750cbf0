"""The files of a published autoencoder: JSON and tensors, or only the shapes of tensors."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stages.dictionary.formats.fields import Fields, checked_fields
from stages.storage import Store

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_DAMAGED = (SafetensorError, ValueError, KeyError, EOFError, struct.error, zipfile.BadZipFile)
_LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


class _Entry(Fields):
    """What a safetensors header says of a tensor; offsets are bytes after the header."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


class Folder:
    """A folder of a published autoencoder, on any filesystem.

    Attributes:
        store: Where its files are.
        shapes_only: Whether tensors are on the meta device: shapes, without a read of the data.
    """

    def __init__(self, store: Store, *, shapes_only: bool = False) -> None:
        """Keep where the files are."""
        self.store = store
        self.shapes_only = shapes_only

    @property
    def path_parts(self) -> list[str]:
        """The names on the way to the folder, its own last."""
        return [part for part in self.store.url.split("/") if part]

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file.

        Raises:
            ValueError: It isn't one.
        """

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is no JSON number")

        try:
            value = json.loads(self.store.read_bytes(name), parse_constant=refuse)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{name} must hold an object, got {type(value).__name__}")
        return value

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors or npz file; floating-point ones in float32.

        Raises:
            ValueError: The file is neither, is damaged, or holds pickled objects.
        """
        read = _npz if name.endswith(".npz") else _safetensors
        with self.store.open(name) as file:
            try:
                found = read(file, self.shapes_only)
            except _DAMAGED as error:
                raise ValueError(f"{name} can't be read: {error}") from error
        return {key: _as_float32(value) for key, value in found.items()}

    def unpickled(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state in a file of torch.save: tensors as `tensors` gives them, and other values.

        Only weights and plain values are unpickled, nothing that could run code.

        Raises:
            ValueError: The file is no such file, or holds other objects.
        """
        with self.store.open(name) as file:
            try:
                state = torch.load(
                    file, map_location="meta" if self.shapes_only else "cpu", weights_only=True
                )
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"{name} holds more than weights and plain values, or is no file of "
                    "torch.save; it isn't unpickled, since that could run code. Convert it where "
                    "it comes from"
                ) from error
            except (RuntimeError, EOFError) as error:
                raise ValueError(f"{name} can't be read: {error}") from error
        if not isinstance(state, Mapping):
            raise ValueError(f"{name} must hold a state_dict, got {type(state).__name__}")
        tensors = {str(k): _as_float32(v) for k, v in state.items() if isinstance(v, Tensor)}
        return tensors, {str(k): v for k, v in state.items() if not isinstance(v, Tensor)}


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _safetensors(file: IO[bytes], shapes_only: bool) -> dict[str, Tensor]:
    if not shapes_only:
        return load(file.read())
    (size,) = struct.unpack("<Q", file.read(8))
    if size > _LARGEST_HEADER:
        raise ValueError("it has no safetensors header")
    header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: checked_fields(name, _Entry, entry) for name, entry in header.items()}
    told = 8 + size + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    held = file.seek(0, os.SEEK_END)
    if held != told:
        raise ValueError(f"it holds {held} bytes, but its header tells of {told}: fetch it again")
    for name, entry in entries.items():
        if math.prod(entry.shape) > entry.data_offsets[1] - entry.data_offsets[0]:
            raise ValueError(f"{name} of shape {entry.shape} has no room in it")
    return {
        name: _empty(entry.shape, floating=entry.dtype in _FLOATS)
        for name, entry in entries.items()
    }


def _npz(file: IO[bytes], shapes_only: bool) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        found: dict[str, Tensor] = {}
        for member in archive.namelist():
            with archive.open(member) as stream:
                name = member.removesuffix(".npy")
                if shapes_only:
                    shape, dtype = _npy_header(stream)
                    found[name] = _empty(shape, floating=np.issubdtype(dtype, np.floating))
                else:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                    found[name] = torch.from_numpy(np.ascontiguousarray(array))
        return found


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return shape, dtype


def _empty(shape: tuple[int, ...] | list[int], *, floating: bool) -> Tensor:
    dtype = torch.float32 if floating else torch.int64
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
