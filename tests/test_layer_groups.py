"""Names of groups and choices of decoder layers, by hand-made names and a layer pattern like Gemma 3n's."""

import re

import pytest

from forgekit.layer_groups import (
    GROUPS,
    SETS,
    check_layers,
    describe_groups,
    expand_groups,
    find_group,
    find_layers_by_kind,
    find_tower,
    resolve_layers,
    write_group_regex,
    write_ranges,
)

E4B = (["sliding_attention"] * 4 + ["full_attention"]) * 7, 15
TEXT = "model.language_model"


@pytest.mark.parametrize(
    ("name", "group", "tower"),
    [
        (f"{TEXT}.layers.3.self_attn.k_proj", "attention", "language"),
        ("model.layers.3.self_attn.k_proj", "attention", "language"),
        (f"{TEXT}.layers.3.mlp.down_proj", "mlp", "language"),
        (f"{TEXT}.layers.3.laurel.linear_left", "laurel", "language"),
        (f"{TEXT}.layers.3.altup.modality_router", "altup", "language"),
        (f"{TEXT}.altup_unembed_projections.2", "altup", "language"),
        (f"{TEXT}.layers.3.per_layer_input_gate", "per_layer", "language"),
        (f"{TEXT}.per_layer_model_projection", "per_layer", "language"),
        (f"{TEXT}.embed_tokens", "embeddings", "language"),
        (f"{TEXT}.embed_tokens_per_layer", "per_layer_embeddings", "language"),
        ("model.vision_tower.timm_model.blocks.1.2.pw_exp.conv", "vision_stage2", "vision"),
        ("model.vision_tower.timm_model.blocks.1.2.dw_start.conv", None, "vision"),
        ("model.vision_tower.timm_model.conv_stem.conv", "vision_stem", "vision"),
        ("model.embed_vision.embedding_projection", "vision_projector", "vision"),
        ("model.audio_tower.conformer.4.attention.attn.q_proj", "audio_conformer", "audio"),
        ("model.audio_tower.conformer.4.lconv1d.depthwise_conv1d", None, "audio"),
        ("model.audio_tower.subsample_conv_projection.input_proj_linear", "audio_subsampling", "audio"),
        ("model.embed_audio.embedding_projection", "audio_projector", "audio"),
        # another family's picture tower has layers with the language model's names
        ("model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj", None, "vision"),
        (f"{TEXT}.layers.3.input_layernorm", None, "language"),
        ("lm_head", None, "language"),
    ],
)
def test_a_module_belongs_to_one_group_at_most(name: str, group: str | None, tower: str) -> None:
    assert (find_group(name), find_tower(name)) == (group, tower)
    assert [g for g in GROUPS if re.fullmatch(write_group_regex(g), name)] == ([group] if group else [])


def test_sets_expand_once_in_the_order_of_the_table() -> None:
    assert expand_groups(("audio", "mlp", "attention", "audio_projector")) == (
        "attention",
        "mlp",
        "audio_subsampling",
        "audio_conformer",
        "audio_projector",
    )
    with pytest.raises(KeyError, match="atention"):
        expand_groups(("atention",))


def test_the_help_names_every_choice() -> None:
    assert [name for name in (*GROUPS, *SETS) if name not in describe_groups()] == []


def test_kinds_of_layers_are_those_of_the_released_models() -> None:
    kinds = find_layers_by_kind(*E4B)
    assert kinds["full"] == (4, 9, 14, 19, 24, 29, 34)
    assert (kinds["kv_source"], kinds["kv_shared"]) == ((18, 19), tuple(range(20, 35)))
    assert len(kinds["sliding"]) == 28
    plain = find_layers_by_kind(["full_attention"] * 4, 0)
    assert (plain["kv_source"], plain["kv_shared"]) == ((), ())


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ("0-2,20", (0, 1, 2, 20)),
        ("last 3", (32, 33, 34)),
        ("full", (4, 9, 14, 19, 24, 29, 34)),
        ("kv_source,0", (0, 18, 19)),
        ("5,5,4-6", (4, 5, 6)),
    ],
)
def test_layers_are_resolved(choice: str, layers: tuple[int, ...]) -> None:
    assert resolve_layers(choice, *E4B) == layers
    assert resolve_layers(write_ranges(layers), *E4B) == layers


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("0-99", "asks for layer 35, and the model has layers 0 to 34"),
        ("last 40", "asks for layer -5"),
        ("9-3", "no layer"),
    ],
)
def test_layers_that_the_model_lacks_are_named(choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layers(choice, *E4B)


@pytest.mark.parametrize(
    ("value", "text"), [(5, "5"), ([0, 1, "20-24"], "0,1,20-24"), ("0-9, last  2", "0-9,last 2"), (None, None)]
)
def test_a_choice_is_kept_as_text(value: object, text: str | None) -> None:
    assert check_layers(value) == text


@pytest.mark.parametrize("value", [1.5, True, "0..9", "middle", "last 0", "", [[1]], "-3"])
def test_a_choice_of_no_known_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="numbers and ranges"):
        check_layers(value)


def test_layers_narrow_the_decoder_alone() -> None:
    pattern = write_group_regex("per_layer", (3, 4))
    assert re.fullmatch(pattern, f"{TEXT}.layers.3.per_layer_projection")
    assert not re.fullmatch(pattern, f"{TEXT}.layers.13.per_layer_projection")
    assert re.fullmatch(pattern, f"{TEXT}.per_layer_model_projection")
