"""Which layers a recipe can choose: groups of modules by Gemma 3n's structure, and decoder layers by number or kind.

One table serves the check of a recipe, the help texts, the plan of what learns and whoever draws it:

    language   attention mlp laurel altup per_layer embeddings per_layer_embeddings
    vision     vision_stem vision_stage1 .. vision_stage4 vision_fusion vision_projector
    audio      audio_convolutions audio_subsampling audio_conformer audio_projector

Every module belongs to one group at most. A set (SETS) is a name for several groups.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TOWERS = {  # tower -> parts of the names of its modules; the language model is what is left
    "language": (),
    "vision": ("vision_tower", "embed_vision"),
    "audio": ("audio_tower", "embed_audio"),
}


@dataclass(frozen=True)
class Group:
    """Modules that a person chooses together."""

    tower: str
    pattern: str  # of the modules' names, behind any prefix
    help: str
    whole: str = ""  # the module's name when it learns with all its weights instead of an adapter


def describe_stage(stage: int) -> Group:
    """Return one of MobileNetV5's four stages (timm: blocks.0 to blocks.3); only its plain convolutions can learn."""
    convolutions = r"(?:conv_exp|conv_pwl|(?:pw_exp|pw_proj)\.conv|attn\.(?:query|key|value|output)\.proj)"
    return Group(
        "vision", rf"timm_model\.blocks\.{stage - 1}\.\d+\.{convolutions}", f"plain convolutions of stage {stage} of 4"
    )


# Names follow Gemma 3n in transformers. Layers that share keys and values have no k_proj and v_proj of their own.
GROUPS = {
    "attention": Group("language", r"layers\.\d+\.self_attn\.(?:q|k|v|o)_proj", "queries, keys, values and output"),
    "mlp": Group("language", r"layers\.\d+\.mlp\.(?:gate|up|down)_proj", "the feed-forward part, most of a layer"),
    "laurel": Group(
        "language", r"layers\.\d+\.laurel\.linear_(?:left|right)", "LAuReL, the narrow path beside attention"
    ),
    "altup": Group(
        "language",
        r"(?:layers\.\d+\.altup\.(?:modality_router|prediction_coefs|correction_coefs)|altup_(?:unembed_)?projections\.\d+)",
        "AltUp, which mixes the four streams between layers",
    ),
    "per_layer": Group(
        "language",
        r"(?:layers\.\d+\.per_layer_(?:input_gate|projection)|per_layer_model_projection)",
        "gates and projections of the per-layer embeddings",
    ),
    # the table is tied to the output head: PEFT 0.21 merges an adapter beside it wrongly, also with ensure_weight_tying
    "embeddings": Group(
        "language", r"embed_tokens", "the vocabulary, also the output head, with all its weights", "embed_tokens"
    ),
    "per_layer_embeddings": Group("language", r"embed_tokens_per_layer", "the table of per-layer embeddings"),
    "vision_stem": Group("vision", r"timm_model\.conv_stem\.conv", "the picture tower's first convolution"),
    **{f"vision_stage{stage}": describe_stage(stage) for stage in (1, 2, 3, 4)},
    "vision_fusion": Group(
        "vision", r"timm_model\.msfa\.ffn\.(?:pw_exp|pw_proj)\.conv", "the fusion of the picture tower's scales"
    ),
    "vision_projector": Group("vision", r"embed_vision\.embedding_projection", "from pictures into the language model"),
    "audio_convolutions": Group(
        "audio", r"audio_tower\.subsample_conv_projection\.conv_\d+\.conv", "the two convolutions that thin out frames"
    ),
    "audio_subsampling": Group(
        "audio",
        r"audio_tower\.subsample_conv_projection\.input_proj_linear",
        "from thinned frames into the sound tower",
    ),
    "audio_conformer": Group(
        "audio",
        r"audio_tower\.conformer\.\d+\..*(?:ffw_layer_1|ffw_layer_2|q_proj|k_proj|v_proj|pos_proj|post|linear_start|linear_end)",
        "the sound tower's blocks",
    ),
    "audio_projector": Group("audio", r"embed_audio\.embedding_projection", "from sound into the language model"),
}
SETS = {
    "vision": ("vision_projector",),
    "vision_tower": ("vision_stage1", "vision_stage2", "vision_stage3", "vision_stage4", "vision_fusion"),
    "audio": ("audio_conformer", "audio_subsampling", "audio_projector"),
}
CHOICES = (*GROUPS, *SETS)
# behind any prefix; a tower of another family may have layers with the language model's names
LANGUAGE_PREFIX = r"(?!.*(?:vision|audio)_)(?:.*\.)?"
LAYER_KINDS = {
    "sliding": "attention to the last few hundred tokens only",
    "full": "attention to all tokens",
    "kv_source": "whose keys and values the shared layers use",
    "kv_shared": "without keys and values of their own",
}
LAYERS_HELP = (
    "decoder layers that learn: numbers and ranges (0-9,20), last 8, " + ", ".join(LAYER_KINDS) + "; empty: all"
)


