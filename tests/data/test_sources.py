"""Where rows may come from beside one file: folders, slices, streams, lists in memory; and what is said about overlaps."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from forgekit.data import check, lines, rows
from forgekit.errors import DataError
from tests.data.rows import make_pairs, numbers, questions, write_rows

pytestmark = pytest.mark.usefixtures("own_folder")


# ---- slices ----------------------------------------------------------------------------------------------------------


def test_slices_of_one_file_are_disjoint_when_they_say_so(load: Any) -> None:
    write_rows(make_pairs(10))
    data = load(path="rows.jsonl", train="train[:80%]", test="train[80%:]")
    assert (numbers(data["train"]), numbers(data["test"])) == ([*range(8)], [8, 9])
    data = load(path="rows.jsonl", test="rows.jsonl[2:4]", validation="train[-1:]")
    assert (numbers(data["train"]), numbers(data["test"]), numbers(data["validation"])) == (
        [0, 1, 4, 5, 6, 7, 8],
        [2, 3],
        [9],
    )


def test_slices_count_the_rows_that_are_kept_and_round_as_datasets_does(load: Any) -> None:
    write_rows([{"prompt": "bad", "completion": ""}, *make_pairs(33)])
    data = load(path="rows.jsonl", train="train[:80%]", test="train[80%:]", max_bad=0.1)
    table = Dataset.from_list(make_pairs(33))
    expected = [table.train_test_split(7, shuffle=False)["train"][i]["prompt"] for i in range(26)]
    assert questions(data["train"]) == expected
    assert len(data["test"]) == 7


def test_slices_that_overlap_are_told(load: Any, capsys: pytest.CaptureFixture) -> None:
    write_rows(make_pairs(10))
    load(path="rows.jsonl", train="train[:6]", test="train[5:8]")
    assert (
        "Note: 1 row of the 3 in test asks what a row of train asks too (1 with the same answer)"
        in capsys.readouterr().out
    )


def test_a_slice_without_rows_is_refused(load: Any) -> None:
    write_rows(make_pairs(10))
    with pytest.raises(DataError, match=r"^data\.test: the slice \[50:60\] of 10 rows holds no row\.$"):
        load(path="rows.jsonl", test="train[50:60]")
    with pytest.raises(DataError, match=r"^data\.test: \[:200%\] is no slice of 10 rows: "):
        load(path="rows.jsonl", test="train[:200%]")


def test_the_held_out_rows_of_a_seed_are_these_on_every_machine(load: Any) -> None:
    write_rows(make_pairs(40))
    data = load(path="rows.jsonl", test=5, validation=3)
    # the first eight of `printf '3407\\nuser: what is N + 1?' | sha256sum`, sorted
    assert (numbers(data["test"]), numbers(data["validation"])) == ([6, 15, 35, 36, 39], [5, 10, 32])


def test_same_prompt_with_another_answer_is_told_apart(load: Any, capsys: pytest.CaptureFixture) -> None:
    write_rows(make_pairs(10), "train.jsonl")
    write_rows(
        [*make_pairs(2), {"prompt": "what  is 5 + 1?", "completion": "six"}, *make_pairs(3, first=50)], "test.jsonl"
    )
    load(path="train.jsonl", test="test.jsonl")
    printed = capsys.readouterr().out
    assert (
        "Note: 3 rows of the 6 in test ask what a row of train asks too (2 with the same answer), so the score"
        in printed
    )


def test_a_split_that_was_not_asked_for_says_how_to_have_it(load: Any) -> None:
    write_rows(make_pairs(4))
    with pytest.raises(DataError) as caught:
        load(path="rows.jsonl")["test"]
    assert str(caught.value).startswith(
        "There are no 'test' rows (there are: train). Set data.test to a file, a number of rows"
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_rows_in_memory_are_taken_as_they_are(load: Any) -> None:
    mixed = [{"prompt": "What is 0 + 1?", "completion": "1", "more": object()}, *make_pairs(3, first=1), "no row"]
    data = load(rows=mixed, max_bad=0.5, test=1)
    assert sorted(numbers(data["train"]) + numbers(data["test"])) == [0, 1, 2, 3]
    assert numbers(load(rows=Dataset.from_list(make_pairs(3)))["train"]) == [0, 1, 2]
    data = load(rows={"train": make_pairs(3), "test": make_pairs(2, first=5)})
    assert (numbers(data["train"]), numbers(data["test"])) == ([0, 1, 2], [5, 6])
    assert numbers(load(rows=make_pairs(10), test="train[8:]")["test"]) == [8, 9]


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (
            make_pairs(2),
            {"path": "rows.jsonl"},
            "rows are given in memory, and data.path is rows.jsonl. Leave out one of the two",
        ),
        ([], {}, "The list of train rows is empty."),
        ("rows.jsonl", {}, "rows should be a list of dicts or a Dataset, not str."),
        ({"test": make_pairs(2)}, {}, "There are no train rows: the rows given are for test."),
    ],
)
def test_rows_in_memory_that_cannot_be_meant_are_refused(given: Any, settings: dict, message: str, load: Any) -> None:
    with pytest.raises(DataError) as caught:
        load(rows=given, **settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("size", [0, 1 << 30])
def test_large_files_are_kept_on_disk_and_read_the_same(size: int, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "IN_MEMORY", size)
    write_rows(make_pairs(600))
    data = load(path="rows.jsonl", test=10)
    assert sorted(numbers(data["train"]) + numbers(data["test"])) == [*range(600)]
    assert bool(data["train"].cache_files) == (size == 0)


def test_what_a_killed_process_left_on_disk_is_removed(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", own_folder)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    left = [
        own_folder / f"forgekit-{host}-{owner}-abc"
        for host in (platform.node(), "other")
        for owner in (dead, os.getpid())
    ]
    for folder in left:
        folder.mkdir()
    made = rows.make_scratch()
    assert [folder.exists() for folder in left] == [False, True, True, True]
    assert made.is_dir()


def test_a_line_that_would_fill_the_memory_is_passed_over(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST", 100)
    write_rows([*make_pairs(2), {"prompt": "x" * 450, "completion": "y"}, *make_pairs(2, first=2)])
    data = load(path="rows.jsonl", max_bad=0.5, quarantine_file=Path("quarantine.jsonl"))
    assert numbers(data["train"]) == [0, 1, 2, 3]
    aside = json.loads(Path("quarantine.jsonl").read_text())
    assert (aside["source"], aside["code"]) == ("rows.jsonl:3", "line_too_long")


def test_progress_is_counted_in_rows_and_share_of_the_file(
    load: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "SHOWN", 500)
    write_rows(make_pairs(1200))
    load(path="rows.jsonl")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Checking")]
    assert [line.split(",")[0] for line in printed] == ["Checking train: 512 rows", "Checking train: 1024 rows"]
    assert printed[0].endswith("% of rows.jsonl")


# ---- separators ------------------------------------------------------------------------------------------------------


def test_semicolons_are_found_and_said(load: Any, capsys: pytest.CaptureFixture) -> None:
    Path("rows.csv").write_text('prompt;completion\n"What is 0 + 1, please?";1\nWhat is 1 + 1?;"2, I think"\n')
    data = load(path="rows.csv")
    assert numbers(data["train"]) == [0, 1]
    assert "rows.csv: the columns are separated by ';', as its header line shows.\n" in capsys.readouterr().out


# ---- streams ---------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for datasets.load_dataset: endless rows, and a count of those that were drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, path: str, split: str, streaming: bool) -> IterableDataset:
        assert (path, streaming) == ("someone/rows", True)

        def draw() -> Any:
            number = 0 if split == "train" else 10**6
            while True:
                self.drawn += 1
                yield make_pairs(1, first=number)[0]
                number += 1

        return IterableDataset.from_generator(draw)


def test_a_stream_is_read_as_far_as_it_is_asked_for(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("datasets.load_dataset", hub)
    data = load(path="someone/rows", streaming=True, train=30, test=10, validation="validation[5:10]")
    assert sorted(numbers(data["train"]) + numbers(data["test"])) == [*range(40)]
    assert numbers(data["validation"]) == [*range(10**6 + 5, 10**6 + 10)]
    assert hub.drawn < 100


@pytest.mark.parametrize("settings", [{}, {"train": 0.5}, {"train": 10, "test": 0.1}, {"train": "train[:10%]"}])
def test_a_stream_without_a_number_of_rows_is_refused(settings: dict[str, Any], load: Any) -> None:
    with pytest.raises(
        DataError, match=r"^data\.streaming reads the first rows alone, so their number must be known: set "
    ):
        load(path="someone/rows", streaming=True, **settings)
