"""Turning the fast path (row_skip.py) on and off for a model, and what it saved."""

import functools
import math
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..model.compiler import check_compiler
from .attention import flash_is_right
from .decoder import GATHER, find_source
from .graphs import Graphs
from .proof import Form, Unproved
from .recording import find_cast
from .row_skip import run_compiled, wrap_forward, wrap_text
from .rows import Rows

KINDS = ("Gemma3nForConditionalGeneration", "Gemma3nForCausalLM")
# filling products up to handy sizes is tried out by length, after which a graph serves some lengths only
COMPILER = {"shape_padding": False}
NAME = "_forgekit_fast_path"  # where the model keeps its FastPath


@dataclass
class FastPath:
    """The fast path of one model: what it replaced, how it runs and what it has computed so far."""

    base: Any
    text: Any
    forwards: dict[str, Any]  # "base", "text" -> the forward that the instance had of its own, or None
    memory: str | float
    kernel: str
    compiled: bool
    windows: dict[str, int | None]
    uncompiled_batches: int = 0  # the first ones, which do not wait for the compiler
    graphs: Graphs | None = None  # records compiled batches
    layers: list[Any] | None = None  # some of the layers, for the guard; None: all
    on: bool = True
    rows: Rows | None = None  # of the batch that is in its forward now
    steps: dict[Any, Any] = field(default_factory=dict)  # function -> its compiled form
    learns: tuple[bool, bool] = (False, False)  # whether the batch's embeddings and per-layer rows have gradients
    proved: set[Any] = field(default_factory=set)  # forms that were compared with what they were compiled from
    difference: float | None = None  # the largest that one had, in units of what is allowed
    why_not_compiled: str | None = None  # once that was given up
    fallbacks: Counter[str] = field(default_factory=Counter)  # reason -> batches
    batches: int = 0
    places: int = 0  # rows times columns
    tokens: int = 0  # of them computed in the lower layers
    learned: int = 0  # of them computed in the upper layers

    @property
    def compiles(self) -> bool:
        """Whether the next batch is computed by compiled layers."""
        return self.compiled and self.batches >= self.uncompiled_batches

    def get_step(self, function: Any, again: bool = False) -> Any:
        """Return the function, compiled if that was asked for; `again`: its backward computes again what it needs."""
        if not self.compiles:
            return function
        if (function, again) not in self.steps:
            self.steps[function, again] = compile_again(function) if again else torch.compile(function, options=COMPILER)  # fmt: skip
        return self.steps[function, again]

    def prepare_step(self, function: Any, again: bool) -> Any:
        """Return a step of a layer in its compiled form, for lengths that may be others in the next batch."""
        return functools.partial(run_compiled, self.get_step(function, again))

    def require_proof(self, again: bool) -> None:
        """Raise Unproved when the layers' form for the batch at hand was not compared yet.

        Without gradients nothing is learned from it. Where processes share weights, all would have to compare at the same time.
        """
        if self.rows is None or not torch.is_grad_enabled() or GATHER in vars(self.text.layers[0]):
            return
        cast = find_cast(self.rows.flat.device)
        form = Form(again, self.rows.whole, self.rows.suffix, self.rows.batch == 1, cast, self.learns)
        if form not in self.proved:
            raise Unproved(form)

    def settle(self, form: Any, share: float, where: str) -> None:
        """Take the result of a comparison: use a compiled form from now on, or compile nothing any more and say why.

        Args:
            share: the largest difference, of what is allowed; where: what has it.
        """
        self.difference = max(share, self.difference or 0.0)
        if share <= 1:
            self.proved.add(form)
            return
        how = f"{share:.2g} times as far off as is allowed" if math.isfinite(share) else "missing, or no number"
        self.stop_compiling(f"the compiler made a mistake: {where} is {how}")

    def stop_compiling(self, why: str) -> None:
        """Compute what follows as it is written, without recordings, and say why."""
        self.compiled, self.why_not_compiled = False, why
        if self.graphs:
            self.graphs.forget()
        print(f"fast path: not compiled any more, because {why}", flush=True)

    def count(self, rows: Rows) -> None:
        """Note what a batch computed."""
        self.batches += 1
        self.places += rows.batch * rows.columns
        self.tokens += rows.tokens
        self.learned += rows.learned

    def fall_back(self, reason: str) -> None:
        """Count a batch that the library's forward computes, and say why, once for each reason."""
        if not self.fallbacks[reason]:
            print(f"fast path: the library's own forward is used, because {reason}", flush=True)
        self.fallbacks[reason] += 1

    def summarize(self) -> dict[str, Any]:
        """Return for run.json what was skipped, as shares of all places of the batches, and the estimated gain."""
        return {
            "batches": self.batches,
            "library_batches": dict(self.fallbacks),
            "kernel": self.kernel,
            "compiled": self.compiled,
            "compiled_difference": self.difference if math.isfinite(self.difference or 0.0) else None,
            "why_not_compiled": self.why_not_compiled,
            "recorded_batches": self.graphs.batches if self.graphs else 0,
            "recorded_difference": self.graphs.difference if self.graphs else None,
            "lower_rows_skipped": round(1 - self.tokens / self.places, 4) if self.places else None,
            "upper_rows_skipped": round(1 - self.learned / self.places, 4) if self.places else None,
            "estimated_gain": round(self.estimate_gain(), 3) if self.places else None,
        }

    def estimate_gain(self) -> float:
        """Return how many times the products of the library's forward outnumber ours; attention is left out."""
        layers = [sum(p.numel() for p in layer.parameters()) for layer in self.text.layers]
        source = find_source(self.text.layers)
        head = self.base.get_output_embeddings().weight.numel()
        ours = self.tokens * sum(layers[:source]) + self.learned * (sum(layers[source:]) + head)
        return self.places * (sum(layers) + head) / ours if ours else 1.0

    def __str__(self) -> str:
        if not self.batches:
            return f"fast path: no batch used it ({dict(self.fallbacks) or 'none came'})"
        found = self.summarize()
        rest = sum(self.fallbacks.values())
        return (
            f"fast path: {found['upper_rows_skipped']:.0%} of the upper rows and {found['lower_rows_skipped']:.0%} of the lower rows "
            f"skipped; {found['estimated_gain']:.1f} x fewer products"
            + (f"; {found['recorded_batches']} of {self.batches} batches by CUDA graphs" if self.graphs else "")
            + (f"; {rest} batches without it" if rest else "")
        )


