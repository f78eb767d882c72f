"""A safetensors file in pieces: where each tensor's bytes are, a few rows at a time, so that no file is ever whole in memory.

    8 bytes: length of the header | header, JSON: name -> dtype, shape, data_offsets | the tensors' bytes

The library reads a whole tensor and writes a whole file; a shard of Gemma 3n has 5 GB and its largest tensor 4.7 GB.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ExportError

if TYPE_CHECKING:
    import torch

CHUNK = 8 * 2**20  # bytes of a tensor that are looked at together; some five times as much is in memory meanwhile
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # those that can be added to


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: where its bytes start, counted from the file's, and how they are to be read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    @property
    def rows(self) -> int:
        """Length along the first dimension; 1 for a single number."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Values in one row."""
        return math.prod(self.shape[1:])


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Raises ExportError when the header is damaged or the file is shorter or longer than it says.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length if length < size else 0))
        entries.pop("__metadata__", None)
        tensors = [
            Tensor(name, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
            for name, entry in entries.items()
            for first, last in [entry["data_offsets"]]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is no whole safetensors file: its header cannot be read ({error}).") from None
    tensors.sort(key=lambda tensor: tensor.start)
    end = max((tensor.start + tensor.bytes for tensor in tensors), default=8 + length)
    if end != size:
        raise ExportError(f"{path} is no whole safetensors file: it has {size:,} bytes and its header says {end:,}.")
    return {tensor.name: tensor for tensor in tensors}


def split_rows(tensor: Tensor, chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of about `chunk` bytes each, at least one row."""
    step = max(1, chunk * tensor.rows // max(tensor.bytes, 1))
    for first in range(0, tensor.rows, step):
        yield first, min(first + step, tensor.rows)


def read_bytes(path: Path, tensor: Tensor, first: int = 0, last: int | None = None) -> bytearray:
    """Return the bytes of some rows."""
    row = tensor.bytes // tensor.rows if tensor.rows else 0
    count = ((tensor.rows if last is None else last) - first) * row
    with open(path, "rb") as file:
        file.seek(tensor.start + first * row)
        content = bytearray(file.read(count))
    if len(content) != count:
        raise ExportError(f"{path} ends inside {tensor.name}.")
    return content


def decode_rows(content: bytearray, path: Path, tensor: Tensor) -> "torch.Tensor":
    """Return the bytes of some rows as a float32 matrix [rows, width]. Raises ExportError for packed or whole numbers."""
    import torch

    if tensor.dtype not in DTYPES:
        raise ExportError(f"{path}: {tensor.name} is of type {tensor.dtype}; only {', '.join(DTYPES)} can be added to.")
    rows = torch.frombuffer(content, dtype=getattr(torch, DTYPES[tensor.dtype])).reshape(-1, tensor.width)
    return rows.to(torch.float32, copy=True)  # never the bytes themselves, which are compared with the result


def encode_rows(rows: "torch.Tensor", tensor: Tensor) -> bytes:
    """Return rows as the bytes that the file holds of them, rounded once to its dtype."""
    import torch

    rounded = rows.to(getattr(torch, DTYPES[tensor.dtype])).contiguous()
    return rounded.view(torch.uint8).numpy().tobytes()
