"""Slices of a Gemma 3n checkpoint: a smaller model cut out of a larger one's files, without training and without loading it.

E2B is such a slice of E4B, and any model between the two can be cut likewise (`forgekit/slice_presets.py`). The result is a
checkpoint as transformers saves it: whole, or not there at all.
"""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from ..config import Config
from ..environment import cache_folder
from ..errors import ModelError
from ..files import share_files, write_json
from ..hardware import GIB, free_disk
from ..run_folder import find_version
from .load import explain_load_error, find_model
from .shapes import prepare_libraries
from .slice_plan import SlicePlan, plan_slice
from .slice_weights import INDEX, find_shards, list_pieces, write_shards
from .trust import NO_CODE, check_weights, find_commit

RECORD = "slice.json"  # beside config.json: what the slice was cut from
BESIDE = (".json", ".jinja", ".model", ".txt")  # tokenizer, processor, template, generation settings
NOT_COPIED = ("config.json", INDEX, RECORD)
FAMILY = ("gemma3n", "gemma3n_text")


def slice_checkpoint(config: Config, folder: str | Path) -> Path:
    """Write the slice that `model.slice` describes of `model.id` into a new folder: weights, config.json, processor, slice.json.

    Returns the folder. Raises ModelError when the source is no Gemma 3n, the combination would break it, the folder
    exists, or the disk is too small.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists():
        raise ModelError(f"{folder} exists, and nothing is written over. Name another folder, or move this one away.")
    prepare_libraries(config)
    plan = read_plan(find_checkpoint(config, "config.json"), config)
    print(f"Slicing {plan}.", flush=True)
    write_slice(find_checkpoint(config), folder, plan, config)
    return folder


def find_checkpoint(config: Config, *files: str) -> Path:
    """Return the folder of `model.id`: its own, or the Hub's copy on this machine, fetched when needed.

    Args:
        files: what has to be there; none: all. A combination is refused by config.json, before gigabytes are fetched.
    """
    name = find_model(config)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = files or ("*.safetensors", *(f"*{ending}" for ending in BESIDE))
    try:
        return Path(snapshot_download(name, revision=config.model.revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise explain_load_error(config, error) from error


def name_source(config: Config) -> str:
    """Return what a checkpoint is called in messages and in slice.json: the Hub id, or the folder's name without its path."""
    return Path(find_model(config)).name if Path(find_model(config)).is_dir() else config.model.id


def read_plan(path: Path, config: Config) -> SlicePlan:
    """Resolve `model.slice` against a checkpoint's config.json. Raises ModelError when it is no Gemma 3n, or packed."""
    source = name_source(config)
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path / 'config.json'} cannot be read ({error}). Fetch or save the checkpoint again."
        ) from None
    check_family(raw, source)
    from transformers import AutoConfig

    return plan_slice(AutoConfig.from_pretrained(path, **NO_CODE).get_text_config(), config.model.slice, source)


def check_family(settings: dict[str, Any], source: str) -> None:
    """Raise ModelError unless a config.json describes a Gemma 3n in 16 or 32 bit."""
    kind = settings.get("model_type")
    if kind not in FAMILY:
        raise ModelError(
            f"{source} is of the type {kind}, and only Gemma 3n was trained so that parts of it work alone. "
            "Take one of its checkpoints, for instance google/gemma-3n-E4B-it."
        )
    if "quantization_config" in settings:
        raise ModelError(f"{source} holds quantised weights, which cannot be cut. Slice the 16-bit checkpoint.")


