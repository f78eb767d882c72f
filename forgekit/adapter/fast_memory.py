"""Bytes of activations with forgekit's fast path (train/row_skip.py), which computes and keeps other tensors than the library.

    kept        a layer's work for each of its rows ("high"), or the streams at its start ("low")
    working     the layer or the pair of layers that is computed again, or the loss

The bytes a row of a layer are A a unit of hidden size and B a unit of feed-forward width, measured on a GPU: `benchmarks/README.md`
has the peaks, and `tests/adapter/test_fast_memory.py` compares each with what is predicted here.
"""

from dataclasses import dataclass

from ..config import Config
from ..hardware import choose_device, detect_hardware
from ..model.shapes import Shapes
from .activations import Sizes, Step, count_streams, read_sizes

# (bytes a unit of hidden size, bytes a unit of feed-forward width) that one row keeps in one layer, in 16 bit
KEPT = {"eager": (88.4, 8.24), "compiled": (65.3, 5.86)}
PACKED = 5.57  # bytes a unit of feed-forward width more: packed layers answer in float32, as they are asked
PAIR = 3.0  # bytes a unit of feed-forward width more while a pair of layers is computed again
INSIDE = (12.0, 22.9)  # a compiled layer that computes itself again inside of its backward, as KEPT
LOSS_ROWS = 256  # train/loss.py, CHUNK_LOGITS
LOSS_BYTES = {"eager": 20.0, "compiled": 5.3}  # of one logit
# Layers that are computed again together when nothing is kept. With n layers in groups of k, the start of n / k groups is kept, and
# the work of k layers exists at once; a layer of E2B works on 4.5 times the bytes of its start (benchmarks/README.md), so 2 is best.
SPAN = 2
# A compiled layer computes itself again inside of its own backward, at no cost to the CPU; pairs go through torch's checkpoint, which
# takes the CPU 0.2 s a step. From so many tokens on the GPU has more to do than the CPU, and the smaller peak is free.
PAIRED_TOKENS = 12_288


@dataclass(frozen=True)
class FastStep:
    """How the fast path runs: compiled or not, and whether it keeps nothing ("low") or everything ("high")."""

    memory: str
    compiled: bool
    packed: bool

    @property
    def kind(self) -> str:
        return "compiled" if self.compiled else "eager"


def choose_fast_step(config: Config, engine: str) -> FastStep | None:
    """Return how the fast path will run on a GPU, or None where it does not, or where Unsloth may have to take float16.

    Without a word on memory it keeps what fits, so what it needs is what "low" needs. What is compiled hangs on the length of the
    run; without a word on it the eager form is taken, which keeps more.
    """
    if config.train.fast == "off" or (engine == "unsloth" and may_be_float16(config)):
        return None
    by_checkpointing = {"on": "low", "off": "high", "auto": "low"}[config.train.gradient_checkpointing]
    memory = by_checkpointing if config.train.memory == "auto" else config.train.memory
    packed = config.model.load_in in ("4bit", "8bit")
    return FastStep("high" if memory == "high" else "low", config.train.compile == "on", packed)


def may_be_float16(config: Config) -> bool:
    """Say whether 16 bit may turn out to be float16, which the fast path leaves to Unsloth: on GPUs older than Ampere."""
    if config.model.dtype != "auto":
        return config.model.dtype == "float16"
    return not (choose_device(config) == "cuda" and detect_hardware().bfloat16)


def find_parked(config: Config, fast: FastStep, images: int, clips: int) -> tuple[str, ...]:
    """Return parts of names of modules whose weights wait in the machine's memory while it trains (train/speed.py)."""
    switch = config.model.offload_ple
    asked = (
        "low" if config.train.memory == "auto" and config.train.gradient_checkpointing == "on" else config.train.memory
    )
    table = asked == "low" if switch == "auto" else switch == "on"
    idle = [name for name, number in (("vision_tower", images), ("audio_tower", clips)) if not number]
    return (*idle, *(["embed_tokens_per_layer"] if table else []))


def count_fast(shapes: Shapes, step: Step, fast: FastStep, learned: float = 1.0) -> tuple[float, float]:
    """Return the bytes kept for the backward pass, and the most that is at work beside them.

    Args:
        learned: share of the tokens that the layers from the source on compute.
    """
    sizes, layers, source = read_sizes(shapes), len(shapes.layer_types), find_source_layer(shapes)
    rows = [step.tokens * (1.0 if layer < source else learned) for layer in range(layers)]
    start = step.tokens * layers * sizes.per_layer * (4 + step.unit)  # the per-layer inputs, normed
    loss = min(step.tokens * learned, LOSS_ROWS) * sizes.vocabulary * LOSS_BYTES[fast.kind]
    works = [rows[layer] * count_row(sizes, layer, fast) for layer in range(layers)]
    streams = count_streams(sizes, step)
    if fast.memory == "high":
        return start + streams + sum(works), loss
    span = 1 if fast.compiled and step.tokens < PAIRED_TOKENS else SPAN
    below, above = -(-source // span) + 1, -(-(layers - source) // span)  # the source layer's keys start from all rows
    if span == 1:
        work = max(row * (INSIDE[0] * sizes.hidden + INSIDE[1] * width) for row, width in zip(rows, sizes.feed_forward, strict=True))  # fmt: skip
    else:
        work = max(span * works[layer] + rows[layer] * PAIR * sizes.feed_forward[layer] for layer in range(layers))
    # while a lower layer is at work the starts above it have gone; the loss stands at the end, beside all of them
    ends = above * streams * learned
    return start + below * streams, max(work, loss + ends)


def count_table(shapes: Shapes) -> int:
    """Return the weights of the per-layer embedding table."""
    return sum(n for m in shapes.modules if "embed_tokens_per_layer" in m.name for _, n in m.parameters)


def find_source_layer(shapes: Shapes) -> int:
    """Return the last layer with keys of its own, where rows that teach nothing leave."""
    return len(shapes.layer_types) - shapes.shared_layers - 1


def count_row(sizes: Sizes, layer: int, fast: FastStep) -> float:
    """Return the bytes that one row keeps in one layer."""
    hidden, width = KEPT[fast.kind]
    return hidden * sizes.hidden + (width + PACKED * fast.packed) * sizes.feed_forward[layer]
