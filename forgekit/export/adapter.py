"""The adapter alone: small, and enough together with its base. Also the way back: a folder that answers questions."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..errors import ExportError
from ..model.load import load_model
from ..model.slice import name_base, split_base
from .card import write_card


def export_adapter(
    model: Any, processor: Any, config: Config, folder: Path, scores: dict[str, Any] | None = None
) -> Path:
    """Write adapter_config.json, adapter_model.safetensors, processor, chat template and a model card; read them back.

    Raises ExportError when the file does not hold exactly the adapter in memory.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ExportError(
            "The model has no adapter (load_in: full trains the weights themselves): export merged instead."
        )
    with named_base(model.peft_config["default"], config):
        model.save_pretrained(str(folder), save_embedding_layers=False)  # LoRA leaves the vocabulary as it is
    processor.save_pretrained(str(folder))
    write_card(folder, config, "adapter", scores)
    compare_adapter(model, folder)
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


def load_export(folder: Path | str, config: Config | None = None) -> tuple[Any, Any]:
    """Load an exported adapter or merged model from its folder alone, through transformers and PEFT.

    Args:
        folder: models/lora (its base is loaded by the name in adapter_config.json) or models/merged.
        config: says engine, precision and device, as in training; None: the defaults, in 16 bit.

    Returns (model, processor), ready for `generate_answer`. Raises ExportError when the file holds other tensors than the
    adapter that its config describes: PEFT alone leaves missing ones at zero and only warns.
    """
    folder = Path(folder)
    adapter = folder / "adapter_config.json"
    saved = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
    settings: dict[str, Any] = split_base(saved.get("base_model_name_or_path", str(folder)))
    settings["model.revision"] = saved.get("revision")
    if config is None or config.model.load_in == "full":
        settings["model.load_in"] = "16bit"
    model, processor = load_model((config or load_config()).change(settings, "export"))
    if adapter.is_file():
        from peft import PeftModel
        from transformers import AutoProcessor

        model = PeftModel.from_pretrained(model, str(folder))
        compare_adapter(model, folder)
        processor = AutoProcessor.from_pretrained(folder)  # the template and tokens that it was trained with
    return model, processor
