"""The plan against PEFT on meta-device models, the loaded model against the plan, and every refusal with its sentence."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, load_model, start_run
from forgekit.adapter.lora import add_peft_adapter
from forgekit.adapter.plan import (
    LayerPlan,
    check_learner,
    check_plan,
    check_plan_against_data,
    count_learning,
    plan_layers,
    read_plan,
)
from forgekit.errors import ConfigError, ModelError
from forgekit.model.shapes import build_shapes, make_released_config
from tests.adapter.known import KNOWN, TOTALS


def plan_released(make_config: Any, size: str, **adapter: Any) -> LayerPlan:
    """Return the plan of E2B or E4B with r = 8 and some settings of the adapter."""
    settings = {f"adapter.{name}": value for name, value in {"r": 8, **adapter}.items()}
    return plan_layers(make_config(settings), make_released_config(size))


@pytest.mark.parametrize(
    ("size", "layers", "modules", "parameters"),
    [*KNOWN, ("E2B", ["attention", "mlp", "vision"], 191, 10_158_080 + 32_768)],
)
def test_released_models_are_planned_with_the_known_counts(
    make_config: Any, size: str, layers: list[str], modules: int, parameters: int
) -> None:
    plan = plan_released(make_config, size, layers=layers)
    assert (len(plan.modules), plan.parameters) == (modules, parameters)
    assert plan.total == TOTALS[size]
    assert sum(total.parameters for total in plan.totals) == parameters


def test_projections_of_the_large_model_are_counted_one_by_one(make_config: Any) -> None:
    names = [module.name for module in plan_released(make_config, "E4B").modules]
    found = {
        end: sum(name.endswith(f".{end}_proj") for name in names) for end in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert found == {"q": 35, "k": 20, "v": 20, "o": 35, "gate": 35, "up": 35, "down": 35}


def test_all_plain_convolutions_of_the_large_tower_can_learn(make_config: Any) -> None:
    plan = plan_released(make_config, "E4B", layers=["vision_stem", "vision_tower"])
    assert len(plan.modules) == 237
    with pytest.raises(ConfigError, match="matches 45 grouped convolutions"):
        plan_released(make_config, "E4B", target_modules=r".*vision_tower.*\.(dw_start|dw_mid)\.conv|.*down_conv")


CHOICES = {
    "every group": {"layers": ["attention", "mlp", "laurel", "altup", "per_layer", "per_layer_embeddings", "vision", "audio"]},
    "towers": {"layers": ["vision_stem", "vision_tower", "audio_convolutions", "audio"]},
    "DoRA": {"layers": ["attention", "per_layer_embeddings", "vision_tower"], "use_dora": True},
    "whole modules": {"layers": ["attention", "embeddings"], "modules_to_save": ["altup.prediction_coefs", "embed_vision"]},
    "patterns": {"layers": ["attention", "mlp", "vision"], "rank_pattern": {"vision": 2, r".*\.up_proj": 3}, "alpha_pattern": {"mlp": 5}},
    "some layers": {"layers_to_transform": "0-3,full,kv_source"},
    "names": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": "last 7"},
    "all-linear": {"target_modules": "all-linear"},
    "biases": {"target_modules": ".*(q_proj|conv_1.conv)", "bias": "all"},
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_peft_makes_exactly_what_is_planned(make_config: Any, choice: str) -> None:
    """On the built-in model's config, which has 25 layers and both towers, without its weights."""
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, Gemma3nForConditionalGeneration

    folder = Path(__file__).parents[2] / "forgekit" / "model" / "tiny"
    settings = AutoConfig.from_pretrained(folder)
    config = make_config({f"adapter.{name}": value for name, value in CHOICES[choice].items()})
    with torch.device("meta"):
        model = Gemma3nForConditionalGeneration(settings)
        model.tie_weights()
        learner = add_peft_adapter(model.requires_grad_(False), config)
    plan = plan_layers(config, AutoConfig.from_pretrained(folder))  # timm changes the one it builds from
    check_learner(plan, learner)
    assert sum(count_learning(learner).values()) == plan.parameters > 0
    made = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.lora_alpha["default"])
        for name, layer in learner.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert made == {m.name: (m.r, m.lora_alpha) for m in plan.modules if m.kind == "LoRA"}


