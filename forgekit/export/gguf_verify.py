"""Is the GGUF file the model that was trained? Read back through llama.cpp and compared with the model in memory.

bytes        the file holds what was meant to be written
tokens       llama.cpp cuts 200 texts as the tokenizer does
template     llama.cpp writes chats as the training template does
probability  the next token's distribution on held-out rows (Kullback-Leibler divergence, nats a token)
perplexity   of the held-out answers; where every row has media, of the trained model's own answers to a few chats
base         the file is nearer to the trained model than the base is
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.collate import get_tokenizer, render_chats, tokenize_texts
from ..data.messages import Messages, get_answer, make_message
from ..evaluate.generate import end_tokens, generate_answers
from .adapter import load_export
from .compare import Reference
from .gguf import open_merged
from .gguf_reference import (
    Row,
    divide_as_llama,
    list_chats,
    list_texts,
    mark_rows,
    measure_reference,
    read_reference,
)
from .gguf_seal import read_seal
from .llama import (
    answer_prompt,
    continue_tokens,
    cut_text,
    measure_answers,
    open_gguf,
    read_log_probabilities,
    write_prompt,
)
from .verdict import Check, Verdict, at_most

if TYPE_CHECKING:
    import numpy

ROWS = 16  # of which probabilities are compared
TEXTS = 200
PLACES = 8  # next tokens compared a row
PERPLEXITY_ROWS = 8  # one request a token
OWN_ANSWER = 16  # tokens that the reference says where no held-out row is without media
# Largest seen over five seeds (benchmarks/README.md): KL 6e-5 in 16 bit, 6e-4 in Q8_0, 1.3e-2 in Q4_K_M; perplexity 0.3 %, 0.4 %, 5.6 %.
# kind -> (mean KL in nats a token against a reference with llama.cpp's cut-off; share by which perplexity may differ; share
# of the base's KL to the trained model, of which rounding to 4 bit takes more when a run was short)
BOUNDS = {
    "F32": (2e-3, 0.01, 0.5),
    "F16": (2e-3, 0.01, 0.5),
    "BF16": (2e-3, 0.01, 0.5),
    "Q8_0": (1e-2, 0.01, 0.5),
    "Q4_K_M": (5e-2, 0.07, 0.9),
}
CUTOFF_KL = 1e-3  # what the other standard deviation may add (benchmarks/README.md, GGUF against transformers)


def verify_gguf(kind: str, trained: Reference, path: Path, config: Config) -> Verdict:
    """Compare a GGUF file with the trained model in memory.

    Args:
        kind: what the file was written as: "F16", "BF16", "Q8_0", "Q4_K_M".
        trained: model and held-out rows; of rows with media only the text is compared.

    Returns the Verdict; its notes list how many tensors have which type. Raises ExportError when llama.cpp cannot load it.
    """
    verdict = check_bytes(path)
    if not verdict.verified:  # llama.cpp may end the process over a damaged file
        return verdict
    processor, (chats, own) = trained.processor, list_chats(trained.chats, ROWS)
    verdict = verdict.add(rows=len(chats), notes={"types": count_types(path)})
    with open_reference(trained.model, processor, path, config) as reference:
        known = [*chats[:own], *answer_chats(reference, processor, chats[own:PERPLEXITY_ROWS])][:PERPLEXITY_ROWS]
        rows = mark_rows(known, processor)
        verdict = verdict.add(tokens=sum(sum(learned) for _, learned in rows))
        context = max(len(ids) for ids, _ in mark_rows([*chats, *known], processor)) * 2
        context += config.evaluate.max_new_tokens + 64
        with open_gguf(path, context, exact=True) as server:
            verdict = verdict.add(*compare_tokens(server, processor, chats))
            verdict = verdict.add(*compare_probabilities(server, reference, trained.model, processor, chats, kind))
            verdict = verdict.add(compare_perplexity(server, reference, processor, rows, kind))
            if own:
                scores = score_both(server, reference, processor, chats[:own], config.evaluate.max_new_tokens)
                verdict = verdict.add(score=scores[0], merged_score=scores[1])
    return verdict


def check_bytes(path: Path) -> Verdict:
    """Say whether a file holds the bytes that were meant to be written."""
    size, (meant, unchanged) = path.stat().st_size, read_seal(path)
    whole = at_most("files whose bytes differ from those written", int(not unchanged), 0)
    return Verdict((at_most("bytes too many or too few", abs(size - meant), 0), whole), size, meant)


def count_types(path: Path) -> dict[str, int]:
    """Return how many tensors of a GGUF file have which type."""
    from gguf import GGUFReader

    return dict(sorted(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors).items()))


@contextlib.contextmanager
def open_reference(model: Any, processor: Any, path: Path, config: Config) -> Iterator[Any]:
    """Yield the model that the file has to equal: the one in memory, or the merged one where its base is quantised.

    A base in 4 or 8 bit differs from the 16-bit one that was merged into by more than any format of GGUF.
    """
    if config.model.load_in in ("16bit", "full"):
        yield model
        return
    with open_merged(model, processor, config, path) as merged:
        yield load_export(merged, config.change({"model.load_in": "16bit"}, "export"))[0]


def answer_chats(reference: Any, processor: Any, chats: list[Messages]) -> list[Messages]:
    """Return chats that are no whole held-out rows with the reference's own answers in place of those that stand there.

    To a model that learned something else these are so improbable that rounding alone moves their perplexity by more than
    any bound: 1.4 % in Q8_0 where sounds were learned, at a KL of 7e-4 nats a token.
    """
    answers = generate_answers(reference, processor, chats, OWN_ANSWER) if chats else []
    return [[*chat[:-1], make_message("assistant", answer)] for chat, answer in zip(chats, answers, strict=True)]


def compare_tokens(server: Any, processor: Any, chats: list[Messages]) -> list[Check]:
    """Compare the tokens of 200 texts, and how chats are written."""
    tokenizer = get_tokenizer(processor)
    texts = list_texts(chats, TEXTS)
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    wrong = [text for text, ids in zip(texts, expected, strict=True) if cut_text(server, text, special=False) != ids]
    wrong += texts[:1] if cut_text(server, texts[0]) != [tokenizer.bos_token_id, *expected[0]] else []
    longer = [[make_message("system", "Be brief."), *chat, *chat] for chat in chats]
    rendered = render_chats([*chats, *longer], processor, answer=False)
    written = [write_prompt(server, chat[:-1]) for chat in (*chats, *longer)]
    other = [a for a, b in zip(rendered, written, strict=True) if a != tokenizer.bos_token + b]
    return [
        at_most(f"texts of {TEXTS} cut into other tokens", len(wrong), 0),
        at_most(f"chats of {len(rendered)} written otherwise", len(other), 0),
    ]


def compare_probabilities(
    server: Any, reference: Any, trained: Any, processor: Any, chats: list[Messages], kind: str
) -> list[Check]:
    """Compare the distributions of the next tokens along the file's own answers."""
    vocabulary = reference.config.get_text_config().vocab_size
    prompts = tokenize_texts(chats, processor, answer=False)["input_ids"]
    words = getattr(reference.config.get_text_config(), "vocab_size_per_layer_input", vocabulary)
    said = [cut_media(*continue_tokens(server, ids, PLACES, vocabulary), words) for ids in prompts]
    found = [read_log_probabilities(places, vocabulary) for _, places in said]
    rows = [[*ids, *new[: len(places) - 1]] for ids, (new, places) in zip(prompts, said, strict=True)]
    firsts = [len(ids) - 1 for ids in prompts]
    plain = read_reference(reference, rows, firsts)
    with divide_as_llama(reference):
        same = read_reference(reference, rows, firsts)
    mean = {"same": measure_distance(same, found), "plain": measure_distance(plain, found)}
    if hasattr(trained, "disable_adapter"):
        own = plain if reference is trained else read_reference(trained, rows, firsts)
        with trained.disable_adapter():
            mean["base"] = measure_distance(own, read_reference(trained, rows, firsts))
        mean["trained"] = measure_distance(own, found)
    checks = [
        at_most("mean KL with llama.cpp's cut-off, nats a token", mean["same"], BOUNDS[kind][0]),
        at_most("mean KL, nats a token", mean["plain"], BOUNDS[kind][0] + CUTOFF_KL),
    ]
    if "base" in mean:
        share = mean["trained"] / mean["base"] if mean["base"] else math.inf
        checks.append(at_most("mean KL as a share of the base's", share, BOUNDS[kind][2]))
    return checks


