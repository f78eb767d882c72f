"""What the tests of rows share: a folder of their own, and functions that load rows from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_config, load_data


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test stands in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(small_tokenizer: Any) -> Callable:
    """Returns a function: settings of the data section -> splits; rows.jsonl is read where nothing else is named."""

    def load_rows(
        to_example: Any = None, quarantine_file: Path | None = None, rows: Any = None, **settings: Any
    ) -> Any:
        given = settings if rows is not None else {"path": "rows.jsonl", **settings}
        config = load_config(None, {f"data.{name}": value for name, value in given.items()})
        return load_data(config, small_tokenizer, to_example, quarantine_file, rows=rows)

    return load_rows


@pytest.fixture
def load_media(tiny_folder: Path) -> Callable:
    """Returns a function: a run's folder and settings of the data section -> splits, with a processor that takes pictures."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_folder)
    return lambda folder=None, **settings: load_data(
        load_config(None, {f"data.{name}": value for name, value in settings.items()}),
        processor,
        None,
        folder and folder / "quarantine.jsonl",
    )
