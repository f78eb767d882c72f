"""Answers: one, streamed to the screen, or many at once without chance."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..data.collate import TURN_END, get_tokenizer, tokenize_chats
from ..data.messages import Messages, check_message, make_message
from ..data.parts import load_parts

if TYPE_CHECKING:
    import torch


# None takes back what a checkpoint's generation_config.json says of sampling, which transformers warns about otherwise
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def end_tokens(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: <end_of_turn> and the end of text."""
    return [tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id]


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """Switch a model to answering and back to what it was; Unsloth keeps switches of its own beside train and eval."""
    import torch

    training = model.training
    # one switch a layer: Unsloth's is cleared by its for_inference, transformers' by eval mode alone
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    unsloth = sys.modules.get("unsloth")
    if unsloth:
        unsloth.FastModel.for_inference(model)
    model.eval()
    try:
        with torch.inference_mode() if not unsloth else torch.no_grad():
            yield
    finally:
        if unsloth and training:
            unsloth.FastModel.for_training(model, use_gradient_checkpointing=bool(checkpointed))
        model.train(training)


def generate_answers(
    model: Any, processor: Any, chats: list[Messages], max_new_tokens: int, **settings: Any
) -> list[str]:
    """Answer the last question of each chat; greedy unless `settings` for `generate` say otherwise.

    Args:
        chats: messages that end with the assistant's turn, which is left off and never seen by the model.
        max_new_tokens: longest answer in tokens.

    Returns one trimmed text a chat, special tokens removed.
    """
    tokenizer = get_tokenizer(processor)
    batch = tokenize_chats(chats, processor, answer=False, padding=True, padding_side="left", return_tensors="pt")
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with inference(model):
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_tokens(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **(settings or GREEDY),
        )
    answers: torch.Tensor = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def generate_answer(
    model: Any,
    processor: Any,
    question: str | Messages,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 0.95,
    top_k: int = 64,
    stream: bool | Callable[[str], None] = True,
    seed: int | None = None,
) -> str:
    """Answer one question, printing the words as they come.

    Args:
        question: text, or the turns so far, the last one the user's.
        temperature, top_p, top_k: sampling as Google recommends for Gemma 3n; temperature 0 is greedy.
        stream: print; or a function that is given each new piece of text, also an empty one with each token. What it
            raises ends the answer.
        seed: makes the draw repeatable.

    Returns the whole answer, trimmed.
    """
    import torch
    from transformers import TextStreamer

    turns = [make_message("user", question)] if isinstance(question, str) else question
    chat = load_parts([check_message(turn) for turn in turns])
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else dict(GREEDY)
    )
    if stream:
        sampling["streamer"] = TextStreamer(get_tokenizer(processor), skip_prompt=True, skip_special_tokens=True)
    if callable(stream):
        show = stream
        sampling["streamer"].on_finalized_text = lambda text, stream_end=False: show(text)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return generate_answers(model, processor, [[*chat, make_message("assistant", "")]], max_new_tokens, **sampling)[
            0
        ]
