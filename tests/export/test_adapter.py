"""The exported adapter is the trained one: reloaded by forgekit and by PEFT alone it gives the same logits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_export, load_model
from forgekit.data.collate import render_chat
from forgekit.data.messages import make_message
from forgekit.errors import ExportError
from forgekit.export.adapter import compare_adapter, export_adapter
from forgekit.export.merged import export_merged

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"adapter.use_rslora": True, "adapter.use_dora": True},
}
FRESH = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoProcessor, Gemma3nForConditionalGeneration
ids, folders, out = torch.tensor([json.loads(sys.argv[1])]), sys.argv[3:], {}

def read(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits

for folder in folders:
    base = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
    base = Gemma3nForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    report = model.load_adapter(folder, adapter_name="again")
    assert not report.missing_keys and not report.unexpected_keys, report
    AutoProcessor.from_pretrained(folder)
    out["peft " + folder] = read(model)
    merged = folder + "-merged"
    model, report = Gemma3nForConditionalGeneration.from_pretrained(
        merged, trust_remote_code=False, local_files_only=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["unexpected_keys"], report
    AutoProcessor.from_pretrained(merged, trust_remote_code=False, local_files_only=True)
    out["merged " + folder] = read(model)
assert not [name for name in sys.modules if name.startswith("forgekit")]

from forgekit import load_config, load_export
config = load_config(None, {"model.engine": "huggingface", "model.device": "cpu", "model.load_in": "16bit"})
for folder in folders:
    base = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
    out["forgekit " + folder] = read(load_export(folder, config.change({"model.id": base}))[0])
torch.save(out, sys.argv[2])
"""


def check_same(expected: Any, logits: Any) -> None:
    assert expected.shape == logits.shape and (expected - logits).abs().max() < 1e-5


def test_a_fresh_process_gives_the_same_logits_by_peft_transformers_and_forgekit(
    make_learned: Any, tmp_path: Path, project_folder: Path
) -> None:
    """PEFT alone and transformers alone, from disk and without a file of ours; forgekit last. No key is missing or over."""
    import torch

    ids, expected = [2, 4, 20, 30, 40, 50, 60, 5], {}
    for name, settings in VARIANTS.items():
        model, processor, config = make_learned(settings)
        folder = str(export_adapter(model, processor, config, tmp_path / "models" / name))
        export_merged(model, processor, config, tmp_path / "models" / f"{name}-merged")
        with torch.no_grad():
            expected[folder] = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            with model.disable_adapter():
                base = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        assert (expected[folder] - base).abs().max() > 0.1  # the adapter says something
    out = tmp_path / "logits.pt"
    command = [sys.executable, "-c", FRESH, json.dumps(ids), str(out), *expected]
    environment = os.environ | {"PYTHONPATH": str(project_folder)}
    subprocess.run(command, check=True, timeout=200, cwd=tmp_path, env=environment)
    found = torch.load(out)
    for folder, logits in expected.items():
        check_same(logits, found[f"peft {folder}"])
        check_same(logits, found[f"forgekit {folder}"])
        assert (logits - found[f"merged {folder}"]).abs().max() < 1e-4


@pytest.fixture
def exported(make_learned: Any, read_logits: Any, tmp_path: Path) -> tuple[Path, Any, Any]:
    """An exported adapter, its config, and the logits of the model it was exported from."""
    model, processor, config = make_learned({"adapter.layers": ["attention", "mlp", "vision", "audio"]})
    return export_adapter(model, processor, config, tmp_path / "models" / "lora"), config, read_logits(model, processor)


def test_load_export_gives_the_same_logits(exported: Any, read_logits: Any) -> None:
    folder, config, expected = exported
    check_same(expected, read_logits(*load_export(folder, config)))


def test_load_export_needs_no_config(exported: Any, read_logits: Any) -> None:
    folder, _, expected = exported
    check_same(expected, read_logits(*load_export(folder)))


