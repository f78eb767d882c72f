"""Answers: many at once equal one by one, they end where a turn ends, and the model is left as it was."""

from pathlib import Path
from typing import Any

import pytest

from forgekit import generate_answer, generate_answers, load_config, load_model
from forgekit.data.messages import check_example
from forgekit.evaluate import generate
from forgekit.evaluate.generate import end_tokens, inference

QUESTIONS = ["1?", "Please deliver 4 boxes of tea to Ana in Lima by Monday, and 7 of soap to Ben in Oslo.", "2 + 2?"]
CHATS = [
    check_example({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]})
    for text in QUESTIONS
]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Any:
    settings = {"model.id": str(tiny_folder), "model.engine": "huggingface", "model.load_in": "16bit"}
    return load_model(load_config(None, {**settings, "model.device": "cpu"}))


def answer_by_hand(model: Any, processor: Any, question: str, tokens: int) -> str:
    """Decode greedily with whole forward passes: no cache, no padding, no generate."""
    import torch

    tokenizer = processor.tokenizer
    text = f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + tokens and (len(ids) == start or ids[-1] not in end_tokens(tokenizer)):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def check_answers(model: Any, processor: Any) -> None:
    batched = generate_answers(model, processor, CHATS, 12)
    assert batched == [answer_by_hand(model, processor, question, 12) for question in QUESTIONS]
    assert len(set(batched)) > 1  # a model that says one thing to all would hide a mix-up


def test_batched_answers_equal_decoding_by_hand_one_by_one(loaded: Any) -> None:
    check_answers(*loaded)


def test_padding_on_the_wrong_side_turns_that_check_red(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generate.tokenize_chats
    monkeypatch.setattr(
        generate,
        "tokenize_chats",
        lambda *args, padding_side, **settings: real(*args, padding_side="right", **settings),
    )
    with pytest.raises(AssertionError):
        check_answers(*loaded)


def test_a_prompt_without_the_models_turn_turns_that_check_red(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generate.tokenize_chats
    monkeypatch.setattr(generate, "tokenize_chats", lambda *args, answer, **settings: real(*args, **settings))
    with pytest.raises(AssertionError):
        check_answers(*loaded)


def force_tokens(model: Any, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model prefer the given tokens, one after the other, whatever it reads."""
    real, seen = model.forward, []

    def forward(*args: Any, **inputs: Any) -> Any:
        output = real(*args, **inputs)
        output.logits[:, -1, tokens[min(len(seen), len(tokens) - 1)]] = 1000.0
        seen.append(1)
        return output

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.parametrize("end", ["<end_of_turn>", "<eos>"])
def test_an_answer_ends_with_its_turn(loaded: Any, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    model, processor = loaded
    seven, stop = processor.tokenizer.convert_tokens_to_ids(["7", end])
    force_tokens(model, [seven, seven, stop, seven], monkeypatch)
    assert generate_answers(model, processor, CHATS[:1], 12) == ["77"]


def test_the_reference_answer_is_never_seen(loaded: Any) -> None:
    other = [[chat[0], {"role": "assistant", "content": [{"type": "text", "text": "quite another"}]}] for chat in CHATS]
    assert generate_answers(*loaded, other, 8) == generate_answers(*loaded, CHATS, 8)


def test_a_seed_makes_the_draw_repeatable_and_leaves_the_generator_alone(loaded: Any) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    draws = [generate_answer(*loaded, "1?", 12, stream=False, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert draws[0] == draws[1] != draws[2]


def test_temperature_zero_is_greedy(loaded: Any) -> None:
    greedy = generate_answers(*loaded, CHATS[:1], 12)[0]
    assert generate_answer(*loaded, QUESTIONS[0], 12, temperature=0, stream=False) == greedy


def test_streaming_prints_the_answer_as_it_comes(loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    streamed = generate_answer(*loaded, "1?", 12, seed=3)
    printed = capsys.readouterr().out
    assert printed.strip() == streamed
    assert streamed == generate_answer(*loaded, "1?", 12, seed=3, stream=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("training", [True, False])
def test_answering_leaves_mode_and_weights_as_they_were(loaded: Any, training: bool) -> None:
    import torch

    model, processor = loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training)
    try:
        generate_answers(model, processor, CHATS[:1], 2)
        assert model.training is training
        with pytest.raises(ZeroDivisionError), inference(model):
            assert not model.training and not torch.is_grad_enabled()
            _ = 1 / 0
        assert model.training is training and torch.is_grad_enabled()
    finally:
        model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
