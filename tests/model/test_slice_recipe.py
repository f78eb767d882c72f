"""`model.slice` in a recipe: made once, counted without weights, trained, exported and found again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from forgekit import load_model, plan_layers
from forgekit.model import slice as slicing
from forgekit.model.load import find_weights

HALF = {"skip": "6-8", "widths": 32}  # as E2B is cut from E4B


def test_a_recipe_s_slice_is_made_once_and_anew_from_a_changed_source(
    make_sliced: Callable, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    config = make_sliced(HALF, **{"model.id": str(mine)})
    first = find_weights(config)
    assert first.startswith(str(tmp_path / "cache" / "slices" / "mine-9-layers-"))
    assert f"Made once, into {first}" in capsys.readouterr().out
    assert find_weights(config) == first and capsys.readouterr().out == ""
    assert find_weights(config.change({"model.slice": {"skip": "6-8"}})) != first
    shard = next(mine.glob("*.safetensors"))
    shard.touch()
    assert find_weights(config) != first


def test_the_plan_counts_a_slice_without_making_it(make_sliced: Callable, tmp_path: Path) -> None:
    plan = plan_layers(make_sliced(HALF, **{"adapter.layers": ["mlp"]}))
    assert "sliced as model.slice says" in plan.source
    assert len(plan.modules) == 9 * 3 and not (tmp_path / "cache" / "slices").exists()


def test_an_adapter_of_a_slice_finds_its_base_again_and_nobody_takes_the_whole_one(
    make_sliced: Callable, source: Path, tmp_path: Path, read_logits: Callable
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, PeftConfig

    from forgekit import add_adapter, load_export
    from forgekit.export.adapter import export_adapter
    from forgekit.export.merged import export_merged

    config = make_sliced(HALF)
    model, processor = load_model(config)
    model = add_adapter(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    expected = read_logits(model, processor)
    export_adapter(model, processor, config, tmp_path / "lora")
    export_merged(model, processor, config, tmp_path / "merged")
    for folder, bound in (("lora", 1e-6), ("merged", 1e-4)):
        again, _ = load_export(tmp_path / folder, config)
        assert (
            max(float((a - b).abs().max()) for a, b in zip(read_logits(again, processor), expected, strict=True))
            <= bound
        )
    base = PeftConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path
    assert base == f'{source}#slice={{"skip":"6-8","widths":32}}'
    with pytest.raises((OSError, ValueError)):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")


def test_a_slice_trains_and_the_run_s_record_names_it(make_sliced: Callable) -> None:
    import math

    from forgekit import add_adapter, load_data, sft_trainer, start_run
    from forgekit.files import read_json

    config = make_sliced(HALF, **{"train.max_steps": 2})
    run = start_run(config, "cut")
    model, processor = load_model(config)
    trainer = sft_trainer(add_adapter(model, config), processor, load_data(config, processor), config, run)
    assert math.isfinite(trainer.train().training_loss)
    record = read_json(run.path / "run.json")
    assert record["slice"]["folder"] == find_weights(config) and record["slice"]["skipped"] == [6, 7, 8]
    assert record["settings"]["model.slice"] == {"value": HALF, "from": "notebook"}
    assert slicing.record_slice(config.change({"model.slice": {}})) == {}
