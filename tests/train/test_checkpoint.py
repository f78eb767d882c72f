"""A checkpoint folder is complete or absent, whatever happens, and one that has changed is never taken."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit.errors import RunError
from forgekit.files import read_json
from forgekit.train import checkpoint
from forgekit.train.checkpoint import NEEDED, find_newest, list_checkpoints, rotate, verify_checkpoint, write_whole

FILES = {"adapter_model.safetensors": b"weights" * 100, **{name: name.encode() * 50 for name in NEEDED}}


def write_files(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "inner").mkdir()
    (folder / "inner" / "more.json").write_text("{}")


def make_checkpoints(folder: Path, *steps: int) -> list[Path]:
    paths = [folder / f"checkpoint-{step}" for step in steps]
    for path in paths:
        write_whole(path, write_files, {"step": 1})
    return paths


def test_a_checkpoint_lists_every_file_and_verifies(tmp_path: Path) -> None:
    (path,) = make_checkpoints(tmp_path, 3)
    listed = {file["name"]: file["size"] for file in read_json(path / "manifest.json")["files"]}
    assert listed == {name: len(content) for name, content in FILES.items()} | {"inner/more.json": 2}
    assert verify_checkpoint(path) is None and [child.name for child in tmp_path.iterdir()] == ["checkpoint-3"]


def flip(path: Path) -> None:
    content = bytearray((path / "optimizer.pt").read_bytes())
    content[7] ^= 1
    (path / "optimizer.pt").write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit": (flip, "optimizer.pt has changed since it was written"),
    "half a file": (lambda path: os.truncate(path / "adapter_model.safetensors", 9), "adapter_model.safetensors has 9 bytes"),
    "no schedule": (lambda path: (path / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest that can be read"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 99), "has no manifest that can be read"),
    "a stranger": (lambda path: (path / "pytorch_model.bin").write_bytes(b"pickle"), "does not list pytorch_model.bin"),
}  # fmt: skip


def check_walk_back(folder: Path, damage: Callable[[Path], Any], reason: str) -> None:
    """The newest checkpoint is damaged: the one before is taken, with a message; when that is damaged too, none is."""
    older, newer = make_checkpoints(folder, 2, 10)
    assert find_newest(folder) == newer
    damage(newer)
    said: list[str] = []
    assert find_newest(folder, said.append) == older, "a damaged checkpoint was taken"
    assert len(said) == 1 and "checkpoint-10 is not whole and is passed over" in said[0] and reason in said[0]
    damage(older)
    with pytest.raises(RunError, match="No checkpoint in .* is whole"):
        find_newest(folder)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str) -> None:
    check_walk_back(tmp_path, *DAMAGES[name])


@pytest.mark.parametrize("name", ["one bit", "no schedule"])
def test_without_the_manifest_check_a_damaged_checkpoint_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(checkpoint, "verify_checkpoint", lambda path: None)
    with pytest.raises(AssertionError, match="a damaged checkpoint was taken"):
        check_walk_back(tmp_path, *DAMAGES[name])


def test_a_checkpoint_without_a_part_that_transformers_would_do_without_is_not_whole(tmp_path: Path) -> None:
    for name in FILES:
        kept = {other: content for other, content in FILES.items() if other != name}

        def write(folder: Path, kept: dict[str, bytes] = kept) -> None:
            for other, content in kept.items():
                (folder / other).write_bytes(content)

        with pytest.raises(RunError, match="holds no weights" if "model" in name else f"{name} is missing"):
            write_whole(tmp_path / name / "checkpoint-1", write, {})


def watch_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list that holds, in order, what was flushed to the disk and what was renamed."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(handle: int) -> None:
        events.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_rename(path: Path, target: Any) -> Path:
        events.append(("rename", str(path)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    return events


def check_flushed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and the folder itself are on the disk before the folder gets its name, and the name is before we go on."""
    events = watch_disk(monkeypatch)
    make_checkpoints(folder, 1)
    temporary = folder / ".writing-checkpoint-1"
    named = events.index(("rename", str(temporary)))
    flushed = {path for kind, path in events[:named] if kind == "flush"}
    assert {str(temporary / name) for name in FILES} | {str(temporary)} <= flushed, "renamed before it was flushed"
    order = [Path(path).name for kind, path in events[:named] if kind == "flush"]
    (manifest,) = [place for place, name in enumerate(order) if name.startswith(".manifest.json")]
    assert manifest > max(order.index(name) for name in FILES), "the manifest comes last"
    assert ("flush", str(folder)) in events[named:]


def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_flushed(tmp_path, monkeypatch)


def test_a_checkpoint_that_is_not_flushed_turns_that_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "sync", lambda path: None)
    with pytest.raises(AssertionError, match="renamed before it was flushed"):
        check_flushed(tmp_path, monkeypatch)


@pytest.mark.parametrize("point", ["save_open", "save_fsync", "save_rename"])
def test_a_full_disk_leaves_the_older_checkpoint_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    (older,) = make_checkpoints(tmp_path, 2)
    monkeypatch.setenv("FORGEKIT_FAULT", f"{point}:1:no_space")
    monkeypatch.setattr("forgekit.faults.passed", {})
    with pytest.raises(
        RunError, match=r"checkpoint-4 could not be written: No space left .* checkpoint-2 is the newest"
    ):
        make_checkpoints(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"] and verify_checkpoint(older) is None


def test_errors_of_torch_and_safetensors_on_a_full_disk_are_told_too(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    for error in (
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"),
        SafetensorError("No space left"),
    ):

        def fail(folder: Path, error: Exception = error) -> None:
            raise error

        with pytest.raises(RunError, match="checkpoint-1 could not be written"):
            write_whole(tmp_path / "checkpoint-1", fail, {})
    with pytest.raises(RuntimeError, match="a bug"):
        write_whole(tmp_path / "checkpoint-1", lambda folder: (_ for _ in ()).throw(RuntimeError("a bug")), {})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_save_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    write_files_to = tmp_path / ".writing-checkpoint-5"
    write_files_to.mkdir()
    write_files(write_files_to)
    assert find_newest(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    (path,) = make_checkpoints(tmp_path, 5)
    path.rename(tmp_path / ".replaced-checkpoint-5")  # killed between the two renames
    assert find_newest(tmp_path) == path and verify_checkpoint(path) is None
    make_checkpoints(tmp_path, 5)
    assert [child.name for child in tmp_path.iterdir()] == ["checkpoint-5"]


def test_rotation_keeps_the_newest_two_and_the_pinned_ones(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 2, 4, 9, 10, 11)
    rotate(tmp_path, {"checkpoint-4"})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10", "checkpoint-11"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_disk_that_gives_back_other_bytes_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkpoint.put_in_place

    def damage(temporary: Path, path: Path) -> None:
        place(temporary, path)
        flip(path)

    monkeypatch.setattr(checkpoint, "put_in_place", damage)
    with pytest.raises(RunError, match="checkpoint-1 does not read back as it was written: optimizer.pt has changed"):
        make_checkpoints(tmp_path, 1)


def test_errno_is_kept_as_the_cause(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.raises(RunError, match="quota") as caught:
        write_whole(tmp_path / "checkpoint-1", fail, {})
    assert isinstance(caught.value.__cause__, OSError)
