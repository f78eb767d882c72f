"""What a GGUF file is compared with: the trained model in transformers, its rows without media, its probabilities.

In sparse layers Gemma 3n keeps what lies above mean + 1.645 standard deviations. transformers divides by n in that
deviation and llama.cpp by n - 1 (ggml, `gaussian_topk`), which matters when the feed-forward part is narrow. So that
rounding can be told from it, the reference is asked both ways.
"""

import contextlib
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from ..data.collate import Markers, get_tokenizer, mark_learned, tokenize_texts
from ..data.messages import Messages, get_text
from ..evaluate.generate import end_tokens, inference
from ..evaluate.loss import autocast
from .compare import choose_rows
from .llama import measure_answers, open_gguf

if TYPE_CHECKING:
    import numpy

TABLE = 1 << 26  # log-probabilities held at once: 0.5 GB in float64
Row = tuple[list[int], list[bool]]  # a chat's token ids, and which of them are learned
ODD_TEXTS = (
    "Hello  world\n\n\nfoo\tbar",
    "def f(x):\n    return  x+1\n\n\n\n# ünïcödé 漢字 😀🏳️\u200d🌈",
    "   leading and trailing   ",
    "1234567890 3.14159e-10 -7,5",
    " " * 20 + "x",
    "a▁b literal",
    "<table><h1>hi</h1></table>",
    "\r\n\r\n",
    "don't  can't",
    "<unused1>x",
    '{"quantity": 12, "city": "Lima"}',
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "日本語のテキスト и русский текст",
    "\u00a0non\u2009breaking\u200bspaces",
)


@contextlib.contextmanager
def divide_as_llama(model: Any) -> Iterator[None]:
    """Let the sparse layers of a Gemma 3n divide by n - 1 in the standard deviation, as llama.cpp does."""
    import torch

    def cut(module: Any) -> Any:
        factor = NormalDist().inv_cdf(module.activation_sparsity)
        return lambda x: torch.relu(x - x.mean(-1, keepdim=True) - factor * x.std(-1, keepdim=True, unbiased=True))

    sparse = [module for module in model.modules() if getattr(module, "activation_sparsity", 0) > 0]
    for module in sparse:
        module._gaussian_topk = cut(module)  # an attribute of the instance hides the method of the class
    try:
        yield
    finally:
        for module in sparse:
            del module._gaussian_topk


def read_reference(model: Any, rows: list[list[int]], firsts: list[int]) -> list["numpy.ndarray"]:
    """Return for each row the log-probabilities of what follows each token from `first` on: float64 [tokens, vocabulary].

    Rows are padded behind, where a causal model does not look, and read together as far as TABLE numbers go.
    """
    import torch

    longest, tables = max(map(len, rows)), []
    size = max(1, TABLE // (longest * model.config.get_text_config().vocab_size))
    with inference(model), autocast(model):
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in some], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in some], device=model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for one, row, first in zip(logits, some, firsts[start : start + size], strict=True):
                tables.append(torch.log_softmax(one[first : len(row)].double(), -1).cpu().numpy())
    return tables


def list_chats(rows: list[Messages], number: int) -> tuple[list[Messages], int]:
    """Return text-only chats to compare on, and how many of them, at the front, are whole held-out rows.

    Media are left out, because a GGUF file of the text model cannot take them: of such rows one is kept, since they often
    ask the same. A few chats in words fill up.
    """
    built_in = choose_rows(None)
    whole: list[Messages] = []
    cut: list[Messages] = []
    for row in rows:
        chat = [{**turn, "content": [part for part in turn["content"] if part["type"] == "text"]} for turn in row]
        if all(get_text(turn).strip() for turn in chat) and row not in built_in:
            (whole if all(part["type"] == "text" for turn in row for part in turn["content"]) else cut).append(chat)
    chats = [*whole[:number], *cut[: not whole]]
    return [*chats, *built_in[: max(0, number - len(chats))]], min(len(whole), number)


def list_texts(chats: list[Messages], number: int) -> list[str]:
    """Return texts whose tokens are compared: turns of the chats, odd ones, and pieces of both in chance order."""
    texts = [*ODD_TEXTS, *(get_text(turn) for chat in chats for turn in chat)][:number]
    generator, source = random.Random(7), list(texts)
    while len(texts) < number:
        pieces = [generator.choice(source) for _ in range(3)]
        start = generator.randrange(40)
        texts.append(generator.choice(("", " ", "\n", "  ")).join(piece[start % max(1, len(piece)) :] for piece in pieces))  # fmt: skip
    return texts


def mark_rows(chats: list[Messages], processor: Any) -> list[Row]:
    """Return each chat's ids and which of them are learned."""
    markers = Markers.find(get_tokenizer(processor))
    return [(ids, mark_learned(ids, markers)) for ids in tokenize_texts(chats, processor)["input_ids"]]


def measure_reference(model: Any, rows: list[Row]) -> float:
    """Return the mean negative log-likelihood of the learned tokens in nats."""
    tables = read_reference(model, [ids for ids, _ in rows], [0] * len(rows))
    found = [
        table[place - 1, ids[place]]
        for table, (ids, learned) in zip(tables, rows, strict=True)
        for place in range(1, len(ids))
        if learned[place]
    ]
    return -float(sum(found)) / len(found)


def measure_perplexity(path: Path | str, processor: Any, chats: list[Messages]) -> float:
    """Return the perplexity of the chats' answers to a GGUF file, through llama.cpp: exp of the mean loss in nats a token.

    Args:
        processor: the one of training; the chats are cut into tokens by it, so that other precisions see the same ones.
        chats: held-out rows; what is no text in them is left out.
    """
    rows = mark_rows(list_chats(chats, len(chats))[0], processor)
    with open_gguf(path, max(len(ids) for ids, _ in rows) + 8) as server:
        end, size = end_tokens(get_tokenizer(processor))[0], len(get_tokenizer(processor))
        return math.exp(measure_answers(server, rows, size, end)[0])
