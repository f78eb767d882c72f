"""Cross-entropy of the kept tokens, in chunks, so that a batch's logits never exist whole (4,096 tokens: 4.3 GB in float32).

hidden [M, H] ─ head ─ soft-cap (30 tanh(x / 30)) ─ float32 ─ loss of each token [M]
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .recompute import recompute
from .rows import IGNORE

CHUNK_LOGITS = 256 * 262_400  # 256 tokens of the released vocabulary: 0.27 GB in float32


class TokenLosses(NamedTuple):
    """For each token, in float32 and zero where there is no target: loss, entropy of the prediction, whether it was right."""

    loss: torch.Tensor
    entropy: torch.Tensor | None
    right: torch.Tensor | None


def measure_tokens(
    head: Any, hidden: torch.Tensor, targets: torch.Tensor, cap: float | None, statistics: bool = False, compiled: Any = None
) -> TokenLosses:  # fmt: skip
    """Return the loss of each token.

    Args:
        head: the lm_head module; frozen and plain, its gradient for `hidden` is computed along with the loss; adapted or
            trained, it is called as the module it is, once more in the backward.
        targets: [M], -100 where nothing is learned.
        statistics: entropy and correctness as well.
        compiled: a compiled `score_logits`.
    """
    size = max(64, CHUNK_LOGITS // head.weight.shape[0])
    score = compiled or score_logits
    if is_plain(head):
        loss, entropy, right = FrozenHead.apply(hidden, head.weight, targets, cap, size, statistics, score)
        return TokenLosses(loss, entropy if statistics else None, right.bool() if statistics else None)
    parts = []
    for start in range(0, hidden.shape[0], size):
        chunk = (head, hidden[start : start + size], targets[start : start + size], cap, statistics)
        parts.append(recompute(score_through_module, *chunk))
    loss, entropy, right = (torch.cat(values) for values in zip(*parts, strict=True))
    return TokenLosses(loss, entropy if statistics else None, right.bool() if statistics else None)


def is_plain(head: Any) -> bool:
    """Say whether the head is a frozen torch.nn.Linear without a bias or hooks."""
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return type(head) is torch.nn.Linear and not head.weight.requires_grad and head.bias is None and not hooks


def score_through_module(
    head: Any, hidden: torch.Tensor, targets: torch.Tensor, cap: float | None, statistics: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, entropy and correctness of one chunk, by torch's own operations."""
    logits = soft_cap(head(hidden), cap)
    loss = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
    entropy, right = describe(logits.detach(), targets) if statistics else (loss.detach(), loss.detach())
    return loss, entropy, right


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return cap * tanh(logits / cap) in float32; half precision is left before and not after."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return (logits if cap is None else torch.tanh(logits / cap) * cap).float()


def describe(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the entropy of each row of capped logits and 1.0 where the target is the likeliest word."""
    learned = targets != IGNORE
    log_probabilities = logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return entropy * learned, (logits.argmax(-1) == targets).to(logits.dtype) * learned


def score_logits(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, statistics: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return losses, entropy, correctness, and the gradient of the summed losses for the logits, [m, words].

    With t = tanh(x / cap) and p = softmax(cap t), the gradient for x is (p - target) (1 - t^2).
    """
    learned = targets != IGNORE
    capped = soft_cap(logits, cap)
    logsumexp = torch.logsumexp(capped, -1)
    safe = targets.clamp(min=0)
    loss = (logsumexp - capped.gather(1, safe[:, None])[:, 0]) * learned
    entropy, right = describe(capped, targets) if statistics else (loss, loss)
    gradient = torch.exp(capped - logsumexp[:, None])
    words = torch.arange(logits.shape[1], device=logits.device)
    gradient = gradient - (words == safe[:, None]).to(gradient.dtype)
    if cap is not None:
        gradient = gradient * (1 - (capped / cap).square())
    return loss, entropy, right, (gradient * learned[:, None]).to(logits.dtype)


class FrozenHead(torch.autograd.Function):
    """Losses of a frozen head; the gradient for `hidden` is ready with them, so no logit is kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float | None, size: int, statistics: bool, score: Any) -> Any:  # fmt: skip
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        weight, keep = weight.to(dtype), ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if keep else None
        parts = []
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.shape[0], size):
                chunk = slice(start, start + size)
                *scores, slope = score(hidden[chunk].to(dtype) @ weight.T, targets[chunk], cap, statistics)
                parts.append(scores)
                if gradient is not None:
                    gradient[chunk] = (slope @ weight).to(hidden.dtype)
        ctx.gradient = gradient
        loss, entropy, right = (torch.cat(values) for values in zip(*parts, strict=True))
        ctx.mark_non_differentiable(entropy, right)
        return loss, entropy, right

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        return (gradient * grad[:, None].to(gradient.dtype), *[None] * 6)
