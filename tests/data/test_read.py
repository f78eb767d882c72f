"""Which file or data set each split is read from, and what is said when there is none."""

from pathlib import Path
from typing import Any

import pytest

from forgekit.config import load_config
from forgekit.data.read import find_source, is_file_name
from forgekit.errors import DataError
from tests.data.rows import LINES, write_file

pytestmark = pytest.mark.usefixtures("own_folder")


def split(settings: dict[str, Any], name: str = "train", recipe: Path | None = None) -> Any:
    source = find_source(load_config(recipe, settings), name)
    return source and list(source.open())


def test_a_file_is_looked_for_here_beside_the_recipe_and_beside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("project/params", "project/notebooks"):
        Path(folder).mkdir(parents=True)
    recipe = write_file("project/params/text.yaml", "train: {seed: 1}").absolute()
    write_file("project/rows.jsonl", LINES[0])
    monkeypatch.chdir("project/notebooks")
    assert len(split({"data.path": "rows.jsonl"}, recipe=recipe)) == 1
    write_file("rows.jsonl", "\n".join(LINES))
    assert len(split({"data.path": "rows.jsonl"}, recipe=recipe)) == 2  # the current folder comes first


def test_a_missing_file_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        split({"data.path": "rows.jsonl"})
    assert str(caught.value) == f"data.path: rows.jsonl does not exist (looked in {tmp_path})."
    write_file("train.jsonl", LINES[0])
    with pytest.raises(DataError, match=r"^data\.test: test\.jsonl does not exist"):
        split({"data.path": "train.jsonl", "data.test": "test.jsonl"}, "test")


def test_a_folder_is_no_file() -> None:
    Path("rows").mkdir()
    with pytest.raises(DataError) as caught:
        split({"data.path": "rows"})
    assert str(caught.value) == (
        "data.path: rows is a folder without metadata.jsonl or metadata.csv, and holds no train file (train.jsonl, train.json, "
        "train.csv, train.tsv, train.parquet, train.arrow). Name one file, or write such a file into it."
    )


def test_no_path_at_all_is_refused_with_an_example() -> None:
    with pytest.raises(
        DataError,
        match=r"^data\.path is not set: name a file, a Hub id or a built-in task, for instance sample:orders, or give load_data",
    ):
        split({})


def test_splits_may_be_files_of_their_own() -> None:
    for name in ("train", "val", "test"):
        write_file(f"{name}.jsonl", "\n".join(LINES))
    settings = {"data.train": "train.jsonl", "data.validation": "val.jsonl", "data.test": "test.jsonl"}
    assert [len(split(settings, name)) for name in ("train", "validation", "test")] == [2, 2, 2]


def test_a_number_of_rows_is_cut_from_the_training_rows_later() -> None:
    assert split({"data.path": "sample:orders", "data.test": 10}, "test") is None


@pytest.mark.parametrize("path", ["sample:orders", "rows.jsonl"])
def test_a_split_by_name_needs_a_hub_data_set(path: str) -> None:
    write_file("rows.jsonl", LINES[0])
    with pytest.raises(
        DataError,
        match=f"data.test: 'validation' is neither a file .* nor a slice .* nor, as {path} is no Hub data set, a split",
    ):
        split({"data.path": path, "data.test": "validation"}, "test")


def test_a_built_in_task_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(DataError) as caught:
        split({"data.path": "sample:order"})
    message = str(caught.value)
    assert message.startswith("data.path: there is no built-in task 'order'. There are: sample:orders, sample:digits, ")


def test_a_data_set_of_the_hub_that_cannot_be_had_is_one_sentence() -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(DataError) as caught:
        split({"data.path": "nobody/no-such-rows"})
    message = str(caught.value)
    assert message.startswith("data.path: nobody/no-such-rows (train) cannot be loaded from the Hub: ")
    assert message.endswith(". If it is a file, check its name and folder.")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("path", "answer"), [("a.jsonl", True), ("A.CSV", True), ("there", True), ("org/name", False), ("train", False)]
)
def test_a_name_is_a_file_by_its_ending_or_because_it_is_there(path: str, answer: bool) -> None:
    write_file("there", "x")
    assert is_file_name(path) == answer