def test_the_plan_before_loading_is_the_one_of_the_loaded_model(make_config: Any) -> None:
    config = make_config({"adapter.layers": ["attention", "mlp", "vision_tower", "audio", "altup"]})
    assert plan_layers(config).modules == plan_layers(config, load_model(config)[0]).modules


def test_full_training_plans_the_language_model(make_config: Any) -> None:
    config = make_config({"model.load_in": "full", "export.formats": ["merged"]})
    plan = plan_layers(config)
    language, vision, audio = plan.totals
    assert language.parameters == language.total > 0
    assert vision.modules == audio.modules == 0 < vision.total
    assert plan.bytes == 4 * plan.parameters  # float32 on a CPU
    add_adapter(load_model(config)[0], config)  # checks the model against it
    with pytest.raises(ConfigError, match=r"adapter\.layers_to_transform would choose nothing"):
        plan_layers(config.change({"adapter.layers_to_transform": "0"}))


def test_a_model_that_learns_something_else_is_an_error(make_config: Any) -> None:
    config = make_config()
    learner = add_adapter(load_model(config)[0], config)
    plan = plan_layers(config)
    for name, parameter in learner.named_parameters():
        if name.endswith("layers.1.mlp.up_proj.lora_B.default.weight"):
            parameter.requires_grad_(False)
        if name.endswith("layers.0.input_layernorm.weight"):
            parameter.requires_grad_(True)
    with pytest.raises(
        ModelError, match=r"not what was planned, in 2 modules .*up_proj: planned \d.*layernorm: planned 0, learns 32"
    ):
        check_learner(plan, learner)