def describe_groups() -> str:
    """Return the help text of `adapter.layers`: the sets and groups, tower by tower."""
    language = ", ".join(name for name, group in GROUPS.items() if group.tower == "language")
    others = "; ".join(f"{name} = {', '.join(parts)}" for name, parts in SETS.items())
    alone = [name for name, group in GROUPS.items() if group.tower != "language"]
    alone = [name for name in alone if not any(name in parts for parts in SETS.values())]
    return f"groups that learn: {language}; {others}; {', '.join(alone)}"


def expand_groups(names: tuple[str, ...]) -> tuple[str, ...]:
    """Replace sets by their groups, in the table's order, each once. Raises KeyError for an unknown name."""
    chosen = {group for name in names for group in SETS.get(name, (name,))}
    unknown = sorted(chosen - GROUPS.keys())
    if unknown:
        raise KeyError(unknown[0])
    return tuple(group for group in GROUPS if group in chosen)


def write_group_regex(name: str, layers: tuple[int, ...] | None = None) -> str:
    """Return the regular expression of one group's whole module names, in some decoder layers or (None) in all.

    Modules that stand in no decoder layer are not touched by `layers`.
    """
    group = GROUPS[name]
    pattern = group.pattern
    if group.tower == "language" and layers is not None:
        pattern = pattern.replace(r"layers\.\d+", rf"layers\.(?:{'|'.join(map(str, layers))})")
    return (LANGUAGE_PREFIX if group.tower == "language" else r"(?:.*\.)?") + f"(?:{pattern})"


@functools.cache
def find_group(module: str) -> str | None:
    """Return the group that a module belongs to, or None."""
    return next((name for name in GROUPS if re.fullmatch(write_group_regex(name), module)), None)


@functools.cache
def find_tower(module: str) -> str:
    """Return the tower that a module or parameter belongs to; projections count with their tower."""
    return next((tower for tower, parts in TOWERS.items() if any(part in module for part in parts)), "language")


def find_layer(module: str) -> int | None:
    """Return the number of the decoder layer that a module of the language model stands in, or None."""
    found = re.search(r"\blayers\.(\d+)\.", module)
    return int(found.group(1)) if found and find_tower(module) == "language" else None


def check_layers(value: Any) -> Any:
    """Return a choice of decoder layers as text: "0-9,20", "last 8", "full". Raises ValueError for anything else."""
    if value is None:
        return None
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    terms = [" ".join(str(part).split()) for part in parts]
    for term in terms:
        known = re.fullmatch(r"\d+|\d+-\d+|last [1-9]\d*", term) or term in LAYER_KINDS
        if isinstance(value, bool | float) or not known:
            raise ValueError(f"numbers and ranges such as 0-9,20 or last 8, or one of {', '.join(LAYER_KINDS)}")
    return ",".join(terms)


def find_layers_by_kind(layer_types: list[str], shared: int) -> dict[str, tuple[int, ...]]:
    """Return the decoder layers of each kind.

    Args:
        layer_types: "sliding_attention" or "full_attention" for each layer, as in transformers' text config.
        shared: how many of the last layers use the keys and values of others; each takes those of the last layer of
            its own type that has some (transformers, Gemma3nTextAttention).
    """
    count = len(layer_types)
    own = layer_types[: count - shared] if 0 < shared < count else layer_types
    sources = {kind: len(own) - 1 - own[::-1].index(kind) for kind in own} if len(own) < count else {}
    return {
        "sliding": tuple(i for i, kind in enumerate(layer_types) if kind == "sliding_attention"),
        "full": tuple(i for i, kind in enumerate(layer_types) if kind == "full_attention"),
        "kv_source": tuple(sorted(sources.values())),
        "kv_shared": tuple(range(len(own), count)),
    }


def resolve_layers(choice: str, layer_types: list[str], shared: int) -> tuple[int, ...]:
    """Return the numbers of the chosen decoder layers. Raises ValueError saying which do not exist."""
    kinds, count, chosen = find_layers_by_kind(layer_types, shared), len(layer_types), set()
    for term in choice.split(","):
        if term in kinds:
            chosen |= set(kinds[term])
        elif term.startswith("last "):
            chosen |= set(range(count - int(term.removeprefix("last ")), count))
        else:
            first, _, last = term.partition("-")
            chosen |= set(range(int(first), int(last or first) + 1))
    outside = [layer for layer in sorted(chosen) if not 0 <= layer < count]
    if outside:
        raise ValueError(f"{choice} asks for layer {outside[0]}, and the model has layers 0 to {count - 1}")
    if not chosen:
        raise ValueError(f"{choice} chooses no layer of this model")
    return tuple(sorted(chosen))


def find_runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return runs of numbers that follow each other, first and last of each: {0, 1, 2, 20} -> [(0, 2), (20, 20)]."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def write_ranges(layers: tuple[int, ...]) -> str:
    """Return numbers as ranges: (0, 1, 2, 20) -> "0-2,20"."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in find_runs(layers))
