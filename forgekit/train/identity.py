"""What a training is made of, by name, so that a checkpoint of another one is not taken for its own.

dataset    a hash of the rows learned from and scored       config     every setting that decides what is learned
base       a hash of the base model's shapes and weights    versions   Python and the packages that compute
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..config import flatten
from ..errors import RunError
from ..hardware import choose_device, choose_optimizer, shares_weights
from ..run_folder import find_versions

if TYPE_CHECKING:
    from ..config import Config

Identity = dict[str, dict[str, Any]]  # name -> what it consists of
# settings that decide when something is said, kept or scored afterwards, and not what is learned; rows stand in `dataset`
FREE_SECTIONS = ("data", "evaluate", "export")
FREE = {
    "train.logging_steps", "train.save_steps", "train.save_minutes", "train.report_to", "train.status_file", "train.guard",
    "train.resume", "train.allow_drift", "train.gpus", "model.id",
}  # fmt: skip
NOT_COMPUTING = ("papermill",)
SAMPLES = 64  # numbers looked at in each weight: reading all of them would cost more than a minute with E4B


def identify(config: "Config", model: Any, data: Mapping[str, Any]) -> Identity:
    """Return what this training is made of; call it before the first step, while the base's weights are as loaded.

    Args:
        data: from `load_data`; rows of other sources are told apart as well as `datasets` does it.
    """
    settings = {
        name: value
        for name, value in flatten(config.model_dump(mode="json")).items()
        if name not in FREE and name.partition(".")[0] not in FREE_SECTIONS
    }
    if shares_weights(config):  # auto is another optimiser then, and its state another one
        alone = config.change({"train.gpus": 1})
        names = [choose_optimizer(this, choose_device(config)) for this in (config, alone)]
        settings["train.optim"] = settings["train.optim"] if names[0] == names[1] else names[0]
    versions = {name: value for name, value in find_versions().items() if name not in NOT_COMPUTING}
    rows = {name: data[name] for name in ("train", "validation") if name in data}
    if not config.train.eval_steps:
        rows.pop("validation", None)
    return {
        "dataset": {name: f"{len(split)} rows, {split._fingerprint}" for name, split in rows.items()},
        "config": settings,
        "base": {"weights": hash_weights(model)},
        "versions": versions,
    }


def hash_weights(model: Any) -> str:
    """Return a hash of the names, shapes and formats of all weights but the adapter's, and of numbers spread evenly over each.

    Another base, another fine-tuning of it or another packing gives another hash; a change of a few numbers in one weight may not.
    """
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if ".lora_" in name:  # drawn anew in each process, and read from the checkpoint
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if weight.device.type == "meta":
            continue
        flat = weight.detach().flatten()
        count = min(SAMPLES, flat.numel())
        places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
        digest.update(flat[places].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_drift(then: Mapping[str, Any], now: Identity) -> dict[str, list[str]]:
    """Return, for each name that differs, what was and what is."""
    drift: dict[str, list[str]] = {}
    for name, parts in now.items():
        before = then.get(name, {})
        current = json.loads(json.dumps(parts))
        drift[name] = [
            f"{part} was {before.get(part)}, is {current.get(part)}"
            for part in sorted({*before, *current})
            if before.get(part) != current.get(part)
        ]
    return {name: changes for name, changes in drift.items() if changes}


def check_drift(then: Mapping[str, Any], now: Identity, allowed: Collection[str], where: str) -> list[str]:
    """Return a sentence for each change that is allowed. Raises RunError, naming every one that is not."""
    drift = find_drift(then, now)
    refused = {name: changes for name, changes in drift.items() if name not in allowed}
    if refused:
        lines = [f"{name}: {'; '.join(changes)}" for name, changes in refused.items()]
        raise RunError(
            f"{where} is of another training, so it is not resumed.\n"
            + "\n".join(lines)
            + f"\nPut back what changed, or accept it with train.allow_drift: [{', '.join(refused)}]; the result is then not the one "
            "of an uninterrupted run. Or start a run of another name."
        )
    return [f"accepted change of {name}: {'; '.join(changes)}" for name, changes in drift.items()]
