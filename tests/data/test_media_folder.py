"""Folders of rows and of media: split files, saved sets, pictures with a metadata file, and splits saved with their media."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image

from forgekit.data.messages import get_text
from forgekit.errors import DataError
from tests.data.rows import make_pairs, numbers, write_rows

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_folder_of_split_files(load: Any) -> None:
    write_rows(make_pairs(5), "set/train.jsonl")
    write_rows(make_pairs(2, first=10), "set/val.jsonl")
    write_rows(make_pairs(3, first=20), "set/test.jsonl")
    data = load(path="set", validation="validation", test="test")
    assert {name: len(table) for name, table in data.items()} == {"train": 5, "validation": 2, "test": 3}


def test_a_folder_that_datasets_saved(load: Any) -> None:
    Dataset.from_list(make_pairs(5)).save_to_disk("saved")
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
        write_rows(found, "photos/metadata.jsonl")
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
    write_rows([{"image": "photos/a.png", "question": "Which colour?", "answer": "red"}], "project/rows.jsonl")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    [row] = load_media(path="../project/rows.jsonl")["train"]
    assert row["messages"][0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_saved_splits_name_places_and_media(load_media: Any) -> None:
    draw("a.png", "red")
    content = Path("a.png").read_bytes()
    write_rows([{"image": "a.png", "question": f"{n}?", "answer": "red"} for n in range(4)])
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
    write_rows(make_pairs(4))
    with pytest.raises(DataError, match=r"^data\.save_splits needs a place: "):
        load(path="rows.jsonl", save_splits=True)
