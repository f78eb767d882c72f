"""Batches as CUDA graphs: the thousands of kernels of the decoder are recorded once a shape and started by two launches.

Up to some thousand tokens a GPU is done before the CPU has launched the next kernel, so this is where the time goes. The kernels are
those of the compiled layers (fast_path.py); each recording is compared with them before it is used. What recordings work with lies in
memory that they share: a batch has to be through its backward before the next one begins, and one that is not is computed without.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .attention import bound
from .proof import Unproved
from .recording import Capture, Decode, Recording, Workshop, capture, describe_shape, find_cast

TOKENS = 8192  # a longer batch keeps the GPU busy (16,384 tokens of E2B on an H200: nothing to gain), and a recording holds memory
SHAPES = 32  # recordings of one training, some MB each
SEEN = 2  # a shape is recorded when it comes for this time at the earliest: compiled layers have run it once
# A step that also records and compares took 0.7 to 1.3 s, and a recording saves 36 to 130 ms a batch (an H200, benchmarks/README.md):
# a shape is recorded where so many more batches of it are to be expected.
REPAID = 16
LEARNED_BYTES = 2**30  # gradients stand twice while a recording is used: little for an adapter, much for whole weights
# How far a recording may be from its kernels launched one by one. Half precision: attention's backward adds up in any order, and a
# library may choose another kernel; reading something old or nothing at all is a difference of about one.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 1e-3, torch.float64: 1e-6}
OUTSIDE = ("embed_tokens", "embed_tokens_per_layer")  # modules of the language model that the decoder does not call


@dataclass
class Graphs:
    """The recordings of one Gemma3nTextModel.

    longest: tokens of the longest batch that is recorded. left: says how many batches are still to come, None where nobody knows.
    kernel: of attention. capture: makes a recording. came: batches since the model last changed. seen: those of each shape.
    batches: those that came by a recording. difference: the largest that one was found to have. why_not: set once recording has
    failed. unfit: why the model as it is cannot be recorded. turn: number of the batch that the shared memory belongs to. ticket:
    held by the batch whose backward is still to come.
    """

    text: Any
    longest: int = TOKENS
    left: Callable[[], int] | None = None
    kernel: str = "padded"
    capture: Capture = capture
    recordings: dict[Any, Recording] = field(default_factory=dict)
    came: int = 0
    seen: Counter[Any] = field(default_factory=Counter)
    batches: int = 0
    difference: float | None = None
    why_not: str | None = None
    unfit: str | None = None
    turn: int = 0
    ticket: Any = None
    recording: bool = False
    watch: "Watch | None" = None
    workshop: Workshop | None = None

    @property
    def held(self) -> int:
        """Bytes of the GPU that batches without a recording cannot have."""
        return self.workshop.held if self.workshop else 0

    def run(self, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Any) -> torch.Tensor:
        """Return what `decode` returns, [M, H], by its recording if there is one, or make one when the shape has come often enough.

        Args:
            x: [N, H], the rows' embeddings; per_layer: [N, layers, P] or None.
            decode: computes with compiled layers, and the same for every batch of one shape.
        """
        if self.watch is None:
            self.look_at_model()
        if self.why_not or self.unfit or not torch.is_grad_enabled():
            return decode(x, per_layer, rows)
        if x.shape[0] > self.longest:
            hidden = decode(x, per_layer, rows)
            self.came += 1
            return hidden
        rows = bound(rows, self.kernel)
        key = describe_shape(x, per_layer, rows)
        self.came += 1
        self.seen[key] += 1
        try:
            return self.run_shape(key, decode, x, per_layer, rows)
        except Unproved:  # the batch begins anew
            self.came, self.seen[key] = self.came - 1, self.seen[key] - 1
            raise

    def run_shape(self, key: Any, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Any) -> torch.Tensor:  # fmt: skip
        """Run a batch by the recording of its shape, or without one."""
        if self.ticket is not None and self.ticket() is not None:  # the shared memory is another batch's
            return decode(x, per_layer, rows)
        if key not in self.recordings and self.pays(key) and len(self.recordings) < SHAPES:
            self.record(key, decode, x, per_layer, rows)
        recording = self.recordings.get(key)
        if recording is None or self.workshop is None:
            return decode(x, per_layer, rows)
        self.batches += 1
        recording.load_numbers(rows)
        return Run.apply(self, recording, x, per_layer, *self.workshop.weights)

    def pays(self, key: Any) -> bool:
        """Say whether a shape comes often enough; one that has had a share of the batches so far will have it of the rest."""
        if self.seen[key] < SEEN:
            return False
        return self.left is None or self.seen[key] / self.came * self.left() >= REPAID

    def give_up(self, why: str) -> None:
        """Record nothing any more, and say why, once."""
        self.why_not = why
        self.forget()
        print(f"fast path: no CUDA graphs, because {why}", flush=True)

    def forget(self) -> None:
        """Drop all recordings and the memory that they hold."""
        self.recordings.clear()
        self.came = 0
        self.seen.clear()
        self.workshop = self.watch = None

    def look_at_model(self) -> None:
        """Forget all recordings when something in the model has changed: they know addresses, and run no Python.

        Called before a batch's rows are chosen, while the GPU still works on the step before.
        """
        if self.why_not or (self.watch is not None and self.watch.look() == self.watch.state):
            return
        self.forget()
        self.watch = Watch(self.text)
        self.workshop = Workshop(self.text, self.capture)
        learned = sum(p.numel() * p.element_size() for p in self.workshop.weights)
        unfit = self.watch.find_obstacle()
        unfit = unfit or ("more learns than an adapter" if learned > LEARNED_BYTES else None)
        if unfit and unfit != self.unfit:
            print(f"fast path: no CUDA graphs, because {unfit}", flush=True)
        self.unfit = unfit

    def record(self, key: Any, decode: Decode, x: torch.Tensor, per_layer: torch.Tensor | None, rows: Any) -> None:
        """Make the recording of a shape, and compare it; where that fails say so, once, and go on without any."""
        workshop = self.workshop
        assert workshop is not None
        held = workshop.held
        try:
            self.recording = True
            made = workshop.record(decode, x, per_layer, rows)
            self.recording = False
            problem = find_lack_of_room(workshop.held, x.device)
            if not problem:
                difference = workshop.compare(made, decode, x, per_layer, rows)
                allowed = TOLERANCE[find_cast(x.device) or x.dtype]
                if not difference <= allowed:
                    problem = f"a recording is {difference:.2g} off what it recorded"
                self.difference = max(difference, self.difference or 0.0)
        except Unproved:  # what was made is dropped
            workshop.held = held
            raise
        except RuntimeError as error:
            problem = f"recording failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        finally:
            self.recording = False
        if problem:
            self.give_up(problem)
        else:
            self.recordings[key] = made

    def make_room(self, run: Callable[[], Any]) -> Any:
        """Return what `run` returns; where memory is missing for it, recordings give theirs back for good, and it runs once more."""
        try:
            return run()
        except torch.OutOfMemoryError:
            if not self.recordings:
                raise
        self.give_up("a batch without a recording needs their memory")
        torch.cuda.empty_cache()
        return run()


def find_lack_of_room(held: int, device: torch.device) -> str | None:
    """Say why a batch of another shape, which comes without a recording at first, might not fit beside the recordings, or return None."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - held
    if free + max(0, unused) >= held:
        return None
    return f"{free / 2**30:.1f} GiB are free beside the {held / 2**30:.1f} GiB of the recordings"


