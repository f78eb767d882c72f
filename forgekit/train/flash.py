"""torch's flash attention over rows of different length that stand in one line, as operators that a compiler takes whole.

    queries [Q, heads, d], keys and values [N, kv heads, d], row starts of both, int32 [rows + 1] -> [Q, heads, d]

The last query of a row stands beside its last key; a query sees the keys up to its own, or a window of them.
"""

import torch


@torch.library.custom_op("forgekit::flash", mutates_args=())
def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    limits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own flash attention over rows of different length, causal from the end of each row backwards.

    An operator of its own, so that a compiler takes it whole. `limits` is a tensor on the CPU and not three numbers, because
    a compiler would compile again for each new number. Returns the output [Q, heads, d] and the softmax's logarithm.
    """
    queries, keys, window = limits.tolist()
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, key_starts, queries, keys, 0.0, True, False, scale=1.0,
        window_size_left=window, window_size_right=0,
    )  # fmt: skip
    return out, logsumexp


@flash.register_fake
def _(q, k, v, starts, key_starts, limits):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("forgekit::flash_backward", mutates_args=())
def flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    limits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `flash` for queries, keys and values."""
    queries, keys, window = limits.tolist()
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is zero
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, logsumexp, starts, key_starts, queries, keys, 0.0, True, random_state,
        torch.empty(0, device=q.device), scale=1.0, window_size_left=window, window_size_right=0,
    )  # fmt: skip


@flash_backward.register_fake
def _(grad, q, k, v, out, logsumexp, starts, key_starts, limits):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, *places = inputs
    ctx.save_for_backward(q, k, v, *output, *places)


def differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    return (*flash_backward(grad, *ctx.saved_tensors), None, None, None)


flash.register_autograd(differentiate, setup_context=save_for_backward)
