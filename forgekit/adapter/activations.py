"""Bytes of activations: what a training step of Gemma 3n keeps and works on, counted from the tensors that autograd saves.

The terms name the lines of transformers' Gemma 3n they stand for; `tests/adapter/test_memory.py` compares them with the
tensors that autograd really saves. T tokens in the batch, D hidden size, I feed-forward size, Q and K widths of queries
and keys, S AltUp's streams, u bytes of an activation.
"""

import functools
from dataclasses import dataclass

from ..layer_groups import find_layer, find_layers_by_kind
from ..model.shapes import Module, Shapes
from .choose import PlannedModule
from .plan import LayerPlan

VOCABULARY_CHUNK, TOKEN_CHUNK = 32768, 4096  # of TRL's loss (trl.trainer.utils, trl.kernels.chunked_logprob)
# tower -> its weights, and the bytes in 16 bit of one picture of 768 pixels or clip of 30 s: all that autograd saves when it
# learns, and four times the largest tensor. `python -m benchmarks.memory --towers` counts them.
TOWER_BYTES = {"vision": (298_587_456, 3.92e9, 0.25e9), "audio": (684_694_048, 1.62e9, 0.04e9)}
NORMS = 8  # a layer: before and after attention, feed-forward, LAuReL and per-layer input; AltUp's router twice


@dataclass(frozen=True)
class Sizes:
    """The widths of a model's language part."""

    hidden: int
    feed_forward: tuple[int, ...]  # of each layer
    queries: int
    keys: int
    per_layer: int
    streams: int
    vocabulary: int


@functools.lru_cache(maxsize=8)
def read_sizes(shapes: Shapes) -> Sizes:
    """Read the widths off the shapes; families without AltUp have one stream."""
    by_end: dict[str, list[Module]] = {}
    for module in shapes.modules:
        if find_layer(module.name) is not None or "embed_tokens" in module.name:
            by_end.setdefault(module.name.rpartition(".")[2], []).append(module)
    vocabulary, hidden = by_end["embed_tokens"][0].shape
    streams = 1 + sum(".altup_projections." in module.name for module in shapes.modules)
    per_layer = by_end["per_layer_projection"][0].shape[1] if "per_layer_projection" in by_end else 0
    return Sizes(
        hidden,
        tuple(module.shape[1] for module in by_end["down_proj"]),
        by_end["q_proj"][0].shape[0],
        by_end["k_proj"][0].shape[0],
        per_layer,
        streams,
        vocabulary,
    )


def count_layer(
    plan: LayerPlan, shapes: Shapes, layer: int, rows: int, length: int, unit: int, engine: str, own: int
) -> float:
    """Return the bytes that autograd saves in one decoder layer."""
    sizes, tokens = read_sizes(shapes), rows * length
    shared = layer in find_layers_by_kind(list(shapes.layer_types), shapes.shared_layers)["kv_shared"]
    learning = [module for module in plan.in_layers.get(layer, ()) if len(module.shape) == 2]
    full = any(module.kind == "full weights" for module in learning)
    keys = 0 if shared else sizes.keys
    per_token: float = NORMS * 4 * sizes.hidden * (2 if full else 1)  # norms compute in float32 and keep their input
    per_token += 4 * sizes.queries + 8 * keys  # norms of queries, keys and values
    per_token += 2 * unit * sizes.streams * sizes.hidden if sizes.streams > 1 else 0  # AltUp: predict and correct
    per_token += 2 * unit * sizes.queries + 2 * unit * keys  # attention
    # the activation's input, its output and the other factor; a sparse layer keeps the values before the cut as well
    per_token += unit * sizes.feed_forward[layer] * (4 if shapes.sparse[layer] else 3)
    per_token += 4 * unit * sizes.per_layer
    per_token += count_inputs(learning, unit, own)
    pairs = rows * length * length
    masked = shapes.layer_types[layer] == "full_attention" or length > shapes.window
    # eager attention keeps its weights twice, in float32 and in 16 bit; else each layer keeps its mask
    quadratic = pairs * (shapes.heads * (4 + unit) if engine == "unsloth" else unit * masked)
    return tokens * per_token + quadratic


