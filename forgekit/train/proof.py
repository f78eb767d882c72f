"""Compiled layers against the same layers as they are written, on the batch at hand, before a batch is trained through them.

    a batch asks for a form of the layers that was not compared yet ─ Unproved ─ nothing of the batch is kept
      └ prove: layer by layer on this batch's own inputs, results and gradients
           as written                          right
           as written, inputs rounded          what one more rounding does to it
           compiled                            near enough?
              yes   the batch begins anew, and this form serves all later ones
              no    nothing is compiled any more, which is said and stands in run.json

An adapter that has hardly begun to learn would have next to no gradient for its first half, so there is noise on the second one inside.
Dropout draws other numbers each time, so with it a rounding seems to do much, and smaller mistakes are not found. Processes that share
weights (sharded.py) do not compare.
All layers are compared and not one of a kind: a mistake may show in some numbers only. One that shows now and then, such as that of
model/compiler.py, is not sure to be met; step_guards.py tells of gradients that jump.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .decoder import Call, Stored, run_calls, run_decoder
from .guard import GRADIENT_TOLERANCE, NOISE
from .loss import score_logits

if TYPE_CHECKING:
    from .fast_path import FastPath

# In half precision E2B's compiled layers with random weights moved nothing by more than 8 %, nor by more than 1.3 times what the
# rounding moved it (an H200, benchmarks/README.md).
SEVERAL = 4
# Where a neuron stands on the threshold of a sparse layer, one rounding in many changes the result by more than others do (up to 3.9 times
# what is allowed, in 2 of 400 comparisons of a layer 2,048 wide): what is less than DOUBTED is compared again, with more roundings.
DOUBTED, DRAWS = 10, 8
FLOOR = 1e-3  # a gradient that is smaller than this share of the layer's largest is measured by that
SCORED = 32  # tokens whose scores are compared
SIZES = 2  # numbers of tokens for which they are: the compiler takes the first for a constant, and the second for any
# Both sides compute scores in float32, and round the gradient alone. Of a token that is known well little is left but rounding, so
# scores below SCORE_FLOOR are measured by that.
SCORE_BOUND, SCORE_FLOOR = 0.01, 0.1


class Form(NamedTuple):
    """What the compiler writes other code for.

    again: the backward computes again what it needs. whole, suffix: attention without gaps or a mask (rows.py). single: one row.
    cast: autocast's precision. learns: whether gradients reach the embeddings and the per-layer rows.
    """

    again: bool
    whole: bool
    suffix: bool
    single: bool
    cast: torch.dtype | None
    learns: tuple[bool, bool]


class Unproved(Exception):
    """A batch asks for a form that was not compared yet. No error, and not seen outside of the fast path."""

    def __init__(self, form: Form):
        """Keep the form."""
        super().__init__(str(form))
        self.form = form


class Difference(NamedTuple):
    """How far a compiled result is off, in units of what is allowed [values], and the names of the values."""

    shares: torch.Tensor
    names: list[str]


def prove(path: "FastPath", form: Form, x: torch.Tensor, per_layer: torch.Tensor | None) -> None:
    """Compare a form of all layers on a batch, and let the path have what was found; leave no trace in weights and random state.

    Args:
        x: [N, H], the batch's embeddings; per_layer: [N, layers, P] or None.
    """
    from .trial import find_lora_b, perturb

    table = None if per_layer is None else per_layer.detach().requires_grad_(per_layer.requires_grad)
    x = x.detach().requires_grad_(x.requires_grad)
    torch.clear_autocast_cache()  # which keeps casts of weights, and those of the second halves are others inside
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), perturb(find_lora_b(path.text), NOISE):  # fmt: skip
            share, where = find_worst(compare_layers(path, form, x, table, 1))
            if 1 < share < DOUBTED:
                share, where = find_worst(compare_layers(path, form, x, table, DRAWS))
    finally:
        torch.clear_autocast_cache()
    path.settle(form, share, where)
    if path.compiled:
        print(f"fast path: compiled layers agree with uncompiled ones: {share:.0%} of what is allowed ({where})", flush=True)  # fmt: skip


def compare_layers(path: "FastPath", form: Form, x: torch.Tensor, per_layer: torch.Tensor | None, draws: int) -> list[Difference]:  # fmt: skip
    """Run the decoder layer by layer, and compare each one; a layer gets what the uncompiled one before it gave.

    Args:
        draws: roundings to try, of which the largest effect on a value counts.
    """
    assert path.rows is not None
    bound, rounding = find_bound(form.cast or x.dtype), torch.finfo(form.cast or x.dtype).eps / 2
    found: list[Difference] = []

    def run(calls: list[Call], streams: torch.Tensor) -> tuple[torch.Tensor, Stored]:
        if not hasattr(calls[0].module, "mlp"):  # expanding and contracting are not compiled
            return run_calls(calls, streams)
        (call,) = calls
        results, right = examine(call, call.step, streams)
        moved = [examine(call, call.step, streams, (1 + draw % 2) * rounding, draw)[1] for draw in range(draws)]
        _, compiled = examine(call, path.prepare_step(call.step, form.again), streams)
        found.append(measure(f"layer {call.module.self_attn.layer_idx}", right, compiled, moved, bound))
        streams, *keys = (result.requires_grad_() for result in results)
        return streams, {call.module.self_attn.layer_idx: keys} if call.stores else {}

    run_decoder(path.text, x, per_layer, path.rows, path.windows, path.kernel, run, layers=path.layers)
    return found


def examine(call: Call, step: Callable[..., Any], streams: torch.Tensor, rounding: float = 0.0, draw: int = 0) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:  # fmt: skip
    """Run a step of a layer, and its backward from a random gradient of its results.

    Args:
        rounding: change inputs that gradients reach by up to such a share, in a way that `draw` numbers.

    Returns the results, and them and the gradients of all that learns by name; everything is detached.
    """
    noise = torch.Generator(streams.device).manual_seed(draw)

    def cut_off(value: Any, learns: bool) -> Any:
        if not learns:
            return value
        value = value.detach()
        if rounding:
            change = torch.rand(value.shape, generator=noise, device=value.device) * 2 - 1
            value = (value * (1 + rounding * change)).to(value.dtype)
        return value.requires_grad_()

    # streams always learn here: where nothing below does, the fast path hangs them on the graph (Attach)
    inputs = [cut_off(value, n == 0 or getattr(value, "requires_grad", False)) for n, value in enumerate((streams, *call.rest))]  # fmt: skip
    sources = {f"input {n}": value for n, value in enumerate(inputs) if getattr(value, "requires_grad", False)}
    sources |= {name: weight for name, weight in call.module.named_parameters() if weight.requires_grad}
    results = list(step(call.module, *inputs))
    noise.manual_seed(0)
    directions = [torch.randn(r.shape, generator=noise, device=r.device, dtype=torch.float32).to(r.dtype) for r in results]  # fmt: skip
    with torch.autocast(streams.device.type, enabled=False):  # as a trainer's backward
        gradients = torch.autograd.grad(results, list(sources.values()), directions, allow_unused=True)
    results = [result.detach() for result in results]
    named = {f"result {n}": result for n, result in enumerate(results)}
    return results, named | {f"gradient of {name}": g for name, g in zip(sources, gradients, strict=True)}


def measure(where: str, right: dict[str, Any], found: dict[str, Any], moved: list[dict[str, Any]], bound: float) -> Difference:  # fmt: skip
    """Compare values by name; on a GPU nobody waits for the result yet.

    Where what is right is no number nothing is compared: the loss will be none either, and step_guards.py stops there.
    """
    norms = {name: value.float().norm() for name, value in right.items() if value is not None}
    gradients = [norm for name, norm in norms.items() if name.startswith("gradient")]
    floor = FLOOR * torch.stack(gradients).nan_to_num(0.0, 0.0).max() if gradients else 0.0
    shares = []
    for name, value in right.items():
        if value is None or found[name] is None:
            shares.append(torch.tensor(0.0 if value is found[name] else math.inf))
            continue
        length = (norms[name] if name.startswith("result") else norms[name].clamp(min=floor)).clamp(min=1e-30)
        off, *rounded = ((other[name].float() - value.float()).norm() / length for other in (found, *moved))
        share = off / (SEVERAL * torch.stack(rounded).max()).clamp(min=bound)
        shares.append(torch.where(norms[name].isfinite(), share, torch.zeros_like(share)))
    device = next(iter(norms.values())).device
    return Difference(torch.stack([share.to(device) for share in shares]), [f"{where}, {name}" for name in right])


def find_worst(found: list[Difference]) -> tuple[float, str]:
    """Return the largest share, infinite where something is no number, and the name of what has it."""
    shares = torch.cat([difference.shares for difference in found]).nan_to_num(nan=math.inf)
    names = [name for difference in found for name in difference.names]
    return float(shares.max()), names[int(shares.argmax())]


def find_bound(dtype: torch.dtype) -> float:
    """Return how far anything may be off in a precision, as a share, whatever a rounding does."""
    return GRADIENT_TOLERANCE[str(dtype).removeprefix("torch.")]


def score_proved(path: "FastPath", logits: torch.Tensor, targets: torch.Tensor, cap: float | None, statistics: bool) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Return what `score_logits` returns, compiled, and compared on a few tokens when that is new."""
    found = path.get_step(score_logits)(logits, targets, cap, statistics)
    kind = (logits.dtype, statistics)
    compared = {form for form in path.proved if form[:2] == kind}
    if not path.compiles or (*kind, len(logits)) in compared or len(compared) == SIZES:
        return found
    right = score_logits(logits[:SCORED], targets[:SCORED], cap, statistics)
    path.settle((*kind, len(logits)), *find_worst([measure_scores(right, found)]))
    return found if path.compiles else score_logits(logits, targets, cap, statistics)


def measure_scores(right: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> Difference:
    """Compare loss, entropy and gradient of the first tokens; which of two equal words is the likeliest may differ."""
    shares = []
    for value, other in ((right[place].float(), found[place][: len(right[place])].float()) for place in (0, 1, 3)):
        off, length = ((some.flatten(1) if some.dim() > 1 else some[:, None]).norm(dim=1) for some in (other - value, value))  # fmt: skip
        share = off / (SCORE_BOUND * length.clamp(min=SCORE_FLOOR))
        shares.append(torch.where(length.isfinite(), share, torch.zeros_like(share)).max())
    return Difference(torch.stack(shares), [f"the head, {name}" for name in ("loss", "entropy", "gradient of logits")])
