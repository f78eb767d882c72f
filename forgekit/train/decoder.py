"""Gemma 3n's decoder on tokens in one line: the library's own modules, in an order that lets rows leave early.

    embedded [N, H] ─ expand ─ streams [N, 4, H] ─ lower layers ─ source layer ─ shared layers ─ contract ─ hidden [M, H]
                                                                 │ N tokens give keys and values
                                                                 └ M kept tokens go on

The layers behind the source layer share its keys and values (and those of the last layer of the other attention kind), so
nobody reads a token there whose next token teaches nothing. The source layer itself needs it for its key and value alone.
AltUp, four streams of which one is computed (https://arxiv.org/abs/2301.13310), is written out here because the library's
products with 4 x 4 matrices cannot be fused; everything that holds weights is called as the module that the model has.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.models.gemma3n.modeling_gemma3n import apply_rotary_pos_emb

from .attention import Plan, attend, plan_attention
from .rows import Rows

GATHER = "_forgekit_gather"  # a layer's method that runs a step with its weights gathered, where processes share them (sharded.py)
Stored = dict[int, list[torch.Tensor]]  # layer -> keys and values that layers behind it share


class Place(NamedTuple):
    """Where the queries of a layer stand: rotary angles of [Q, d] and the attention's plan."""

    cos: torch.Tensor
    sin: torch.Tensor
    plan: Plan


class Call(NamedTuple):
    """A step of the decoder, its module and its arguments behind the streams; `stores`: its keys and values are used later."""

    step: Callable[..., Any]
    module: Any
    rest: tuple[Any, ...] = ()
    stores: bool = False


def run_decoder(
    text: Any,
    x: torch.Tensor,
    per_layer: torch.Tensor | None,
    rows: Rows,
    windows: dict[str, int | None],
    kernel: str,
    run: Callable[[list[Call], torch.Tensor], tuple[torch.Tensor, Stored]],
    span: int = 1,
    layers: list[Any] | None = None,
) -> torch.Tensor:
    """Return the normed hidden states of the kept tokens, [M, H].

    Args:
        text: a Gemma3nTextModel, adapted or not.
        x: [N, H], the rows' embeddings, pictures and sound merged in.
        per_layer: [N, layers, P] from the per-layer table, or None.
        run: does what `run_calls` does; it decides about compiling and about keeping what the backward needs.
        span: layers that are given to `run` together.
        layers: some of the model's layers; None: all.
    """
    layers = list(text.layers) if layers is None else layers
    source = find_source(layers)
    clamp_coefficients(text)
    per_layer = text.project_per_layer_inputs(x[None], None if per_layer is None else per_layer[None])[0]
    kept = rows.upper.index
    lower, upper = ({kind: make_place(text, x, rows, stage, kind, windows[kind], kernel) for kind in windows} for stage in ("lower", "upper"))  # fmt: skip
    streams, _ = run([Call(expand, text)], x)
    stored: Stored = {}
    for block in make_blocks(len(layers), source, span):
        calls = []
        for place in block:
            layer, attention = layers[place], layers[place].self_attn
            number, kind = attention.layer_idx, text.config.layer_types[attention.layer_idx]
            if place < source:
                rest = (per_layer[:, number], lower[kind])
                calls.append(Call(lower_layer, layer, rest, attention.store_full_length_kv))
                continue
            if place == source:
                stored |= run([Call(make_own_keys, layer, (lower[kind].cos, lower[kind].sin), True)], streams)[1]
                streams, per_layer = streams.index_select(0, kept), per_layer.index_select(0, kept)
            own = stored[number if place == source else attention.kv_shared_layer_index]
            calls.append(Call(upper_layer, layer, (per_layer[:, number], upper[kind], *own)))
        streams, keys = run(calls, streams)
        stored |= keys
    return run([Call(contract, text)], streams)[0]


