"""Shapes without weights: equal to the loaded model's, remembered, and the released sizes known without a network."""

from typing import Any

import pytest

from forgekit import load_model
from forgekit.errors import ModelError
from forgekit.model import shapes
from forgekit.model.shapes import build_shapes, make_released_config, read_config, read_shapes


def test_shapes_of_a_config_are_those_of_the_loaded_model(make_config: Any) -> None:
    model, _ = load_model(make_config())
    loaded, built = read_shapes(model), build_shapes(model.config)
    assert built.modules == loaded.modules
    assert (built.layer_types, built.shared_layers, built.tied) == (loaded.layer_types, 2, True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(number for module in loaded.modules for _, number in module.parameters) == parameters


def test_the_same_config_is_built_once(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = read_config(make_config())
    first = build_shapes(settings)
    monkeypatch.setattr(shapes, "read_shapes", None)
    assert build_shapes(settings).modules is first.modules
    with pytest.raises(TypeError):  # another one has to be built
        settings.text_config.intermediate_size = [48] * 4
        build_shapes(settings)


@pytest.mark.parametrize(("name", "layers"), [("unsloth/gemma-3n-E2B-it", 30), ("google/gemma-3n-E4B", 35)])
def test_released_sizes_are_known_offline_and_said_to_be(make_config: Any, name: str, layers: int) -> None:
    settings, source = read_config(make_config({"model.id": name}))
    assert settings.text_config.num_hidden_layers == layers
    assert (
        source
        == f"the released sizes of Gemma 3n {name[-6:-3] if 'it' in name else name[-3:]} (its config.json is not on this machine)"
    )
    assert (
        build_shapes(make_released_config("E2B" if layers == 30 else "E4B")).modules == build_shapes(settings).modules
    )


def test_an_unknown_model_that_cannot_be_reached_is_refused(make_config: Any) -> None:
    with pytest.raises(ModelError, match="config.json of nobody/nothing cannot be read"):
        read_config(make_config({"model.id": "nobody/nothing"}))
