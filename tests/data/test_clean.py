"""Bad rows are set aside with place and reason, too many stop a run, and a mistake of the user's own function is his to see."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit.data.clean import BadRow, Quarantine
from forgekit.errors import DataError
from tests.data.rows import make_pairs, questions, write_rows

pytestmark = pytest.mark.usefixtures("own_folder")


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
    write_rows([*make_pairs(3), *(row for row, _ in BAD), *make_pairs(2, first=3)])
    data = load(max_bad=0.7, format="prompt_completion", quarantine_file=Path("deep/quarantine.jsonl"))
    assert questions(data["train"]) == [row["prompt"] for row in make_pairs(5)]
    aside = [json.loads(line) for line in Path("deep/quarantine.jsonl").read_text().splitlines()]
    found = sorted((row["source"], row["code"]) for row in aside)
    assert found == sorted((f"rows.jsonl:{number}", code) for number, (_, code) in enumerate(BAD, 4))
    assert all(row["reason"] for row in aside)
    assert len(data["train"]) + len(aside) == 5 + len(BAD)
    assert f"Rows: 5 train; {len(BAD)} set aside. 1 x " in capsys.readouterr().out


def test_more_bad_rows_than_allowed_stop_the_run_and_name_the_first(load: Any) -> None:
    write_rows([*make_pairs(150), {"prompt": "x", "completion": ""}, {"prompt": "y", "completion": ""}])
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
    write_rows(make_pairs(300))
    assert len(load(max_bad=0.0)["train"]) == 300
    write_rows([*make_pairs(300), "x"])
    with pytest.raises(DataError, match=r"^1 of 301 rows cannot be learned from"):
        load(max_bad=0.0)


def test_rows_of_every_split_are_checked_and_counted(load: Any) -> None:
    write_rows(make_pairs(10))
    write_rows([*make_pairs(4, first=50), {"prompt": "x", "completion": ""}], "val.jsonl")
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
    write_rows([*make_pairs(2), {"question": "1?", "answer": "2"}])
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
    write_rows(make_pairs(2))
    with pytest.raises(DataError) as caught:
        load(to_example)
    assert str(caught.value).startswith(f"to_example failed on the row at rows.jsonl:1: {message}")
    assert "The row: {'prompt': 'What is 0 + 1?'" in str(caught.value)


def test_what_to_example_returns_is_checked(load: Any) -> None:
    write_rows(make_pairs(2))
    with pytest.raises(
        DataError,
        match=r"2 x no_messages \(first: rows\.jsonl:1: to_example must return \{'messages': \[\.\.\.\]\}, not None\)",
    ):
        load(lambda row: None)