def forget_adapter(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def zero_one_matrix(model: Any) -> None:
    next(p for name, p in model.named_parameters() if "layers.1.self_attn.q_proj.lora_B" in name).data.zero_()


def swap_two_matrices(model: Any) -> None:
    names = [f"layers.{number}.mlp.up_proj.lora_A" for number in (0, 1)]
    first, second = (next(p for n, p in model.named_parameters() if name in n) for name in names)
    first.data, second.data = second.data.clone(), first.data.clone()


@pytest.mark.parametrize("mutant", [forget_adapter, zero_one_matrix, swap_two_matrices])
def test_a_damaged_adapter_turns_the_comparison_of_logits_red(exported: Any, read_logits: Any, mutant: Any) -> None:
    folder, config, expected = exported
    model, processor = load_export(folder, config)
    mutant(model)
    with pytest.raises(AssertionError):
        check_same(expected, read_logits(model, processor))


def test_the_base_alone_turns_the_comparison_of_logits_red(exported: Any, read_logits: Any) -> None:
    _, config, expected = exported
    with pytest.raises(AssertionError):
        check_same(expected, read_logits(*load_model(config)))


def check_template(folder: Path, processor: Any) -> None:
    from transformers import AutoProcessor

    chat = [make_message("system", "Be brief."), make_message("user", "1?"), make_message("assistant", "2")]
    assert render_chat(chat, AutoProcessor.from_pretrained(folder)) == render_chat(chat, processor)


def test_the_export_holds_the_template_and_another_one_turns_the_check_red(exported: Any) -> None:
    folder, config, _ = exported
    _, processor = load_model(config)
    check_template(folder, processor)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<start_of_turn>", "<turn>"))
    with pytest.raises(AssertionError):
        check_template(folder, processor)


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_missing_tensor_is_refused_when_the_export_is_loaded(exported: Any) -> None:
    folder, config, _ = exported
    rewrite(folder, lambda tensors: tensors.pop(sorted(tensors)[-1]))
    with pytest.raises(ExportError, match="1 tensors are missing or unexpected, for instance base_model"):
        load_export(folder, config)


def test_an_unknown_tensor_is_refused_when_the_export_is_loaded(exported: Any) -> None:
    folder, config, _ = exported
    rewrite(folder, lambda tensors: tensors.update({"base_model.model.other.lora_A.weight": next(iter(tensors.values())).clone()}))  # fmt: skip
    with pytest.raises(ExportError, match="1 tensors are missing or unexpected"):
        load_export(folder, config)


def test_a_file_that_differs_from_the_model_in_memory_is_refused(make_learned: Any, tmp_path: Path) -> None:
    model, processor, config = make_learned()
    folder = export_adapter(model, processor, config, tmp_path / "models" / "lora")
    rewrite(folder, lambda tensors: tensors[sorted(tensors)[0]].flatten()[0].add_(1e-6))
    with pytest.raises(ExportError, match="1 tensors differ from the trained ones"):
        compare_adapter(model, folder)


def test_a_model_without_an_adapter_has_none_to_export(make_config: Any, tmp_path: Path) -> None:
    config = make_config({"model.load_in": "full", "export.formats": ["merged"]})
    with pytest.raises(ExportError, match="The model has no adapter .* export merged instead"):
        export_adapter(*load_model(config), config, tmp_path / "lora")


def test_training_can_go_on_after_an_export(
    make_learned: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The files name the base as the recipe does; PEFT looks it up by its folder when a checkpoint is saved."""
    model, processor, config = make_learned()
    before = model.peft_config["default"].base_model_name_or_path
    export_adapter(model, processor, config.change({"model.id": "tiny"}), tmp_path / "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert model.peft_config["default"].base_model_name_or_path == before
    recwarn.clear()
    model.save_pretrained(str(tmp_path / "checkpoint"))
    assert not [str(warning.message) for warning in recwarn if "config file" in str(warning.message)]
