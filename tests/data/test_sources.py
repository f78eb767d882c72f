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
from PIL import Image

from forgekit import load_config, load_data
from forgekit.data import check, lines, rows
from forgekit.data.messages import get_text
from forgekit.errors import DataError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(small_tokenizer: Any) -> Any:
    """Returns a function: settings of the data section -> splits."""

    def load_rows(to_example: Any = None, rows: Any = None, folder: Path | None = None, **settings: Any) -> Any:
        config = load_config(None, {f"data.{name}": value for name, value in settings.items()})
        return load_data(config, small_tokenizer, to_example, folder and folder / "quarantine.jsonl", rows=rows)

    return load_rows


@pytest.fixture
def load_media(tiny_folder: Path) -> Any:
    """The same with a processor, for rows that hold pictures."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_folder)
    return lambda folder=None, **settings: load_data(
        load_config(None, {f"data.{name}": value for name, value in settings.items()}),
        processor,
        None,
        folder and folder / "quarantine.jsonl",
    )


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(first, first + count)]


def write(name: str, rows: list[Any]) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def questions(table: Any) -> list[str]:
    return [get_text(row["messages"][0]) for row in table]


def numbers(table: Any) -> list[int]:
    return [int(question.split()[2]) for question in questions(table)]


# ---- slices ----------------------------------------------------------------------------------------------------------


def test_slices_of_one_file_are_disjoint_when_they_say_so(load: Any) -> None:
    write("rows.jsonl", pairs(10))
    data = load(path="rows.jsonl", train="train[:80%]", test="train[80%:]")
    assert (numbers(data["train"]), numbers(data["test"])) == ([*range(8)], [8, 9])
    data = load(path="rows.jsonl", test="rows.jsonl[2:4]", validation="train[-1:]")
    assert (numbers(data["train"]), numbers(data["test"]), numbers(data["validation"])) == (
        [0, 1, 4, 5, 6, 7, 8],
        [2, 3],
        [9],
    )


def test_slices_count_the_rows_that_are_kept_and_round_as_datasets_does(load: Any) -> None:
    write("rows.jsonl", [{"prompt": "bad", "completion": ""}, *pairs(33)])
    data = load(path="rows.jsonl", train="train[:80%]", test="train[80%:]", max_bad=0.1)
    table = Dataset.from_list(pairs(33))
    expected = [table.train_test_split(7, shuffle=False)["train"][i]["prompt"] for i in range(26)]
    assert questions(data["train"]) == expected
    assert len(data["test"]) == 7


def test_slices_that_overlap_are_told(load: Any, capsys: pytest.CaptureFixture) -> None:
    write("rows.jsonl", pairs(10))
    load(path="rows.jsonl", train="train[:6]", test="train[5:8]")
    assert (
        "Note: 1 row of the 3 in test asks what a row of train asks too (1 with the same answer)"
        in capsys.readouterr().out
    )


def test_a_slice_without_rows_is_refused(load: Any) -> None:
    write("rows.jsonl", pairs(10))
    with pytest.raises(DataError, match=r"^data\.test: the slice \[50:60\] of 10 rows holds no row\.$"):
        load(path="rows.jsonl", test="train[50:60]")
    with pytest.raises(DataError, match=r"^data\.test: \[:200%\] is no slice of 10 rows: "):
        load(path="rows.jsonl", test="train[:200%]")


def test_the_held_out_rows_of_a_seed_are_these_on_every_machine(load: Any) -> None:
    write("rows.jsonl", pairs(40))
    data = load(path="rows.jsonl", test=5, validation=3)
    # the first eight of `printf '3407\\nuser: what is N + 1?' | sha256sum`, sorted
    assert (numbers(data["test"]), numbers(data["validation"])) == ([6, 15, 35, 36, 39], [5, 10, 32])


def test_same_prompt_with_another_answer_is_told_apart(load: Any, capsys: pytest.CaptureFixture) -> None:
    write("train.jsonl", pairs(10))
    write("test.jsonl", [*pairs(2), {"prompt": "what  is 5 + 1?", "completion": "six"}, *pairs(3, first=50)])
    load(path="train.jsonl", test="test.jsonl")
    printed = capsys.readouterr().out
    assert (
        "Note: 3 rows of the 6 in test ask what a row of train asks too (2 with the same answer), so the score"
        in printed
    )


def test_a_split_that_was_not_asked_for_says_how_to_have_it(load: Any) -> None:
    write("rows.jsonl", pairs(4))
    with pytest.raises(DataError) as caught:
        load(path="rows.jsonl")["test"]
    assert str(caught.value).startswith(
        "There are no 'test' rows (there are: train). Set data.test to a file, a number of rows"
    )


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_split_files(load: Any) -> None:
    write("set/train.jsonl", pairs(5))
    write("set/val.jsonl", pairs(2, first=10))
    write("set/test.jsonl", pairs(3, first=20))
    data = load(path="set", validation="validation", test="test")
    assert {name: len(table) for name, table in data.items()} == {"train": 5, "validation": 2, "test": 3}


def test_a_folder_that_datasets_saved(load: Any) -> None:
    Dataset.from_list(pairs(5)).save_to_disk("saved")
    assert numbers(load(path="saved")["train"]) == [*range(5)]


def draw(name: str, colour: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(name)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_of_pictures_with_a_metadata_file(kind: str, load_media: Any, capsys: pytest.CaptureFixture) -> None:
    for name in ("a.png", "deep/b.png", "forgotten.png"):
        draw(f"photos/{name}", "red")
    found = [
        {"file_name": "a.png", "text": "one"},
        {"file_name": "deep/b.png", "text": "two"},
        {"file_name": "c.png", "text": "lost"},
    ]
    if kind == "jsonl":
        write("photos/metadata.jsonl", found)
    else:
        Path("photos/metadata.csv").write_text(
            "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in found)
        )
    data = load_media(Path("."), path="photos", max_bad=0.5, instruction="Which number?")
    assert [[part["type"] for part in row["messages"][0]["content"]] for row in data["train"]] == [
        ["image", "text"]
    ] * 2
    assert get_text(data["train"][1]["messages"][0]) == "Which number?"
    [aside] = [json.loads(line) for line in Path("quarantine.jsonl").read_text().splitlines()]
    assert (aside["code"], aside["source"]) == ("missing_media", f"metadata.{kind}:{3 if kind == 'jsonl' else 4}")
    printed = capsys.readouterr().out
    assert (
        "Note: 1 media files in photos stand in no line of its metadata (first: forgotten.png); they are left out."
        in printed
    )
    assert "  1 user: [image] Which number?\n  1 assistant: one\n" in printed


def test_media_paths_start_beside_the_data_file(load_media: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw("project/photos/a.png", "red")
    write("project/rows.jsonl", [{"image": "photos/a.png", "question": "Which colour?", "answer": "red"}])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    [row] = load_media(path="../project/rows.jsonl")["train"]
    assert row["messages"][0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_saved_splits_name_places_and_media(load_media: Any) -> None:
    draw("a.png", "red")
    content = Path("a.png").read_bytes()
    write("rows.jsonl", [{"image": "a.png", "question": f"{n}?", "answer": "red"} for n in range(4)])
    data = load_media(Path("run"), path="rows.jsonl", test=1, save_splits=True)
    saved = {
        name: [json.loads(line) for line in Path(f"run/data/splits/{name}.jsonl").read_text().splitlines()]
        for name in data
    }
    assert {name: len(lines) for name, lines in saved.items()} == {"train": 3, "test": 1}
    assert sorted(line["source"] for lines in saved.values() for line in lines) == [
        f"rows.jsonl:{n}" for n in range(1, 5)
    ]
    assert saved["test"][0]["messages"][0]["content"][0]["image"].endswith("a.png")
    Dataset.from_list([{"image": {"bytes": content, "path": None}, "question": "1?", "answer": "red"}]).to_parquet(
        "rows.parquet"
    )
    load_media(Path("run2"), path="rows.parquet", save_splits=True)
    line = json.loads(Path("run2/data/splits/train.jsonl").read_text())
    assert line["source"] == "train:1"
    assert line["messages"][0]["content"][0]["image"].startswith("sha256:")
    assert line["messages"][0]["content"][1] == {"type": "text", "text": "1?"}


def test_saving_splits_needs_a_folder(load: Any) -> None:
    write("rows.jsonl", pairs(4))
    with pytest.raises(DataError, match=r"^data\.save_splits needs a place: "):
        load(path="rows.jsonl", save_splits=True)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_rows_in_memory_are_taken_as_they_are(load: Any) -> None:
    mixed = [{"prompt": "What is 0 + 1?", "completion": "1", "more": object()}, *pairs(3, first=1), "no row"]
    data = load(rows=mixed, max_bad=0.5, test=1)
    assert sorted(numbers(data["train"]) + numbers(data["test"])) == [0, 1, 2, 3]
    assert numbers(load(rows=Dataset.from_list(pairs(3)))["train"]) == [0, 1, 2]
    data = load(rows={"train": pairs(3), "test": pairs(2, first=5)})
    assert (numbers(data["train"]), numbers(data["test"])) == ([0, 1, 2], [5, 6])
    assert numbers(load(rows=pairs(10), test="train[8:]")["test"]) == [8, 9]


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (
            pairs(2),
            {"path": "rows.jsonl"},
            "rows are given in memory, and data.path is rows.jsonl. Leave out one of the two",
        ),
        ([], {}, "The list of train rows is empty."),
        ("rows.jsonl", {}, "rows should be a list of dicts or a Dataset, not str."),
        ({"test": pairs(2)}, {}, "There are no train rows: the rows given are for test."),
    ],
)
def test_rows_in_memory_that_cannot_be_meant_are_refused(given: Any, settings: dict, message: str, load: Any) -> None:
    with pytest.raises(DataError) as caught:
        load(rows=given, **settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("size", [0, 1 << 30])
def test_large_files_are_kept_on_disk_and_read_the_same(size: int, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "IN_MEMORY", size)
    write("rows.jsonl", pairs(600))
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
    write("rows.jsonl", [*pairs(2), {"prompt": "x" * 450, "completion": "y"}, *pairs(2, first=2)])
    data = load(path="rows.jsonl", max_bad=0.5, folder=Path("."))
    assert numbers(data["train"]) == [0, 1, 2, 3]
    aside = json.loads(Path("quarantine.jsonl").read_text())
    assert (aside["source"], aside["code"]) == ("rows.jsonl:3", "line_too_long")


def test_progress_is_counted_in_rows_and_share_of_the_file(
    load: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "SHOWN", 500)
    write("rows.jsonl", pairs(1200))
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
                yield pairs(1, first=number)[0]
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
