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


@dataclass(frozen=True)
class Step:
    """The shape of a training step, and the bytes of one number of each kind of tensor.

    Attributes:
        unit: activations and weights, 2 in 16 bit.
        streams: AltUp's streams. CUDA's autocast computes powers in float32 (pow stands in its list), and the streams are
            scaled by a root of mean squares before the first layer, so all of them stay in float32 to the end.
        outputs: what a projection returns: bitsandbytes' layers return the precision of their input (Linear4bit.forward), plain
            ones autocast's 16 bit. Beside float32 streams that is 4, and the feed-forward part keeps twice as much.
        matrices: LoRA's, 4 where PEFT keeps them in float32.
        engine: "huggingface" or "unsloth".
    """

    rows: int
    length: int
    unit: int
    streams: int
    outputs: int
    matrices: int
    engine: str
    checkpointing: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length


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


def count_layer(plan: LayerPlan, shapes: Shapes, layer: int, step: Step) -> float:
    """Return the bytes that autograd saves in one decoder layer.

    AltUp keeps what `predict` multiplies (cast to 16 bit when the streams are in float32), and in the streams' precision the
    predictions, the repeated innovation and the corrected streams. In 16 bit each norm keeps a float32 copy of its input; beside
    float32 streams the first norm and the router's keep a view of them. The scores' kernel keeps queries, output and, for a batch
    with padding, keys and values repeated for each head, and the mask that it is given.
    """
    sizes, unit, wide = read_sizes(shapes), step.unit, step.streams > step.unit
    shared = layer in find_layers_by_kind(list(shapes.layer_types), shapes.shared_layers)["kv_shared"]
    learning = [module for module in plan.in_layers.get(layer, ()) if len(module.shape) == 2]
    full = any(module.kind == "full weights" for module in learning)
    keys = 0 if shared else sizes.keys
    per_token: float = (NORMS - 2 * wide) * 4 * sizes.hidden * (2 if full else 1)
    per_token += 4 * sizes.queries + 8 * keys  # norms of queries, keys and values
    if sizes.streams > 1:
        per_token += (unit + 3 * step.streams if wide else 2 * unit) * sizes.streams * sizes.hidden
    per_token += 4 * unit * sizes.queries  # attention
    # the activation's input, its output and the other factor; a sparse layer keeps the values before the cut as well
    per_token += step.outputs * sizes.feed_forward[layer] * (4 if shapes.sparse[layer] else 3)
    per_token += 4 * unit * sizes.per_layer
    per_token += count_inputs(learning, step)
    # eager attention keeps its weights twice, in float32 and in 16 bit; else each layer keeps its mask
    pairs = step.rows * step.length**2
    return step.tokens * per_token + pairs * (shapes.heads * (4 + unit) if step.engine == "unsloth" else unit)


def count_inputs(learning: list[PlannedModule], step: Step) -> float:
    """Return the bytes a token of the inputs that modules which learn keep, in 16 bit.

    Where the input or the matrices are in float32, each module casts its own. In one precision throughout, the three projections
    of attention share one, the first two of the feed-forward part too; and 16-bit matrices share the scores' output with o_proj.
    """
    own = {module.name.rpartition(".")[2]: module.shape[1] for module in learning}
    cast = step.matrices > step.unit and all(module.kind == "LoRA" for module in learning)
    if not cast and step.streams == step.unit:
        twins = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        own = {twins.get(name, name): width for name, width in own.items()}
    elif not cast:
        own.pop("o_proj", None)
    return step.unit * sum(own.values())


def first_learning(plan: LayerPlan, checkpointing: bool) -> int:
    """Return the first decoder layer that keeps anything: with checkpointing the inputs ask for gradients, so all do."""
    outside = any(find_layer(m.name) is None for m in plan.modules)
    return 0 if checkpointing or outside else min(plan.in_layers, default=0)


