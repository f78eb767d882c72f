"""A file that was attached reads the same from both ipywidgets."""

from typing import Any

import pytest

from forgekit.data.clean import BadRow
from forgekit.panels.upload import read_uploads

SEVEN = {"a.png": {"metadata": {"name": "a.png", "type": "image/png", "size": 3}, "content": b"png"}}
EIGHT = ({"name": "a.png", "type": "image/png", "size": 3, "content": memoryview(b"png")},)


@pytest.mark.parametrize("value", [SEVEN, EIGHT], ids=["ipywidgets 7", "ipywidgets 8"])
def test_both_forms_give_one_part(value: Any) -> None:
    assert read_uploads(value) == [{"type": "image", "image": b"png"}]


@pytest.mark.parametrize("value", [{}, ()])
def test_nothing_attached_gives_nothing(value: Any) -> None:
    assert read_uploads(value) == []


def test_a_name_tells_what_the_browser_does_not() -> None:
    file = {"name": "clip.wav", "type": "", "content": b"wav"}
    assert read_uploads((file,)) == [{"type": "audio", "audio": b"wav"}]


@pytest.mark.parametrize("name", ["notes.txt", "thing"])
def test_other_files_are_refused_by_name(name: str) -> None:
    with pytest.raises(BadRow, match=f"{name} is of no known type; attach a picture"):
        read_uploads(({"name": name, "type": "", "content": b""},))
