"""A slice's tensors: which part of which source tensor each one is, read and written a few gigabytes at a time.

    feed-forward part       gate, up: [width, hidden]   first rows        down: [hidden, width]   first columns
    per-layer embeddings    table: [words, layers * n]  columns of the kept layers
    their projection        [layers * n, hidden]        rows of the kept layers
    other tensors of a layer                            as they are, under the layer's new number
    everything else, towers included                    as it is

The released checkpoints hold keys and values of the layers that share those of others, and other engines ask for them: they
are carried over where the source has them.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .slice_plan import SlicePlan

SHARD = 4 * 10**9  # bytes of one file, and about the memory that a slice takes; the table of E2B alone has 4.03e9
CHUNK = 16384  # rows of a tensor read at once, 0.3e9 bytes of the table
INDEX = "model.safetensors.index.json"
# the language model's own layers: the towers have blocks of other names; text-only checkpoints have the shorter prefix
LAYER = re.compile(r"((?:model\.)?(?:language_model\.)?(?:model\.)?layers\.)(\d+)(\..+)")
CUT = {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1}  # name -> dimension of the width
TABLE, PROJECTION = "embed_tokens_per_layer.weight", "per_layer_model_projection.weight"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Piece:
    """One tensor of a slice: where it comes from, and which ranges of one dimension it keeps (none: all)."""

    file: Path
    name: str
    new_name: str
    shape: tuple[int, ...]
    size: int  # bytes
    dim: int = 0
    ranges: tuple[tuple[int, int], ...] = ()


def find_shards(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files. Raises ModelError when there are none, or the index names a missing one."""
    index = folder / INDEX
    if not index.is_file():
        shards = sorted(folder.glob("*.safetensors"))
    else:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = [folder / name for name in sorted(set(names))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        what = f"lacks {missing[0]}, which its index names" if missing else "holds no safetensors files"
        raise ModelError(f"{folder} {what}. Fetch it again; other formats cannot be sliced.")
    return shards


def open_shard(shard: Path) -> Any:
    """Open a safetensors file for reading in parts. Raises ModelError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(shard, "pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard} cannot be read ({error}). Fetch or save it again.") from None


def list_pieces(shards: Iterable[Path], plan: SlicePlan) -> list[Piece]:
    """Return every tensor that the slice keeps, from the files' headers alone.

    Raises ModelError when a tensor that has to be cut is missing or has another shape than config.json says.
    """
    pieces, layers = [], {old: new for new, old in enumerate(plan.layers)}
    for shard in shards:
        with open_shard(shard) as file:
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                view = file.get_slice(name)
                found = LAYER.fullmatch(name)
                if found and int(found[2]) not in layers:
                    continue
                new_name = f"{found[1]}{layers[int(found[2])]}{found[3]}" if found else name
                pieces.append(cut_piece(shard, name, new_name, tuple(view.get_shape()), view.get_dtype(), plan))
    needed = len(plan.layers) * len(CUT) + 2
    cut = [piece for piece in pieces if find_cut(piece.name, plan)]
    if len(cut) != needed:
        raise ModelError(
            f"{plan.source} has {len(cut)} of the {needed} tensors that a slice is cut from. Its files do not make a whole "
            "Gemma 3n checkpoint: fetch or save it again."
        )
    return pieces


def find_cut(name: str, plan: SlicePlan) -> tuple[int, int, tuple[tuple[int, int], ...]] | None:
    """Return the dimension in which a source tensor is cut, its length there, and the ranges kept; None: it stays whole."""
    found = LAYER.fullmatch(name)
    if found and found[3].removeprefix(".") in CUT:
        layer = int(found[2])
        return CUT[found[3].removeprefix(".")], plan.source_widths[layer], ((0, plan.widths[plan.layers.index(layer)]),)
    if name.endswith((TABLE, PROJECTION)):
        ranges = tuple((layer * plan.per_layer, (layer + 1) * plan.per_layer) for layer in plan.layers)
        return int(name.endswith(TABLE)), len(plan.source_widths) * plan.per_layer, join_ranges(ranges)
    return None


def join_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join ranges that touch: (0, 4), (4, 8), (12, 16) -> (0, 8), (12, 16)."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return tuple(joined)


def cut_piece(shard: Path, name: str, new_name: str, shape: tuple[int, ...], dtype: str, plan: SlicePlan) -> Piece:
    """Return one kept tensor with its new shape. Raises ModelError when the source's shape is not what config.json says."""
    if dtype not in BYTES:
        raise ModelError(
            f"{plan.source}: {name} is stored as {dtype}, and 16 or 32 bit numbers are needed to slice it."
        )
    cut = find_cut(name, plan)
    if cut is None:
        return Piece(shard, name, new_name, shape, count_bytes(shape, dtype))
    dim, length, ranges = cut
    if len(shape) != 2 or shape[dim] != length:
        raise ModelError(
            f"{plan.source}: {name} has shape {list(shape)}, and config.json describes one of {length} in dimension {dim}. "
            "Its files do not belong together: fetch or save it again."
        )
    kept = sum(stop - start for start, stop in ranges)
    shape = (kept, shape[1]) if dim == 0 else (shape[0], kept)
    return Piece(shard, name, new_name, shape, count_bytes(shape, dtype), dim, ranges if kept < length else ())


def count_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of a tensor."""
    size = BYTES[dtype]
    for length in shape:
        size *= length
    return size


def write_shards(pieces: list[Piece], folder: Path) -> None:
    """Write the tensors as model.safetensors, or in several files with an index, named as transformers names them."""
    from safetensors.torch import save_file

    groups = list(group_pieces(pieces, SHARD))
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        single = len(groups) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        begun, size = time.monotonic(), sum(piece.size for piece in group)
        save_file(read_pieces(group), folder / name, {"format": "pt"})
        places |= {piece.new_name: name for piece in group}
        print(
            f"Sliced {name} of {len(groups)}: {len(group)} tensors, {size / 1e9:.2f} GB, {time.monotonic() - begun:.1f} s",
            flush=True,
        )
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(piece.size for piece in pieces)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def group_pieces(pieces: list[Piece], limit: int) -> Iterator[list[Piece]]:
    """Yield the tensors of one file after the other, in the source's order, each file at most `limit` bytes or one tensor."""
    group: list[Piece] = []
    for piece in pieces:
        if group and sum(other.size for other in group) + piece.size > limit:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def read_pieces(group: list[Piece]) -> dict[str, Any]:
    """Return the tensors of one file; whole ones stay in the source's mapped file until they are written."""
    tensors = {}
    for shard in dict.fromkeys(piece.file for piece in group):
        with open_shard(shard) as file:
            for piece in group:
                if piece.file == shard:
                    tensors[piece.new_name] = read_cut(piece) if piece.ranges else file.get_tensor(piece.name)
    return tensors


def read_cut(piece: Piece) -> Any:
    """Return the kept part of one tensor, read some rows at a time.

    The file is opened anew for each, because the pages of a mapped file count as this process's memory until it is closed.
    Tried: reading only the kept columns of the table; three times slower than whole rows.
    """
    import torch

    whole, filled = None, 0
    for start, stop in piece.ranges if piece.dim == 0 else ((0, piece.shape[0]),):
        for row in range(start, stop, CHUNK):
            with open_shard(piece.file) as file:
                part = file.get_slice(piece.name)[row : min(row + CHUNK, stop)]
            if piece.dim == 1:
                part = torch.cat([part[:, first:last] for first, last in piece.ranges], dim=1)
            whole = torch.empty(piece.shape, dtype=part.dtype) if whole is None else whole
            whole[filled : filled + len(part)] = part
            filled += len(part)
    return whole
