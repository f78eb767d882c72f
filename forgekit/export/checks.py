"""What is looked at before an export begins: whose adapter it is, the vocabulary, and whether anything was learned."""

import json
from pathlib import Path
from typing import Any

from ..config import Config
from ..data.collate import get_tokenizer
from ..errors import ExportError
from ..model.bases import is_same_base
from ..model.load import find_model, find_weights


def check_export(model: Any, processor: Any, config: Config) -> None:
    """Raise ExportError unless the model in memory is an adapted or trained version of the recipe's base."""
    check_base(model, config)
    check_vocabulary(model, processor, config)
    check_learned(model)


def check_base(model: Any, config: Config) -> None:
    """Raise ExportError with both names when the adapter was made for another base than the recipe's."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return
    trained = model.peft_config["default"].base_model_name_or_path
    if trained and not is_same_base(trained, find_weights(config)):
        raise ExportError(
            f"The adapter was trained on {trained}, and the recipe's model.id is {config.model.id}: on that base it would mean something "
            f"else. Export with model.id: {trained}."
        )


def check_vocabulary(model: Any, processor: Any, config: Config) -> None:
    """Raise ExportError with both sizes when the vocabulary was resized, or the tokenizer knows more words than the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    base = Path(find_model(config)) / "config.json"
    settings = json.loads(base.read_text(encoding="utf-8")) if base.is_file() else model.config.to_dict()
    expected = settings.get("text_config", settings).get("vocab_size", rows)
    words = len(get_tokenizer(processor))
    if rows != expected:
        raise ExportError(
            f"The vocabulary was resized: the model in memory has {rows:,} words and its base {config.model.id} has {expected:,}. Neither an "
            "adapter nor a merge holds the new ones. Train on a base that was saved with the new vocabulary."
        )
    if words > rows:
        raise ExportError(
            f"The tokenizer has {words:,} words and the model {rows:,}: the last ones could not be read. Load the processor that belongs to "
            f"{config.model.id} (load_processor), or train on a base with the larger vocabulary."
        )


def check_learned(model: Any) -> None:
    """Raise ExportError when an adapter would change nothing: its run never trained."""
    from peft import PeftModel

    if isinstance(model, PeftModel) and not has_learned(model):
        raise ExportError(
            "The model has learned nothing yet: every matrix that the adapter adds is zero, as before the first step, so the export would "
            "be the base itself. Train first (trainer.train()), or set adapter.path to an adapter that was trained."
        )


def has_learned(model: Any) -> bool:
    """Say whether an adapter changes anything: LoRA starts with B = 0 (an embedding's with A = 0), a whole module as a copy."""
    import torch
    from peft import get_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    if any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name or ".lora_embedding_A" in name):
        return True
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            before, after = module.original_module.state_dict(), module.modules_to_save["default"].state_dict()
            if any(not torch.equal(before[name], after[name]) for name in after):
                return True
    return model.peft_config["default"].bias != "none"  # biases keep no copy of what they were