def cut_media(new: list[int], places: list[Any], words: int) -> tuple[list[int], list[Any]]:
    """Return a continuation up to its first token that stands for a picture or sound: transformers reads those otherwise."""
    first = next((place for place, token in enumerate(new) if token >= words), len(new))
    return new[: first + 1], places[: first + 1]


def compare_perplexity(server: Any, reference: Any, processor: Any, rows: list[Row], kind: str) -> Check:
    """Compare the perplexity of the held-out answers, both with llama.cpp's cut-off."""
    vocabulary = reference.config.get_text_config().vocab_size
    with divide_as_llama(reference):
        expected = measure_reference(reference, rows)
    found = measure_answers(server, rows, vocabulary, end_tokens(get_tokenizer(processor))[0])[0]
    return at_most("change of perplexity", abs(math.expm1(found - expected)), BOUNDS[kind][1])


def measure_distance(expected: list["numpy.ndarray"], found: list["numpy.ndarray"]) -> float:
    """Return the mean Kullback-Leibler divergence of log-probabilities [places, vocabulary], in nats a token.

    llama.cpp normalises in float32, so its rows are normalised again.
    """
    import numpy

    total = 0.0
    for wanted, other in zip(expected, found, strict=True):
        other = other - numpy.logaddexp.reduce(other, axis=-1, keepdims=True)
        total += float((numpy.exp(wanted) * (wanted - other)).sum())
    return total / sum(map(len, expected))


def score_both(
    server: Any, reference: Any, processor: Any, chats: list[Messages], max_new_tokens: int
) -> tuple[float, float]:
    """Return the share of rows answered exactly, by the file through llama.cpp and by the reference in transformers."""
    prompts = tokenize_texts(chats, processor, answer=False)["input_ids"]
    through = [answer_prompt(server, ids, max_new_tokens) for ids in prompts]
    answers = generate_answers(reference, processor, chats, max_new_tokens)
    right = [get_answer(chat) for chat in chats]
    return tuple(sum(map(str.__eq__, some, right)) / len(chats) for some in (through, answers))  # type: ignore[return-value]
