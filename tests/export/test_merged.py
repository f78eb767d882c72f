"""The merged model is base + adapter: same logits, adapted weights changed, every other tensor untouched."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, export_model, load_export, load_model, start_run
from forgekit.errors import ExportError
from forgekit.export import changes, merged
from forgekit.export.changes import LowRank, read_layer
from forgekit.export.merged import export_merged
from forgekit.files import read_json

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"adapter.layers": ["attention", "mlp", "vision", "audio"]},
    "rslora": {"adapter.use_rslora": True},
    "dora": {"adapter.use_dora": True},
    "per-layer table": {"adapter.layers": ["attention", "mlp", "per_layer_embeddings"]},
}


def read_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_merged(learned: Any, folder: Path, read_logits: Any, share: float) -> None:
    """Compare logits of the merged files with those of the adapter; `share` is the error allowed, of what was learned."""
    model, processor, config = learned
    expected = read_logits(model, processor)
    with model.disable_adapter():
        change = (expected - read_logits(model, processor)).abs().max()
    assert change > 0.1  # the adapter says something
    error = (expected - read_logits(*load_export(folder, config))).abs().max()
    assert error < share * change, f"logits differ by {error:.2e}, and the adapter's effect is {change:.2e}"


def check_tensors(learned: Any, base: Path, folder: Path) -> None:
    """Require that exactly the adapted weights changed, and that all others equal the base bit by bit."""
    import torch

    before, after = read_tensors(base), read_tensors(folder)
    assert before.keys() == after.keys()
    adapted = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default", "")
        .replace(".lora_embedding_A.default", ".weight")
        for name, _ in learned[0].named_parameters()
        if "lora_A" in name or "lora_embedding_A" in name
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == adapted and len(adapted) >= 24
    assert all(before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_logits_equal_adapter_logits(
    make_learned: Any, read_logits: Any, tiny_folder: Path, tmp_path: Path, variant: str
) -> None:
    """An fp32 base: only the order of summation differs, about 1e-7 of each value, so 1e-5 of the effect is ample."""
    learned = make_learned(VARIANTS[variant])
    folder = export_merged(*learned, tmp_path / "models" / "merged")
    check_merged(learned, folder, read_logits, 1e-5)
    check_tensors(learned, tiny_folder, folder)


def forget_scale(name: str, layer: Any) -> LowRank:
    real = read_layer(name, layer)
    return LowRank(real.left, real.right / layer.scaling["default"])


def keep_base(name: str, layer: Any) -> LowRank:
    real = read_layer(name, layer)
    return LowRank(real.left, 1e-3 * real.right)


@pytest.mark.parametrize("mutant", [forget_scale, keep_base])
def test_a_wrong_sum_turns_the_comparison_red(
    make_learned: Any, read_logits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Any
) -> None:
    learned = make_learned()  # lora_alpha / r is 2
    monkeypatch.setattr(changes, "read_layer", mutant)
    folder = export_merged(*learned, tmp_path / "models" / "merged")
    with pytest.raises(AssertionError, match="logits differ"):
        check_merged(learned, folder, read_logits, 1e-5)


def test_one_module_left_out_turns_both_comparisons_red(
    make_learned: Any, read_logits: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merged.match_changes
    monkeypatch.setattr(merged, "match_changes", lambda *given: dict(list(real(*given).items())[1:]))
    learned = make_learned()
    folder = export_merged(*learned, tmp_path / "models" / "merged")
    with pytest.raises(AssertionError):
        check_tensors(learned, tiny_folder, folder)
    with pytest.raises(AssertionError, match="logits differ"):
        check_merged(learned, folder, read_logits, 1e-5)


@pytest.fixture
def half_base(make_config: Any, tmp_path: Path) -> Path:
    """The random checkpoint in bfloat16, in several files with an index, with two tensors that transformers does not load."""
    import torch
    from safetensors.torch import load_file, save_file

    model, processor = load_model(make_config())
    folder = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="400KB")
    processor.save_pretrained(folder)
    first = sorted(folder.glob("*.safetensors"))[0]
    name = "model.language_model.layers.3.self_attn.k_proj.weight"  # layer 3 shares keys and values, so it has none
    save_file(load_file(first) | {name: torch.ones(4, 4, dtype=torch.bfloat16)}, first, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = first.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_a_16_bit_base_in_several_files_is_summed_in_float32_and_rounded_once(
    make_learned: Any, read_logits: Any, half_base: Path, tmp_path: Path
) -> None:
    """bfloat16 keeps 8 bits, so rounding once moves a weight by at most 2**-9 of itself, and the logits by a few percent
    of the adapter's effect here. The weights are compared exactly instead: with the sum written out."""
    import torch

    learned = make_learned({"model.id": str(half_base)})
    model, _, config = learned
    folder = export_merged(*learned, tmp_path / "models" / "merged")
    check_merged(learned, folder, read_logits, 0.1)
    check_tensors(learned, half_base, folder)
    before, after = read_tensors(half_base), read_tensors(folder)
    values = dict(model.named_parameters())
    for name, value in values.items():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            scale = config.adapter.lora_alpha / config.adapter.r
            total = before[weight].float() + scale * (values[name.replace("lora_A", "lora_B")] @ value).detach()
            assert (total - after[weight].float()).abs().le(2.0**-8 * total.abs() + 1e-9).all()
            assert (total.to(torch.bfloat16) == after[weight]).float().mean() > 0.999  # ties of another summation order
    assert (folder / "model.safetensors.index.json").read_text() == (half_base / "model.safetensors.index.json").read_text()  # fmt: skip


