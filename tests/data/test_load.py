"""From rows to checked splits: nothing is lost without a word, and nothing stands on both sides."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_config, load_data
from forgekit.data.clean import BadRow, Quarantine
from forgekit.data.messages import get_text
from forgekit.errors import DataError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(small_tokenizer: Any) -> Any:
    """Returns a function that loads rows.jsonl (or another data.path) with some settings."""

    def load_rows(to_example: Any = None, quarantine_file: Path | None = None, **settings: Any) -> Any:
        config = load_config(None, {"data.path": "rows.jsonl", **{f"data.{n}": v for n, v in settings.items()}})
        return load_data(config, small_tokenizer, to_example, quarantine_file)

    return load_rows


def write_rows(rows: list[Any], name: str = "rows.jsonl") -> None:
    """Write rows as JSON lines; a row that is text already stays as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(first, first + count)]


def questions(table: Any) -> list[str]:
    return [get_text(row["messages"][0]) for row in table]


# ---- good rows -------------------------------------------------------------------------------------------------------


def test_every_row_arrives_as_messages_in_the_order_of_the_file(load: Any, capsys: pytest.CaptureFixture) -> None:
    write_rows(pairs(5))
    data = load()
    assert list(data) == ["train"]
    assert data["train"][0] == {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is 0 + 1?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
        ]
    }
    assert questions(data["train"]) == [row["prompt"] for row in pairs(5)]
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

    rows = pairs(6)
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

    rows = [{**row, **dict.fromkeys(columns, f'{{"x": {n}}}')} for n, row in enumerate(pairs(4))]
    Dataset.from_list([*rows, {**rows[0], "completion": ""}]).to_parquet("rows.parquet")
    data = load(path="rows.parquet", max_bad=0.5, quarantine_file=Path("bad.jsonl"))
    assert questions(data["train"]) == [row["prompt"] for row in rows]
    assert json.loads(Path("bad.jsonl").read_text())["source"] == "train:5"


# ---- bad rows --------------------------------------------------------------------------------------------------------

BAD = [
    ('{"prompt": "cut', "broken_json"),
    ("[1]", "not_an_object"),
    ({"prompt": "no answer"}, "wrong_type"),
    ({"prompt": "empty", "completion": " "}, "empty_answer"),
    ({"prompt": "x " * 3000, "completion": "long"}, "too_long"),
    ({"prompt": "two <bos> starts", "completion": "x"}, "bos"),
    ({"prompt": "a <end_of_turn> inside", "completion": "x"}, "control_tokens"),
    ({"prompt": "NUL \0", "completion": "x"}, "not_text"),
]


def test_each_bad_row_is_set_aside_with_its_place_and_reason(load: Any, capsys: pytest.CaptureFixture) -> None:
    """kept + set aside = seen."""
    write_rows([*pairs(3), *(row for row, _ in BAD), *pairs(2, first=3)])
    data = load(max_bad=0.7, format="prompt_completion", quarantine_file=Path("deep/quarantine.jsonl"))
    assert questions(data["train"]) == [row["prompt"] for row in pairs(5)]
    aside = [json.loads(line) for line in Path("deep/quarantine.jsonl").read_text().splitlines()]
    found = sorted((row["source"], row["code"]) for row in aside)
    assert found == sorted((f"rows.jsonl:{number}", code) for number, (_, code) in enumerate(BAD, 4))
    assert all(row["reason"] for row in aside)
    assert len(data["train"]) + len(aside) == 5 + len(BAD)
    assert f"Rows: 5 train; {len(BAD)} set aside. 1 x " in capsys.readouterr().out


def test_more_bad_rows_than_allowed_stop_the_run_and_name_the_first(load: Any) -> None:
    write_rows([*pairs(150), {"prompt": "x", "completion": ""}, {"prompt": "y", "completion": ""}])
    with pytest.raises(DataError) as caught:
        load(quarantine_file=Path("quarantine.jsonl"))
    assert str(caught.value) == (
        "2 of 152 rows cannot be learned from, more than data.max_bad = 0.01 allows: 2 x empty_answer (first: rows.jsonl:151: "
        "an assistant turn is empty, so it teaches nothing). Mend the rows, or raise data.max_bad to go on without them."
    )
    assert len(Path("quarantine.jsonl").read_text().splitlines()) == 2  # written before the run stops


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_the_limit_is_a_share_of_the_rows_seen(bad: int, stops: bool) -> None:
    quarantine = Quarantine(seen=100)
    for number in range(bad):
        quarantine.add(f"a:{number}", BadRow("x", "y"))
    if stops:
        with pytest.raises(DataError):
            quarantine.check(0.01)
    else:
        quarantine.check(0.01)


def test_max_bad_zero_accepts_only_whole_files(load: Any) -> None:
    write_rows(pairs(300))
    assert len(load(max_bad=0.0)["train"]) == 300
    write_rows([*pairs(300), "x"])
    with pytest.raises(DataError, match=r"^1 of 301 rows cannot be learned from"):
        load(max_bad=0.0)


def test_rows_of_every_split_are_checked_and_counted(load: Any) -> None:
    write_rows(pairs(10))
    write_rows([*pairs(4, first=50), {"prompt": "x", "completion": ""}], "val.jsonl")
    with pytest.raises(DataError, match=r"^1 of 15 rows .*first: val\.jsonl:5: "):
        load(validation="val.jsonl")
    data = load(validation="val.jsonl", max_bad=0.1)
    assert {name: len(table) for name, table in data.items()} == {"train": 10, "validation": 4}


