"""Two models on the same rows: how far their distributions of the next token lie apart, at each learned token."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.collate import IGNORE, Collator, tokenize_rows
from ..data.messages import Messages, make_message
from ..evaluate.generate import inference
from ..evaluate.loss import autocast

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    Logits = list[torch.Tensor]

ROWS, TOKENS = 32, 1024  # compared at most: float32 logits of 1024 tokens over 262,400 words are 1.1 GB
TIE = 0.125  # two logits closer than one step of bfloat16 at 16 to 32, where Gemma 3n's lie: which is larger is chance

# for an export without held-out rows
CHATS = (
    ("What is the capital of France?", "Paris."),
    ("Count from one to five.", "One, two, three, four, five."),
    ("Write 12 as a word.", "Twelve."),
    ('Turn this into JSON: name Ada, age 36.', '{"name": "Ada", "age": 36}'),
    ("Translate into German: good morning.", "Guten Morgen."),
    ("Is water wet? Answer yes or no.", "Yes."),
    ("Name three colours.", "Red, green and blue."),
    ("Say hello to Grace in Oslo.", "Hello, Grace. How is Oslo today?"),
)  # fmt: skip


@dataclass(frozen=True)
class Distance:
    """How far one model's predictions are from another's, over all compared tokens."""

    largest: float  # largest difference of two logits
    divergence: float  # mean Kullback-Leibler divergence in nats a token
    agreement: float  # share of tokens whose most probable word is the same, or was tied with it in the first model
    tokens: int


class Reference:
    """The trained model in memory and what it says about the compared rows, computed once for all formats."""

    def __init__(self, model: Any, processor: Any, dataset: "Dataset | None"):
        self.model, self.processor = model, processor
        self.chats = choose_rows(dataset)

    @functools.cached_property
    def trained(self) -> "Logits":
        """The trained model's logits."""
        return read_logits(self.model, self.processor, self.chats)

    @functools.cached_property
    def base(self) -> "Logits | None":
        """The base's logits: the model's without its adapter; None after full training, which left no base in memory."""
        from peft import PeftModel

        if not isinstance(self.model, PeftModel):
            return None
        with self.model.disable_adapter():
            return read_logits(self.model, self.processor, self.chats)

    @property
    def tokens(self) -> int:
        """Learned tokens that are compared."""
        return sum(map(len, self.trained))


def choose_rows(dataset: "Dataset | None") -> list[Messages]:
    """Return the first held-out rows, or without any a few chats in words."""
    if dataset is None:
        return [[make_message("user", question), make_message("assistant", answer)] for question, answer in CHATS]
    return [example["messages"] for example in dataset.select(range(min(ROWS, len(dataset))))]


def read_logits(model: Any, processor: Any, chats: list[Messages]) -> "Logits":
    """Return for each chat float32 logits [learned tokens, vocabulary] on the CPU, until TOKENS are reached.

    Only where a learned token is predicted, and of few rows at a time: never the logits of a whole batch of long rows.
    """
    import torch

    collate, found = Collator(processor), []
    for some in make_batches(chats, processor):
        batch = collate([{"messages": chat} for chat in some])
        learned = batch.pop("labels")[:, 1:] != IGNORE
        places = torch.nonzero(learned.any(0)).flatten()
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with inference(model), autocast(model):
            logits = model(**batch, use_cache=False, logits_to_keep=places.to(model.device)).logits
        found += [
            row[mask].float().cpu() for row, mask in zip(logits, learned[:, places].to(logits.device), strict=True)
        ]
        if sum(map(len, found)) >= TOKENS:
            break
    return found


def make_batches(chats: list[Messages], processor: Any) -> Iterator[list[Messages]]:
    """Yield the chats in their order, so many together that a batch has at most TOKENS tokens with its padding."""
    batch: list[Messages] = []
    longest = 0
    for chat, ids in zip(chats, tokenize_rows(chats, processor), strict=True):
        longest = max(longest, len(ids))
        if batch and (len(batch) + 1) * longest > TOKENS:
            yield batch
            batch, longest = [], len(ids)
        batch.append(chat)
    if batch:
        yield batch


def measure_distance(first: "Logits", second: "Logits") -> Distance:
    """Compare logits of two models on the same rows. Infinite where shapes differ or a number is missing."""
    import torch

    if [a.shape for a in first] != [b.shape for b in second] or any(bool(b.isnan().any()) for b in (*first, *second)):
        return Distance(float("inf"), float("inf"), 0.0, sum(map(len, first)))
    tokens = sum(map(len, first))
    largest = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    divergence, equal = 0.0, 0
    for a, b in zip(first, second, strict=True):
        p, q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
        divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        chosen = a.gather(-1, b.argmax(-1, keepdim=True)).squeeze(-1)
        equal += int((chosen >= a.max(-1).values - TIE).sum())
    return Distance(largest, max(0.0, divergence / tokens), equal / tokens, tokens)


@contextlib.contextmanager
def learning_kept(model: Any) -> Iterator[None]:
    """Put back, behind the block, which parameters learn: PEFT changes that when an adapter is added or chosen."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.requires_grad_(before[name])
