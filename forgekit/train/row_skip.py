"""The training forward that computes no row which teaches nothing. Exact: same loss, same gradients.

    Gemma3nForConditionalGeneration.forward(labels=...)          replaced on the instance
      ├─ Gemma3nModel.forward                                    the library's: pictures and sound are merged in
      │    └─ Gemma3nTextModel.forward                           replaced on the instance: decoder.py on the rows of rows.py
      └─ head and loss                                           loss.py, on the kept tokens

Without labels, in evaluation, and where a batch asks for something that needs every row, the library's own forward runs.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .decoder import GATHER, Call, run_calls, run_decoder
from .loss import TokenLosses, measure_tokens
from .proof import Unproved, prove, score_proved
from .recompute import Memory, plan_memory, recompute
from .rows import Rows, choose_rows

if TYPE_CHECKING:
    from .fast_path import FastPath

MULTIPLE = 64  # compiled steps fill their tokens up to a multiple of this: rows of 60 tokens gain too
# what a batch may ask for that only the library's forward gives
WHOLE = ("output_hidden_states", "output_attentions", "position_ids", "past_key_values", "shift_labels", "use_cache", "logits_to_keep")  # fmt: skip


def wrap_forward(library: Callable[..., Any], path: "FastPath") -> Any:
    """Return the forward of the whole model; `library` is the one that stood there."""
    taken = [name for name in inspect.signature(type(path.base).forward).parameters if name != "self"]

    @functools.wraps(type(path.base).forward)  # its signature is looked at by Trainer and by generate
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not path.on or not self.training:
            return make_room(path, lambda: library(*args, **kwargs))
        if path.graphs:
            path.graphs.look_at_model()
        values = {**dict(zip(taken, args, strict=False)), **kwargs}
        reason = find_request(path, values)
        rows = None
        if not reason:
            mask = values.get("attention_mask")
            multiple, coarse = (MULTIPLE, path.graphs.longest if path.graphs else 0) if path.compiles else (1, 0)
            rows = choose_rows(values["labels"], mask, path.windows, multiple, coarse)
            reason = None if rows else "padding was given a label"
        if rows is None:
            path.fall_back(str(reason))
            return library(*args, **kwargs)
        fused = bool(values.get("fused_lm_head"))  # how TRL's SFTTrainer asks for the loss of each token
        tokens = make_room(path, lambda: run_model(path, values, rows, statistics=fused))
        loss = average(tokens.loss, rows, values.get("num_items_in_batch"))
        return make_fused_output(loss, tokens, rows, values["labels"]) if fused else make_output(path, loss)

    forward._forgekit = path  # type: ignore[attr-defined]
    return forward


def find_request(path: "FastPath", values: dict[str, Any]) -> str | None:
    """Say what a batch asks for that needs every row, or return None."""
    if values.get("labels") is None:
        return "no labels were given (label smoothing, or a loss of the caller's own, needs all logits)"
    asked = [name for name in WHOLE if isinstance(values.get(name), torch.Tensor) or values.get(name)]
    if asked:
        return f"{asked[0]} was asked for"
    if values.get("return_dict") is False:
        return "a tuple was asked for"
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(path.base.config, name, False) or getattr(path.text.config, name, False):
            return f"the configuration asks for {name}"
    mask = values.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return "the attention mask is not one number a token"
    return None


def run_model(path: "FastPath", values: dict[str, Any], rows: Rows, statistics: bool) -> TokenLosses:
    """Run the model up to the loss of each kept token."""
    ours = ("labels", "num_items_in_batch", "fused_lm_head", "logits_to_keep", "return_dict", "use_cache")
    inputs = {name: value for name, value in values.items() if value is not None and name not in ours}
    path.rows = rows
    try:
        hidden = path.base.model(**inputs, use_cache=False).last_hidden_state[0]
    finally:
        path.rows = None
    head, cap = path.base.get_output_embeddings(), path.text.config.final_logit_softcapping
    tokens = measure_tokens(head, hidden, rows.targets, cap, statistics, functools.partial(score_proved, path))
    path.count(rows)
    return tokens


def average(losses: torch.Tensor, rows: Rows, items: Any) -> torch.Tensor:
    """Return the sum of the losses over `num_items_in_batch`, or their mean, as the library's loss does."""
    if items is None:
        return losses.sum() / rows.learned if rows.learned else losses.sum() / 0.0  # NaN, as the library's
    return losses.sum() / (items.to(losses.device) if torch.is_tensor(items) else items)


def make_output(path: "FastPath", loss: torch.Tensor) -> Any:
    """Return what the library returns, without logits."""
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nCausalLMOutputWithPast

    whole = path.text is not path.base.model
    return Gemma3nCausalLMOutputWithPast(loss=loss) if whole else CausalLMOutputWithPast(loss=loss)


def make_fused_output(loss: torch.Tensor, tokens: TokenLosses, rows: Rows, labels: torch.Tensor) -> Any:
    """Return TRL's output for `fused_lm_head=True`: log-probability, entropy and correctness, each [rows, columns - 1]."""
    from trl.trainer.utils import FusedCausalLMOutput

    places = rows.flat[rows.upper.index][: rows.learned]

    def unfold(values: torch.Tensor | None) -> torch.Tensor:
        assert values is not None
        empty = values.new_zeros(rows.batch * rows.columns)
        # a batch that teaches nothing stays connected to the weights, so that its backward is a zero and not an error
        empty = empty + 0 * values.float().sum() if values.requires_grad else empty
        return empty.index_copy(0, places, values[: rows.learned]).view(rows.batch, rows.columns)[:, :-1]

    return FusedCausalLMOutput(
        loss=loss,
        log_probs=unfold(-tokens.loss),
        entropy=unfold(tokens.entropy),
        is_top1=unfold(tokens.right),
        label_mask=labels[:, 1:] != -100,
    )


