"""The adapter alone: small, and enough together with its base. Also the way back: a folder that answers questions."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..errors import ExportError
from ..model.bases import is_base_of
from ..model.load import load_model
from ..model.slice import name_base, split_base
from ..model.trust import NO_CODE, check_weights
from ..run_folder import shorten_path
from .merged import check_space


def export_adapter(
    model: Any, processor: Any, config: Config, folder: Path, scores: dict[str, Any] | None = None
) -> Path:
    """Write adapter_config.json, adapter_model.safetensors, processor and chat template.

    Raises ExportError when the model has no adapter, or the disk is too small.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise ExportError(
            "The model has no adapter (load_in: full trains the weights themselves): export merged instead."
        )
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_space(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), folder)
    with named_base(model.peft_config["default"], config):
        model.save_pretrained(str(folder), save_embedding_layers=False)  # LoRA leaves the vocabulary as it is
    processor.save_pretrained(str(folder))
    return folder


@contextlib.contextmanager
def named_base(adapter: Any, config: Config) -> Iterator[None]:
    """Name the base as the recipe does while an adapter is saved, so that its files do not depend on a path of this machine.

    Put back afterwards: PEFT looks the base up by that name when training goes on and saves a checkpoint.
    """
    before = adapter.base_model_name_or_path, adapter.revision
    name = name_base(config.model.id, config.model.slice)
    adapter.base_model_name_or_path, adapter.revision = name, config.model.revision
    try:
        yield
    finally:
        adapter.base_model_name_or_path, adapter.revision = before


def compare_adapter(model: Any, folder: Path) -> None:
    """Raise ExportError unless the saved tensors are the ones in memory: the same names, shapes and values."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    now = get_peft_model_state_dict(model, save_embedding_layers=False)  # as they were saved
    if saved.keys() != now.keys():
        raise ExportError(
            f"{folder}: {len(saved.keys() ^ now.keys())} tensors are missing or unexpected, for instance {sorted(saved.keys() ^ now.keys())[0]}."
        )
    different = [name for name, tensor in now.items() if not torch.equal(tensor.cpu(), saved[name].to(tensor.dtype))]
    if different:
        raise ExportError(
            f"{folder}: {len(different)} tensors differ from the trained ones, for instance {different[0]}."
        )


def check_saved_base(saved: dict[str, Any], folder: Path, config: Config) -> None:
    """Raise ExportError with both names when a saved adapter is of another base than the recipe's."""
    made_for = saved.get("base_model_name_or_path")
    if made_for and not is_base_of(config, made_for):
        raise ExportError(
            f"The adapter in {shorten_path(folder)} was trained on {made_for}, and the recipe's model.id is {name_base(config.model.id, config.model.slice)}: on that base it would "
            f"mean something else. Load it with model.id: {made_for}, or without a config."
        )


def load_export(folder: Path | str, config: Config | None = None) -> tuple[Any, Any]:
    """Load an exported adapter or merged model from its folder alone, through transformers and PEFT.

    Args:
        folder: models/lora (its base is loaded by the name in adapter_config.json) or models/merged.
        config: says engine, precision and device, as in training; None: the defaults, in 16 bit.

    Returns (model, processor), ready for `generate_answer`. Raises ExportError for an adapter of another base than the
    recipe's, and when the file holds other tensors than the adapter that its config describes: PEFT alone leaves missing
    ones at zero and only warns.
    """
    folder = Path(folder)
    adapter = folder / "adapter_config.json"
    saved = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
    if saved and config is not None:
        check_saved_base(saved, folder, config)
    settings: dict[str, Any] = split_base(saved.get("base_model_name_or_path", str(folder)))
    settings["model.revision"] = saved.get("revision")
    if config is None or config.model.load_in == "full":
        settings["model.load_in"] = "16bit"
    model, processor = load_model((config or load_config()).change(settings, "export"))
    if adapter.is_file():
        check_weights(folder, f"the adapter {shorten_path(folder)}")
        from peft import PeftModel
        from transformers import AutoProcessor

        model = PeftModel.from_pretrained(model, str(folder))
        compare_adapter(model, folder)
        processor = AutoProcessor.from_pretrained(folder, **NO_CODE)  # the template and tokens that it was trained with
    return model, processor
