"""Compiled layers against the same layers as they are written, on the batch at hand, before a batch is trained through them.

    a batch asks for a form of the layers that was not compared yet ─ Unproved ─ nothing of the batch is kept
      └ prove: layer by layer on this batch's own inputs, results and gradients
           as written                          right
           as written, inputs rounded          what one more rounding does to it
           compiled                            near enough?
              yes   the batch begins anew, and this form serves all later ones
              no    nothing is compiled any more, which is said and stands in run.json

An adapter that has hardly begun to learn would have next to no gradient for its first half, so there is noise on the second one inside.
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
FLOOR = 1e-3  # a gradient that is smaller than this share of the layer's largest is measured by that
SCORED = 32  # tokens whose scores are compared
# Both sides compute scores in float32, and round the gradient alone. Of a token that is known well little is left but rounding, so
# scores below SCORE_FLOOR are measured by that.
SCORE_BOUND, SCORE_FLOOR = 0.01, 0.1


class Form(NamedTuple):
    """What the compiler writes other code for: a backward that computes again, attention without gaps or a mask, autocast's precision."""

    again: bool
    whole: bool
    suffix: bool
    cast: torch.dtype | None


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

    assert path.rows is not None
    bound = find_bound(form.cast or x.dtype)
    found: list[Difference] = []

    def run(calls: list[Call], streams: torch.Tensor) -> tuple[torch.Tensor, Stored]:
        if not hasattr(calls[0].module, "mlp"):  # expanding and contracting are not compiled
            return run_calls(calls, streams)
        (call,) = calls
        results, right = examine(call, call.step, streams)
        _, moved = examine(call, call.step, streams, rounding=torch.finfo(form.cast or x.dtype).eps / 2)
        _, compiled = examine(call, path.prepare_step(call.step, form.again), streams)
        found.append(measure(f"layer {call.module.self_attn.layer_idx}", right, compiled, moved, bound))
        streams, *keys = (result.requires_grad_() for result in results)
        return streams, {call.module.self_attn.layer_idx: keys} if call.stores else {}

    rows_of_table = None if per_layer is None else per_layer.detach().requires_grad_(per_layer.requires_grad)
    torch.clear_autocast_cache()  # which keeps casts of weights, and those of the second halves are others inside
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), perturb(find_lora_b(path.text), NOISE):  # fmt: skip
            run_decoder(
                path.text, x.detach().requires_grad_(x.requires_grad), rows_of_table, path.rows,
                path.windows, path.kernel, run, layers=path.layers,
            )  # fmt: skip
    finally:
        torch.clear_autocast_cache()
    share, where = find_worst(found)
    path.settle(form, share, where)
    if path.compiled:
        print(f"fast path: compiled layers agree with uncompiled ones: {share:.0%} of what is allowed ({where})", flush=True)  # fmt: skip


def examine(call: Call, step: Callable[..., Any], streams: torch.Tensor, rounding: float = 0.0) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:  # fmt: skip
    """Run a step of a layer, and its backward from a random gradient of its results.

    Args:
        rounding: change inputs that gradients reach by up to such a share.

    Returns the results, and them and the gradients of all that learns by name; everything is detached.
    """
    noise = torch.Generator(streams.device).manual_seed(0)

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
    noise.manual_seed(1)
    directions = [torch.randn(r.shape, generator=noise, device=r.device, dtype=torch.float32).to(r.dtype) for r in results]  # fmt: skip
    with torch.autocast(streams.device.type, enabled=False):  # as a trainer's backward
        gradients = torch.autograd.grad(results, list(sources.values()), directions, allow_unused=True)
    results = [result.detach() for result in results]
    named = {f"result {n}": result for n, result in enumerate(results)}
    return results, named | {f"gradient of {name}": g for name, g in zip(sources, gradients, strict=True)}


def measure(where: str, right: dict[str, Any], found: dict[str, Any], moved: dict[str, Any], bound: float) -> Difference:  # fmt: skip
    """Compare values by name; on a GPU nobody waits for the result yet."""
    norms = {name: value.float().norm() for name, value in right.items() if value is not None}
    gradients = [norm for name, norm in norms.items() if name.startswith("gradient")]
    floor = FLOOR * torch.stack(gradients).max() if gradients else 0.0
    shares = []
    for name, value in right.items():
        if value is None or found[name] is None:
            shares.append(torch.tensor(0.0 if value is found[name] else math.inf))
            continue
        length = (norms[name] if name.startswith("result") else norms[name].clamp(min=floor)).clamp(min=1e-30)
        off, rounded = ((other.float() - value.float()).norm() / length for other in (found[name], moved[name]))
        shares.append(off / (SEVERAL * rounded).clamp(min=bound))
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
    """Return what `score_logits` returns, compiled, and compared on a few tokens when it is asked for the first time."""
    found = path.get_step(score_logits)(logits, targets, cap, statistics)
    form = (logits.dtype, statistics)
    if not path.compiles or form in path.proved:
        return found
    right = score_logits(logits[:SCORED], targets[:SCORED], cap, statistics)
    path.settle(form, *find_worst([measure_scores(right, found)]))
    return found if path.compiles else score_logits(logits, targets, cap, statistics)


def measure_scores(right: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> Difference:
    """Compare loss, entropy and gradient of the first tokens; which of two equal words is the likeliest may differ."""
    shares = []
    for value, other in ((right[place].float(), found[place][: len(right[place])].float()) for place in (0, 1, 3)):
        off, length = ((some.flatten(1) if some.dim() > 1 else some[:, None]).norm(dim=1) for some in (other - value, value))  # fmt: skip
        shares.append((off / (SCORE_BOUND * length.clamp(min=SCORE_FLOOR))).max())
    return Difference(torch.stack(shares), [f"the head, {name}" for name in ("loss", "entropy", "gradient of logits")])
