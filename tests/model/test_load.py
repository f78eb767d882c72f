"""Weights and processors: loaded whole, in the asked-for precision, frozen, and refused with a sentence otherwise."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_model, load_processor
from forgekit.errors import ModelError
from forgekit.model.load import find_model, get_tokenizer, start_engine


def read_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_every_weight_is_the_one_on_disk(make_config: Any, tiny_folder: Path) -> None:
    import torch

    model, processor = load_model(make_config())
    saved = read_tensors(tiny_folder)
    assert type(model).__name__ == "Gemma3nForConditionalGeneration"
    assert type(processor).__name__ == "Gemma3nProcessor"
    loaded = model.state_dict()
    assert {name for name in loaded if name not in saved} <= {"lm_head.weight"}  # tied to the embedding
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(("load_in", "learns"), [("16bit", False), ("full", True)])
def test_weights_are_frozen_unless_all_of_them_learn(make_config: Any, load_in: str, learns: bool) -> None:
    model, _ = load_model(make_config({"model.load_in": load_in, "export.formats": ["merged"]}))
    assert {parameter.requires_grad for parameter in model.parameters()} == {learns}
    assert not model.training


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_precision_is_the_one_asked_for(make_config: Any, dtype: str, expected: str) -> None:
    model, _ = load_model(make_config({"model.dtype": dtype}))
    assert str(model.dtype) == f"torch.{expected}"


def test_a_loaded_model_can_be_saved_again(make_config: Any, tmp_path: Path) -> None:
    """timm rewrites `model_args` while it builds the tower, after which saving fails."""
    import torch

    config = make_config()
    model, processor = load_model(config)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again, _ = load_model(config.change({"model.id": str(tmp_path / "again")}))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_processor_comes_without_weights(make_config: Any, tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    processor = load_processor(make_config({"model.id": str(tmp_path)}))
    assert get_tokenizer(processor).chat_template or processor.chat_template
    assert get_tokenizer(get_tokenizer(processor)) is processor.tokenizer


def test_a_checkpoint_without_a_template_is_refused(make_config: Any, tiny_folder: Path, tmp_path: Path) -> None:
    import json

    for file in tiny_folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"has no chat template, .* Use an instruction-tuned \(-it\) checkpoint"):
        load_processor(make_config({"model.id": str(tmp_path)}))


def test_a_missing_tensor_is_refused_and_not_drawn_at_random(
    make_config: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = read_tensors(tmp_path)
    lost = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights .*layers\.1\.mlp\.up_proj"):
        load_model(make_config({"model.id": str(tmp_path)}))


def test_an_unknown_architecture_is_a_sentence(make_config: Any, tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("Gemma3nForConditionalGeneration", "Gemma99ForEverything"))
    with pytest.raises(ModelError, match=r"has no Gemma99ForEverything, which .* Update transformers"):
        load_model(make_config({"model.id": str(tmp_path)}))


def test_tiny_is_the_packaged_folder_and_a_folder_without_config_is_refused(make_config: Any, tmp_path: Path) -> None:
    assert (Path(find_model(make_config({"model.id": "tiny"}))) / "config.json").is_file()
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(
        ModelError, match=r"is a folder but no checkpoint: it has no config.json \(it holds notes.txt\)"
    ):
        find_model(make_config({"model.id": str(tmp_path)}))
    with pytest.raises(ModelError, match="the folder .*/nowhere does not exist"):
        find_model(make_config({"model.id": str(tmp_path / "nowhere")}))


def test_transformers_imported_before_unsloth_is_refused(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers  # noqa: F401  # the mistake

    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    with pytest.raises(ModelError, match=r"transformers.* was imported before unsloth, .* Restart the kernel"):
        start_engine(make_config({"model.engine": "unsloth"}))


def test_plain_transformers_asked_for_after_unsloth_is_refused(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    with pytest.raises(ModelError, match=r"has imported unsloth, which has rewritten transformers.* Restart"):
        start_engine(make_config({"model.engine": "huggingface"}))
    assert start_engine(make_config({"model.engine": "unsloth"})) == "unsloth"


def test_an_unsloth_that_cannot_be_imported_names_the_remedy(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "trl", "peft"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "unsloth", None)  # what Python does with it: ImportError
    monkeypatch.setattr("forgekit.model.load.sys", types.SimpleNamespace(modules={}))
    with pytest.raises(ModelError, match=r"Unsloth cannot be imported here: .* or set model.engine: huggingface"):
        start_engine(make_config({"model.engine": "unsloth"}))


def test_no_altup_layer_and_no_tower_is_packed_in_4_bit(make_config: Any) -> None:
    """transformers matches a name to skip at the start or the end of a module's name only."""
    import torch
    from transformers.quantizers.quantizers_utils import should_convert_module

    from forgekit.model.load import KEEP_16BIT

    model, _ = load_model(make_config())
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    packed = [name for name in linear if should_convert_module(name, KEEP_16BIT)]
    inside = [name for name in packed if ".language_model.layers." in name]
    assert packed and packed == inside
    assert {name.split(".layers.")[1].split(".")[1] for name in packed} == {
        "self_attn",
        "mlp",
        "laurel",
        "per_layer_input_gate",
        "per_layer_projection",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_packed_model_trains_on_a_gpu(make_config: Any, load_in: str) -> None:
    import math

    from forgekit import add_adapter, load_data, sft_trainer, start_run

    settings = {"model.load_in": load_in, "model.device": "cuda", "adapter.layers": ["attention", "mlp"]}
    config = make_config(settings)
    run = start_run(config, "packed")
    model, processor = load_model(config)
    trainer = sft_trainer(add_adapter(model, config), processor, load_data(config, processor), config, run)
    assert math.isfinite(trainer.train().training_loss)
