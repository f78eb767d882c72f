"""One recording of the decoder, forward and backward, for batches of one shape (graphs.py keeps them, and says when they are used).

x [N, H], per-layer rows, places ─ copied to where the recording reads ─ forward ─ hidden [M, H]
gradient of hidden [M, H]        ─ copied                              ─ backward ─ gradients of what learns
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import raise_to_power
from .rows import Line, Rows

Decode = Callable[[torch.Tensor, torch.Tensor | None, Rows], torch.Tensor]
Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Any], Any], tuple[Replay, Any]]


def capture(function: Callable[[], Any], pool: Any) -> tuple[Replay, Any]:
    """Record what a function launches; return what launches it again, and the function's result, which that fills anew."""
    graph = torch.cuda.CUDAGraph()
    # other threads of the process, a data loader's for instance, may use the GPU meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


@dataclass
class Recording:
    """Where it reads and writes, and what runs it. `reached`: gradients of x, of the per-layer rows and of each weight, or None."""

    numbers: list[torch.Tensor]
    x: torch.Tensor
    per_layer: torch.Tensor | None
    hidden: torch.Tensor
    gradient: torch.Tensor
    reached: list[torch.Tensor | None]
    forward: Replay
    backward: Replay

    def load(self, x: torch.Tensor, per_layer: torch.Tensor | None) -> None:
        """Put a batch's embeddings where the recording reads them; its numbers are put there by `load_numbers`."""
        fill((self.x, self.per_layer), (x, per_layer))

    def load_numbers(self, rows: Rows) -> None:
        """Put a batch's places where the recording reads them."""
        torch._foreach_copy_(self.numbers, list_numbers(rows))


class Workshop:
    """Makes recordings of one model that share inputs, gradients and a pool of memory.

    The weights that learn are recorded through aliases of the same memory: the engine of autograd would otherwise wait for the stream
    on which each weight was first used, and a recording may not wait for anything outside of it.
    """

    def __init__(self, text: Any, capture: Capture):
        """Take the model and what records."""
        self.text, self.capture = text, capture
        self.weights: list[torch.nn.Parameter] = [p for p in text.parameters() if p.requires_grad]
        self.aliases = {p: torch.nn.Parameter(p.detach()) for p in self.weights}
        self.buffers: dict[str, torch.Tensor] = {}
        self.gradients: list[torch.Tensor] = []
        self.pool: Any = None
        self.held = 0  # bytes of the GPU that only recordings can use
        self.warm = False

    def record(self, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows) -> Recording:
        """Record forward and backward of the shape of these rows."""
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

        def backward() -> list[torch.Tensor | None]:
            with self.through_aliases():
                return self.keep(find_gradients(latest[0], sources, gradient))

        fill((fixed, per_layer_fixed), (x, per_layer))
        if not self.warm:  # what a process does once, it does before the first recording
            with side_stream(x.device):
                gradient = self.lend("gradient", forward())
                backward()
                latest.clear()  # with it go autograd's notes of this stream
            self.warm = True
        if self.pool is None and x.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        before = empty_cache(x.device)  # what the batches before took, the recording takes
        replay_forward, hidden = self.capture(forward, self.pool)
        gradient = self.lend("gradient", hidden)
        replay_backward, reached = self.capture(backward, self.pool)
        latest.clear()
        self.held += empty_cache(x.device) - before
        return Recording(numbers, fixed, per_layer_fixed, hidden, gradient, reached, replay_forward, replay_backward)

    def lend(self, name: str, like: torch.Tensor, learns: bool = False) -> torch.Tensor:
        """Return the first rows of the buffer of a name, which recordings share.

        It is as long as the next power of two; for a longer batch there is a new one, and older recordings keep theirs.
        """
        found = self.buffers.get(name)
        if found is None or len(found) < len(like) or found.shape[1:] != like.shape[1:] or found.dtype != like.dtype:
            found = self.buffers[name] = like.detach().new_zeros((raise_to_power(len(like)), *like.shape[1:]))
        return found[: like.shape[0]].detach().requires_grad_(learns)

    def keep(self, found: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Copy gradients of weights to where all recordings put them; those of inputs stay where they are."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        with torch.no_grad():
            for own, new in zip(self.gradients, found[2:], strict=True):
                if new is not None:
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

    def compare(
        self, recording: Recording, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows
    ) -> float:
        """Return how far a recording is from the same kernels launched one by one, as a share: hidden states, then all gradients.

        Both get these rows with other embeddings than were recorded, and the recording's results are spoilt before, so that what is
        read from an old place, or never written, shows.
        """
        x, per_layer = x.detach().roll(1, 0), None if per_layer is None else per_layer.detach().roll(1, 0)
        leaves = [value if value is None else value.requires_grad_(place is not None and place.requires_grad) for value, place in ((x, recording.x), (per_layer, recording.per_layer))]  # fmt: skip
        hidden = decode(x, per_layer, rows)
        noise = torch.Generator(x.device).manual_seed(0)
        direction = torch.randn(hidden.shape, generator=noise, device=x.device, dtype=torch.float32).to(hidden.dtype)
        launched = find_gradients(hidden, [*leaves, *self.weights], direction)
        with torch.no_grad():
            for spoilt in (recording.hidden, *recording.reached):
                if spoilt is not None:
                    spoilt.fill_(float("nan"))
            recording.load_numbers(rows)
            recording.load(x, per_layer)
            recording.forward()
            recording.gradient.copy_(direction)
            recording.backward()
            return max(measure_distance([hidden], [recording.hidden]), measure_distance(launched, recording.reached))


def fill(places: tuple[torch.Tensor | None, ...], values: tuple[torch.Tensor | None, ...]) -> None:
    """Copy values to where a recording reads them; a place and its value are both None where the model has no such input."""
    with torch.no_grad():
        for place, value in zip(places, values, strict=True):
            if place is not None and value is not None:
                place.copy_(value)


def find_gradients(
    result: torch.Tensor, sources: list[torch.Tensor | None], gradient: torch.Tensor
) -> list[torch.Tensor | None]:
    """Return the gradient of each source, None for one that learns nothing or is not reached; outside of autocast, as a trainer's."""
    learned = [source for source in sources if source is not None and source.requires_grad]
    with torch.autocast(result.device.type, enabled=False):
        found = torch.autograd.grad(result, learned, gradient, allow_unused=True)
    by_source = dict(zip(map(id, learned), found, strict=True))
    return [by_source.get(id(source)) for source in sources]


def measure_distance(right: list[torch.Tensor | None], got: list[torch.Tensor | None]) -> float:
    """Return the length of the difference as a share of the length of what is right; infinite where something is missing."""
    if any((a is None) != (b is None) for a, b in zip(right, got, strict=True)):
        return float("inf")
    pairs = [(a.float(), b.float()) for a, b in zip(right, got, strict=True) if a is not None and b is not None]
    if not pairs:
        return 0.0
    off = torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt()
    length = torch.stack([a.square().sum() for a, _ in pairs]).sum().sqrt()
    return float(off / length) if float(length) else float(off)


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


def find_cast(device: torch.device) -> torch.dtype | None:
    """Return the precision that autocast computes in, or None outside of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def describe_shape(x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows) -> tuple[Any, ...]:
    """Return all that a recording is made for, beside the model."""
    cast = find_cast(x.device)
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
