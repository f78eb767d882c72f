"""A GGUF file run by llama.cpp itself, in this process, from the file alone: its tokenizer, its template, its numbers.

xllamacpp, a binding with prebuilt wheels, carries llama.cpp's own server; it listens on a free port of 127.0.0.1 while the
context is open. Questions about tokens and probabilities have no function in the binding and go over that port.
"""

import contextlib
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.messages import Messages, get_text, make_message
from ..errors import ExportError

if TYPE_CHECKING:
    import numpy

LIKELY = 16  # next tokens asked for at first; the whole vocabulary of a large model is 20 MB of JSON a token


@contextlib.contextmanager
def open_gguf(path: Path | str, context: int = 4096, threads: int | None = None, exact: bool = False) -> Iterator[Any]:
    """Load a GGUF file and yield an xllamacpp.Server for it, on the CPU.

    Args:
        context: longest prompt and answer together, in tokens.
        threads: of the CPU; None: as many as torch uses.
        exact: keep keys and values in float32 rather than float16, for comparisons.

    Raises ExportError for a file that llama.cpp does not take.
    """
    import xllamacpp

    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: no such GGUF file. Name gguf:q8_0 in export.formats to get one.")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = context, 1, 0, 0
    params.warmup = params.fit_params = params.ui = False
    params.swa_full = True  # a prompt that shares its beginning with the last one is read on from there
    params.verbosity = -1
    params.cpuparams.n_threads = threads or count_threads()
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"{path}: llama.cpp cannot load this file: {error}") from error
    try:
        yield server
    finally:
        del server  # ends its threads and frees the weights


def count_threads() -> int:
    """Return as many threads as torch computes with, which the user may have limited."""
    import torch

    return torch.get_num_threads()


def ask_server(server: Any, route: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the server's answer to a JSON request. Raises ExportError with its message when it refuses."""
    body = urllib.request.Request(
        server.listening_address + route, json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 needs no proxy
    try:
        with opener.open(body) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ExportError(f"llama.cpp refused {route}: {error.read().decode(errors='replace')}") from error


def cut_text(server: Any, text: str, special: bool = True) -> list[int]:
    """Return the token ids that llama.cpp makes of a text: <bos> in front when `special`, special tokens in it recognised."""
    return ask_server(server, "/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]


def write_prompt(server: Any, messages: Messages) -> str:
    """Return the turns as the template in the file writes them, without <bos>, the model's turn begun."""
    turns = [{"role": turn["role"], "content": get_text(turn)} for turn in messages]
    return ask_server(server, "/apply-template", {"messages": turns})["prompt"]


def continue_tokens(
    server: Any, ids: list[int], number: int, likely: int, forced: int | None = None
) -> tuple[list[int], list[dict[int, float]]]:
    """Continue a prompt greedily.

    Args:
        likely: how many of the most probable next tokens are returned at each place.
        forced: a token that is said in any case; the probabilities are the model's own all the same.

    Returns the new ids, and for each of them {id: log-probability} of the most probable tokens at its place; both end before
    the first byte of a character that was not finished, because the server tells such bytes together.
    """
    request: dict[str, Any] = {"prompt": ids, "n_predict": number, "n_probs": likely, "temperature": 0}
    if forced is not None:
        request["logit_bias"] = [[forced, 1000.0]]
    answer = ask_server(server, "/completion", {**request, "return_tokens": True, "cache_prompt": True})
    told = answer.get("completion_probabilities", [])
    number = 0
    while number < min(len(told), len(answer["tokens"])) and told[number]["id"] == answer["tokens"][number]:
        number += 1
    places = [{one["id"]: one["logprob"] for one in place["top_logprobs"]} for place in told[:number]]
    return answer["tokens"][:number], places


def read_log_probabilities(places: list[dict[int, float]], vocabulary: int) -> "numpy.ndarray":
    """Return log-probabilities as an array [places, vocabulary]; -inf for tokens that llama.cpp left out."""
    import numpy

    table = numpy.full((len(places), vocabulary), -numpy.inf)
    for row, place in zip(table, places, strict=True):
        row[list(place)] = list(place.values())
    return table


def answer_prompt(server: Any, ids: list[int], max_new_tokens: int) -> str:
    """Return the greedy answer to a prompt, trimmed."""
    request = {"prompt": ids, "n_predict": max_new_tokens, "temperature": 0, "cache_prompt": True}
    return ask_server(server, "/completion", request)["content"].strip()


def measure_answers(
    server: Any, rows: list[tuple[list[int], list[bool]]], vocabulary: int, end: int
) -> tuple[float, int]:
    """Return (mean negative log-likelihood in nats a token, number of tokens) of the learned tokens of some rows.

    Args:
        rows: (ids, learned) as `tokenize_rows` and `mark_learned` give them.

        end: id of a token that is no piece of text, to be said each time: the server would hold back half a character.

    One request a token: the server tells the probabilities of what comes next only.
    """
    total, count = 0.0, 0
    for ids, learned in rows:
        for place in (place for place, chosen in enumerate(learned) if chosen):
            found: dict[int, float] = {}
            for likely in (min(LIKELY, vocabulary), vocabulary):
                found = continue_tokens(server, ids[:place], 1, likely, end)[1][0]
                if ids[place] in found:
                    break
            total -= found.get(ids[place], -math.inf)
            count += 1
    return total / max(count, 1), count


def ask_gguf(
    path: Path | str,
    question: str | Messages,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | None = None,
) -> str:
    """Answer one question through llama.cpp from a GGUF file alone, with the chat template inside it.

    Args:
        question: text, or the turns so far, the last one the user's.
        temperature: 0 takes the most probable token each time; Google recommends 1.0 for Gemma 3n.

    Returns the answer, trimmed. Raises ExportError for a file that llama.cpp does not take.
    """
    turns = [make_message("user", question)] if isinstance(question, str) else question
    messages = [{"role": turn["role"], "content": get_text(turn)} for turn in turns]
    request: dict[str, Any] = {"messages": messages, "max_tokens": max_new_tokens, "temperature": temperature}
    if temperature:
        request |= {"top_p": 0.95, "top_k": 64, "min_p": 0.0}
    if seed is not None:
        request["seed"] = seed
    with open_gguf(path) as server:
        answer = ask_server(server, "/v1/chat/completions", request)
    return answer["choices"][0]["message"]["content"].strip()
