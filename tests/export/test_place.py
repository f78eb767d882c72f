"""Drafts become exports whole, and files that share a folder have a verdict each and one together."""

import os
from pathlib import Path

import pytest

from forgekit.export.place import check_absent, drafted, remove_export, settle
from forgekit.export.verdict import Verdict, at_most, place_verdict, read_verdict
from forgekit.files import read_json


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "models" / "lora"
    (tmp_path / "models" / ".lora.part").mkdir(parents=True)
    (tmp_path / "models" / ".lora.part" / "half").write_text("x")
    with drafted(target) as draft:
        assert not draft.exists()
        draft.mkdir()
        (draft / "whole").write_text("y")
        settle(draft, target)
    assert os.listdir(tmp_path / "models") == ["lora"] and os.listdir(target) == ["whole"]


def test_a_format_of_one_file_shares_its_folder(tmp_path: Path) -> None:
    """As several precisions of one model do; each has a verdict of its own."""
    for name in ("model-Q8_0.gguf", "model-F16.gguf"):
        target = tmp_path / "models" / "quantized" / name
        check_absent(target, replace=False)
        with drafted(target) as draft:
            draft.write_bytes(b"weights")
            Verdict((at_most("a", 0, 1),), 7, 8, score=0.9 - len(name) / 100, merged_score=0.9).save(draft)
            settle(draft, target)
        assert place_verdict(target).name == name.replace(".gguf", ".verify.json") and read_verdict(target)
    names = ["model-F16.gguf", "model-F16.verify.json", "model-Q8_0.gguf", "model-Q8_0.verify.json", "verify.json"]
    assert sorted(os.listdir(tmp_path / "models" / "quantized")) == names
    together = read_json(tmp_path / "models" / "quantized" / "verify.json")
    assert together["verified"] and (together["file_bytes"], together["expected_bytes"]) == (14, 16)
    assert [check["name"] for check in together["checks"]] == ["model-F16: a", "model-Q8_0: a"]
    assert together["score"] == pytest.approx(0.75) and together["merged_score"] == 0.9  # of the one that lost more


def test_an_unverified_file_takes_its_verdict_along_and_the_last_one_the_folder(tmp_path: Path) -> None:
    """Else a gate would go on reading a failure that was mended."""
    folder = tmp_path / "models" / "unverified" / "quantized"
    for name, value in (("model-Q8_0.gguf", 2), ("model-F16.gguf", 3)):
        with drafted(folder / name) as draft:
            draft.write_bytes(b"weights")
            Verdict((at_most("a", value, 1),), 7, 7).save(draft)
            settle(draft, folder / name)
    remove_export(folder / "model-Q8_0.gguf")
    assert [check["name"] for check in read_json(folder / "verify.json")["checks"]] == ["model-F16: a"]
    remove_export(folder / "model-F16.gguf")
    assert not folder.exists()