@functools.cache
def make_twin(function: Any) -> Any:
    """Return a copy of a function with code of its own, always the same one: the compiler keeps its results by a function's code."""
    code = function.__code__.replace(co_name=f"{function.__name__}_again")
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__)


def compile_again(function: Any) -> Any:
    """Compile a function so that it keeps its arguments alone and its backward begins with its forward.

    The compiler reads how much to keep from a setting of the process, each time that it compiles.
    """
    compiled = torch.compile(make_twin(function), options=COMPILER)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=0.0):
            return compiled(*arguments)

    return run


def enable_fast_path(
    model: Any,
    *,
    memory: str | float = "auto",
    compiled: bool = False,
    uncompiled_batches: int = 1,
    recorded: bool = False,
    left: Callable[[], int] | None = None,
    kernel: str = "auto",
) -> FastPath | None:
    """Replace the model's training forward by one that skips rows without a label; call it when adapter and trainer are made.

    Works for Gemma3nForConditionalGeneration and Gemma3nForCausalLM, plain or in a PeftModel, and for any trainer that passes
    labels. Dropout (adapter.lora_dropout) draws other numbers than on the library's path; all else is the same.

    Args:
        memory: what the backward needs is kept ("high"), computed again ("low"), kept as long as it fits ("auto"), or as long
            as so many GiB suffice.
        compiled: fuse each kind of layer with torch.compile, which costs about a minute of early steps.
        uncompiled_batches: with `compiled`, the first batches that do without, in as little memory as "low" takes: a first
            loss, or an error, is seen before that minute.
        recorded: with `compiled`, batches on a GPU whose shape comes often are recorded as CUDA graphs (graphs.py).
        left: says how many batches are still to come, where that is known: a recording has to pay.
        kernel: attention by "flash" or "padded"; "auto": flash where it runs and agrees with padded.

    Returns the FastPath with its counts, or None after one printed line that says why it does not apply. Raises ModelError when this
    torch cannot be trusted to compile (compiler.py).
    """
    disable_fast_path(model)
    base = unwrap(model)
    obstacle = find_obstacle(base)
    if obstacle:
        print(f"fast path: off, because {obstacle}", flush=True)
        return None
    text = find_text(base)
    config, weight = text.config, text.embed_tokens.weight  # Unsloth keeps norms in float32
    if compiled and weight.device.type == "cuda":
        check_compiler()
    if kernel == "auto":
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        kernel = "flash" if flash_is_right(weight.device, weight.dtype, *heads) else "padded"
    path = FastPath(
        base=base,
        text=text,
        forwards={"base": vars(base).get("forward"), "text": vars(text).get("forward")},
        memory=memory,
        kernel=kernel,
        compiled=compiled,
        uncompiled_batches=uncompiled_batches,
        graphs=Graphs(text, left=left, kernel=kernel) if recorded and compiled and weight.device.type == "cuda" else None,
        windows={kind: config.sliding_window if kind == "sliding_attention" else None for kind in sorted(set(config.layer_types))},
    )  # fmt: skip
    if compiled:  # the kinds of layers and of attention stand behind the same few functions
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        torch._dynamo.config.specialize_float = (
            True  # a layer's sparsity is a fixed number, and tried as a variable first
        )
    vars(base)[NAME] = path
    base.forward = types.MethodType(wrap_forward(base.forward, path), base)
    text.forward = types.MethodType(wrap_text(text.forward, path), text)
    return path


