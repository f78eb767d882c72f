"""A whole model in 16 bit: base + adapter, added shard by shard in a copy of the base's files.

The sum is taken in float32, a few rows at a time, and rounded once. The base on disk is 16 bit also when training ran on
4-bit weights: adding to those would lose most of what was learned. What does not change keeps its bytes, also tensors that
transformers does not load, such as the unused keys and values of Gemma 3n's shared layers: other engines ask for them.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ExportError
from ..faults import strike
from ..hardware import GIB, free_disk
from ..model.load import find_weights
from .changes import Change, find_changes, open_change
from .shard import Tensor, decode_rows, encode_rows, read_bytes, read_header, split_rows

BESIDE = ("config.json", "generation_config.json", "model.safetensors.index.json")


def export_merged(
    model: Any, processor: Any, config: Config, folder: Path, scores: dict[str, Any] | None = None
) -> Path:
    """Write base + adapter, or the trained weights, as safetensors with config and processor.

    Raises:
        ExportError: too little disk, a base that is not on this machine, or learned weights that the base lacks.
    """
    merge_shards(model, find_base(config), folder)
    processor.save_pretrained(str(folder))
    return folder


def find_base(config: Config) -> Path:
    """Return the folder of the 16-bit base: the checkpoint's own, or the Hub's copy on this machine."""
    name = find_weights(config)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=config.model.revision, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"The 16-bit weights of {name} are not on this machine and cannot be fetched: {error}"
        ) from error


def check_space(needed: int, folder: Path) -> None:
    """Raise ExportError with needed and free bytes when the disk is too small; 1 % is left for config and processor."""
    free = free_disk(folder)
    if needed * 1.01 > free:
        raise ExportError(
            f"{folder}: the export needs {needed / GIB:.2f} GiB ({needed:,} bytes) and the disk has {free / GIB:.2f} GiB ({free:,} bytes) free. "
            "Free some space and call export_model again; what was written before stays."
        )


def find_shards(base: Path) -> list[Path]:
    """Return the weight files of a 16-bit checkpoint. Raises ExportError when there are none, or packed ones."""
    settings = base / "config.json"
    if settings.is_file() and "quantization_config" in json.loads(settings.read_text(encoding="utf-8")):
        raise ExportError(
            f"{base} holds quantised weights, and a merge needs the 16-bit ones. Train on the 16-bit checkpoint's id; load_in: 4bit quantises it while loading."
        )
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise ExportError(f"{base} holds no safetensors files to merge into.")
    return shards


def merge_shards(model: Any, base: Path, folder: Path) -> None:
    """Copy every safetensors file of the base, with index and config, and write what was learned into the copies."""
    shards = find_shards(base)
    needed = sum(shard.stat().st_size for shard in shards)
    check_space(needed, folder)
    changes = match_changes(model, shards)
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    try:
        for shard in shards:
            changed = write_shard(shard, folder / shard.name, changes)
            total += changed
            print(f"Merged {shard.name}: {changed} of {len(read_header(shard))} tensors changed", flush=True)
        for name in BESIDE:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # others may fill the disk meanwhile
            check_space(needed, folder)
            raise ExportError(f"{folder}: the disk is full; the export needs {needed:,} bytes.") from error
        raise
    if not total:
        raise ExportError(
            f"The merged weights equal those of {base}: nothing was learned that its number format can hold. Train first, or for longer."
        )


def write_shard(shard: Path, target: Path, changes: dict[str, Change]) -> int:
    """Copy one file and overwrite in place what changed; return how many tensors did."""
    shutil.copyfile(shard, target)
    changed = set()
    with open(target, "r+b") as file:
        for tensor in read_header(shard).values():
            if tensor.name in changes:
                for place, before, after in change_tensor(shard, tensor, changes[tensor.name]):
                    if after != before:
                        changed.add(tensor.name)
                        file.seek(place)
                        file.write(after)
    return len(changed)


def change_tensor(shard: Path, tensor: Tensor, change: Change) -> Iterator[tuple[int, bytearray, bytes]]:
    """Yield (place in the file, bytes of the base, bytes of the merged model), some rows at a time."""
    add = open_change(change, shard, tensor)
    for first, last in split_rows(tensor):
        before = read_bytes(shard, tensor, first, last)
        place = tensor.start + first * (tensor.bytes // tensor.rows)
        rows = strike("merge", add(decode_rows(before, shard, tensor), first))
        yield place, before, encode_rows(rows, tensor)


def match_changes(model: Any, shards: list[Path]) -> dict[str, Change]:
    """Return what changes by the name that each weight has in the base's files.

    Raises ExportError when a learned weight has none there.
    """
    changes = find_changes(model)
    names = match_names(model, [name for shard in shards for name in read_header(shard)])
    matched = {on_disk: changes[name] for on_disk, name in names.items() if name in changes}
    lost = sorted(changes.keys() - set(names.values()) - find_left_out(model))
    if lost:
        raise ExportError(
            f"{len(lost)} learned weights are not in {shards[0].parent}, for instance {lost[0]}: it is another model than the one that was trained."
        )
    return matched


def find_left_out(model: Any) -> set[str]:
    """Return names that a checkpoint leaves out because it has them elsewhere or can compute them."""
    ties = set(getattr(model, "all_tied_weights_keys", None) or {})
    stored = set(model.state_dict())
    return ties | {name for name, _ in model.named_buffers() if name not in stored}


def match_names(model: Any, on_disk: list[str]) -> dict[str, str]:
    """Return name in the files -> name in the model, by transformers' own rules for checkpoints that name things otherwise."""
    from peft import PeftModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    rules = get_model_conversion_mapping(inner)
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    stored = {name.replace(".base_layer", ""): value for name, value in inner.state_dict().items()}
    prefix = inner.base_model_prefix
    return {name: rename_source_key(name, renamings, [], prefix, stored)[0] for name in on_disk}