def make_blocks(layers: int, source: int, span: int) -> list[range]:
    """Return the places of layers that run as one: `span` of them at most, and the source layer alone, where rows leave."""
    below = [range(start, min(start + span, source)) for start in range(0, source, span)]
    above = [range(start, min(start + span, layers)) for start in range(source + 1, layers, span)]
    return [*below, range(source, source + 1), *above]


def run_calls(calls: list[Call], x: torch.Tensor) -> tuple[torch.Tensor, Stored]:
    """Run steps one after the other on x; return the last one's result, and the keys and values that other layers share."""
    stored: Stored = {}
    for call in calls:
        x, *own = run_step(call.step, call.module, x, *call.rest)
        if call.stores:
            stored[call.module.self_attn.layer_idx] = own
    return x, stored


def run_step(step: Callable[..., Any], module: Any, *arguments: Any) -> Any:
    """Run a step with the module's weights at hand."""
    gather = vars(module).get(GATHER)
    return gather(step, *arguments) if gather else step(module, *arguments)


def find_source(layers: Any) -> int:
    """Return the place of the last layer with keys of its own; it is the last one where none are shared."""
    return max(place for place, layer in enumerate(layers) if not layer.self_attn.is_kv_shared_layer)


def make_place(text: Any, x: torch.Tensor, rows: Rows, stage: str, kind: str, window: int | None, kernel: str) -> Place:
    """Compute the rotary angles of a stage's queries and plan its attention."""
    positions = rows.positions if stage == "lower" else rows.positions[rows.upper.index]
    cos, sin = text.rotary_emb(x, positions[None], kind)
    return Place(cos[0], sin[0], plan_attention(rows, stage, kind, window, kernel))


def clamp_coefficients(text: Any) -> None:
    """Clamp AltUp's prediction weights in place, which the library does in each training forward.

    Outside of the layers, because a compiler takes no change of a weight; frozen ones need it once.
    """
    clip = text.config.altup_coef_clip
    if clip is None or not text.training:
        return
    for layer in text.layers:
        weight = layer.altup.prediction_coefs.weight
        if weight.is_floating_point() and (
            weight.requires_grad or getattr(layer.altup, "_forgekit_clamped", None) != clip
        ):
            weight.data.clamp_(-clip, clip)
            layer.altup._forgekit_clamped = clip


