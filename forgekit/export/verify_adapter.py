"""The adapter read back: the same names and values, the same template, the same logits on held-out rows."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.collate import get_tokenizer, tokenize_rows
from ..model.slice import name_base
from ..model.trust import NO_CODE
from .compare import Reference, learning_kept, measure_distance, read_logits
from .verdict import Check, Verdict, at_least, at_most

if TYPE_CHECKING:
    from .compare import Logits

AGAIN = "read_back"  # PEFT's name of the adapter that was read from the file

# Bounds. Measured by `python -m benchmarks.verify`, five seeds each; benchmarks/README.md holds the table.
FLOAT32_RELOAD = 1e-5  # largest difference of two logits, the same sums in the same order
FLOAT32_MERGED = 1e-4  # largest difference of two logits: W x + s B A x against (W + s B A) x
DIVERGENCE = 1e-3  # mean Kullback-Leibler divergence in nats a token, weights in 16 bit on disk
DIVERGENCE_HALF = (
    3e-3  # the same where the trained model computes in 16 bit too: worst seen 1.4e-3, two steps into training
)
AGREEMENT = 0.99  # share of tokens with the same most probable word, for 16-bit numbers
EFFECT = 1e-6  # a trained model's logits differ from its base's by more


def verify_adapter(reference: Reference, folder: Path, config: Config) -> Verdict:
    """Compare a saved adapter with the one in memory; it is read into the same base, so no second model is needed.

    Returns the Verdict; nothing is raised for a file that differs, or cannot be read.
    """
    model, weights = reference.model, folder / "adapter_model.safetensors"
    checks, wanted = compare_tensors(model, weights)
    checks += compare_base(folder, config) + compare_processor(reference, folder)
    expected = reference.trained  # before another adapter is put beside it
    with learning_kept(model):
        found, error = read_back(reference, folder)
    checks += compare_logits(model, expected, found, FLOAT32_RELOAD if is_float32(model) else None)
    assert reference.base is not None
    checks.append(
        at_least("difference from the base, logits", measure_distance(expected, reference.base).largest, EFFECT)
    )
    size = weights.stat().st_size if weights.is_file() else 0
    return Verdict(
        tuple(checks), size, wanted, len(expected), reference.tokens, notes={"error": error} if error else {}
    )


def compare_tensors(model: Any, weights: Path) -> tuple[list[Check], int]:
    """Compare names and values of the file with those in memory; return the checks and the bytes that the values take."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    now = get_peft_model_state_dict(model, save_embedding_layers=False)
    size = sum(tensor.numel() * tensor.element_size() for tensor in now.values())
    try:
        saved = load_file(weights)
    except (SafetensorError, OSError):
        saved = {}
    lost = len(saved.keys() ^ now.keys())
    both = saved.keys() & now.keys()
    different = sum(not torch.equal(now[name].cpu(), saved[name].to(now[name].dtype)) for name in both)
    return [at_most("tensors missing or unexpected", lost, 0), at_most("tensors that differ", different, 0)], size


def compare_base(folder: Path, config: Config) -> list[Check]:
    """Check that the adapter names the recipe's base."""
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        saved = {}
    expected = name_base(config.model.id, config.model.slice)
    return [at_most("other base than the recipe's", int(saved.get("base_model_name_or_path") != expected), 0)]


def compare_processor(reference: Reference, folder: Path) -> list[Check]:
    """Check that template and tokens of the saved processor write the rows as the trained one does."""
    from transformers import AutoProcessor

    processor, chats = reference.processor, reference.chats
    try:
        again = AutoProcessor.from_pretrained(folder, **NO_CODE)
        size = abs(len(get_tokenizer(again)) - len(get_tokenizer(processor)))
        pairs = zip(tokenize_rows(chats, processor), tokenize_rows(chats, again), strict=True)
        wrong = sum(a != b for a, b in pairs)
    except Exception:  # noqa: BLE001  # a damaged file trips up any part of four libraries; it is not the saved processor
        size, wrong = len(get_tokenizer(processor)), len(chats)
    return [
        at_most("rows that template or tokenizer write otherwise", wrong, 0),
        at_most("words more or fewer", size, 0),
    ]


def read_back(reference: Reference, folder: Path) -> tuple["Logits", str | None]:
    """Return the logits of the adapter in the file, put beside the one in memory for a moment, or why it cannot be read."""
    model = reference.model
    try:
        model.load_adapter(str(folder), adapter_name=AGAIN, is_trainable=False, torch_device=str(model.device))
        model.set_adapter(AGAIN)
        return read_logits(model, reference.processor, reference.chats), None
    except Exception as error:  # noqa: BLE001  # whatever PEFT says about the file: it is no adapter of this model
        return [], f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        model.set_adapter("default")
        if AGAIN in model.peft_config:
            model.delete_adapter(AGAIN)


def compare_logits(model: Any, expected: "Logits", found: "Logits", exact: float | None) -> list[Check]:
    """Return the checks of two sets of logits: the largest difference where `exact` bounds it, else divergence and agreement."""
    distance = measure_distance(expected, found)
    if exact is not None:
        return [at_most("largest difference of logits", distance.largest, exact)]
    bound = DIVERGENCE if is_float32(model) else DIVERGENCE_HALF
    return [
        at_most("mean divergence, nats a token", distance.divergence, bound),
        at_least("same most probable word, share", distance.agreement, AGREEMENT),
    ]


def is_float32(model: Any) -> bool:
    """Say whether a model computes in float32 with weights of that precision."""
    import torch

    return model.dtype == torch.float32 and not is_packed(model)


def is_packed(model: Any) -> bool:
    """Say whether a model's weights are held in 4 or 8 bits."""
    return getattr(model.config, "quantization_config", None) is not None