def wrap_text(library: Callable[..., Any], path: "FastPath") -> Any:
    """Return the forward of the language model, which takes the rows that the whole model's forward chose."""

    @functools.wraps(type(path.text).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if path.rows is None:
            return library(*args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        ids, embedded, per_layer = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "per_layer_inputs"))
        if ids is not None:
            embedded, per_layer = self.embed_tokens(ids), self.get_per_layer_inputs(ids)
        embedded, per_layer = (value if value is None else value.flatten(0, 1).index_select(0, path.rows.flat) for value in (embedded, per_layer))  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=decode_proved(path, path.rows, embedded, per_layer)[None])

    forward._forgekit = path  # type: ignore[attr-defined]
    return forward


def make_room(path: "FastPath", run: Callable[[], Any]) -> Any:
    """Return what `run` returns, if need be with the memory that recordings hold."""
    return path.graphs.make_room(run) if path.graphs else run()


def decode_proved(path: "FastPath", rows: Rows, x: torch.Tensor, per_layer: torch.Tensor | None) -> torch.Tensor:
    """Run the decoder, by a recording if there is one; compiled forms that this takes are compared first, by `prove`."""
    path.learns = (x.requires_grad, per_layer is not None and per_layer.requires_grad)
    while True:
        plans = plan_batch(path, x.device, rows.tokens)
        try:
            if path.graphs and path.compiles:
                return path.graphs.run(functools.partial(decode, path, plans), x, per_layer, rows)
            return decode(path, plans, x, per_layer, rows)
        except Unproved as unproved:
            form = unproved.form
        prove(path, form, x, per_layer)  # behind the except, which holds what the batch has kept so far


def decode(
    path: "FastPath", plans: dict[bool, Memory], x: torch.Tensor, per_layer: torch.Tensor | None, rows: Rows
) -> torch.Tensor:
    """Run the decoder on the rows' embeddings, [N, H] -> [M, H].

    Args:
        plans: what is kept for the backward, while a recording is made (True) and otherwise.
    """
    plan = plans[bool(path.graphs and path.graphs.recording)]
    # processes gather weights in one and the same order, whatever their memory lets them keep
    memory = Memory(plan.limit, 1 if GATHER in vars(path.text.layers[0]) else plan.span)
    run = functools.partial(run_block, path, memory)
    return run_decoder(path.text, x, per_layer, rows, path.windows, path.kernel, run, memory.span, path.layers)


def plan_batch(path: "FastPath", device: torch.device, tokens: int) -> dict[bool, Memory]:
    """Return the plans of a batch's memory; they are made before a recording, in which nobody may ask the driver what is free."""
    kept = path.memory if path.compiles == path.compiled else "low"  # what fits compiled may not fit before
    if path.why_not_compiled and kept == "high":  # ... nor behind
        kept = "auto"
    if path.graphs is None:
        return {False: plan_memory(kept, device, tokens, path.compiles)}
    return {
        False: plan_memory(kept, device, tokens, path.compiles, path.graphs.held),
        # half of what is free: batches without a recording need the other half
        True: plan_memory(kept, device, tokens, path.compiles, share=0.5),
    }


def run_block(
    path: "FastPath", memory: Memory, calls: list[Call], x: torch.Tensor
) -> tuple[torch.Tensor, dict[int, list[torch.Tensor]]]:
    """Run some steps of the decoder on the rows of x, compiled and recomputed as the settings say."""
    layers = hasattr(calls[0].module, "mlp")
    kind = tuple((call.step.__name__, layers and call.module.mlp.activation_sparsity) for call in calls)
    if not (path.compiles and layers):  # expanding and contracting happen once and would not pay for compiling
        return memory.run(lambda: run_calls(calls, x), lambda: recompute(run_calls, calls, x), kind, x.shape[0])
    if torch.is_grad_enabled() and not x.requires_grad:
        x = Attach.apply(x, x.new_zeros((), requires_grad=True))

    def compiled(again: bool) -> list[Call]:
        path.require_proof(again)
        return [call._replace(step=path.prepare_step(call.step, again)) for call in calls]

    def run_again() -> Any:
        return run_calls(compiled(True), x) if memory.span == 1 else recompute(run_calls, compiled(False), x)

    return memory.run(lambda: run_calls(compiled(False), x), run_again, kind, x.shape[0])


def run_compiled(step: Callable[..., Any], module: Any, *arguments: Any) -> Any:
    """Run a compiled step with lengths that may be others in the next batch."""
    mark_lengths(arguments)
    return step(module, *arguments)


class Attach(torch.autograd.Function):
    """Hangs streams of frozen embeddings on the graph, so that the first layer needs no compiled form of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        return None, None


def mark_lengths(arguments: Any) -> None:
    """Tell the compiler that tokens are counted anew in each batch, so that one graph serves all lengths."""
    for value in arguments:
        if isinstance(value, tuple):
            mark_lengths(value)
        elif isinstance(value, torch.Tensor) and value.numel():
            for size in (0, 2, 3) if value.dtype == torch.bool else (0,):
                torch._dynamo.maybe_mark_dynamic(value, size)