def test_a_model_that_is_not_what_its_config_says_is_an_error(make_config: Any) -> None:
    import torch

    config = make_config()
    model = load_model(config)[0]
    model.model.language_model.layers[1].mlp.up_proj = torch.nn.Linear(32, 7)
    with pytest.raises(ModelError, match=r"differs from what its config describes, in 2 .*layers\.1\.mlp\.up_proj"):
        add_adapter(model, config)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"layers": ["mlp"], "layers_to_transform": "0-99"}, r"layers_to_transform: 0-99 asks for layer 30, .* 0 to 29"),
        ({"layers": ["vision"], "layers_to_transform": "3"}, "none of adapter.layers .vision. stands in a decoder layer"),
        ({"target_modules": ["k_proj"], "layers_to_transform": "kv_shared"}, r"'k_proj' asks for keys or values of layers 20-29, which have none: they use those of layers 18-19"),
        ({"target_modules": r".*layers\.25\.self_attn\.v_proj"}, "asks for keys or values of layers 25, which have none"),
        ({"target_modules": "q_porj"}, "'q_porj' matches no module of Gemma3nForConditionalGeneration, so it would learn nothing"),
        ({"target_modules": ["q_proj", "quarry"]}, "'quarry' matches no module"),
        ({"target_modules": ".*input_layernorm"}, r"30 modules that are no Linear, .* \(Gemma3nRMSNorm\)"),
        ({"target_modules": ".*depthwise_conv1d"}, "12 grouped convolutions"),
        ({"target_modules": ".*lm_head|.*q_proj"}, "lm_head, which is the vocabulary's table and the output head in one"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save: 'nothing' matches no module"),
        ({"modules_to_save": ["layers.3.mlp.up_proj"]}, "up_proj is already adapted by LoRA"),
        ({"layers": ["embeddings"]}, "nothing but model.language_model.embed_tokens would learn"),
        ({"rank_pattern": {"vision": 4}}, "adapter.rank_pattern: 'vision' meets no module that learns"),
        ({"bias": "lora_only"}, "adapter.bias: lora_only finds no bias"),
    ],
)  # fmt: skip
def test_what_cannot_learn_is_refused_with_one_sentence(
    make_config: Any, adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_released(make_config, "E2B", **adapter)
    assert len(caught.value.args) == 1 and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": "all-linear", "layers": ["mlp"]}, "adapter.target_modules is set and adapter.layers too"),
        (
            {"target_modules": "all-linear", "layers_to_transform": "3"},
            "adapter.layers_to_transform too .3, from notebook",
        ),
        ({"target_modules": "q_proj("}, "is no regular expression"),
        ({"target_modules": []}, "a regular expression, a list of module names"),
        ({"rank_pattern": {"atention": 4}}, "'atention' is no group of layers. Did you mean attention?"),
        ({"layers_to_transform": "first"}, "numbers and ranges such as 0-9,20"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_once(
    make_config: Any, adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({f"adapter.{name}": value for name, value in adapter.items()})


def test_a_list_of_names_replaces_the_default_groups_and_an_emptied_one(make_config: Any) -> None:
    for layers in ({}, {"adapter.layers": []}):
        config = make_config({"adapter.target_modules": ["q_proj"], **layers})
        assert {module.name.rpartition(".")[2] for module in plan_layers(config).modules} == {"q_proj"}


def test_a_tower_learns_only_where_rows_have_its_kind(make_config: Any) -> None:
    plan = plan_released(make_config, "E2B", layers=["mlp", "vision", "audio"])
    check_plan_against_data(plan, {"text", "image", "audio"})
    check_plan_against_data(plan_released(make_config, "E2B"), {"text"})
    with pytest.raises(
        ConfigError, match=r"1 modules of the vision tower .* no image or video \(they hold: audio, text\)"
    ):
        check_plan_against_data(plan, {"text", "audio"})


def test_training_a_tower_on_text_is_refused(make_config: Any) -> None:
    from forgekit import load_data, sft_trainer

    config = make_config({"adapter.layers": ["attention", "vision"]})
    model, processor = load_model(config)
    run, data = start_run(config, "text"), load_data(config, processor)
    with pytest.raises(ConfigError, match="the training rows hold no image or video"):
        sft_trainer(add_adapter(model, config), processor, data, config, run)


def test_the_plan_in_the_run_folder_reads_back_equal(make_config: Any) -> None:
    config = make_config({"adapter.layers": ["mlp", "vision"], "adapter.modules_to_save": ["altup.correction_coefs"]})
    run = start_run(config, "planned")
    model = load_model(config)[0]
    plan = plan_layers(config, model)
    add_adapter(model, config, run)
    again = read_plan(run.path / "plan.json")
    assert again == plan and repr(again) == repr(plan)
    check_plan(again, None, config)


def test_a_plan_of_another_model_names_what_vanished(make_config: Any, tmp_path: Path) -> None:
    plan = plan_released(make_config, "E4B", layers=["mlp"])
    with pytest.raises(ConfigError) as caught:
        check_plan(plan, make_released_config("E2B"), make_config())
    text = str(caught.value)
    assert "15 modules of the plan are not in this model: model.language_model.layers.30.mlp.gate_proj" in text
    assert "90 modules of the plan have another shape" in text
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        read_plan(tmp_path / "none.json")
    for wrong in ("no json", "[]", json.dumps({"format": 99}), json.dumps({"format": 1, "modules": 3})):
        (tmp_path / "plan.json").write_text(wrong)
        with pytest.raises(ConfigError, match=r"plan\.json: this is no plan of format 1"):
            read_plan(tmp_path / "plan.json")


def test_the_table_has_a_row_a_group_and_adds_up(make_config: Any) -> None:
    plan = plan_released(make_config, "E4B", layers=["attention", "mlp", "audio"], rank_pattern={"audio_projector": 2})
    table = plan.table()
    assert list(table["group"]) == ["attention", "mlp", "audio_subsampling", "audio_conformer", "audio_projector"]
    assert list(table["modules"]) == [110, 105, 1, 132, 1]
    assert table["r"].iloc[-1] == 2 and table["layers"].iloc[0] == "0-34"
    assert sum(int(text.replace(",", "")) for text in table["parameters"]) == plan.parameters
    assert "use those of 18-19" in plan.notes[0]
    for shown in (repr(plan), plan._repr_html_()):
        assert f"{plan.parameters:,}" in shown and "audio_conformer" in shown


def test_a_rank_above_a_matrix_is_noted(make_config: Any) -> None:
    assert any(
        "fewer rows or columns than their rank" in note
        for note in plan_released(make_config, "E2B", layers=["altup"]).notes
    )


def test_a_plan_is_made_fast_enough_for_every_click(make_config: Any) -> None:
    config, shapes = (
        make_config({"adapter.layers": ["attention", "mlp", "vision_tower", "audio"]}),
        build_shapes(make_released_config("E4B")),
    )
    plan_layers(config, shapes)
    started = time.process_time()
    plan_layers(config, shapes)
    assert time.process_time() - started < 0.1
