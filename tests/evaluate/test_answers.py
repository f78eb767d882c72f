"""Answers that are kept: a second call goes on where the first ended, and a changed model, row or limit answers anew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, evaluate_model, load_model
from forgekit.data.messages import check_example
from forgekit.evaluate import answers
from forgekit.evaluate.fingerprint import fingerprint_model, fingerprint_row, read_values


def make_rows(number: int = 6, answer: str = "x") -> Any:
    from datasets import Dataset

    turns = [[f"Question {i}" + " again" * i, answer] for i in range(number)]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    return Dataset.from_list([{"messages": check_example({"messages": chat})} for chat in chats])


@pytest.fixture
def loaded(make_config: Any) -> tuple[Any, Any, Any]:
    config = make_config(
        {"evaluate.rows": "none", "evaluate.per_device_eval_batch_size": 2, "evaluate.max_new_tokens": 4}
    )
    return (*load_model(config), config)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that the model was really asked, in the order of asking."""
    seen: list[str] = []
    real = answers.generate_answers

    def count(model: Any, processor: Any, chats: Any, limit: int) -> list[str]:
        seen.extend(" ".join(chat[0]["content"][0]["text"].split()[:2]) for chat in chats)
        return real(model, processor, chats, limit)

    monkeypatch.setattr(answers, "generate_answers", count)
    return seen


class Killed(BaseException):
    """Stands for the end of the process."""


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end after so many batches."""
    real, left = answers.answer_batch, [batches]

    def answer(*args: Any) -> Any:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(*args)

    monkeypatch.setattr(answers, "answer_batch", answer)


def test_a_call_that_was_killed_goes_on_where_it_ended(
    loaded: Any, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, partial = tmp_path / "scores.json", tmp_path / "scores.partial.jsonl"
    whole = evaluate_model(loaded[0], loaded[1], make_rows(), loaded[2])
    asked.clear()
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Killed):
            evaluate_model(loaded[0], loaded[1], make_rows(), loaded[2], path)
    assert len(partial.read_text().splitlines()) == 4 and not path.exists()
    with open(partial, "a") as file:
        file.write('{"key": "cut sho')  # the process ended while it wrote
    first = list(asked)
    capsys.readouterr()
    scores = evaluate_model(loaded[0], loaded[1], make_rows(), loaded[2], path)
    assert capsys.readouterr().out.startswith("4 of 6 rows were answered by this model before\n")
    assert sorted(asked) == [f"Question {i}" for i in range(6)] and asked[: len(first)] == first
    assert [row["prediction"] for row in scores.rows] == [row["prediction"] for row in whole.rows]
    assert scores.loss == pytest.approx(whole.loss, abs=1e-6)
    assert path.exists() and not partial.exists()


def change_weight(loaded: Any) -> tuple[Any, Any]:
    """One value of one learned matrix, by the least step that float32 has."""
    import torch

    weight = next(p for n, p in loaded[0].named_parameters() if "lora_B" in n and p.requires_grad)
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))
    return make_rows(), loaded[2]


CHANGES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "nothing": lambda loaded: (make_rows(), loaded[2]),
    "weights": change_weight,
    "right answers": lambda loaded: (make_rows(answer="y"), loaded[2]),
    "longest answer": lambda loaded: (make_rows(), loaded[2].change({"evaluate.max_new_tokens": 5})),
}


@pytest.fixture
def tuned(loaded: Any) -> Any:
    """The model with an adapter that has learned something."""
    import torch

    model = add_adapter(loaded[0], loaded[2])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    return model, loaded[1], loaded[2]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_row_or_limit_is_answered_anew(
    change: str, tuned: Any, asked: list[str], tmp_path: Path
) -> None:
    model, processor, config = tuned
    evaluate_model(model, processor, make_rows(), config, tmp_path / "scores.json")
    asked.clear()
    rows, config = CHANGES[change](tuned)
    evaluate_model(model, processor, rows, config, tmp_path / "scores.json")
    assert len(asked) == (0 if change == "nothing" else 6)


def test_more_rows_are_added_to_those_that_were_answered(loaded: Any, asked: list[str], tmp_path: Path) -> None:
    evaluate_model(loaded[0], loaded[1], make_rows(3), loaded[2], tmp_path / "scores.json")
    asked.clear()
    scores = evaluate_model(loaded[0], loaded[1], make_rows(5), loaded[2], tmp_path / "scores.json")
    assert sorted(asked) == ["Question 3", "Question 4"] and len(scores.rows) == 5


def test_a_metric_that_is_added_later_is_computed_from_the_same_answers(
    loaded: Any, asked: list[str], tmp_path: Path
) -> None:
    evaluate_model(loaded[0], loaded[1], make_rows(), loaded[2], tmp_path / "scores.json")
    asked.clear()
    config = loaded[2].change({"evaluate.metric": ["wer", "token_f1"]})
    scores = evaluate_model(loaded[0], loaded[1], make_rows(), config, tmp_path / "scores.json")
    assert asked == [] and list(scores.metrics) == ["wer", "token_f1", "exact_match", "loss"]


def test_another_programs_file_is_written_anew(loaded: Any, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("[1, 2]")
    evaluate_model(loaded[0], loaded[1], make_rows(2), loaded[2], tmp_path / "scores.json")
    assert len(json.loads((tmp_path / "scores.json").read_text())["rows"]) == 2


def test_media_are_part_of_what_was_asked(loaded: Any) -> None:
    from PIL import Image

    def make_chat(colour: str) -> Any:
        parts = [{"type": "image", "image": Image.new("RGB", (8, 8), colour)}, {"type": "text", "text": "What colour?"}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]

    chats = [make_chat(colour) for colour in ("red", "red", "blue")]
    prints = [fingerprint_row(chat, loaded[1])[0] for chat in chats]
    assert prints[0] == prints[1] != prints[2]
    rows = [{"messages": chat} for chat in chats]
    scores = evaluate_model(loaded[0], loaded[1], rows, loaded[2].change({"evaluate.metric": "loss"}))
    media = [row["media"] for row in scores.rows]
    assert media[0] == media[1] != media[2] and all(media)


def test_a_large_weight_is_sampled_up_to_its_last_value() -> None:
    """float32 would round the last place of 16,777,220 up, beyond the end."""
    import torch

    weight = torch.zeros(16_777_220, dtype=torch.int8)
    before = read_values(weight, learned=False)
    weight[-1] = 1
    assert read_values(weight, learned=False) != before
    weight[-1], weight[1] = 0, 1  # between two samples: seen in the sum, which learned weights have too
    assert read_values(weight, learned=False) == before
    assert read_values(weight, learned=True) != read_values(torch.zeros_like(weight), learned=True)


def test_base_fresh_adapter_and_disabled_adapter_are_one_model_and_a_trained_one_another(loaded: Any) -> None:
    model, _, config = loaded
    base = fingerprint_model(model)
    model = add_adapter(model, config)
    assert fingerprint_model(model) == base
    b = next(p for n, p in model.named_parameters() if "lora_B" in n)
    b.data[0, 0] = 0.1
    trained = fingerprint_model(model)
    assert trained != base == fingerprint_model_without_adapter(model)
    model.peft_config["default"].lora_alpha *= 2
    assert fingerprint_model(model) != trained
    frozen = next(p for n, p in model.named_parameters() if "lora" not in n and p.numel() > 100)
    frozen.data *= 1.01
    assert fingerprint_model_without_adapter(model) != base


def fingerprint_model_without_adapter(model: Any) -> str:
    with model.disable_adapter():
        return fingerprint_model(model)
