"""Puts back the part of a configuration that timm rewrites while it builds a vision tower."""

import copy
import json
from pathlib import Path
from typing import Any


def restore_model_args(model: Any, folder: str | Path) -> None:
    """Gives a loaded model the `vision_config.model_args` that stand in the folder's config.json again.

    timm's EfficientNetBuilder works on `block_args` in place (it removes keys and adds functions), so that after
    `from_pretrained` every save fails with "Object of type partial is not JSON serializable". Checkpoints without
    `model_args`, the released Gemma 3n among them, are left alone.
    """
    vision = getattr(model.config, "vision_config", None)
    if getattr(vision, "model_args", None):
        saved = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        set_model_args(model, saved["vision_config"]["model_args"])


def set_model_args(model: Any, model_args: dict) -> None:
    """Sets a copy of `model_args` in every configuration of the model that describes the vision tower."""
    configs: list[Any] = [
        model.config,
        *(module.config for module in model.modules() if getattr(module, "config", None)),
    ]
    for config in configs:
        for part in (config, getattr(config, "vision_config", None)):
            if part is not None and getattr(part, "model_args", None):
                part.model_args = copy.deepcopy(model_args)
