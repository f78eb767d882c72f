"""The card of an export: what it is made of, how it scored, how to use it, and the terms that go with it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from forgekit.export import card
from forgekit.export.card import write_card


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text below it."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "my-run" / "models" / "lora"


@pytest.mark.parametrize(("kind", "library"), [("adapter", "peft"), ("merged", "transformers")])
def test_front_matter_is_what_the_hub_reads(make_config: Any, folder: Path, kind: str, library: str) -> None:
    write_card(folder, make_config({"model.id": "unsloth/gemma-3n-E2B-it"}), kind)
    front, text = read_card(folder)
    assert front == {"base_model": "unsloth/gemma-3n-E2B-it", "library_name": library, "tags": ["forgekit"]}
    assert f"# my-run: {kind}" in text


def test_a_base_that_is_a_folder_is_not_named_to_the_hub(make_config: Any, folder: Path) -> None:
    write_card(folder, make_config(), "adapter")
    assert "base_model" not in read_card(folder)[0]


def test_scores_stand_in_a_table_and_their_lack_is_said(make_config: Any, folder: Path) -> None:
    write_card(folder, make_config(), "adapter", {"exact match before": 0.01, "exact match after": 0.93})
    assert "| exact match before | 0.01 |\n| exact match after | 0.93 |" in read_card(folder)[1]
    write_card(folder, make_config(), "adapter")
    assert "Not scored." in read_card(folder)[1] and "0.93" not in read_card(folder)[1]


def test_changed_settings_stand_with_their_origin_and_defaults_do_not(make_config: Any, folder: Path) -> None:
    write_card(folder, make_config({"adapter.r": 24}), "adapter")
    text = read_card(folder)[1]
    assert "| adapter.r | 24 | notebook |" in text
    assert "adapter.use_dora" not in text


def test_use_and_terms_and_versions_are_there(make_config: Any, folder: Path) -> None:
    import transformers

    write_card(folder, make_config(), "adapter")
    text = read_card(folder)[1]
    assert 'load_export("lora")' in text
    assert "Gemma Terms of Use found at https://ai.google.dev/gemma/terms" in text
    assert f"transformers {transformers.__version__}" in text


def test_a_card_without_the_terms_turns_that_check_red(
    make_config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "TERMS", "")
    with pytest.raises(AssertionError):
        test_use_and_terms_and_versions_are_there(make_config, folder)
