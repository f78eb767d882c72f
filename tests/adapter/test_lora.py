"""What learns: the modules and counts of the large models, the adapter's start, and going on from a saved one."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, count_trainable, load_model, load_processor
from forgekit.adapter.lora import add_peft_adapter
from forgekit.data.collate import Collator
from forgekit.data.messages import check_example
from forgekit.errors import ConfigError, ModelError
from forgekit.model.shapes import make_released_config
from tests.adapter.known import KNOWN, TOTALS


def make_meta_model(name: str) -> Any:
    """Return E4B or E2B at full size without memory: parameters on the meta device have shapes and no values."""
    import torch
    from transformers import Gemma3nForConditionalGeneration

    with torch.device("meta"):
        return Gemma3nForConditionalGeneration(make_released_config(name))


@pytest.mark.parametrize(("name", "layers", "modules", "trainable"), KNOWN)
def test_large_models_learn_the_known_modules_and_counts(
    make_config: Any, name: str, layers: list[str], modules: int, trainable: int
) -> None:
    import torch

    model = make_meta_model(name)
    total = TOTALS[name]
    assert sum(count["total"] for count in count_trainable(model).values()) == total
    with torch.device("meta"):
        learner = add_peft_adapter(model, make_config({"adapter.r": 8, "adapter.layers": layers}))
    counts = count_trainable(learner).values()
    assert sum(count["modules"] for count in counts) == modules
    assert sum(count["trainable"] for count in counts) == trainable
    assert sum(count["total"] for count in counts) == total  # the adapter is no part of the base


def test_layers_with_shared_keys_and_values_get_no_key_and_value_adapter(make_config: Any) -> None:
    config = make_config()
    learner = add_adapter(load_model(config)[0], config)
    found = [name for name, parameter in learner.named_parameters() if parameter.requires_grad and "lora_A" in name]
    for projection, layers in {"q": 4, "k": 2, "v": 2, "o": 4, "gate": 4, "up": 4, "down": 4}.items():
        assert sum(f".{projection}_proj." in name for name in found) == layers
    assert all("language_model" in name for name in found)


def test_only_the_adapter_learns_and_the_counts_are_printed_by_tower(
    make_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"adapter.layers": ["mlp", "vision", "audio"]})
    learner = add_adapter(load_model(config)[0], config)
    learning = {name for name, parameter in learner.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in learner.named_parameters() if "lora_" in name}
    counts, printed = count_trainable(learner), capsys.readouterr().out
    assert counts["language"]["modules"] == 12 and counts["vision"]["modules"] == 1 and counts["audio"]["modules"] > 20
    for tower, count in counts.items():
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"{tower}:"))
        assert f" {count['modules']} modules learn" in line
        assert f" {count['trainable']:,} of " in line and f" {count['total']:,} parameters" in line


def test_the_start_depends_on_the_seed_alone_and_changes_nothing(make_config: Any) -> None:
    import torch

    first, again, other = (read_adapter(make_config({"train.seed": seed})) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert not any(first[name].any() for name in first if "lora_B" in name)


def read_adapter(config: Any) -> dict[str, Any]:
    learner = add_adapter(load_model(config)[0], config)
    return {name: parameter.detach() for name, parameter in learner.named_parameters() if parameter.requires_grad}


def test_scale_follows_alpha_r_and_rslora(make_config: Any) -> None:
    for settings, scale in (
        ({"adapter.r": 4, "adapter.lora_alpha": 8}, 2.0),
        ({"adapter.r": 4, "adapter.lora_alpha": 8, "adapter.use_rslora": True}, 4.0),
    ):
        config = make_config(settings)
        learner = add_adapter(load_model(config)[0], config)
        scales = {module.scaling["default"] for module in learner.modules() if hasattr(module, "lora_A")}
        assert scales == {scale}


def test_full_trains_the_language_model_and_leaves_the_towers(make_config: Any) -> None:
    config = make_config({"model.load_in": "full", "export.formats": ["merged"]})
    counts = count_trainable(add_adapter(load_model(config)[0], config))
    assert counts["language"]["trainable"] == counts["language"]["total"] > 0
    assert counts["vision"]["trainable"] == counts["audio"]["trainable"] == 0
    assert counts["vision"]["total"] and counts["audio"]["total"]


def test_full_with_an_adapter_to_export_is_refused_before_training(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"export.formats asks for adapter, .* Set export.formats: \[merged\]"):
        make_config({"model.load_in": "full", "export.formats": ["adapter", "merged"]})


def test_a_group_that_the_model_lacks_is_refused(make_config: Any) -> None:
    config = make_config({"adapter.layers": ["attention", "vision"]})
    model = load_model(config)[0]
    model.model.embed_vision = None
    with pytest.raises(ConfigError, match="adapter.layers: 'vision' matches no module of Gemma3nForConditional"):
        add_adapter(model, config)


def test_a_model_in_which_nothing_learns_is_refused(make_config: Any) -> None:
    from forgekit.adapter.lora import print_trainable

    model = load_model(make_config())[0].requires_grad_(False)
    with pytest.raises(ModelError, match="Nothing learns"):
        print_trainable(model)


@pytest.fixture
def saved_adapter(make_config: Any, tmp_path: Path) -> tuple[Path, float]:
    """An adapter with weights that matter, on disk, and its loss."""
    import torch

    config = make_config()
    learner = add_adapter(load_model(config)[0], config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in learner.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    learner.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", measure(learner, config)


def measure(model: Any, config: Any) -> float:
    import torch

    chat = check_example({"messages": [{"role": "user", "content": "1 2 3?"}, {"role": "assistant", "content": "4 5"}]})
    with torch.no_grad():
        return float(model(**Collator(load_processor(config))([{"messages": chat}]), use_cache=False).loss)


def test_going_on_from_a_saved_adapter_starts_at_its_loss(make_config: Any, saved_adapter: tuple[Path, float]) -> None:
    folder, loss = saved_adapter
    config = make_config({"adapter.path": str(folder), "train.seed": 99})
    assert measure(add_adapter(load_model(config)[0], config), config) == pytest.approx(loss, abs=1e-6)


def test_an_adapter_that_is_not_loaded_turns_that_check_red(
    make_config: Any, saved_adapter: tuple[Path, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgekit.adapter.lora.load_adapter_weights", lambda *given: None)
    with pytest.raises(AssertionError):
        test_going_on_from_a_saved_adapter_starts_at_its_loss(make_config, saved_adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter.r": 16}, r"adapter\.r is 16, but the adapter in .* was made with 8\. Set it to that"),
        ({"adapter.lora_alpha": 32}, r"adapter\.lora_alpha is 32.*, but the adapter in .* was made with 16"),
        ({"adapter.use_dora": True}, r"adapter\.use_dora is True, but .* was made with False"),
        ({"adapter.use_rslora": True}, r"adapter\.use_rslora is True, but .* was made with False"),
        ({"adapter.layers": ["attention"]}, r"adapter\.layers chooses other modules .* \(48 tensors\)"),
        ({"adapter.layers": ["attention", "mlp", "audio"]}, r"adapter\.layers chooses other modules"),
    ],
)
def test_going_on_with_other_settings_is_refused_with_both_values(
    make_config: Any, saved_adapter: tuple[Path, float], settings: dict[str, Any], message: str
) -> None:
    config = make_config({"adapter.path": str(saved_adapter[0]), **settings})
    with pytest.raises(ConfigError, match=message):
        add_adapter(load_model(config)[0], config)


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_without_an_adapter_is_refused(
    make_config: Any, saved_adapter: tuple[Path, float], missing: str
) -> None:
    (saved_adapter[0] / missing).unlink()
    config = make_config({"adapter.path": str(saved_adapter[0])})
    with pytest.raises(ConfigError, match=rf"holds no adapter \({missing} is missing\)"):
        add_adapter(load_model(config)[0], config)


def test_an_adapter_config_of_an_older_peft_is_accepted(make_config: Any, saved_adapter: tuple[Path, float]) -> None:
    path = saved_adapter[0] / "adapter_config.json"
    saved = json.loads(path.read_text())
    del saved["use_dora"], saved["use_rslora"]
    path.write_text(json.dumps(saved))
    test_going_on_from_a_saved_adapter_starts_at_its_loss(make_config, saved_adapter)
