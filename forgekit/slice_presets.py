"""What `model.slice` may say: one of Google's slices of Gemma 3n E4B by name, or layers to skip and widths to keep.

Gemma 3n is a MatFormer (https://arxiv.org/abs/2310.07707): the first half of each feed-forward part was trained to work
alone, and E2B is E4B with all parts halved and layers 20 to 24 left out. What lies between is called Mix-n-Match.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .layer_groups import check_layers

PRESET_LAYERS = 35  # of E4B, which the presets number


@dataclass(frozen=True)
class Preset:
    """One of Google's slices; layers are E4B's own numbers, those that are not in `wide` keep half of their width."""

    skip: str
    wide: str
    billions: float  # parameters of the language model without its two tables of embeddings, as Google names them
    mmlu: float  # per cent right on MMLU with the pre-trained weights, not the instruction-tuned ones; E4B itself: 62.3


# huggingface.co/datasets/google/gemma3n-slicing-configs, configs.csv. Names say the size; -block: whole rounds of four
# sliding layers and a full one were widened together (block-level there), the others layer by layer (layer-level).
PRESETS = {
    "e2b": Preset("20-24", "", 1.91, 50.9),
    "e1.96b": Preset("20-24", "4", 1.96, 53.4),
    "e2.54b": Preset("", "4,20-24", 2.54, 55.4),
    "e2.69b": Preset("", "4,9,14,19-24", 2.69, 57.7),
    "e2.98b": Preset("", "15-24,30-34", 2.98, 59.5),
    "e3.18b": Preset("", "4,9-24,29,34", 3.18, 61.8),
    "e3.39b": Preset("", "4,9-29,34", 3.39, 63.0),
    "e3.59b": Preset("", "4-29,34", 3.59, 63.4),
    "e3.79b": Preset("", "4-34", 3.79, 63.4),
    "e2.49b-block": Preset("", "20-24", 2.49, 54.5),
    "e2.73b-block": Preset("", "15-24", 2.73, 57.1),
    "e2.98b-block": Preset("", "10-24", 2.98, 59.5),
    "e3.24b-block": Preset("", "10-29", 3.24, 60.7),
    "e3.49b-block": Preset("", "5-29", 3.49, 61.4),
    "e3.74b-block": Preset("", "5-34", 3.74, 62.0),
}
KEYS = ("preset", "skip", "widths")
SLICE_HELP = (
    "load a slice of a Gemma 3n instead of all of it: e2b or another preset (forgekit slice --help), or {skip: 20-24, widths: "
    "8192}; widths: one for all layers, {all: 8192, full: 16384} by layers, or a list with one a kept layer; empty: all of it"
)


def check_slice(value: Any) -> dict[str, Any]:
    """Return a slice as {"preset": name}, or {"skip": layers, "widths": widths}, or {} for the whole checkpoint.

    Raises ValueError, whose text goes on behind "should be", for anything else.
    """
    if value is None or value in ("", {}):
        return {}
    choice = dict(value) if isinstance(value, Mapping) else {"preset": value}
    choice = {key: part for key, part in choice.items() if part is not None}
    unknown = [key for key in choice if key not in KEYS]
    if unknown:
        raise ValueError(f"a mapping of {', '.join(KEYS)}; there is no {unknown[0]!r} in it")
    if "preset" in choice:
        choice["preset"] = str(choice["preset"]).lower()  # people write E2B
        check_preset(choice)
    if "skip" in choice:
        choice["skip"] = check_layers(choice["skip"])
    if "widths" in choice:
        choice["widths"] = check_widths(choice["widths"])
    return choice


def check_preset(choice: dict[str, Any]) -> None:
    """Raise ValueError for a preset that is not known, or one beside skip or widths, which it says already."""
    name = choice["preset"]
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"a mapping of skip and widths, or one of {', '.join(PRESETS)} ({name!r} is none{hint})")
    if len(choice) > 1:
        raise ValueError(
            f"a preset, or skip and widths, not both: {name} already says which layers and widths are kept"
        )


def check_widths(value: Any) -> Any:
    """Return widths as one number, a list of numbers, or {layers: number}. Raises ValueError for anything else."""
    if is_width(value):
        return value
    if isinstance(value, list | tuple) and value and all(map(is_width, value)):
        return list(value)
    if isinstance(value, Mapping) and value and all(map(is_width, value.values())):
        return {key if key == "all" else check_layers(key): width for key, width in value.items()}
    raise ValueError(
        "a mapping whose widths are one number, a list with one a kept layer, or a mapping such as {all: 8192, 4: 16384}"
    )


def read_widths(words: list[str]) -> Any:
    """Turn words of a command line into widths: 8192; 8192 16384 ... for each kept layer; 8192 20-24=16384.

    A word that is no number stays as it is, for `check_widths` to refuse.
    """
    read = [int(word) if word.isdecimal() else word for word in words]
    if not any("=" in word for word in words):
        return read[0] if len(read) == 1 else read
    pairs = [word.rsplit("=", 1) if "=" in word else ("all", word) for word in words]
    return {layers: int(width) if width.isdecimal() else width for layers, width in pairs}


def is_width(value: Any) -> bool:
    """Say whether a value is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def describe_presets() -> str:
    """Return the presets as lines: name, layers, billions of parameters, MMLU, what is skipped and what stays wide."""
    lines = ["preset        billion  MMLU %  skipped  not halved"]
    for name, preset in PRESETS.items():
        lines.append(
            f"{name:<12} {preset.billions:>8.2f} {preset.mmlu:>7.1f}  {preset.skip or '-':<7}  {preset.wide or '-'}"
        )
    return "\n".join(lines)
