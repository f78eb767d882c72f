"""Batches as CUDA graphs: the thousands of kernels of the decoder are recorded once a shape and started by two launches.

    x [N, H], per-layer rows, places ─ copied to where the recording reads ─ forward ─ hidden [M, H] ─ head and loss, as ever
    gradient of hidden [M, H]        ─ copied                              ─ backward ─ gradients of what learns

Up to some thousand tokens a GPU is done before the CPU has launched the next kernel, so this is where the time goes. The kernels are
those of the compiled layers (fast_path.py), so the result is the same. What a recording works with lies in memory that all recordings
share: a batch has to be through its backward before the next one begins, and one that is not is computed without.
"""

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .rows import Line, Rows

Decode = Callable[[torch.Tensor, torch.Tensor | None, Rows], torch.Tensor]
Replay = Callable[[], Any]

TOKENS = 8192  # a longer batch keeps the GPU busy (16,384 tokens of E2B on an H200: nothing to gain), and a recording holds memory
SHAPES = 32  # recordings of one training, about a second and some MB each
SEEN = 2  # a shape is recorded when it comes for this time: compiled layers have run it once, and it is likely to come again
LEARNED_BYTES = (
    2**30
)  # gradients stand twice while a recording is used: for an adapter that is nothing, for whole weights much


def capture(function: Callable[[], Any], pool: Any) -> tuple[Replay, Any]:
    """Record what a function launches; return what launches it again, and the function's result, which that fills anew."""
    graph = torch.cuda.CUDAGraph()
    # other threads of the process, a data loader's for instance, may use the GPU meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


@dataclass
class Recording:
    """One shape of batch: where it reads and writes, and what runs it."""

    numbers: list[torch.Tensor]
    x: torch.Tensor
    per_layer: torch.Tensor | None
    hidden: torch.Tensor
    gradient: torch.Tensor
    reached: list[torch.Tensor | None]  # gradients of x, per_layer and the weights
    forward: Replay
    backward: Replay


