"""How probable right answers are to the model: the loss of each row, of the chosen tokens alone.

`sum_losses` asks the model's own forward for the logits of columns that teach something. Another way to the same numbers
can be given in its place (`RowLosses`), as `train/score.py` gives the fast path.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

from ..data.collate import IGNORE, Collator
from ..data.messages import Messages, make_message
from .generate import inference

# (model, batch with labels) -> summed negative log-likelihood of each row's learned tokens in nats, float32 of [rows]
RowLosses = Callable[[Any, dict[str, Any]], Any]
MOST_LOGITS = 2**27  # logits of one forward, two answers of 256 tokens: more are taken in smaller batches
PART_LOGITS = 2**25  # of them in float32 at a time: 128 MiB, and as much again inside the loss


def sum_losses(model: Any, batch: dict[str, Any]) -> Any:
    """Return the summed loss of each row by the model's own forward, in float32."""
    import torch
    from torch.nn.functional import cross_entropy

    labels = batch["labels"][:, 1:].to(model.device)
    columns = (labels != IGNORE).any(0).nonzero()[:, 0]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    size = max(1, PART_LOGITS // (logits.shape[0] * logits.shape[2]))
    parts = zip(logits.split(size, 1), labels[:, columns].split(size, 1), strict=True)
    losses = [
        cross_entropy(part.float().transpose(1, 2), target, reduction="none", ignore_index=IGNORE).sum(1)
        for part, target in parts
    ]
    return torch.stack(losses).sum(0)


def measure_rows(
    model: Any, processor: Any, chats: list[Messages], losses: RowLosses = sum_losses
) -> list[tuple[float, int]]:
    """Return for each chat the summed loss of its learned tokens in nats and their number."""
    batch = Collator(processor)([{"messages": chat} for chat in chats])
    learned = batch["labels"][:, 1:] != IGNORE
    vocabulary = model.config.get_text_config().vocab_size
    if len(chats) > 1 and len(chats) * int(learned.any(0).sum()) * vocabulary > MOST_LOGITS:
        middle = len(chats) // 2
        halves = (chats[:middle], chats[middle:])
        return [row for half in halves for row in measure_rows(model, processor, half, losses)]
    with inference(model), autocast(model):
        sums = losses(model, batch).tolist()
    return list(zip(sums, learned.sum(1).tolist(), strict=True))


def measure_loss(
    model: Any, processor: Any, chats: list[Messages], batch_size: int, losses: RowLosses = sum_losses
) -> tuple[float, int]:
    """Return the mean loss in nats over all learned tokens of the chats, computed in float32, and the number of tokens."""
    rows: list[tuple[float, int]] = []
    for start in range(0, len(chats), batch_size):
        rows += measure_rows(model, processor, chats[start : start + batch_size], losses)
    tokens = sum(number for _, number in rows)
    return math.fsum(total for total, _ in rows) / tokens, tokens


def weigh_choices(
    model: Any, processor: Any, chat: Messages, choices: list[str], batch_size: int, losses: RowLosses = sum_losses
) -> list[float]:
    """Return the log-likelihood in nats of each choice as the last answer, its <end_of_turn> included.

    A whole answer's probability, so that no choice wins by being short; turns before it weigh the same for all.
    """
    chats = [[*chat[:-1], make_message("assistant", choice)] for choice in choices]
    found: list[float] = []
    for start in range(0, len(chats), batch_size):
        found += [-loss for loss, _ in measure_rows(model, processor, chats[start : start + batch_size], losses)]
    return found


def autocast(model: Any) -> Any:
    """Return autocast to the model's half precision on a GPU, as training has it; elsewhere a context that does nothing."""
    import torch

    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast("cuda", model.dtype) if model.device.type == "cuda" and half else contextlib.nullcontext()