def expand(text: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
    """Make the streams, each scaled to the magnitude of the first. [N, H] -> [N, 4, H]"""
    target = x.square().mean(-1, keepdim=True) ** 0.5
    return (torch.stack([x, *(rescale(project(x), x, target) for project in text.altup_projections)], 1),)


def contract(text: Any, streams: torch.Tensor) -> tuple[torch.Tensor]:
    """Take the mean of the streams and norm it. [M, 4, H] -> [M, H]"""
    first = streams[:, 0]
    target = first.square().mean(-1, keepdim=True) ** 0.5
    projections = enumerate(text.altup_unembed_projections, 1)
    scaled = [rescale(project(streams[:, stream]), first, target) for stream, project in projections]
    return (text.norm(torch.stack([first, *scaled]).mean(0)),)


def rescale(x: torch.Tensor, like: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Scale x to a root mean square of `target`."""
    x = x.to(like.dtype)
    return x * target / x.square().mean(-1, keepdim=True).clamp_min(1e-5).sqrt()


def lower_layer(
    layer: Any, streams: torch.Tensor, per_layer: torch.Tensor, place: Place
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer on all tokens. Returns streams, keys and values."""
    predictions = predict(layer.altup, streams)
    normed = layer.input_layernorm(predictions[:, layer.config.altup_active_idx])
    k, v = make_keys(layer.self_attn, normed, place.cos, place.sin)
    return finish_layer(layer, predictions, normed, per_layer, place, k, v), k, v


def make_own_keys(
    layer: Any, streams: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The source layer's keys and values of all tokens, its upper part follows as `upper_layer`. Returns streams, keys, values."""
    normed = layer.input_layernorm(predict(layer.altup, streams, layer.config.altup_active_idx)[:, 0])
    return streams, *make_keys(layer.self_attn, normed, cos, sin)


def upper_layer(
    layer: Any, streams: torch.Tensor, per_layer: torch.Tensor, place: Place, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor]:
    """One layer on the kept tokens, with keys and values that are there already."""
    predictions = predict(layer.altup, streams)
    normed = layer.input_layernorm(predictions[:, layer.config.altup_active_idx])
    return (finish_layer(layer, predictions, normed, per_layer, place, k, v),)


def make_keys(
    attention: Any, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values, each [N, kv heads, d]."""
    shape = (normed.shape[0], -1, attention.head_dim)
    k = apply_rotary_pos_emb(attention.k_norm(attention.k_proj(normed).view(shape)), cos, sin)
    return k, attention.v_norm(attention.v_proj(normed).view(shape))


def finish_layer(
    layer: Any,
    predictions: torch.Tensor,
    normed: torch.Tensor,
    per_layer: torch.Tensor,
    place: Place,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Attention, LAuReL, feed-forward, AltUp's correction and the per-layer input of Q tokens. Returns streams [Q, 4, H]."""
    config, altup, attention = layer.config, layer.altup, layer.self_attn
    active = predictions[:, config.altup_active_idx]
    q = attention.q_proj(normed).view(normed.shape[0], -1, attention.head_dim)
    q = apply_rotary_pos_emb(attention.q_norm(q), place.cos, place.sin)
    heard = attend(q, k.to(q.dtype), v.to(q.dtype), place.plan).flatten(1)
    heard = layer.post_attention_layernorm(attention.o_proj(heard))
    heard = (active + heard + layer.laurel(normed)) / math.sqrt(2)
    thought = heard + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(heard)))
    corrected = correct(altup, predictions, thought, config)
    first = corrected[:, config.altup_active_idx]
    if config.altup_correct_scale:
        first = altup.scale_corrected_output(first)
    first = layer.per_layer_projection(layer.act_fn(layer.per_layer_input_gate(first)) * per_layer)
    first = layer.post_per_layer_input_norm(first)
    return torch.cat([corrected[:, :1], corrected[:, 1:] + first[:, None]], 1)


def predict(altup: Any, streams: torch.Tensor, only: int | None = None) -> torch.Tensor:
    """Predict each stream from all of them: stream o becomes itself + sum over i of stream i * c[o, i]. [N, 4, H]

    Args:
        only: predict this stream alone, [N, 1, H].
    """
    number = altup.config.altup_num_inputs
    routed = altup.compute_router_modalities(streams[:, altup.config.altup_active_idx])
    coefficients = altup.prediction_coefs(routed).view(-1, number, number)
    outputs = range(number) if only is None else [only]
    if torch.compiler.is_compiling():
        # as sums, one kernel reads the streams once; a product with 4 x 4 matrices would be a kernel of its own
        return torch.stack([streams[:, o] + sum(streams[:, i] * coefficients[:, o, i, None] for i in range(number)) for o in outputs], 1).to(streams.dtype)  # fmt: skip
    wanted = coefficients if only is None else coefficients[:, only : only + 1]
    own = streams if only is None else streams[:, only : only + 1]
    return (torch.matmul(wanted, streams) + own).to(streams.dtype)


def correct(altup: Any, predictions: torch.Tensor, activated: torch.Tensor, config: Any) -> torch.Tensor:
    """Move every prediction by what the computed stream turned out to differ. [Q, 4, H]

    The library passes by an adapter on these coefficients while it trains, because it clamps their weight; so does this.
    """
    routed = altup.compute_router_modalities(activated)
    weight = altup.correction_coefs.weight
    if altup.training and config.altup_coef_clip is not None and weight.is_floating_point():
        clip = config.altup_coef_clip
        coefficients = F.linear(routed, weight.clamp(-clip, clip)) + 1.0
    else:
        coefficients = altup.correction_coefs(routed) + 1.0
    innovation = activated - predictions[:, config.altup_active_idx]
    return (predictions + innovation[:, None] * coefficients[:, :, None]).to(activated.dtype)
