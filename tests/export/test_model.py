"""An export is whole or absent, never over another by itself, and refused with one sentence where it would be wrong."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, export_model, load_export, load_model, start_run
from forgekit.errors import ConfigError, ExportError
from forgekit.export import checks, merged
from forgekit.export import model as module
from forgekit.export.checks import check_base
from forgekit.export.formats import FORMATS, find_format
from forgekit.export.verdict import Verdict, at_least, at_most, read_verdict
from forgekit.files import read_json
from forgekit.model.bases import clean_hub_name
from forgekit.settings import Export


def list_files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def check_message(caught: Any, *parts: str) -> None:
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert message.endswith(".") and "\n" not in message


def test_every_format_of_the_settings_has_a_place_a_writer_and_a_verification() -> None:
    (choices,) = [c for c in str(Export.model_fields["formats"].annotation).split("Literal") if "[" in c][-1:]
    for name, format in FORMATS.items():
        assert f"'{name}'" in choices
        assert format.place.startswith("models/") and callable(format.write) and callable(format.verify)
    assert len({format.place for format in FORMATS.values()}) == len(FORMATS) == choices.count("'") // 2


# ---- what did not verify ----------------------------------------------------------------------------------------------


def spoil(real: Any) -> Any:
    """Return a writer whose file holds another number than the model."""

    def write(model: Any, processor: Any, config: Any, folder: Path, scores: Any = None) -> Path:
        from safetensors.torch import load_file, save_file

        real(model, processor, config, folder, scores)
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors[min(tensors)].mul_(1.5)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write


def test_a_failed_bound_moves_the_export_and_the_run_says_so(
    make_learned: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor, config = make_learned({"export.formats": ["adapter", "merged"]})
    run = start_run(config, "spoilt")
    monkeypatch.setitem(FORMATS, "adapter", FORMATS["adapter"]._replace(write=spoil(FORMATS["adapter"].write)))
    written = export_model(model, processor, config, run)
    assert written == {"adapter": run.path / "models/unverified/lora", "merged": run.path / "models/merged"}
    assert not (run.path / "models/lora").exists()
    saved = read_json(run.path / "run.json")
    assert saved["verified"] == {"adapter": False, "merged": True}
    assert saved["exports"] == {"adapter": "models/unverified/lora", "merged": "models/merged"}
    assert read_verdict(written["adapter"])["verified"] is False  # type: ignore[index]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("adapter:"))
    assert "unverified/lora" in line and "NOT VERIFIED, 2 of 7 checks failed: tensors that differ: 1 (bound 0)" in line
    assert "NOT VERIFIED" in (written["adapter"] / "README.md").read_text(encoding="utf-8")


def test_the_earlier_export_stays_when_its_successor_does_not_verify(
    make_learned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, config = make_learned({"export.replace": True})
    run = start_run(config, "twice")
    first = export_model(model, processor, config, run)["adapter"]
    before = list_files(first)
    monkeypatch.setitem(FORMATS, "adapter", FORMATS["adapter"]._replace(write=spoil(FORMATS["adapter"].write)))
    for _ in range(2):
        assert export_model(model, processor, config, run)["adapter"] == run.path / "models/unverified/lora"
    assert list_files(first) == before and sorted(os.listdir(first.parent)) == ["lora", "unverified"]


def test_a_verdict_without_checks_or_with_no_number_is_not_verified() -> None:
    assert not Verdict((), 0, 0).verified
    assert not at_most("a", float("nan"), 1).held and not at_least("a", float("nan"), 0).held
    assert at_most("a", 1, 1).held and at_least("a", 1, 1).held and not at_most("a", 1.1, 1).held
    verdict = Verdict((at_most("a", 1, 1),), 5, 4, score=0.5).add(at_least("b", 0, 1), merged_score=0.6)
    assert verdict.to_dict()["merged_score"] == 0.6 and verdict.to_dict()["score"] == 0.5
    assert verdict.describe() == "NOT VERIFIED, 1 of 2 checks failed: b: 0 (bound 1)"


# ---- whole or absent --------------------------------------------------------------------------------------------------


def test_an_existing_export_is_refused_unless_replace_is_set(make_learned: Any) -> None:
    model, processor, config = make_learned()
    run = start_run(config, "again")
    folder = export_model(model, processor, config, run)["adapter"]
    (folder / "mine.txt").write_text("kept")
    before = list_files(run.path / "models")
    with pytest.raises(ExportError) as caught:
        export_model(model, processor, config, run)
    check_message(caught, "models/lora exists", "Set export.replace: true to replace it once the new one is verified")
    assert list_files(run.path / "models") == before
    export_model(model, processor, config.change({"export.replace": True}), run)
    assert not (folder / "mine.txt").exists() and (folder / "adapter_model.safetensors").is_file()
    assert os.listdir(run.path / "models") == ["lora"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_nothing(
    make_learned: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model, processor, config = make_learned()
    run = start_run(config, "half")

    def write(model: Any, processor: Any, config: Any, folder: Path, scores: Any = None) -> Path:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setitem(FORMATS, "adapter", FORMATS["adapter"]._replace(write=write))
    with pytest.raises(type(error)):
        export_model(model, processor, config, run)
    assert not (run.path / "models").exists() and "exports" not in run.record


# ---- full disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_seen_before_anything_is_written(make_learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, config = make_learned({"export.formats": ["adapter", "merged"]})
    run = start_run(config, "full")
    sizes = {"lora": 10**9, "merged": 5_000}
    monkeypatch.setattr(merged, "free_disk", lambda folder: sizes[folder.name.split(".")[1]])
    with pytest.raises(ExportError) as caught:
        export_model(model, processor, config, run)
    check_message(caught, "the export needs ", " bytes) and the disk has ", "(5,000 bytes) free", "what was written before stays")  # fmt: skip
    assert os.listdir(run.path / "models") == ["lora"]
    assert read_json(run.path / "run.json")["exports"] == {"adapter": "models/lora"}


def test_a_disk_that_fills_up_meanwhile_leaves_earlier_files_untouched(
    make_learned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, config = make_learned({"export.formats": ["merged"], "export.replace": True})
    run = start_run(config, "filling")
    export_model(model, processor, config, run)
    before = list_files(run.path / "models")

    def full(*given: Any) -> None:
        monkeypatch.setattr(merged, "free_disk", lambda folder: 1234)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merged, "write_shard", full)
    with pytest.raises(ExportError) as caught:
        export_model(model, processor, config, run)
    check_message(caught, "the export needs ", "(1,234 bytes) free")
    assert list_files(run.path / "models") == before


# ---- what should not be exported --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"adapter.use_dora": True}, {"adapter.layers": ["attention", "per_layer_embeddings"], "adapter.modules_to_save": ["altup.prediction_coefs"]}],
)  # fmt: skip
def test_a_run_that_never_trained(make_config: Any, settings: dict[str, Any]) -> None:
    config = make_config(settings)
    model, processor = load_model(config)
    run = start_run(config, "untrained")
    model = add_adapter(model, config)
    with pytest.raises(ExportError) as caught:
        export_model(model, processor, config, run)
    check_message(caught, "The model has learned nothing yet", "Train first (trainer.train())")
    assert not (run.path / "models").exists()


def test_full_training_that_never_trained(make_config: Any) -> None:
    config = make_config({"model.load_in": "full", "export.formats": ["merged"]})
    model, processor = load_model(config)
    run = start_run(config, "untrained")
    with pytest.raises(ExportError) as caught:
        export_model(model, processor, config, run)
    check_message(caught, "The merged weights equal those of ", "nothing was learned")
    assert not (run.path / "models").exists()


def test_one_step_is_enough_to_have_learned(make_config: Any) -> None:
    config = make_config()
    model, _ = load_model(config)
    model = add_adapter(model, config)
    assert not checks.has_learned(model)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = 1e-9
    assert checks.has_learned(model)


def test_an_adapter_of_another_base(make_learned: Any, tiny_folder: Path) -> None:
    model, processor, config = make_learned()
    other = config.change({"model.id": "tiny"})
    with pytest.raises(ExportError) as caught:
        export_model(model, processor, other, start_run(config, "other"))
    check_message(caught, f"trained on {tiny_folder}", "the recipe's model.id is tiny", f"model.id: {tiny_folder}.")
    folder = export_model(model, processor, config, start_run(config, "own"))["adapter"]
    with pytest.raises(ExportError) as caught:
        load_export(folder, other)
    check_message(caught, f"trained on {tiny_folder}", "the recipe's model.id is tiny")
    load_export(folder, config)
    edited = (folder / "adapter_config.json").read_text(encoding="utf-8").replace(str(tiny_folder), "tiny")
    (folder / "adapter_config.json").write_text(edited, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        add_adapter(load_model(config)[0], config.change({"adapter.path": str(folder)}))
    check_message(caught, "trained on tiny, and model.id is ", str(tiny_folder))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("google/gemma-3n-E2B-it", "unsloth/gemma-3n-e2b-it-unsloth-bnb-4bit", True),
        ("unsloth/gemma-3n-E2B-it", "unsloth/gemma-3n-E2B-it", True),
        ("google/gemma-3n-E2B-it", "google/gemma-3n-E4B-it", False),
        ("google/gemma-3n-E2B-it", "google/gemma-3n-E2B", False),
    ],
)
def test_quantised_copies_of_the_hub_are_the_same_base(first: str, second: str, same: bool) -> None:
    assert (clean_hub_name(first) == clean_hub_name(second)) is same


def test_a_model_without_an_adapter_is_of_no_other_base(make_config: Any) -> None:
    check_base(object(), make_config())


def test_a_resized_vocabulary(make_learned: Any) -> None:
    model, processor, config = make_learned()
    size = model.get_input_embeddings().weight.shape[0]
    model.get_base_model().resize_token_embeddings(size + 8)
    with pytest.raises(ExportError) as caught:
        export_model(model, processor, config, start_run(config, "resized"))
    check_message(caught, f"the model in memory has {size + 8:,} words", f"has {size:,}", "The vocabulary was resized")


def test_a_tokenizer_with_more_words_than_the_model(make_learned: Any) -> None:
    model, processor, config = make_learned()
    size = model.get_input_embeddings().weight.shape[0]
    processor.tokenizer.add_tokens([f"<new{n}>" for n in range(size)])
    with pytest.raises(ExportError) as caught:
        export_model(model, processor, config, start_run(config, "words"))
    check_message(caught, f"The tokenizer has {len(processor.tokenizer):,} words and the model {size:,}")


def test_formats_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    assert find_format(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert find_format(tmp_path) == "merged"
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    assert find_format(tmp_path) == "adapter"


def test_nothing_is_uploaded_without_the_flag(make_learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "push_exports", lambda *given: pytest.fail("uploaded"))
    model, processor, config = make_learned()
    export_model(model, processor, config, start_run(config, "here"))
