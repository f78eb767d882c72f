"""Which layers and widths a slice keeps, what its config.json says, and which combinations are refused.

layer       0 .. 17      18       19     20 .. 24   25 .. 34        E4B: 35 layers of width 16384
keys from   its own     own      own     18 or 19   18 or 19
                                         ────────
slice e2b   0 .. 17      18       19                20 .. 29        30 layers of width 8192
"""

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import ModelError
from ..layer_groups import find_layers_by_kind, resolve_layers, write_ranges
from ..slice_presets import PRESET_LAYERS, PRESETS

# hidden size -> width below which the released Gemma 3n was never trained: huggingface.co/google/gemma-3n-E2B-it, config.json
NARROWEST = {2048: 8192}
# what llama.cpp takes for granted for Gemma 3n: layers with keys and values of their own, and sparse ones among them
LLAMA_CPP = (20, 10)


@dataclass(frozen=True)
class SlicePlan:
    """What is kept of a source's language model; layers are the source's numbers."""

    source: str  # as a person calls it
    layers: tuple[int, ...]
    widths: tuple[int, ...]  # hidden features of the feed-forward parts, one a kept layer
    layer_types: tuple[str, ...]  # of the kept layers
    sparsity: tuple[float, ...]
    shared: int  # kept layers that use the keys and values of others
    source_widths: tuple[int, ...]  # one a layer of the source
    per_layer: int  # features of the per-layer embeddings, for each layer

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of the text config that a slice changes."""
        return {
            "num_hidden_layers": len(self.layers),
            "intermediate_size": list(self.widths),
            "layer_types": list(self.layer_types),
            "activation_sparsity_pattern": list(self.sparsity),
            "num_kv_shared_layers": self.shared,
        }

    @property
    def skipped(self) -> tuple[int, ...]:
        """The source's layers that are left out."""
        return tuple(sorted(set(range(len(self.source_widths))) - set(self.layers)))

    def __str__(self) -> str:
        skipped = f" (without {write_ranges(self.skipped)})" if self.skipped else ""
        widths = ", ".join(
            f"{self.widths.count(width)} of width {width}" for width in sorted(set(self.widths), reverse=True)
        )
        own, sparse = len(self.layers) - self.shared, sum(value > 0 for value in self.sparsity)
        text = f"{self.source}: {len(self.layers)} of {len(self.source_widths)} layers{skipped}, {widths}"
        if (own, sparse) != LLAMA_CPP:
            text += (
                f".\nllama.cpp reads Gemma 3n with {LLAMA_CPP[0]} layers that have keys and values of their own and "
                f"{LLAMA_CPP[1]} sparse ones alone; this slice has {own} and {sparse}, and runs in transformers"
            )
        return text


def plan_slice(text: Any, choice: dict[str, Any], source: str) -> SlicePlan:
    """Resolve a slice against the text config of its source.

    Args:
        text: transformers' Gemma3nTextConfig.
        choice: as `check_slice` returns it.
        source: the source's name, for messages.

    Raises ModelError with the reason for a combination that would not be the model that was trained.
    """
    types, widths = list(text.layer_types), tuple(text.intermediate_size)
    skip, wanted = choice.get("skip"), choice.get("widths")
    if "preset" in choice:
        skip, wanted = read_preset(choice["preset"], widths, source)
    skipped = find_skipped(skip, types, text.num_kv_shared_layers, source)
    kept = tuple(layer for layer in range(len(types)) if layer not in skipped)
    check_order(kept, types, source)
    chosen = choose_widths(wanted, kept, types, text.num_kv_shared_layers, widths, source)
    check_trained(chosen, kept, widths, text.hidden_size, source)
    if len(kept) == len(types) and chosen == widths:
        refuse(source, "nothing would be left out. Name a preset, layers to skip, or widths below the source's")
    return SlicePlan(
        source,
        kept,
        chosen,
        tuple(types[layer] for layer in kept),
        tuple(float(text.activation_sparsity_pattern[layer]) for layer in kept),
        sum(layer >= len(types) - text.num_kv_shared_layers for layer in kept),
        widths,
        text.hidden_size_per_layer_input,
    )


def refuse(source: str, why: str) -> NoReturn:
    """Raise ModelError with the reason."""
    raise ModelError(f"{source} cannot be sliced so: {why}.")