def write_slice(path: Path, folder: Path, plan: SlicePlan, config: Config) -> None:
    """Write a slice into a temporary folder beside `folder`, and give it that name when it is whole."""
    from safetensors import SafetensorError

    check_weights(path, plan.source)
    pieces = list_pieces(find_shards(path), plan)
    check_space(sum(piece.size for piece in pieces), folder)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        write_shards(pieces, temporary)
        copy_beside(path, temporary)
        write_json(temporary / "config.json", change_config(path / "config.json", plan))
        write_json(temporary / RECORD, describe_slice(plan, config) | {"commit": find_commit(path)})
        share_files(temporary)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be written: {error}. Nothing of it is left; free some space or name another."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_space(needed: int, folder: Path) -> None:
    """Raise ModelError with needed and free bytes when the disk is too small; 100 MB are left for the processor."""
    free, needed = free_disk(folder), needed + 10**8
    if needed > free:
        raise ModelError(
            f"{folder}: the slice needs {needed / GIB:.2f} GiB ({needed:,} bytes) and the disk has {free / GIB:.2f} GiB "
            f"({free:,} bytes) free. Free some space, or name a folder on another disk (model.slice: FORGEKIT_CACHE)."
        )


def copy_beside(path: Path, folder: Path) -> None:
    """Copy tokenizer, processor, template and generation settings, byte for byte."""
    files = [file for file in path.iterdir() if file.suffix in BESIDE and file.name not in NOT_COPIED]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if not any(file.name == "tokenizer.json" or file.suffix == ".model" for file in files):
        print(f"{path} has no tokenizer, so the slice has none.", flush=True)


def change_config(path: Path, plan: SlicePlan) -> dict[str, Any]:
    """Return the source's config.json with the slice's fields; all others stay as they were written."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    text = settings if settings["model_type"] == "gemma3n_text" else settings.setdefault("text_config", {})
    text.update(plan.settings)
    return settings


def describe_slice(plan: SlicePlan, config: Config) -> dict[str, Any]:
    """Return what slice.json says: the source, and of each layer the source's number and the width."""
    return {
        "source": plan.source,
        "revision": config.model.revision,
        "layers": list(plan.layers),
        "skipped": list(plan.skipped),
        "widths": list(plan.widths),
        "forgekit": find_version("forgekit"),
    }


# ---- model.slice in a recipe -----------------------------------------------------------------------------------------


def make_slice(config: Config) -> Path:
    """Return the folder of a recipe's slice in the cache ($FORGEKIT_CACHE/slices), made when it is not there yet.

    The folder's name holds a hash of the source's files (place, size, time) and of what is kept, so that a changed source is
    sliced anew. It is as large as the sliced model, and stays until somebody deletes it.
    """
    plan = read_plan(find_checkpoint(config, "config.json"), config)
    path = find_checkpoint(config)
    folder = cache_folder() / "slices" / name_folder(path, plan)
    if not folder.exists():
        print(f"Slicing {plan}.\nMade once, into {folder}", flush=True)
        try:
            write_slice(path, folder, plan, config)
        except ModelError:
            if not folder.exists():  # another process may have finished the same slice first
                raise
    return folder


def record_slice(config: Config) -> dict[str, Any]:
    """Return what run.json says about a recipe's slice: its folder and what slice.json holds; nothing without a slice."""
    if not config.model.slice:
        return {}
    folder = make_slice(config)
    return {"slice": {"folder": str(folder), **json.loads((folder / RECORD).read_text(encoding="utf-8"))}}


def name_folder(path: Path, plan: SlicePlan) -> str:
    """Return the name of a slice's folder in the cache."""
    files = [path / "config.json", *find_shards(path)]
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([seen, plan.settings, plan.layers])
    label = plan.source.rpartition("/")[2]
    return f"{label}-{len(plan.layers)}-layers-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def name_base(name: str, choice: dict[str, Any]) -> str:
    """Return what an adapter calls its base: the model's name, and behind # the slice, so that nobody loads the whole one.

    An adapter of a slice fits the whole model's layers by name and not by meaning; PEFT would load it there without a word.
    """
    return f"{name}#slice={json.dumps(choice, separators=(',', ':'))}" if choice else name


def split_base(name: str) -> dict[str, Any]:
    """Return the settings that load an adapter's base: the other way of `name_base`."""
    name, _, choice = name.partition("#slice=")
    return {"model.id": name, "model.slice": json.loads(choice or "{}")}
