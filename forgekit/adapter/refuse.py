"""Why a choice of modules cannot be learned, one sentence each."""

from collections.abc import Callable, Iterable
from typing import Any

from ..config import Config
from ..layer_groups import find_layer, find_layers_by_kind, write_ranges
from ..model.shapes import Module, Shapes
from .names import meets

ADAPTABLE = ("linear", "conv", "embedding")


def explain_empty(choice: str, test: Callable[[Module], Any], shapes: Shapes, layers: tuple[int, ...] | None) -> str:
    """Return the sentence for a choice that matches no module: shared keys and values have a reason of their own."""
    shared = find_layers_by_kind(list(shapes.layer_types), shapes.shared_layers)
    prefix = next((m.name.split("layers.")[0] for m in shapes.modules if find_layer(m.name) is not None), "")
    asked = [
        layer
        for layer in shared["kv_shared"]
        if layers is None or layer in layers
        for projection in ("k_proj", "v_proj")
        if test(Module(f"{prefix}layers.{layer}.self_attn.{projection}", "Linear", "linear", (), 1, ()))
    ]
    if asked:
        return (
            f"{choice} asks for keys or values of layers {write_ranges(tuple(set(asked)))}, which have none: they use those of "
            f"layers {write_ranges(shared['kv_source'])}. Choose these instead."
        )
    where = f" in layers {write_ranges(layers)}" if layers is not None else ""
    return f"{choice} matches no module of {shapes.type}{where}, so it would learn nothing. Leave it out."


def find_unfit(matched: Iterable[Module], shapes: Shapes) -> list[str]:
    """Return a sentence for matched modules that no adapter can go beside."""
    grouped = [module for module in matched if module.kind == "conv" and module.groups > 1]
    other = [module for module in matched if module.kind not in ADAPTABLE]
    tied = [module for module in matched if shapes.tied and module.name.endswith(("embed_tokens", "lm_head"))]
    problems = []
    if tied:
        problems.append(
            f"adapter.target_modules matches {tied[0].name}, which is the vocabulary's table and the output head in one: an adapter "
            "beside it cannot be merged. Leave it out, and name embed_tokens in adapter.modules_to_save."
        )
    if grouped:
        problems.append(
            f"adapter.target_modules matches {len(grouped)} grouped convolutions, for instance {grouped[0].name} ({grouped[0].groups} "
            "groups): an adapter of theirs needs a rank that the groups divide and cannot be merged. Leave them out."
        )
    if other:
        problems.append(
            f"adapter.target_modules matches {len(other)} modules that are no Linear, convolution or Embedding, for instance "
            f"{other[0].name} ({other[0].type}): LoRA has nothing to go beside. Leave them out, or name them in adapter.modules_to_save."
        )
    return problems


def find_idle_patterns(config: Config, matched: list[Module]) -> list[str]:
    """Return a sentence for each key of rank_pattern and alpha_pattern that meets no module that learns."""
    return [
        f"adapter.{name}: {key!r} meets no module that learns, so it would change nothing. Leave it out, or choose its group."
        for name in ("rank_pattern", "alpha_pattern")
        for key in getattr(config.adapter, name)
        if not any(meets(key, module.name) for module in matched)
    ]