class Run(torch.autograd.Function):
    """A batch by its recording. Gradients are handed on as copies: autograd keeps as its own what it is given, and adds to it."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, recording: Recording, x: torch.Tensor, per_layer: torch.Tensor | None, *weights: Any) -> torch.Tensor:  # fmt: skip
        recording.load(x, per_layer)
        recording.forward()
        graphs.turn += 1
        ctx.graphs, ctx.recording, ctx.turn, ctx.ticket = graphs, recording, graphs.turn, Ticket()
        graphs.ticket = weakref.ref(
            ctx.ticket
        )  # gone with the batch's graph, whether or not its backward is ever asked for
        return recording.hidden.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        recording, ctx.recording = ctx.recording, None
        if recording is None or ctx.turn != ctx.graphs.turn:
            raise RuntimeError(
                "a recorded batch has one backward, before the next batch begins; its memory is gone (train.cuda_graphs: off allows more)"
            )
        recording.gradient.copy_(grad)
        recording.backward()
        ctx.ticket = None
        return None, None, *(None if found is None else found.clone() for found in recording.reached)


class Ticket:
    """Lives as long as a batch whose backward is still to come."""


class Watch:
    """What a recording depends on and somebody may change: weights, buffers, adapters and what they are scaled by, modules, hooks.

    A number that a module keeps for itself, such as a norm's epsilon, is not looked at.
    """

    def __init__(self, text: Any):
        """Find the places to look at; walking through all modules for each batch would take milliseconds."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        children = [child for name, child in text.named_children() if name not in OUTSIDE]
        self.text = text
        self.modules = [module for child in children for module in child.modules()]
        everything = [text, *self.modules]
        self.places = [(m._parameters, name) for m in everything for name, p in m._parameters.items() if p is not None]
        self.buffers = [(m._buffers, name) for m in everything for name, b in m._buffers.items() if b is not None]
        self.parts = [(m._modules, name) for m in everything for name in m._modules]
        self.adapters = [m for m in self.modules if isinstance(m, BaseTunerLayer)]
        self.dropouts = [m for m in self.modules if isinstance(m, torch.nn.Dropout)]
        self.state = self.look()

    def look(self) -> tuple[Any, ...]:
        """Return what is there now."""
        weights = [parameters.get(name) for parameters, name in self.places]
        buffers = [buffers.get(name) for buffers, name in self.buffers]
        return (
            self.text.training,
            getattr(getattr(self.text, "config", None), "altup_coef_clip", None),
            [(id(w), w.data_ptr(), w.requires_grad) if w is not None else None for w in weights],
            [(b.data_ptr(), b.dtype) if b is not None else None for b in buffers],
            [id(modules.get(name)) for modules, name in self.parts],
            [(m.disable_adapters, list(m.active_adapters), m.merged, dict(m.scaling)) for m in self.adapters],
            [m.p for m in self.dropouts],
            self.find_hooked() is not None,
        )

    def find_hooked(self) -> str | None:
        """Return the kind of a module that somebody watches, or None: a hook is Python, which a recording does not run."""
        for m in self.modules:
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
                return type(m).__name__
        return None

    def find_obstacle(self) -> str | None:
        """Say why this model cannot be recorded, or return None."""
        if any(m.p for m in self.dropouts):
            return "dropout draws other numbers for each batch"
        hooked = self.find_hooked()
        return f"a hook watches a {hooked}" if hooked else None
