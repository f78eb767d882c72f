"""Which model answered which row, as short texts: an answer is used again only where both are the same.

model   what was learned, whole; of frozen weights some values of each; the adapter left out while it is disabled
row     the prompt's token ids, the media, the right answer, the choices
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..data.collate import tokenize_texts
from ..data.messages import Messages, get_answer
from ..data.parts import FEEDS, KINDS

SAMPLES = 64  # values of a frozen weight that are looked at: another checkpoint or precision differs in all of them
WHOLE = 2**24  # a learned weight up to this many values is read whole, a larger one sampled and summed
LORA = ("lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora")  # what scales an adapter


def fingerprint_model(model: Any) -> str:
    """Return a hash of the model as it answers now; a fresh adapter, which changes nothing yet, counts as none.

    The base alone, a model with a disabled adapter and one with a fresh adapter give the same hash.
    """
    adapted = adapter_counts(model)
    parts = []
    for name, parameter in model.named_parameters():
        added = is_added(name)
        if adapted or not added:
            parts.append(f"{shorten_name(name)} {read_values(parameter.data, adapted and parameter.requires_grad)}")
    if adapted:
        settings = [{key: getattr(config, key, None) for key in LORA} for config in model.peft_config.values()]
        parts.append(json.dumps(settings, sort_keys=True, default=str))
    return digest("\n".join(sorted(parts)))


def adapter_counts(model: Any) -> bool:
    """Say whether the model has an adapter that is switched on and changes what it says, or learned weights of its own."""
    if not hasattr(model, "peft_config"):
        return False
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        return False
    added = {name: parameter for name, parameter in model.named_parameters() if is_added(name)}
    low_rank = all("lora_A." in name or "lora_B." in name for name in added)
    # B starts at zero, and with it the product of both; any other kind of added weight may count from the start
    return not low_rank or any(bool(p.data.any()) for name, p in added.items() if "lora_B." in name)


def is_added(name: str) -> bool:
    """Say whether a parameter was added by an adapter."""
    return ".lora_" in name or ".modules_to_save." in name


def shorten_name(name: str) -> str:
    """Return a parameter's name as the base model has it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def read_values(tensor: Any, learned: bool) -> str:
    """Return shape, type and a hash of a weight's values: of all of them where it was learned, else of evenly spaced ones."""
    import torch

    head = f"{tuple(tensor.shape)} {tensor.dtype}"
    flat = tensor.reshape(-1)
    if not flat.numel() or flat.device.type == "meta":
        return head
    if learned and flat.numel() <= WHOLE:
        values = flat
    else:
        # in 64 bit: float32 cannot count to the last place of a large table
        places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
        values = flat[places.long().to(flat.device)]
        head += f" {flat.sum(dtype=torch.float64).item()!r}" if learned else ""
    return f"{head} {hashlib.sha256(values.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()}"


def fingerprint_row(chat: Messages, processor: Any, choices: Any = None) -> tuple[str, int]:
    """Return a hash of what is asked and what would be right, and the length of the question in tokens."""
    ids = tokenize_texts([chat], processor, answer=False)["input_ids"][0]
    return digest(json.dumps([ids, fingerprint_media(chat), get_answer(chat), choices])), len(ids)


def fingerprint_media(chat: Messages) -> str | None:
    """Return a hash of the pictures and sound of a chat, or None where it is text alone."""
    prints = [fingerprint_part(part) for turn in chat for part in turn["content"] if part["type"] in FEEDS]
    return digest(" ".join(prints)) if prints else None


def fingerprint_part(part: Mapping[str, Any]) -> str:
    """Return the hash that the part's kind gives it."""
    return f"{part['type']} {KINDS[part['type']].fingerprint(part)}"


def digest(text: str) -> str:
    """Return 32 hexadecimal digits of SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