def count_kept(plan: LayerPlan, shapes: Shapes, step: Step) -> float:
    """Return the bytes kept from the forward to the backward pass, towers aside."""
    sizes, layers = read_sizes(shapes), len(shapes.layer_types)
    ends = count_start(shapes, step) + count_end(shapes, step)
    if step.checkpointing:
        # the streams at the start of each layer; Unsloth moves them to the host
        return ends + (0 if step.engine == "unsloth" else layers * count_streams(sizes, step))
    # autocast keeps a 16-bit copy of each float32 matrix
    copies = sum(m.parameters for m in plan.modules if m.kind == "LoRA") * step.unit * (step.matrices > step.unit)
    first = first_learning(plan, step.checkpointing)
    return ends + copies + sum(count_layer(plan, shapes, layer, step) for layer in range(first, layers))


def count_streams(sizes: Sizes, step: Step) -> float:
    """Return the bytes of AltUp's streams, which go from layer to layer."""
    return step.tokens * sizes.streams * sizes.hidden * step.streams


def count_start(shapes: Shapes, step: Step) -> float:
    """Return the bytes kept before the layers: AltUp's streams are made of the embeddings, the per-layer inputs are normed.

    The embeddings are kept for their power.
    """
    sizes = read_sizes(shapes)
    inputs = step.tokens * len(shapes.layer_types) * sizes.per_layer * (4 + step.unit)
    if sizes.streams == 1:
        return inputs
    made = count_scaled(step) * (sizes.streams - 1) + step.streams
    return inputs + step.tokens * made * sizes.hidden + count_streams(sizes, step)


def count_scaled(step: Step) -> int:
    """Return the bytes of one number of a stream that is scaled to a magnitude: itself and the product, and a copy for its power.

    Without autocast's float32 the power keeps the stream itself.
    """
    return 2 * step.streams + (step.unit if step.streams > step.unit else 0)


def count_end(shapes: Shapes, step: Step) -> float:
    """Return the bytes kept after the layers: the streams are joined as they were made, then normed for the loss."""
    sizes = read_sizes(shapes)
    joined = count_scaled(step) * (sizes.streams - 1)
    return step.tokens * (joined + 4 + step.streams) * sizes.hidden


def count_working(plan: LayerPlan, shapes: Shapes, step: Step) -> float:
    """Return the most that the backward pass needs at once beyond what is kept, the loss aside.

    First the join of the streams: its gradients in and out. Then layer by layer, the last one first: what a checkpointed layer
    computes again and its gradients, less what earlier steps of the backward pass have let go.
    """
    sizes, layers = read_sizes(shapes), len(shapes.layer_types)
    streams = count_streams(sizes, step)
    moments = [2 * streams + step.tokens * sizes.hidden * step.streams]
    for back, layer in enumerate(reversed(range(layers))):
        need = count_gradients(shapes, layer, step) - count_end(shapes, step)
        if step.checkpointing:
            need += count_layer(plan, shapes, layer, step)
            moments.append(need - (0 if step.engine == "unsloth" else back * streams))
        elif back == 0:
            moments.append(need)
    return max(moments)


def count_gradients(shapes: Shapes, layer: int, step: Step) -> float:
    """Return the bytes of gradients at work in one decoder layer: in AltUp's correction, or in the feed-forward part.

    AltUp: the streams' gradient and its product with the innovation. Feed-forward: the gradient of down_proj's input through the
    frozen weights and through the adapter, in float32 where that casts its input, and the next one; the adapter's kept input has
    gone, and so have the innovation and three norms' inputs, while the streams' gradient stays.
    """
    sizes = read_sizes(shapes)
    widest = 3 * 4 if step.outputs > step.unit else 4 + 2 * step.unit if step.matrices > step.unit else 3 * step.unit
    forward = sizes.feed_forward[layer] * (widest - step.unit) - 3 * 4 * sizes.hidden
    if step.engine == "unsloth":
        forward += step.length * shapes.heads * 4
    return max(2 * count_streams(sizes, step), step.tokens * forward)


def count_loss(plan: LayerPlan, shapes: Shapes, step: Step) -> float:
    """Return the bytes of the loss when every token is learned: TRL and Unsloth never hold the logits of all tokens."""
    sizes, tokens, unit = read_sizes(shapes), step.tokens, step.unit
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