def count_inputs(learning: list[PlannedModule], unit: int, own: int) -> float:
    """Return the bytes a token of the inputs that modules which learn keep.

    float32 matrices get a copy of their input each; in the weights' own precision, and for full weights, the three
    projections of attention share one, and so do the first two of the feed-forward part.
    """
    if own == 4 and all(module.kind == "LoRA" for module in learning):
        return unit * sum(module.shape[1] for module in learning)
    twins = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    shared: dict[str, int] = {}
    for module in learning:
        name = module.name.rpartition(".")[2]
        shared[twins.get(name, name)] = module.shape[1]
    return unit * sum(shared.values())


def first_learning(plan: LayerPlan, checkpointing: bool) -> int:
    """Return the first decoder layer that keeps anything: with checkpointing the inputs ask for gradients, so all do."""
    outside = any(find_layer(m.name) is None for m in plan.modules)
    return 0 if checkpointing or outside else min(plan.in_layers, default=0)


def count_kept(
    plan: LayerPlan, shapes: Shapes, rows: int, length: int, unit: int, engine: str, checkpointing: bool, own: int
) -> float:
    """Return the bytes kept from the forward to the backward pass, towers aside."""
    sizes, tokens, layers = read_sizes(shapes), rows * length, len(shapes.layer_types)
    # before the layers and after them: AltUp's streams are made and joined, the per-layer inputs are normed
    ends = tokens * ((4 * (sizes.streams - 1) + 2) * unit * sizes.hidden + 4 * sizes.hidden)
    ends += tokens * layers * sizes.per_layer * (4 + 3 * unit)
    if checkpointing:
        # the streams at the start of each layer; Unsloth moves them to the host
        return ends + (0 if engine == "unsloth" else tokens * layers * sizes.streams * sizes.hidden * unit)
    first = first_learning(plan, checkpointing)
    return ends + sum(
        count_layer(plan, shapes, layer, rows, length, unit, engine, own) for layer in range(first, layers)
    )


def count_working(
    plan: LayerPlan, shapes: Shapes, rows: int, length: int, unit: int, engine: str, checkpointing: bool, own: int
) -> float:
    """Return the bytes of the layer at work in the backward pass: recomputed when checkpointed, and its gradients.

    Gradients: of the feed-forward part's widest tensor three at once in the activations' precision and, beside float32
    matrices, one more in float32; of AltUp's streams two.
    """
    sizes, tokens = read_sizes(shapes), rows * length
    widest = max(sizes.feed_forward)
    gradients = tokens * (widest * (3 * unit + (4 if own == 4 else 0)) + 2 * unit * sizes.streams * sizes.hidden)
    if engine == "unsloth":
        gradients += rows * length * length * shapes.heads * 4
    layer = 0.0
    if checkpointing:
        layer = max(
            count_layer(plan, shapes, number, rows, length, unit, engine, own)
            for number in range(len(shapes.layer_types))
        )
    return layer + gradients


def count_loss(plan: LayerPlan, shapes: Shapes, rows: int, length: int, unit: int) -> float:
    """Return the bytes of the loss when every token is learned: TRL and Unsloth never hold the logits of all tokens."""
    sizes, tokens = read_sizes(shapes), rows * length
    chunk = min(tokens, TOKEN_CHUNK) * min(VOCABULARY_CHUNK, sizes.vocabulary) * unit
    head = any(m.name.endswith("embed_tokens") and m.kind == "full weights" for m in plan.modules)
    return chunk + tokens * sizes.hidden * (4 + 2 * unit) + head * sizes.vocabulary * sizes.hidden * (4 + unit)


def count_towers(plan: LayerPlan, images: int, clips: int, unit: int) -> float:
    """Return the bytes of the towers' activations; a tower that learns keeps them all, a frozen one a few at a time.

    The released towers' figures; others are taken to scale with their weights.
    """
    together = 0.0
    for total in plan.totals:
        number = {"vision": images, "audio": clips}.get(total.tower, 0)
        if number and total.total:
            inside = any("_tower." in module.name for module in plan.modules if module.tower == total.tower)
            weights, kept, at_work = TOWER_BYTES[total.tower]
            together += number * (kept if inside else at_work) * total.total / weights * unit / 2
    return together
