"""From rows to checked splits: nothing is lost without a word, and nothing stands on both sides."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_config, load_data
from forgekit.data.messages import get_text
from forgekit.errors import DataError
from tests.data.rows import make_pairs, questions, write_rows

pytestmark = pytest.mark.usefixtures("own_folder")


# ---- good rows -------------------------------------------------------------------------------------------------------


def test_every_row_arrives_as_messages_in_the_order_of_the_file(load: Any, capsys: pytest.CaptureFixture) -> None:
    write_rows(make_pairs(5))
    data = load()
    assert list(data) == ["train"]
    assert data["train"][0] == {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is 0 + 1?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
        ]
    }
    assert questions(data["train"]) == [row["prompt"] for row in make_pairs(5)]
    printed = capsys.readouterr().out
    assert (
        "Format: prompt_completion, as 5 of the first 5 rows have the columns prompt, completion. Another one: data.format,"
        in printed
    )
    assert "\n  1 user: What is 0 + 1?\n  1 assistant: 1\n  2 user: What is 1 + 1?\n" in printed
    assert "Rows: 5 train; 0 set aside.\n" in printed


def test_to_example_wins_over_the_format_and_reads_any_columns(load: Any, capsys: pytest.CaptureFixture) -> None:
    write_rows([{"q": "1?", "a": {"n": [1, None]}}, {"q": "2?", "a": "x", "more": 1}])
    data = load(
        lambda row: {
            "messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": str(row["a"])}]
        }
    )
    assert [get_text(row["messages"][1]) for row in data["train"]] == ["{'n': [1, None]}", "x"]
    assert "Format" not in capsys.readouterr().out


def test_the_same_rows_in_every_kind_of_file_give_the_same_examples(load: Any) -> None:
    from datasets import Dataset

    rows = make_pairs(6)
    write_rows(rows)
    Path("rows.json").write_text(json.dumps(rows))
    Path("rows.csv").write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    Dataset.from_list(rows).to_parquet("rows.parquet")
    kinds = [load(path=f"rows.{kind}", test=2) for kind in ("jsonl", "json", "csv", "parquet")]
    found = [{name: list(table) for name, table in data.items()} for data in kinds]
    assert found[0]["test"] and found.count(found[0]) == 4


@pytest.mark.parametrize("columns", [("json", "source"), ("source",), ("json",)])
def test_columns_of_the_users_own_called_json_or_source_stay_his(columns: tuple[str, ...], load: Any) -> None:
    from datasets import Dataset

    rows = [{**row, **dict.fromkeys(columns, f'{{"x": {n}}}')} for n, row in enumerate(make_pairs(4))]
    Dataset.from_list([*rows, {**rows[0], "completion": ""}]).to_parquet("rows.parquet")
    data = load(path="rows.parquet", max_bad=0.5, quarantine_file=Path("bad.jsonl"))
    assert questions(data["train"]) == [row["prompt"] for row in rows]
    assert json.loads(Path("bad.jsonl").read_text())["source"] == "train:5"


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_cut_by_content_and_every_row_stands_once(load: Any) -> None:
    write_rows(make_pairs(100))
    data = load(test=20, validation=0.1)
    assert {name: len(table) for name, table in data.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(sum(map(questions, data.values()), [])) == sorted(row["prompt"] for row in make_pairs(100))


def test_the_held_out_rows_do_not_depend_on_the_seed_the_order_or_the_training_limit(
    load: Any, small_tokenizer: Any
) -> None:
    write_rows(make_pairs(100))
    test = set(questions(load(test=20)["test"]))
    assert set(questions(load(test=20, train=10)["test"])) == test
    other = load_config(None, {"data.path": "rows.jsonl", "data.test": 20, "train.seed": 1})
    assert set(questions(load_data(other, small_tokenizer)["test"])) == test
    write_rows(make_pairs(100)[::-1])
    assert set(questions(load(test=20)["test"])) == test


def test_a_question_with_several_answers_never_stands_on_both_sides(load: Any) -> None:
    rows = [{"prompt": row["prompt"] + " " * n, "completion": f"{n}"} for row in make_pairs(30) for n in range(3)]
    write_rows(rows)
    data = load(test=10)
    sides = [{" ".join(question.split()) for question in questions(table)} for table in data.values()]
    assert not sides[0] & sides[1]
    assert len(data["test"]) == 12  # four questions, whole
    assert len(data["train"]) == 78


def test_prompts_that_a_given_split_shares_with_train_are_told(load: Any, capsys: pytest.CaptureFixture) -> None:
    write_rows(make_pairs(10))
    write_rows(make_pairs(10, first=7), "test.jsonl")
    load(test="test.jsonl")
    assert (
        "Note: 3 rows of the 10 in test ask what a row of train asks too (3 with the same answer), so the score on test flatters"
        in capsys.readouterr().out
    )
    write_rows(make_pairs(10, first=20), "test.jsonl")
    load(test="test.jsonl")
    assert "Note" not in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "rows"), [(5, 5), (1000, 20), (20, 20), (0.5, 10), (0.001, 1)])
def test_data_train_is_a_limit(limit: float, rows: int, load: Any) -> None:
    """At most so many rows; the first of them, in the file's order."""
    write_rows(make_pairs(20))
    assert questions(load(train=limit)["train"]) == [row["prompt"] for row in make_pairs(rows)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"test": 10},
            "data.test is 10: that is 10 of 10 rows. At least one row must be held out, and one left to learn from.",
        ),
        ({"test": 11}, "data.test is 11: that is 11 of 10 rows."),
        ({"validation": 0.01}, "data.validation is 0.01: that is 0 of 10 rows."),
        (
            {"test": 5, "validation": 5},
            "No row is left to learn from: 10 rows, all held out (data.test, data.validation).",
        ),
    ],
)
def test_sizes_that_cannot_be_had_are_refused(settings: dict[str, Any], message: str, load: Any) -> None:
    write_rows(make_pairs(10))
    with pytest.raises(DataError) as caught:
        load(**settings)
    assert str(caught.value).startswith(message)


# ---- many rows -------------------------------------------------------------------------------------------------------


def test_more_rows_than_one_batch_keep_their_places(load: Any) -> None:
    """Rows are checked 256 at a time; the places of bad ones beyond the first batch must not slip."""
    rows: list[Any] = make_pairs(600)
    for line in (1, 256, 257, 300, 513, 600):
        rows[line - 1] = {"prompt": f"bad {line}", "completion": ""}
    write_rows(rows)
    data = load(max_bad=0.1, quarantine_file=Path("quarantine.jsonl"))
    aside = [json.loads(line)["source"] for line in Path("quarantine.jsonl").read_text().splitlines()]
    assert aside == [f"rows.jsonl:{line}" for line in (1, 256, 257, 300, 513, 600)]
    assert len(data["train"]) == 594
    assert not [question for question in questions(data["train"]) if question.startswith("bad")]