def disable_fast_path(model: Any) -> None:
    """Give the model its own forward back. Where a trainer has put something around ours, ours stays and only hands on."""
    base = unwrap(model)
    path: FastPath | None = vars(base).pop(NAME, None)
    if path is None:
        return
    path.on, forwards = False, path.forwards
    if path.graphs:
        path.graphs.forget()
    for name, module in (("text", path.text), ("base", path.base)):
        if getattr(vars(module).get("forward"), "_forgekit", None) is path:
            del module.forward
            if forwards[name] is not None:
                module.forward = forwards[name]


def get_fast_path(model: Any) -> FastPath | None:
    """Return the model's fast path, or None while it is off."""
    return vars(unwrap(model)).get(NAME)


def unwrap(model: Any) -> Any:
    """Return the model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_text(base: Any) -> Any:
    """Return the Gemma3nTextModel of either kind of model."""
    return base.model.language_model if any(kind.__name__ == KINDS[0] for kind in type(base).__mro__) else base.model


def find_obstacle(base: Any) -> str | None:
    """Say why the fast path cannot stand for this model's forward, or return None."""
    if not any(kind.__name__ in KINDS for kind in type(base).__mro__):
        return f"{type(base).__name__} is not Gemma 3n"
    text = find_text(base)
    if text.config.attention_dropout:
        return f"attention_dropout is {text.config.attention_dropout}"
    if len(set(map(str, (getattr(base, "hf_device_map", None) or {}).values()))) > 1:
        return "the model is spread over several devices"
    if torch.float16 in (text.norm.weight.dtype, text.embed_tokens.weight.dtype):
        return "float16 weights overflow outside of the layers that Unsloth patches"
    if not hasattr(text.layers[0].self_attn, "store_full_length_kv"):
        return "this release of transformers shares keys only through a cache; 5.6 and newer do it while training"
    for number, layer in enumerate(text.layers):
        for part in (layer, layer.self_attn, layer.altup):
            if part._forward_hooks or part._forward_pre_hooks:
                return f"a hook watches {type(part).__name__} of layer {number}, which is not called as a whole"
    return None
