"""Scores: a loss that is transformers' own, answers in the order of the rows, and figures that add up."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from forgekit import Scores, evaluate_model, load_config, load_data, load_model, show_answers
from forgekit.data.collate import IGNORE, Collator
from forgekit.data.messages import check_example, get_answer, make_message
from forgekit.errors import DataError, RunError
from forgekit.evaluate import answers, loss
from forgekit.evaluate.loss import measure_loss
from forgekit.evaluate.scores import read_scores

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
    config = make_config({"evaluate.rows": "none", "evaluate.per_device_eval_batch_size": 2})
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

    monkeypatch.setattr(loss, "Collator", Shifted)
    with pytest.raises(AssertionError):
        check_loss(*loaded[:2])


def test_a_mean_over_rows_turns_that_check_red(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loss.measure_loss

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

    monkeypatch.setattr(answers, "generate_answers", repeat_number)
    scores = evaluate_model(model, processor, make_rows(), config)
    assert [row["prediction"] for row in scores.rows] == ["0", "1", "2", "3", "4"]
    assert [row["reference"] for row in scores.rows] == ANSWERS
    assert [row["question"].split()[1].strip("?") for row in scores.rows] == ["0", "1", "2", "3", "4"]
    assert asked == [2, 2, 1]


def test_exact_match_counts_rows_answered_exactly(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, config = loaded
    said = dict(zip(ANSWERS, ["7", ANSWERS[1], "No", "Monday", ""], strict=True))
    monkeypatch.setattr(
        answers,
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
    assert (first.loss, first.tokens, first.metrics, first.key) == (again.loss, again.tokens, again.metrics, again.key)
    assert [leave_time_out(row) for row in first.rows] == [leave_time_out(row) for row in again.rows]
    assert (
        Scores(**json.loads((tmp_path / "scores.json").read_text())) == first == read_scores(tmp_path / "scores.json")
    )
    assert first.loss == pytest.approx(measure_row_by_row(model.eval(), processor, make_rows())[0], abs=1e-5)


def test_rows_limits_what_is_answered(loaded: Any) -> None:
    model, processor, config = loaded
    scores = evaluate_model(model, processor, make_rows(), config.change({"evaluate.rows": 2}))
    assert [row["reference"] for row in scores.rows] == ANSWERS[:2]


def leave_time_out(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def test_each_row_says_how_it_was_scored(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, config = loaded
    said = dict(zip(ANSWERS, ["7", ANSWERS[1].replace(" ", ""), "no.", "Monday", ""], strict=True))
    monkeypatch.setattr(
        answers, "generate_answers", lambda model, processor, chats, limit: [said[get_answer(chat)] for chat in chats]
    )
    config = config.change({"evaluate.metric": ["json_equal", "normalized_match", "perplexity"]})
    scores = evaluate_model(model, processor, make_rows(), config)
    assert list(scores.metrics) == ["json_equal", "normalized_match", "perplexity", "exact_match", "loss"]
    assert (scores.metric, scores.score, scores.exact_match) == ("json_equal", 2 / 5, 1 / 5)
    assert [row["score"] for row in scores.rows] == [1, 1, 0, 0, 0]
    assert [row["right"] for row in scores.rows] == [True, True, False, False, False]
    assert [row["scores"]["normalized_match"] for row in scores.rows] == [1, 0, 1, 0, 0]  # words run together
    for row in scores.rows:
        assert row["media"] is None and row["seconds"] >= 0 and row["tokens"] >= 2
    assert math.fsum(row["loss"] * row["tokens"] for row in scores.rows) / scores.tokens == pytest.approx(scores.loss)
    assert (
        scores.metrics["perplexity"]["score"]
        == pytest.approx(math.exp(scores.loss))
        == pytest.approx(scores.perplexity)
    )
    for values in scores.metrics.values():
        assert values["low"] <= values["score"] <= values["high"]
    assert "JSON equal, % 40.0 (0.0 to 80.0)" in " ".join(repr(scores).split()) and "JSON equal" in scores._repr_html_()


def test_loss_alone_needs_no_answers(loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, processor, config = loaded
    monkeypatch.setattr(answers, "generate_answers", lambda *args: pytest.fail("answers were asked for"))
    config = config.change({"evaluate.metric": "perplexity"})
    scores = evaluate_model(model, processor, make_rows(), config, tmp_path / "scores.json")
    assert list(scores.metrics) == ["perplexity", "loss"] and math.isnan(scores.exact_match)
    assert math.isnan(read_scores(tmp_path / "scores.json").exact_match)


def test_the_most_probable_choice_is_the_one_of_the_lowest_loss(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likelihood of each choice is transformers' own loss of a chat that ends with it."""
    from datasets import Dataset

    model, processor, config = loaded
    monkeypatch.setattr(answers, "generate_answers", lambda *args: pytest.fail("answers were asked for"))
    table = [
        {**row, "choices": [row["messages"][-1]["content"][0]["text"], "maybe", "5 of them"]} for row in make_rows()
    ]
    scores = evaluate_model(model, processor, Dataset.from_list(table), config.change({"evaluate.metric": "choice"}))
    for row, example in zip(scores.rows, table, strict=True):
        expected = []
        for choice in example["choices"]:
            other = {"messages": [example["messages"][0], make_message("assistant", choice)]}
            loss, tokens = measure_row_by_row(model, processor, [other])
            expected.append(-loss * tokens)
        assert row["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
        best = example["choices"][expected.index(max(expected))]
        assert row["choice"] == row["prediction"] == best
        assert row["right"] is (best == row["reference"]) and row["score"] == float(best == row["reference"])
    assert len({row["choice"] for row in scores.rows}) > 1  # one choice for all would hide a mix-up
    named = config.change({"evaluate.metric": "choice", "evaluate.choices": ["maybe", *ANSWERS]})
    assert evaluate_model(model, processor, make_rows(), named).rows[0]["log_likelihoods"][0] < 0


def test_choices_that_to_example_returns_come_with_the_row(small_tokenizer: Any) -> None:
    config = load_config(None, {"model.load_in": "16bit", "data.test": 2})
    rows = [{"q": f"Which, {i}?", "options": [f"{i}", "none"]} for i in range(5)]

    def to_example(row: Any) -> Any:
        chat = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["options"][0]}]
        return {"messages": chat, "choices": row["options"]}

    data = load_data(config, small_tokenizer, to_example, rows=rows)
    assert [example["choices"] for example in data["train"]] == [
        [get_answer(e["messages"]), "none"] for e in data["train"]
    ]
    asked = answers.ask_rows(small_tokenizer, data["test"], config.change({"evaluate.metric": "choice"}))
    assert [row.choices for row in asked] == [(row.facts["reference"], "none") for row in asked]


