"""Weights from safetensors files: one, or several with an index."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.model.weights.source import TensorInfo

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_INTEGER_BYTES = {"I32": 4, "I64": 8}
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # old checkpoints store what config.json implies


class SafetensorsWeights:
    """A WeightSource over the memory-mapped files of a directory."""

    def __init__(self, directory: Path, *, has_integers: bool = False) -> None:
        """Open every file and read its header. Raises ModelLoadError.

        has_integers: whether the checkpoint packs weights in integers; else there must be none.
        """
        self._item_bytes = _ITEM_BYTES | (_INTEGER_BYTES if has_integers else {})
        self._stack = contextlib.ExitStack()
        self._slices: dict[str, Any] = {}
        tensors: dict[str, TensorInfo] = {}
        try:
            for file_name, wanted in _files(directory).items():
                self._open(directory / file_name, wanted, tensors)
        except BaseException:
            self._stack.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = tensors

    def _open(
        self, path: Path, wanted: frozenset[str] | None, tensors: dict[str, TensorInfo]
    ) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            names = frozenset(file.keys())
        except FileNotFoundError:
            raise ModelLoadError(
                f"{path.name} is missing; get the model again from its source"
            ) from None
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{path.name} is not a whole safetensors file ({error}); download it again"
            ) from None
        if wanted is not None and not wanted <= names:
            missing = min(wanted - names)
            raise ModelLoadError(
                f"{path.name} lacks tensor {missing!r}, which {_INDEX} places there; "
                "download it again"
            )
        for name in names if wanted is None else wanted:
            if name.endswith(_IGNORED_SUFFIX):
                continue
            piece = file.get_slice(name)
            dtype = piece.get_dtype()
            shape = tuple(piece.get_shape())
            if dtype not in self._item_bytes:
                raise ModelLoadError(
                    f"{path.name}: tensor {name!r} has type {dtype}, which is not supported; "
                    f"use a checkpoint with only {', '.join(_ITEM_BYTES)}, or a GGUF file"
                )
            num_bytes = self._item_bytes[dtype]
            for size in shape:
                num_bytes *= size
            self._slices[name] = piece
            tensors[name] = TensorInfo(shape=shape, dtype=dtype, num_bytes=num_bytes)

    def load_into(self, name: str, out: Tensor, first_row: int = 0, first_column: int = 0) -> None:
        """See WeightSource."""
        piece = self._slices[name]
        if out.ndim == 0:
            out.copy_(piece[...])
        elif out.ndim == 1:
            out.copy_(piece[first_row : first_row + len(out)])
        else:
            last_column = first_column + out.shape[1]
            out.copy_(piece[first_row : first_row + len(out), first_column:last_column])

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """A part of a tensor as stored; None is all."""
        piece = self._slices[name]
        kept = slice(None) if rows is None else slice(rows.start, rows.stop)
        if columns is not None:
            part: Tensor = piece[kept, columns.start : columns.stop]
        else:
            part = piece[kept]
        return part

    def load_groups(self, name: str, rows: range, columns: range | None = None) -> GroupQuantized:
        """See WeightSource; there are no groups."""
        raise AssertionError(name)

    def sample(self, name: str) -> bytes:
        """See WeightSource."""
        piece = self._slices[name]
        num_dims = len(piece.get_shape())
        values: Tensor = piece[...] if num_dims == 0 else piece[: 1 if num_dims > 1 else 16]
        return values.float().flatten()[:16].numpy().tobytes()

    def close(self) -> None:
        """See WeightSource."""
        self._slices.clear()
        self._stack.close()


def _files(directory: Path) -> dict[str, frozenset[str] | None]:
    """Files to open, each with the tensors wanted from it; None is all."""
    index_path = directory / _INDEX
    if not index_path.is_file():
        if (directory / _SINGLE_FILE).is_file():
            return {_SINGLE_FILE: None}
        found = sorted(path.name for path in directory.glob("*.safetensors"))
        if len(found) == 1:
            return {found[0]: None}
        raise ModelLoadError(
            f"the model directory holds no {_SINGLE_FILE}, no {_INDEX} and no .gguf file; "
            "get the model again from its source"
        )
    try:
        weight_map = json.loads(index_path.read_bytes())["weight_map"]
        pairs = [(str(name), str(file_name)) for name, file_name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise ModelLoadError(f"{_INDEX} holds no weight_map; download it again") from None
    wanted: dict[str, set[str]] = {}
    for name, file_name in pairs:
        if Path(file_name).name != file_name:
            raise ModelLoadError(
                f"{_INDEX} names {file_name!r}, which is outside the model directory"
            )
        wanted.setdefault(file_name, set()).add(name)
    return {file_name: frozenset(names) for file_name, names in wanted.items()}
