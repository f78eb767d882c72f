"""The merged model read back: every byte is the base's or the sum, and its logits are the trained model's."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ForgekitError
from ..hardware import GIB, choose_dtype
from ..model.load import find_weights, hide_progress_bars, load_transformers, load_unsloth, start_engine
from .changes import Change
from .compare import Reference, measure_distance, read_logits
from .merged import change_tensor, find_base, find_shards, match_changes
from .shard import Tensor, read_bytes, read_header, split_rows
from .verdict import Check, Verdict, at_least, at_most
from .verify_adapter import EFFECT, FLOAT32_MERGED, compare_logits, compare_processor, is_float32, is_packed

if TYPE_CHECKING:
    from .compare import Logits

# divergence from the trained model that is left at most, as a share of the base's; the second where the trained model is held
# in 16, 8 or 4 bit: worst seen 0.54, two steps into training (benchmarks/README.md)
KEPT, KEPT_HALF = 0.5, 0.9


def verify_merged(reference: Reference, folder: Path, config: Config) -> Verdict:
    """Compare a merged folder with the model in memory.

    The trained model's logits are taken first; then the folder is loaded, on the GPU where it fits, and let go again. After
    training on 4-bit or 8-bit weights they are compared with those of the 16-bit base with the same adapter: the difference
    between 4 and 16 bit is not the export's.
    """
    model, trained, base = reference.model, reference.trained, reference.base
    checks, size, wanted, exact = compare_files(model, find_base(config), folder)
    checks += compare_processor(reference, folder)
    expected = read_unpacked(reference, config) if is_packed(model) else trained
    found, error = read_folder(reference, folder, config)
    checks += compare_logits(model, expected, found, FLOAT32_MERGED if exact and is_float32(model) else None)
    if base is not None:
        effect = measure_distance(trained, base)
        left = measure_distance(trained, found).divergence / max(effect.divergence, 1e-12)
        checks.append(
            at_most("divergence left, as a share of the base's", left, KEPT if is_float32(model) else KEPT_HALF)
        )
        checks.append(at_least("difference from the base, logits", measure_distance(found, base).largest, EFFECT))
    notes = {"error": error} if error else {}
    return Verdict(tuple(checks), size, wanted, len(trained), reference.tokens, notes=notes)


def compare_files(model: Any, base: Path, folder: Path) -> tuple[list[Check], int, int, bool]:
    """Compare every tensor's bytes with the base's or, where it changed, with the sum taken anew.

    Returns the checks, bytes found and expected, and whether all weights are float32.
    """
    shards = find_shards(base)
    changes = match_changes(model, shards)
    lost = different = changed = size = 0
    kinds = set()
    for shard in shards:
        target, before = folder / shard.name, read_header(shard)
        kinds |= {tensor.dtype for tensor in before.values()}
        try:
            after = read_header(target)
            size += target.stat().st_size
        except (OSError, ForgekitError):
            after = {}
        lost += len(before.keys() ^ after.keys())
        for name in before.keys() & after.keys():
            if (before[name].dtype, before[name].shape) != (after[name].dtype, after[name].shape):
                lost += 1
            else:
                equal, moved = compare_tensor(shard, target, before[name], after[name], changes.get(name))
                different += not equal
                changed += moved
    lost += sum(1 for file in folder.glob("*.safetensors") if not (base / file.name).is_file())
    wanted = sum(shard.stat().st_size for shard in shards)
    checks = [
        at_most("tensors missing, unexpected or of another shape", lost, 0),
        at_most("tensors with other bytes than base or sum", different, 0),
        at_least("tensors that differ from the base", changed, 1),
    ]
    return checks, size, wanted, kinds <= {"F32", "I64"}


def compare_tensor(
    shard: Path, target: Path, before: Tensor, after: Tensor, change: Change | None
) -> tuple[bool, bool]:
    """Return whether a tensor's bytes are the expected ones, and whether those differ from the base's."""
    if change is None:
        pieces = split_rows(before)
        return all(read_bytes(shard, before, *piece) == read_bytes(target, after, *piece) for piece in pieces), False
    shift, moved = after.start - before.start, False
    with open(target, "rb") as file:
        for place, old, new in change_tensor(shard, before, change):
            moved = moved or old != new
            file.seek(place + shift)
            if file.read(len(new)) != new:
                return False, True
    return True, moved


def read_folder(reference: Reference, folder: Path, config: Config) -> tuple["Logits", str | None]:
    """Return the logits of the model in a folder, or why it cannot be loaded."""
    needed = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with make_room(reference.model, needed):
        try:
            return read_logits(load_whole(folder, config), reference.processor, reference.chats), None
        except Exception as error:  # noqa: BLE001  # whatever the libraries say about the files: they are no model
            return [], f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def load_whole(folder: Path | str, config: Config) -> Any:
    """Load a folder's weights in 16 bit (float32 on a CPU), as the recipe's engine does it, without a word."""
    settings = {"model.id": str(folder), "model.revision": None, "model.load_in": "16bit"}
    config = config.change(settings, "export", without=("model.revision", "model.slice"))
    load = load_unsloth if start_engine(config) == "unsloth" else load_transformers
    with hide_progress_bars():
        return load(config, str(folder), choose_dtype(config))


def read_unpacked(reference: Reference, config: Config) -> "Logits":
    """Return the logits of the 16-bit base with the adapter in memory beside it."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder, make_room(reference.model, base_bytes(config)):
        reference.model.save_pretrained(folder, save_embedding_layers=False)
        model = PeftModel.from_pretrained(load_whole(find_weights(config), config), folder)
        return read_logits(model, reference.processor, reference.chats)


def base_bytes(config: Config) -> int:
    """Return the bytes of the base's weights on disk."""
    return sum(shard.stat().st_size for shard in find_shards(find_base(config)))


@contextlib.contextmanager
def make_room(model: Any, needed: int) -> Iterator[None]:
    """Keep a model in the machine's memory meanwhile where the GPU cannot hold a second one of `needed` bytes beside it."""
    import torch

    home = model.device
    crowded = home.type == "cuda" and torch.cuda.mem_get_info()[0] < 1.1 * needed + GIB
    if crowded:
        model.to("cpu")
    try:
        yield
    finally:
        if crowded:
            torch.cuda.empty_cache()
            model.to(home)
