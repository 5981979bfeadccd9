"""Reads the header of a GGUF file and maps its tensors. Needs numpy only.

Format: magic "GGUF", version, counts, key-value pairs, tensor descriptions, padding, data;
little-endian. A damaged or hostile file raises ModelLoadError: every count and size is
checked against the bytes that are there before anything is allocated.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.weights.dequantize import FORMATS, UNSUPPORTED_NAMES, QuantFormat

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SMALLEST_PAIR, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """Where a tensor lies and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, the reverse of the file's order."""
    format: QuantFormat
    offset: int
    """From the start of the file, in bytes."""
    num_bytes: int


class GGUFFile:
    """A mapped GGUF file: metadata as Python values, tensors as raw blocks."""

    def __init__(self, path: Path) -> None:
        """Map the file and read its header. Raises ModelLoadError."""
        self.name = path.name
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelLoadError(f"{self.name} does not exist; check the path") from None
        except ValueError:
            raise ModelLoadError(f"{self.name} is empty; download it again") from None
        except OSError as error:
            raise ModelLoadError(f"{self.name} cannot be read: {error.strerror}") from None
        try:
            header = _HeaderReader(self._map, self.name)
            self.metadata = header.metadata
            """Every key-value pair; arrays are lists."""
            self.tensors = header.tensors
            """By their names in the file."""
        except BaseException:
            self._map.close()
            raise

    def blocks(self, tensor: GGUFTensor) -> npt.NDArray[Any]:
        """A tensor's blocks, [num_rows, blocks a row], as a view of the mapped file."""
        num_rows = tensor.num_bytes // self.row_bytes(tensor)
        blocks = np.frombuffer(
            self._map,
            dtype=tensor.format.block,
            count=tensor.num_bytes // tensor.format.block.itemsize,
            offset=tensor.offset,
        )
        return blocks.reshape(num_rows, -1)

    @staticmethod
    def row_bytes(tensor: GGUFTensor) -> int:
        """Bytes of the innermost dimension."""
        return tensor.shape[-1] // tensor.format.num_elements * tensor.format.block.itemsize

    def sample(self, tensor: GGUFTensor, num_bytes: int) -> bytes:
        """The first bytes of a tensor as stored."""
        return self._map[tensor.offset : tensor.offset + min(num_bytes, tensor.num_bytes)]

    def close(self) -> None:
        """Unmap the file, or leave that to whoever still holds an array of blocks."""
        # An exception on its way up keeps frames alive, and with them views of the map.
        with contextlib.suppress(BufferError):
            self._map.close()


class _HeaderReader:
    """A cursor over the header; ends up holding what it read."""

    def __init__(self, data: mmap.mmap, file_name: str) -> None:
        self._data = data
        self._size = len(data)
        self._file_name = file_name
        self._position = 0
        if data[:4] != _MAGIC:
            raise ModelLoadError(f"{file_name} is not a GGUF file; check the path")
        self._position = 4
        version = self._scalar("<I")
        if version not in _VERSIONS:
            raise ModelLoadError(
                f"{file_name}: GGUF version {version} is not supported; "
                "supported: 2 and 3, little-endian"
            )
        num_tensors = self._count(_SMALLEST_TENSOR, 8)
        num_pairs = self._count(_SMALLEST_PAIR)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"), key)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"alignment {alignment!r} is not a power of two")
        described = [self._describe_tensor() for _ in range(num_tensors)]
        data_start = -(-self._position // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, offset in described:
            if name in self.tensors:
                raise self._damaged(f"two tensors are called {name!r}")
            if offset % alignment:
                raise self._damaged(f"tensor {name!r} is not aligned")
            self.tensors[name] = self._place(name, shape, type_id, data_start + offset)

    def _damaged(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self._file_name} is damaged: {what}; download it again")

    def _truncated(self) -> ModelLoadError:
        return ModelLoadError(
            f"{self._file_name} is truncated: its header goes on past {self._size} bytes; "
            "download it again"
        )

    def _take(self, num_bytes: int) -> int:
        """Step over bytes that must be there; returns where they start."""
        start = self._position
        if num_bytes > self._size - start:
            raise self._truncated()
        self._position = start + num_bytes
        return start

    def _scalar(self, layout: str) -> Any:
        start = self._take(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)[0]

    def _count(self, smallest_item: int, reserved: int = 0) -> int:
        """A 64-bit count of items that must fit in what is left of the file."""
        count: int = self._scalar("<Q")
        if count > (self._size - self._position - reserved) // smallest_item:
            raise ModelLoadError(
                f"{self._file_name} is truncated or damaged: it claims {count} items in "
                f"{self._size} bytes; download it again"
            )
        return count

    def _string(self) -> str:
        start = self._take(self._count(1))
        return self._data[start : self._position].decode("utf-8", errors="replace")

    def _strings(self, count: int) -> list[str]:
        """Many strings; a vocabulary has 10^5, so the loop is kept flat."""
        data, size, position = self._data, self._size, self._position
        read_length = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        for _ in range(count):
            start = position + 8
            position = start + read_length(data, position)[0] if start <= size else size + 1
            if position > size:
                raise self._truncated()
            strings.append(data[start:position].decode("utf-8", errors="replace"))
        self._position = position
        return strings

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            layout = _SCALARS.get(kind)
            if layout is None:
                raise self._damaged(f"{key!r} has unknown value type {kind}")
            return self._scalar(layout)
        item_kind = self._scalar("<I")
        if item_kind == _STRING:
            return self._strings(self._count(8))
        layout = _SCALARS.get(item_kind)
        if layout is None:
            raise self._damaged(f"{key!r} is an array of unknown type {item_kind}")
        dtype = np.dtype(layout)
        count = self._count(dtype.itemsize)
        start = self._take(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start).tolist()

    def _describe_tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._scalar("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(num_dimensions))
        return name, shape[::-1], self._scalar("<I"), self._scalar("<Q")

    def _place(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensor:
        quant_format = FORMATS.get(type_id)
        if quant_format is None:
            supported = ", ".join(known.name for known in FORMATS.values())
            type_name = UNSUPPORTED_NAMES.get(type_id, f"number {type_id}")
            raise ModelLoadError(
                f"{self._file_name}: tensor {name!r} has type {type_name}, which is not "
                f"supported; use a file with only {supported}"
            )
        num_elements = 1
        for size in shape:
            num_elements *= size
        if not num_elements or shape[-1] % quant_format.num_elements:
            raise self._damaged(
                f"tensor {name!r} of shape {list(shape)} is not whole {quant_format.name} blocks"
            )
        num_bytes = num_elements // quant_format.num_elements * quant_format.block.itemsize
        if offset + num_bytes > self._size:
            raise ModelLoadError(
                f"{self._file_name} is truncated: tensor {name!r} ends at byte "
                f"{offset + num_bytes} of {self._size}; download it again"
            )
        return GGUFTensor(
            name=name, shape=shape, format=quant_format, offset=offset, num_bytes=num_bytes
        )