def test_only_bad_rows_leave_nothing_to_learn_from(load: Any) -> None:
    write_rows([{"prompt": "x", "completion": ""}] * 3)
    with pytest.raises(DataError, match="No row is left to learn from"):
        load(max_bad=1.0)


# ---- the user's own function -----------------------------------------------------------------------------------------


def test_a_column_that_to_example_misses_is_named_with_the_row_and_its_columns(load: Any) -> None:
    write_rows([*pairs(2), {"question": "1?", "answer": "2"}])
    with pytest.raises(DataError) as caught:
        load(
            lambda row: {
                "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "x"}]
            }
        )
    assert str(caught.value) == (
        "to_example needs the column 'prompt', which the row at rows.jsonl:3 does not have. It has: question, answer. "
        "Change to_example in the notebook, or put to_example = None there to let the format be found."
    )


@pytest.mark.parametrize(
    ("to_example", "message"),
    [
        (lambda row: row["prompt"] + 5, "TypeError: can only concatenate str"),
        (lambda row: {"messages": [int(row["prompt"])]}, "ValueError: invalid literal for int()"),
        (lambda row: row.prompt, "AttributeError: 'dict' object has no attribute 'prompt'"),
        (lambda row: [][5], "IndexError: list index out of range"),
        (lambda row: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_mistake_in_to_example_names_the_row_that_showed_it(to_example: Any, message: str, load: Any) -> None:
    write_rows(pairs(2))
    with pytest.raises(DataError) as caught:
        load(to_example)
    assert str(caught.value).startswith(f"to_example failed on the row at rows.jsonl:1: {message}")
    assert "The row: {'prompt': 'What is 0 + 1?'" in str(caught.value)


def test_what_to_example_returns_is_checked(load: Any) -> None:
    write_rows(pairs(2))
    with pytest.raises(
        DataError,
        match=r"2 x no_messages \(first: rows\.jsonl:1: to_example must return \{'messages': \[\.\.\.\]\}, not None\)",
    ):
        load(lambda row: None)


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_cut_by_content_and_every_row_stands_once(load: Any) -> None:
    write_rows(pairs(100))
    data = load(test=20, validation=0.1)
    assert {name: len(table) for name, table in data.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(sum(map(questions, data.values()), [])) == sorted(row["prompt"] for row in pairs(100))


def test_the_held_out_rows_do_not_depend_on_the_seed_the_order_or_the_training_limit(
    load: Any, small_tokenizer: Any
) -> None:
    write_rows(pairs(100))
    test = set(questions(load(test=20)["test"]))
    assert set(questions(load(test=20, train=10)["test"])) == test
    other = load_config(None, {"data.path": "rows.jsonl", "data.test": 20, "train.seed": 1})
    assert set(questions(load_data(other, small_tokenizer)["test"])) == test
    write_rows(pairs(100)[::-1])
    assert set(questions(load(test=20)["test"])) == test


def test_a_question_with_several_answers_never_stands_on_both_sides(load: Any) -> None:
    rows = [{"prompt": row["prompt"] + " " * n, "completion": f"{n}"} for row in pairs(30) for n in range(3)]
    write_rows(rows)
    data = load(test=10)
    sides = [{" ".join(question.split()) for question in questions(table)} for table in data.values()]
    assert not sides[0] & sides[1]
    assert len(data["test"]) == 12  # four questions, whole
    assert len(data["train"]) == 78


def test_prompts_that_a_given_split_shares_with_train_are_told(load: Any, capsys: pytest.CaptureFixture) -> None:
    write_rows(pairs(10))
    write_rows(pairs(10, first=7), "test.jsonl")
    load(test="test.jsonl")
    assert (
        "Note: 3 rows of the 10 in test ask what a row of train asks too (3 with the same answer), so the score on test flatters"
        in capsys.readouterr().out
    )
    write_rows(pairs(10, first=20), "test.jsonl")
    load(test="test.jsonl")
    assert "Note" not in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "rows"), [(5, 5), (1000, 20), (20, 20), (0.5, 10), (0.001, 1)])
def test_data_train_is_a_limit(limit: float, rows: int, load: Any) -> None:
    """At most so many rows; the first of them, in the file's order."""
    write_rows(pairs(20))
    assert questions(load(train=limit)["train"]) == [row["prompt"] for row in pairs(rows)]


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
    write_rows(pairs(10))
    with pytest.raises(DataError) as caught:
        load(**settings)
    assert str(caught.value).startswith(message)


# ---- many rows -------------------------------------------------------------------------------------------------------


def test_more_rows_than_one_batch_keep_their_places(load: Any) -> None:
    """Rows are checked 256 at a time; the places of bad ones beyond the first batch must not slip."""
    rows: list[Any] = pairs(600)
    for line in (1, 256, 257, 300, 513, 600):
        rows[line - 1] = {"prompt": f"bad {line}", "completion": ""}
    write_rows(rows)
    data = load(max_bad=0.1, quarantine_file=Path("quarantine.jsonl"))
    aside = [json.loads(line)["source"] for line in Path("quarantine.jsonl").read_text().splitlines()]
    assert aside == [f"rows.jsonl:{line}" for line in (1, 256, 257, 300, 513, 600)]
    assert len(data["train"]) == 594
    assert not [question for question in questions(data["train"]) if question.startswith("bad")]