def test_a_right_answer_that_cannot_be_chosen_is_refused(loaded: Any) -> None:
    model, processor, config = loaded
    config = config.change({"evaluate.metric": "choice", "evaluate.choices": ["yes", "no"]})
    with pytest.raises(DataError, match=r"the right answer of row 1, '7', is none of its choices \['yes', 'no'\]"):
        evaluate_model(model, processor, make_rows(), config)


def test_no_rows_are_refused(loaded: Any) -> None:
    model, processor, config = loaded
    with pytest.raises(DataError, match="no rows to score"):
        evaluate_model(model, processor, make_rows().select([]), config)


def test_a_large_batch_is_cut_so_that_its_logits_fit(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, _ = loaded
    chats = [row["messages"] for row in make_rows()]
    expected = loss.measure_rows(model, processor, chats)
    sizes = []

    def count(model: Any, batch: Any) -> Any:
        sizes.append(len(batch["labels"]))
        return loss.sum_losses(model, batch)

    monkeypatch.setattr(loss, "MOST_LOGITS", model.config.get_text_config().vocab_size * 60)
    monkeypatch.setattr(loss, "PART_LOGITS", model.config.get_text_config().vocab_size * 7)  # and its loss in parts
    found = loss.measure_rows(model, processor, chats, count)
    assert max(sizes) < 5 == sum(sizes)
    assert [n for _, n in found] == [n for _, n in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"rows": []}')
    with pytest.raises(RunError, match="holds no scores"):
        read_scores(tmp_path / "scores.json")


def make_scores(right: list[bool], loss: float) -> Scores:
    rows = [
        {"question": f"q{i}", "reference": f"r{i}", "prediction": f"p{i}", "right": mark}
        for i, mark in enumerate(right)
    ]
    return Scores(sum(right) / len(right), loss, 10, 1.0, rows)


def test_answers_are_shown_side_by_side() -> None:
    table = show_answers(make_scores([False, False], 2), make_scores([True, False], 1), 1)
    assert table.to_dict("records") == [
        {"question": "q0", "right answer": "r0", "before": "p0", "after": "p0", "right": "yes"}
    ]
