"""Scores: a loss that is transformers' own, answers in the order of the rows, and figures that add up."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import Scores, compare_scores, evaluate_model, load_model, show_answers
from forgekit.data.collate import IGNORE, Collator
from forgekit.data.messages import check_example
from forgekit.evaluate import scores as module
from forgekit.evaluate.scores import measure_loss

ANSWERS = ["7", '{"city": "Lima", "items": ["tea", "soap"]}', "no", "Monday at the latest, please", "8 9"]


def make_rows() -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"messages": check_example({"messages": [
                {"role": "user", "content": f"Question {number}" + " again" * (7 - number) + "?"},
                {"role": "assistant", "content": answer},
            ]})}
            for number, answer in enumerate(ANSWERS)
        ]
    )  # fmt: skip


@pytest.fixture
def loaded(make_config: Any) -> tuple[Any, Any, Any]:
    config = make_config({"evaluate.rows": None, "evaluate.per_device_eval_batch_size": 2})
    return (*load_model(config), config)


def measure_row_by_row(model: Any, processor: Any, rows: Any) -> tuple[float, int]:
    """Take the loss that transformers computes from labels, one row at a time, weighted by its learned tokens."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        batch = Collator(processor)([row])
        tokens = int((batch["labels"] != IGNORE).sum())
        with torch.no_grad():
            total += float(model(**batch, use_cache=False).loss) * tokens
        count += tokens
    return total / count, count


def check_loss(model: Any, processor: Any) -> None:
    chats = [row["messages"] for row in make_rows()]
    expected, tokens = measure_row_by_row(model, processor, make_rows())
    for size in (1, 2, 5):  # a batch pads its rows; that must not show
        loss, counted = measure_loss(model, processor, chats, size)
        assert counted == tokens
        assert loss == pytest.approx(expected, abs=1e-5)


def test_loss_is_transformers_own_over_all_learned_tokens(loaded: Any) -> None:
    check_loss(*loaded[:2])


def test_a_loss_one_token_off_turns_that_check_red(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(Collator):
        def __call__(self, examples: Any) -> Any:
            batch = super().__call__(examples)
            batch["labels"] = batch["labels"].roll(1, dims=1)
            return batch

    monkeypatch.setattr(module, "Collator", Shifted)
    with pytest.raises(AssertionError):
        check_loss(*loaded[:2])


def test_a_mean_over_rows_turns_that_check_red(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.measure_loss

    def mean_over_rows(model: Any, processor: Any, chats: Any, size: int) -> Any:
        each = [real(model, processor, [chat], 1) for chat in chats]
        return sum(loss for loss, _ in each) / len(each), sum(tokens for _, tokens in each)

    monkeypatch.setitem(globals(), "measure_loss", mean_over_rows)
    with pytest.raises(AssertionError):
        check_loss(*loaded[:2])


def test_answers_stand_beside_their_rows(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are answered sorted by length; a model that repeats the question's number shows any mix-up."""
    model, processor, config = loaded
    asked = []

    def repeat_number(model: Any, processor: Any, chats: Any, max_new_tokens: int) -> list[str]:
        asked.append(len(chats))
        return [chat[0]["content"][0]["text"].split()[1].strip("?") for chat in chats]

    monkeypatch.setattr(module, "generate_answers", repeat_number)
    scores = evaluate_model(model, processor, make_rows(), config)
    assert [row["prediction"] for row in scores.rows] == ["0", "1", "2", "3", "4"]
    assert [row["reference"] for row in scores.rows] == ANSWERS
    assert [row["question"].split()[1].strip("?") for row in scores.rows] == ["0", "1", "2", "3", "4"]
    assert asked == [2, 2, 1]


def test_exact_match_counts_rows_answered_exactly(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, config = loaded
    said = dict(zip(ANSWERS, ["7", ANSWERS[1], "No", "Monday", ""], strict=True))
    monkeypatch.setattr(
        module,
        "generate_answers",
        lambda model, processor, chats, limit: [said[chat[1]["content"][0]["text"]] for chat in chats],
    )
    scores = evaluate_model(model, processor, make_rows(), config)
    assert scores.exact_match == 2 / 5
    assert [row["right"] for row in scores.rows] == [True, True, False, False, False]


def test_evaluating_leaves_mode_and_weights_as_they_were_and_repeats(loaded: Any, tmp_path: Path) -> None:
    import torch

    model, processor, config = loaded
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate_model(model, processor, make_rows(), config, tmp_path / "scores.json")
    again = evaluate_model(model, processor, make_rows(), config)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (first.rows, first.loss, first.tokens) == (again.rows, again.loss, again.tokens)
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert Scores(**saved) == first
    assert first.loss == pytest.approx(measure_row_by_row(model.eval(), processor, make_rows())[0], abs=1e-5)


def test_rows_limits_what_is_answered(loaded: Any) -> None:
    model, processor, config = loaded
    scores = evaluate_model(model, processor, make_rows(), config.change({"evaluate.rows": 2}))
    assert [row["reference"] for row in scores.rows] == ANSWERS[:2]


def make_scores(right: list[bool], loss: float) -> Scores:
    rows = [
        {"question": f"q{i}", "reference": f"r{i}", "prediction": f"p{i}", "right": mark}
        for i, mark in enumerate(right)
    ]
    return Scores(sum(right) / len(right), loss, 10, 1.0, rows)


def test_comparison_gives_both_scores_and_the_change() -> None:
    table = compare_scores(make_scores([False] * 4, 2.5), make_scores([True, True, True, False], 0.5))
    assert table.loc["exact match, %"].tolist() == [0, 75, 75]
    assert table.loc["loss, nats a token"].tolist() == [2.5, 0.5, -2]
    assert table.loc["rows"].tolist() == [4, 4, 0]


def test_answers_are_shown_side_by_side() -> None:
    table = show_answers(make_scores([False, False], 2), make_scores([True, False], 1), 1)
    assert table.to_dict("records") == [
        {"question": "q0", "right answer": "r0", "before": "p0", "after": "p0", "right": "yes"}
    ]
