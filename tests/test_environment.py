"""Switches and cache folders that other libraries read from the environment."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from forgekit.environment import FOLDERS, SWITCHES, cache_folder, home_folder, is_writable, set_environment
from forgekit.errors import RunError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, with none of the variables set that name cache folders."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("FORGEKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return folder


def block(folder: Path) -> Path:
    """Put a file where the folder would stand, so that nobody, the administrator included, can write below it."""
    if folder.is_dir():
        folder.rmdir()
    folder.write_text("")
    return folder


def test_statistics_are_off_and_home_keeps_the_usual_folders(home: Path) -> None:
    environ: dict[str, str] = {}
    set_environment(environ)
    assert environ.items() >= SWITCHES.items()
    assert environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert environ.keys() - SWITCHES.keys() == {"UNSLOTH_COMPILE_LOCATION"}
    assert Path(environ["UNSLOTH_COMPILE_LOCATION"]).parent == home / ".cache" / "forgekit"


def test_what_the_user_has_set_stays(home: Path) -> None:
    block(home)
    own = {"TOKENIZERS_PARALLELISM": "true", "HF_HOME": "/models", "UNSLOTH_COMPILE_LOCATION": "/compiled"}
    environ = dict(own)
    set_environment(environ)
    assert environ.items() >= own.items()


def test_with_a_home_that_cannot_be_written_every_cache_moves(home: Path, tmp_path: Path) -> None:
    block(home)
    environ: dict[str, str] = {}
    set_environment(environ)
    cache = tmp_path / f"forgekit-{os.getuid()}"
    assert {name: environ[name] for name in FOLDERS} == {name: str(cache / place) for name, place in FOLDERS.items()}
    assert environ["UNSLOTH_COMPILE_LOCATION"].startswith(str(cache))


def test_the_cache_stands_where_asked_then_at_home_then_in_the_temporary_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == home / ".cache" / "forgekit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "forgekit"
    monkeypatch.setenv("FORGEKIT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("FORGEKIT_CACHE", str(block(tmp_path / "file") / "below"))
    assert cache_folder() == tmp_path / "xdg" / "forgekit"


def test_no_place_for_a_cache_is_one_sentence(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block(home)
    monkeypatch.setattr(tempfile, "tempdir", str(block(tmp_path / "temporary")))
    with pytest.raises(
        RunError, match=r"^No folder for caches can be written \(tried .*\)\. Set FORGEKIT_CACHE to one that can\.$"
    ):
        cache_folder()


def test_a_user_without_a_home_gets_the_temporary_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user number stands in no list of users."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    assert home_folder() is None
    environ: dict[str, str] = {}
    set_environment(environ)
    assert environ["HF_HOME"] == str(tmp_path / f"forgekit-{os.getuid()}" / "huggingface")
    assert not (tmp_path / "~").exists()


def test_writable_means_that_a_file_can_be_made(tmp_path: Path) -> None:
    assert is_writable(tmp_path / "new" / "folder")
    assert not is_writable(block(tmp_path / "file"))
    assert not is_writable(tmp_path / "file" / "below")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_an_ordinary_user_cannot_write_in_a_folder_of_another(tmp_path: Path, project_folder: Path) -> None:
    """Permissions do not bind the administrator, so there the question is asked as user 65534 (nobody)."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from forgekit.environment import is_writable\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "print(is_writable(Path(sys.argv[1])), is_writable(Path(sys.argv[1]) / 'below'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=project_folder, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
