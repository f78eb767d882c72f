"""Files are whole or not there, whatever fails while they are written."""

import json
import os
import stat
from pathlib import Path

import pytest

from forgekit.errors import RunError
from forgekit.files import read_json, write_json, write_text


@pytest.mark.parametrize("step", ["os.fsync", "os.chmod", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_rest(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.json"
    write_json(file, {"step": 1})

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"step": 2})
    monkeypatch.undo()
    assert read_json(file) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "old")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]


def test_a_reader_meets_only_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment before the rename the old content stands under the name, and the new one is complete beside it."""
    file = tmp_path / "status.json"
    write_json(file, {"step": 1})
    replace, seen = os.replace, []

    def look(source: str, target: Path) -> None:
        seen.append((read_json(target), read_json(Path(source))))
        replace(source, target)

    monkeypatch.setattr("os.replace", look)
    write_json(file, {"step": 2})
    assert seen == [({"step": 1}, {"step": 2})]
    assert read_json(file) == {"step": 2}


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    write_json(
        tmp_path / "a.json", {"loss": float("nan"), "rows": [float("inf"), (1.5, -float("inf"))], "path": tmp_path}
    )
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    wanted = {"loss": None, "rows": [None, [1.5, None]], "path": str(tmp_path)}
    assert json.loads(text, parse_constant=pytest.fail) == wanted


@pytest.mark.parametrize("content", [b'{"state": ', b"", b"\xff", None])
def test_a_broken_file_of_a_run_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json cannot be read: "):
        read_json(file)