def test_full_training_is_exported_whole_and_reloads_equal(
    make_config: Any, read_logits: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    import torch

    config = make_config({"model.load_in": "full", "export.formats": ["merged"]})
    model, processor = load_model(config)
    model = add_adapter(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    written = export_model(model.eval(), processor, config, start_run(config, "full"))
    again = load_export(written["merged"], config)
    assert torch.equal(read_logits(model, processor), read_logits(*again))
    before, after = read_tensors(tiny_folder), read_tensors(written["merged"])
    for name in before:
        tower = any(part in name for part in ("vision_tower", "audio_tower", "embed_vision", "embed_audio"))
        assert torch.equal(before[name], after[name]) is tower, name


def test_each_format_is_written_and_noted_in_the_run(make_learned: Any) -> None:
    model, processor, config = make_learned({"export.formats": ["adapter", "merged"]})
    run = start_run(config, "both")
    written = export_model(model, processor, config, run, {"exact match after": 0.9})
    assert written == {"adapter": run.path / "models/lora", "merged": run.path / "models/merged"}
    assert run.record["exports"] == {"adapter": "models/lora", "merged": "models/merged"}
    for folder in written.values():
        assert "| exact match after | 0.9 |" in (folder / "README.md").read_text()
        assert read_json(folder / "verify.json")["verified"] is True
        assert (folder / "tokenizer.json").is_file() and (folder / "chat_template.jinja").is_file()
    assert (written["merged"] / "config.json").is_file()
    assert run.record["verified"] == {"adapter": True, "merged": True}


def test_too_little_disk_is_refused_with_both_sizes_before_anything_is_written(
    make_learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "free_disk", lambda folder: 1000)
    with pytest.raises(ExportError, match=r"the export needs .* bytes\) and the disk has .* \(1,000 bytes\) free"):
        export_merged(*make_learned(), tmp_path / "models" / "merged")
    assert not (tmp_path / "models" / "merged").exists()


def test_an_adapter_for_weights_that_the_base_lacks_is_refused(
    make_learned: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model, processor, config = make_learned()
    other = tmp_path / "other"
    other.mkdir()
    tensors = read_tensors(tiny_folder)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.0.mlp" not in name}, other / "model.safetensors"
    )
    with pytest.raises(
        ExportError, match="3 learned weights are not in .*layers.0.mlp.*another model than the one that was trained"
    ):
        merged.merge_shards(model, other, tmp_path / "merged")


def test_a_base_whose_weights_are_quantised_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ExportError, match="holds quantised weights, and a merge needs the 16-bit ones"):
        merged.merge_shards(None, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
