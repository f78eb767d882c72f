"""A whole model in 16 bit: base + adapter, added shard by shard from the base on disk, so that no second model is in memory.

The sum is taken in float32 and rounded once. The base on disk is 16 bit also when training ran on 4-bit weights: adding to
those would lose most of what was learned. Tensors that transformers does not load, such as the unused keys and values of
Gemma 3n's shared layers, are carried over, because other engines ask for them.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ExportError
from ..hardware import GIB, free_disk
from ..model.load import find_weights, hide_progress_bars
from .card import write_card

if TYPE_CHECKING:
    import torch

BESIDE = ("config.json", "generation_config.json")


def export_merged(
    model: Any, processor: Any, config: Config, folder: Path, scores: dict[str, Any] | None = None
) -> Path:
    """Write base + adapter as safetensors with config, processor and model card.

    Raises:
        ExportError: too little disk, a base that is not on this machine, or an adapter matrix without a base weight.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):  # full fine-tuning: the weights in memory are the model
        check_space(sum(p.numel() * p.element_size() for p in model.parameters()), folder)
        with hide_progress_bars():
            model.save_pretrained(str(folder))
    else:
        merge_shards(model, find_base(config), folder)
    processor.save_pretrained(str(folder))
    write_card(folder, config, "merged", scores)
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


def merge_shards(model: Any, base: Path, folder: Path) -> None:
    """Write every safetensors file of the base with the adapter added, under the same names, with the index and config."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    settings = base / "config.json"
    if settings.is_file() and "quantization_config" in json.loads(settings.read_text(encoding="utf-8")):
        raise ExportError(
            f"{base} holds quantised weights, and a merge needs the 16-bit ones. Train on the 16-bit checkpoint's id; load_in: 4bit quantises it while loading."
        )
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise ExportError(f"{base} holds no safetensors files to merge into.")
    check_space(sum(shard.stat().st_size for shard in shards), folder)
    folder.mkdir(parents=True, exist_ok=True)
    deltas, used = adapter_modules(model), set()
    for shard in shards:
        tensors = {}
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                tensor = file.get_tensor(name)
                if name in deltas:
                    used.add(name)
                    tensor = add_delta(tensor, deltas[name])
                tensors[name] = tensor
            save_file(tensors, folder / shard.name, metadata=file.metadata() or {"format": "pt"})
        print(f"Merged {shard.name}: {len(tensors)} tensors", flush=True)
    lost = deltas.keys() - used
    if lost:
        raise ExportError(f"{len(lost)} adapter matrices have no weight in {base}, for instance {sorted(lost)[0]}.")
    for name in (*BESIDE, "model.safetensors.index.json"):
        if (base / name).is_file():
            shutil.copy(base / name, folder / name)


def adapter_modules(model: Any) -> dict[str, Any]:
    """Return the adapted modules by the name of the base weight that each changes."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def add_delta(weight: "torch.Tensor", module: Any) -> "torch.Tensor":
    """Return weight + scale * B @ A (DoRA: the re-scaled sum) in the weight's own dtype, computed in float32."""
    import torch

    if module.use_dora.get("default"):
        # DoRA: magnitude * direction, the direction's length taken over each output row (https://arxiv.org/abs/2402.09353)
        merged = weight.float() + module.get_delta_weight("default").float().cpu()
        magnitude = module.lora_magnitude_vector["default"].weight.float().cpu()
        return (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1).mul(merged).to(weight.dtype)
    return (weight.float() + module.get_delta_weight("default").float().cpu()).to(weight.dtype)
