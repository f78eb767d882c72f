"""Starting points for a selection: one table, from which the panel makes its buttons."""

from dataclasses import dataclass

from .selection import Selection

LANGUAGE = ("attention", "mlp")


@dataclass(frozen=True)
class Preset:
    """A choice that people start from."""

    label: str
    help: str
    groups: tuple[str, ...]
    last: bool = False  # only in the last n decoder layers
    r: int | None = None
    lora_alpha: float | None = None


PRESETS = {
    "text": Preset("Text only", "attention and MLP in all decoder layers; the towers stay as they are", LANGUAGE),
    "attention": Preset("Attention only", "queries, keys, values and outputs in all decoder layers", ("attention",)),
    "last": Preset("Last n layers", "attention and MLP in the last n decoder layers", LANGUAGE, last=True),
    "vision": Preset(
        "Vision + projector", "the picture tower's plain convolutions and its projector", ("vision_tower", "vision")
    ),
    "audio": Preset("Audio", "the sound tower and its projector", ("audio",)),
    "everything": Preset(
        "Everything",
        "all that an adapter can reach, but for the two tables of embeddings and the first convolutions",
        ("attention", "mlp", "laurel", "altup", "per_layer", "vision_tower", "vision", "audio"),
    ),
    # r, lora_alpha and the flags of Unsloth's Gemma 3n notebooks (unsloth.ai/docs/models/gemma-3n): language layers,
    # attention and MLP on, vision off, r = lora_alpha = 8
    "unsloth": Preset("Unsloth's notebook", "attention and MLP with r 8 and lora_alpha 8", LANGUAGE, r=8, lora_alpha=8),
}


def find_members(preset: Preset, selection: Selection, n: int) -> list[str]:
    """Return the modules that a preset chooses; none when the model has none of its groups."""
    names = selection.find_groups(preset.groups)
    if not preset.last:
        return names
    first = max(0, len(selection.by_layer) - n)
    return [name for name in names if (selection.candidates[name].layer or 0) >= first]


def apply_preset(key: str, selection: Selection, n: int = 8) -> None:
    """Put a preset's choice in the place of the present one; ranks of single modules go, the common rank stays unless it sets one."""
    preset = PRESETS[key]
    selection.r = preset.r or selection.r
    selection.lora_alpha = preset.lora_alpha or selection.lora_alpha
    selection.replace(find_members(preset, selection, n))