def read_preset(name: str, widths: tuple[int, ...], source: str) -> tuple[str | None, dict[str, int]]:
    """Return a preset's layers to skip and its widths, as shares of the source's."""
    if len(widths) != PRESET_LAYERS:
        refuse(
            source,
            f"{name} is a slice of Gemma 3n E4B, which has {PRESET_LAYERS} layers, and this has {len(widths)}. "
            "Name layers with skip and sizes with widths",
        )
    preset, whole = PRESETS[name], max(widths)
    return preset.skip or None, {"all": whole // 2} | ({preset.wide: whole} if preset.wide else {})


def find_skipped(skip: str | None, types: list[str], shared: int, source: str) -> tuple[int, ...]:
    """Return the layers to leave out. Raises ModelError for one whose keys and values a kept layer uses."""
    if skip is None:
        return ()
    try:
        skipped = resolve_layers(skip, types, shared)
    except ValueError as error:
        raise ModelError(f"{source} cannot be sliced so: skip {error}.") from None
    if len(skipped) == len(types):
        refuse(source, "no layer would be left")
    kinds = find_layers_by_kind(types, shared)
    for layer in sorted(set(kinds["kv_source"]) & set(skipped)):
        users = tuple(i for i in kinds["kv_shared"] if i not in skipped and types[i] == types[layer])
        if users:
            refuse(source, f"layer {layer} has to stay, because layers {write_ranges(users)} use its keys and values")
    return skipped


def check_order(kept: tuple[int, ...], types: list[str], source: str) -> None:
    """Raise ModelError unless sliding and full attention follow each other as before.

    Other engines, and older transformers, take a layer's kind of attention from its number alone.
    """
    for number, layer in enumerate(kept):
        if types[layer] != types[number]:
            kind, other = (types[i].partition("_")[0] for i in (layer, number))
            rounds = next(n for n in range(1, len(types) + 1) if types == (types[:n] * len(types))[: len(types)])
            refuse(
                source,
                f"layer {layer} has {kind} attention and would become layer {number}, where the order of the layers asks for "
                f"{other} attention. Skip whole rounds of {rounds} layers (0-{rounds - 1}, {rounds}-{2 * rounds - 1}, ...)",
            )


def choose_widths(
    wanted: Any, kept: tuple[int, ...], types: list[str], shared: int, widths: tuple[int, ...], source: str
) -> tuple[int, ...]:
    """Return the width of each kept layer; a layer that is not named keeps its own."""
    if isinstance(wanted, list):
        if len(wanted) != len(kept):
            refuse(
                source, f"{len(wanted)} widths are named, and {len(kept)} layers are kept. Name one for each of those"
            )
        return tuple(wanted)
    by_layers = {"all": wanted} if isinstance(wanted, int) else dict(wanted or {})
    rest = by_layers.pop("all", None)
    chosen = [rest or width for width in widths]
    named: dict[int, str] = {}
    for term, width in by_layers.items():
        try:
            layers = resolve_layers(term, types, shared)
        except ValueError as error:
            raise ModelError(f"{source} cannot be sliced so: widths {error}.") from None
        for layer in layers:
            if layer in named:
                refuse(source, f"widths name layer {layer} twice, by {named[layer]} and by {term}")
            named[layer], chosen[layer] = term, width
    return tuple(chosen[layer] for layer in kept)


def check_trained(
    chosen: tuple[int, ...], kept: tuple[int, ...], widths: tuple[int, ...], hidden_size: int, source: str
) -> None:
    """Raise ModelError for a width above the layer's own, or one at which the feed-forward parts were never trained.

    Gemma 3n was trained with its whole feed-forward parts and with their first halves, and with nothing between or below.
    """
    whole = max(widths)
    trained = {whole} if NARROWEST.get(hidden_size, 0) * 2 > whole or whole % 2 else {whole, whole // 2}
    for layer, width in zip(kept, chosen, strict=True):
        if width > widths[layer]:
            refuse(
                source, f"layer {layer} has width {widths[layer]}, and {width} was asked for. A slice only leaves out"
            )
        if width != widths[layer] and width not in trained:
            sizes = " and ".join(map(str, sorted(trained)))
            refuse(
                source,
                f"width {width} was asked for layer {layer}, and the feed-forward parts were trained to work at width {sizes} alone",
            )


def apply_slice(settings: Any, choice: dict[str, Any], source: str) -> Any:
    """Return a copy of a transformers config with the fields of a slice; an empty choice changes nothing."""
    settings = copy.deepcopy(settings)
    if choice:
        text = settings.get_text_config()
        if text.model_type != "gemma3n_text":
            refuse(
                source,
                f"it is of the type {settings.model_type}, and only Gemma 3n was trained so that parts of it work alone",
            )
        for name, value in plan_slice(text, choice, source).settings.items():
            setattr(text, name, value)
    return settings
