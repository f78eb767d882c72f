"""What is never taken from a checkpoint: code of its own, and weights in a format that runs code when it is read.

model.safetensors      8 bytes, the header's length | "{"           read
whatever its name      80 02..05 (pickle), "PK" (a zip of pickles: torch.save), tar, HDF5     refused
"""

import json
import re
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ModelError
from ..paths import explain_path

# transformers would ask on the keyboard whether code of the checkpoint (auto_map) may run, if nothing were said
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
SAFE_ONLY: dict[str, Any] = {**NO_CODE, "use_safetensors": True}
HEADER_LIMIT = 100_000_000  # bytes, the safetensors library's own limit
MAGIC = {  # how files begin that can carry code
    b"PK\x03\x04": "a zip archive, as torch.save writes its pickles",
    b"\x89HDF": "HDF5",
    b"\x1f\x8b": "packed by gzip",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
}
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".h5", ".msgpack", ".npy")
INDEXES = ("model.safetensors.index.json",)


def check_weights(folder: Path, name: str) -> None:
    """Look at the first bytes of every weight file of a checkpoint's folder, before a library opens one.

    Args:
        name: what the checkpoint is called in messages.

    Raises ModelError for a .safetensors file that is something else, for a folder that has only pickles, and for an index
    that names files outside of the folder.
    """
    for index in INDEXES:
        if (folder / index).is_file():
            check_index(folder / index, name)
    tensors = sorted(folder.glob("*.safetensors"))
    for file in tensors:
        problem = explain_weights(file)
        if problem:
            raise ModelError(
                f"{name}: {file.name} is no safetensors file: {problem}. It is not opened; fetch the checkpoint again, from another source."
            )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLED)
    if pickles and not tensors:
        raise ModelError(
            f"{name} has its weights in {pickles[0]} and none in safetensors. Such a file can run any program while it is read, so it is "
            "not opened. Take a checkpoint with .safetensors files."
        )


def explain_weights(file: Path) -> str | None:
    """Return what a file is instead of safetensors, judged by its first bytes, or None when it is safetensors."""
    with open(file, "rb") as opened:
        start = opened.read(512)
    known = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    if known:
        return known
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle"
    if start[257:262] == b"ustar":
        return "a tar archive"
    if len(start) < 9:  # cut short: the library says so, and there is nothing to run
        return None
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > HEADER_LIMIT:
        return "its first bytes are no such header"
    return None


def check_index(index: Path, name: str) -> None:
    """Raise ModelError when an index of shards names anything but safetensors files of its own folder."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        wrong = sorted(str(shard) for shard in shards if explain_shard(shard))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{name}: {index.name} cannot be read. Fetch the checkpoint again.") from None
    if wrong:
        raise ModelError(
            f"{name}: {index.name} names {wrong[0]!r}, and weights are read from .safetensors files of the checkpoint's own folder alone."
        )


def explain_shard(shard: Any) -> bool:
    """Say whether a shard's name is none of a safetensors file in the same folder."""
    return not isinstance(shard, str) or bool(explain_path(shard)) or "/" in shard or not shard.endswith(".safetensors")


def describe_source(model: Any, config: Config) -> dict[str, str | None]:
    """Return what run.json says about where the base's files came from: id and revision as asked, name and commit as loaded.

    Unsloth may load a quantised copy, whose name it is then. `commit` is None for a folder that is not the Hub's copy here.
    """
    settings = model.config
    name = config.model.id if config.model.slice else getattr(settings, "_name_or_path", None)
    return {
        "id": config.model.id,
        "revision": config.model.revision,
        "loaded": name or None,
        "commit": getattr(settings, "_commit_hash", None),
    }


def find_commit(path: Path) -> str | None:
    """Return the commit of a folder in the Hub's cache, models--owner--name/snapshots/<commit>, or None for another one."""
    return path.name if path.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", path.name) else None