@dataclass
class Graphs:
    """The recordings of one Gemma3nTextModel.

    longest: tokens of the longest batch that is recorded. capture: makes a recording. why_not: set once recording has failed or cannot be. ticket: held by the batch whose backward is
    still to come. turn: number of the batch that the shared memory belongs to.
    """

    text: Any
    longest: int = TOKENS
    capture: Callable[[Callable[[], Any], Any], tuple[Replay, Any]] = capture
    recordings: dict[Any, Recording] = field(default_factory=dict)
    seen: Counter[Any] = field(default_factory=Counter)
    batches: int = 0
    why_not: str | None = None
    turn: int = 0
    ticket: Any = None
    pool: Any = None
    held: int = 0  # bytes of the GPU that batches without a recording cannot have
    recording: bool = False
    watch: "Watch | None" = None
    weights: list[torch.nn.Parameter] = field(default_factory=list)
    aliases: dict[Any, torch.nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def run(self, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows) -> torch.Tensor:
        """Return what `decode` returns, [M, H], by its recording if there is one, or make one when the shape has come often enough.

        Args:
            x: [N, H], the rows' embeddings; per_layer: [N, layers, P] or None.
            decode: computes with compiled layers, and the same for every batch of one shape.
        """
        if self.why_not or x.shape[0] > self.longest or not torch.is_grad_enabled():
            return decode(x, per_layer, rows)
        rows = bound(rows)
        key = describe_shape(x, per_layer, rows)
        self.look_at_model()
        self.seen[key] += 1
        if key not in self.recordings and self.seen[key] >= SEEN and len(self.recordings) < SHAPES:
            self.record(key, decode, x, per_layer, rows)
        recording = self.recordings.get(key)
        if recording is None or (self.ticket is not None and self.ticket() is not None):
            return self.run_unrecorded(decode, x, per_layer, rows)
        self.batches += 1
        torch._foreach_copy_(recording.numbers, list_numbers(rows))
        return Run.apply(self, recording, x, per_layer, *self.weights)

    def run_unrecorded(
        self, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows
    ) -> torch.Tensor:
        """Return what `decode` returns; where the memory of the recordings is missing for it, they give it back for good."""
        try:
            return decode(x, per_layer, rows)
        except torch.OutOfMemoryError:
            if not self.recordings:
                raise
        self.give_up("a batch without a recording needs their memory")
        torch.cuda.empty_cache()
        return decode(x, per_layer, rows)

    def give_up(self, why: str) -> None:
        """Record nothing any more, and say why, once."""
        self.why_not = why
        self.forget()
        print(f"fast path: no CUDA graphs, because {why}", flush=True)

    def look_at_model(self) -> None:
        """Forget all recordings when weights have moved, others learn, or adapters were switched: a recording knows addresses."""
        if self.watch is None or self.watch.look() != self.watch.state:
            self.forget()
            self.watch = Watch(self.text)
            self.weights = [p for p in self.text.parameters() if p.requires_grad]
            self.aliases = {p: torch.nn.Parameter(p.detach()) for p in self.weights}
            if sum(p.numel() * p.element_size() for p in self.weights) > LEARNED_BYTES:
                self.why_not = "more learns than an adapter"
            elif any(isinstance(m, torch.nn.Dropout) and m.p for m in self.text.modules()):
                self.why_not = "dropout draws other numbers for each batch"

    def forget(self) -> None:
        """Drop all recordings and the memory that they hold."""
        self.recordings.clear()
        self.seen.clear()
        self.buffers.clear()
        self.weights, self.aliases, self.gradients = [], {}, []
        self.pool, self.held, self.watch = None, 0, None

    def record(self, key: Any, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows) -> None:
        """Make the recording of a shape; where that fails say so, once, and go on without any."""
        cuda = x.device.type == "cuda"
        try:
            if self.pool is None and cuda:
                self.pool = torch.cuda.graph_pool_handle()
            self.recording = True
            self.recordings[key] = self.make_recording(decode, x, per_layer, rows)
            if cuda:
                self.check_room(x.device)
        except RuntimeError as error:
            self.give_up(f"recording failed: {str(error).strip().splitlines()[0]}")
        finally:
            self.recording = False

    def check_room(self, device: torch.device) -> None:
        """Give up where a batch of another shape, which comes without a recording at first, might not fit beside them."""
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - self.held
        if free + max(0, unused) < self.held:
            self.give_up(f"{free / 2**30:.1f} GiB are free beside the {self.held / 2**30:.1f} GiB of the recordings")

    def make_recording(self, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows) -> Recording:
        """Record forward and backward of one shape.

        The weights that learn are recorded through aliases of the same memory: the engine of autograd would otherwise wait for the
        stream on which each weight was first used, and a recording may not wait for anything outside of it.
        """
        fixed = self.lend("x", x, x.requires_grad)
        per_layer_fixed = None if per_layer is None else self.lend("per_layer", per_layer, per_layer.requires_grad)
        numbers = [number.clone() for number in list_numbers(rows)]
        inside = replace_numbers(rows, iter(numbers))
        latest: list[torch.Tensor] = []

        def forward() -> torch.Tensor:
            torch.clear_autocast_cache()  # a cast that was kept would be read again, when its weight has changed
            with self.through_aliases():
                latest[:] = [decode(fixed, per_layer_fixed, inside)]
            torch.clear_autocast_cache()
            return latest[0].detach()

        sources = [fixed, per_layer_fixed, *self.aliases.values()]
        learned = [source for source in sources if source is not None and source.requires_grad]

        def backward() -> list[torch.Tensor | None]:
            with self.through_aliases(), torch.autocast(x.device.type, enabled=False):
                found = torch.autograd.grad(latest[0], learned, gradient, allow_unused=True)
            by_source = dict(zip(map(id, learned), found, strict=True))
            return self.keep([by_source.get(id(source)) for source in sources])

        with torch.no_grad():
            fixed.copy_(x)
            if per_layer_fixed is not None and per_layer is not None:
                per_layer_fixed.copy_(per_layer)
        if not self.recordings:  # what a process does once, it does before the first recording
            with side_stream(x.device):
                gradient = self.lend("gradient", forward())
                backward()
                latest.clear()  # with it go autograd's notes of this stream
        before = empty_cache(x.device)  # what the batches before took, the recording takes
        replay_forward, hidden = self.capture(forward, self.pool)
        gradient = self.lend("gradient", hidden)
        replay_backward, reached = self.capture(backward, self.pool)
        latest.clear()
        self.held += empty_cache(x.device) - before
        return Recording(numbers, fixed, per_layer_fixed, hidden, gradient, reached, replay_forward, replay_backward)

    def lend(self, name: str, like: torch.Tensor, learns: bool = False) -> torch.Tensor:
        """Return the first rows of the buffer of a name; all recordings share it, so it is as long as the longest may be."""
        found = self.buffers.get(name)
        if found is None or found.shape[1:] != like.shape[1:] or found.dtype != like.dtype:
            found = self.buffers[name] = like.detach().new_zeros((self.longest, *like.shape[1:]))
        return found[: like.shape[0]].detach().requires_grad_(learns)

    def keep(self, found: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Copy gradients of weights to where all recordings put them; those of inputs stay where they are."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        pairs = [(own, new) for own, new in zip(self.gradients, found[2:], strict=True) if new is not None]
        with torch.no_grad():
            for own, new in pairs:
                own.copy_(new)
        weights = [None if new is None else own for own, new in zip(self.gradients, found[2:], strict=True)]
        return [*found[:2], *weights]

    @contextlib.contextmanager
    def through_aliases(self) -> Iterator[None]:
        """Put an alias in the place of each weight that learns."""
        places = [
            (module._parameters, name, weight)
            for module in self.text.modules()
            for name, weight in module._parameters.items()
            if weight is not None and weight in self.aliases
        ]
        try:
            for parameters, name, weight in places:
                parameters[name] = self.aliases[weight]
            yield
        finally:
            for parameters, name, weight in places:
                parameters[name] = weight


class Run(torch.autograd.Function):
    """A batch by its recording. Gradients are handed on as they are; autograd copies what it keeps."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, recording: Recording, x: torch.Tensor, per_layer: torch.Tensor | None, *weights: Any) -> torch.Tensor:  # fmt: skip
        recording.x.detach().copy_(x)
        if recording.per_layer is not None:
            recording.per_layer.detach().copy_(per_layer)
        recording.forward()
        graphs.turn += 1
        ctx.graphs, ctx.recording, ctx.turn, ctx.ticket = graphs, recording, graphs.turn, Ticket()
        graphs.ticket = weakref.ref(
            ctx.ticket
        )  # gone with the batch's graph, whether or not its backward is ever asked for
        return recording.hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.turn != ctx.graphs.turn:
            raise RuntimeError("the backward of this batch came after the next batch had taken its memory")
        recording: Recording = ctx.recording
        recording.gradient.copy_(grad)
        recording.backward()
        ctx.ticket = None
        return None, None, *recording.reached


class Ticket:
    """Lives as long as a batch whose backward is still to come."""


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run a block on another stream of a GPU, as recordings do, and wait for it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)


def empty_cache(device: torch.device) -> int:
    """Give memory that no tensor and no recording holds back to the GPU; return the bytes that this process still has."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def bound(rows: Rows) -> Rows:
    """Return the same rows with the lengths of their longest rounded up, so that batches of like lengths share a recording.

    The filling counts as a row of the attention's kernel, so the longest is at least as long.
    """
    filling = rows.flat.numel() - rows.tokens
    lower, upper = (
        dataclasses.replace(line, longest=1 << (max(line.longest, filling, 2) - 1).bit_length())
        for line in (rows.lower, rows.upper)
    )
    return dataclasses.replace(rows, lower=lower, upper=upper, tokens=rows.flat.numel())


def describe_shape(x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows) -> tuple[Any, ...]:
    """Return all that a recording is made for, beside the model."""
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    sizes = (x.shape, rows.upper.index.numel(), rows.batch, rows.lower.longest, rows.upper.longest)
    inputs = (x.dtype, x.requires_grad, None if per_layer is None else (per_layer.dtype, per_layer.requires_grad))
    return (*sizes, rows.whole, rows.suffix, cast, *inputs)


def list_numbers(rows: Rows) -> list[torch.Tensor]:
    """Return the tensors of the rows that a decoder reads, all int64."""
    lines = [number for line in (rows.lower, rows.upper) for number in (line.index, line.row, line.place, line.counts)]
    return [rows.positions, *rows.first.values(), *lines]


def replace_numbers(rows: Rows, numbers: Iterator[torch.Tensor]) -> Rows:
    """Return rows with other tensors, in the order of `list_numbers`."""

    def replace_line(line: Line) -> Line:
        return Line(next(numbers), next(numbers), next(numbers), next(numbers), line.longest)

    positions, first = next(numbers), {kind: next(numbers) for kind in rows.first}
    return dataclasses.replace(
        rows, positions=positions, first=first, lower=replace_line(rows.lower), upper=replace_line(rows.upper)
    )


class Watch:
    """What a recording depends on and somebody may change: where weights lie, which learn, which adapters are on."""

    def __init__(self, text: Any):
        """Find the places to look at; walking through all modules for each batch would take milliseconds."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.text = text
        self.places = [(m._parameters, name) for m in text.modules() for name, p in m._parameters.items() if p is not None]  # fmt: skip
        self.adapters = [m for m in text.modules() if isinstance(m, BaseTunerLayer)]
        self.state = self.look()

    def look(self) -> tuple[Any, ...]:
        """Return what is there now."""
        weights = [parameters[name] for parameters, name in self.places]
        adapters = [(m.disable_adapters, list(m.active_adapters), m.merged) for m in self.adapters]
        return self.text.training, [(w.data_ptr(), w.requires_grad) for w in weights], adapters
