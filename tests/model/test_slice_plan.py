"""What a slice keeps: E2B out of E4B to the last field, Google's other slices by their size, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from forgekit.config import load_config
from forgekit.errors import ConfigError, ModelError
from forgekit.model.shapes import build_shapes, make_released_config
from forgekit.model.slice_plan import apply_slice, plan_slice
from forgekit.slice_presets import PRESETS, check_slice, describe_presets, read_widths

HALF = 3 * 2048 * 8192  # parameters of half a feed-forward part: gate, up and down


@pytest.fixture(scope="module")
def e4b() -> Any:
    return make_released_config("E4B")


def count_language(settings: Any) -> int:
    """Count the language model's parameters without its two tables, with the keys and values that sharing layers ship."""
    modules = [m for m in build_shapes(settings).modules if "language_model" in m.name and m.kind != "embedding"]
    own = sum(number for module in modules for _, number in module.parameters)
    return own + settings.text_config.num_kv_shared_layers * (2 * 2048 * 512 + 256)


def test_e2b_out_of_e4b_has_the_released_e2b_s_config(e4b: Any) -> None:
    sliced = apply_slice(e4b, check_slice("e2b"), "E4B")
    assert sliced.to_dict() == make_released_config("E2B").to_dict()
    assert e4b.text_config.num_hidden_layers == 35  # a copy was changed


def test_every_preset_has_the_size_that_google_names(e4b: Any) -> None:
    """Google's MatFormer Lab notebook prints 1,905,495,648 for E2B; the names of the others are up to 0.02 off."""
    sizes = {"e2b": count_language(apply_slice(e4b, {"preset": "e2b"}, "E4B"))}
    assert sizes["e2b"] == 1_905_495_648
    whole = count_language(e4b)
    assert round(whole / 1e9, 2) == 3.98
    for name in PRESETS:
        plan = plan_slice(e4b.text_config, {"preset": name}, "E4B")
        halves = plan.widths.count(8192)
        assert halves + plan.widths.count(16384) == len(plan.layers) == (30 if plan.skipped else 35)
        size = sizes["e2b"] + (30 - halves) * HALF if plan.skipped else whole - halves * HALF
        assert abs(size / 1e9 - PRESETS[name].billions) <= 0.02, name  # one half more or less is 0.05
        assert f"{PRESETS[name].billions:.2f}" in name or name == "e2b"
        assert name in describe_presets()


def test_layers_and_widths_follow_the_source_s_numbers(e4b: Any) -> None:
    plan = plan_slice(e4b.text_config, {"skip": "20-24", "widths": {"all": 8192, "4,25": 16384}}, "E4B")
    assert plan.layers == (*range(20), *range(25, 35)) and plan.skipped == (20, 21, 22, 23, 24)
    assert [i for i, width in enumerate(plan.widths) if width == 16384] == [4, 20]
    assert plan.shared == 10 and plan.sparsity == (0.95,) * 10 + (0.0,) * 20
    assert str(plan) == "E4B: 30 of 35 layers (without 20-24), 2 of width 16384, 28 of width 8192"
    listed = plan_slice(e4b.text_config, {"skip": "20-24", "widths": list(plan.widths)}, "E4B")
    assert listed == plan


def test_a_slice_that_llama_cpp_cannot_run_says_so(e4b: Any) -> None:
    plan = plan_slice(e4b.text_config, {"skip": "0-4"}, "E4B")
    assert (plan.shared, plan.sparsity[:6]) == (15, (0.95,) * 5 + (0.0,))
    assert (
        "llama.cpp reads Gemma 3n with 20 layers that have keys and values of their own and 10 sparse ones alone"
        in str(plan)
    )
    assert "this slice has 15 and 5, and runs in transformers" in str(plan)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"skip": "18"}, r"layer 18 has to stay, because layers 20-23,25-28,30-33 use its keys and values\."),
        ({"skip": "15-19"}, r"layer 18 has to stay"),
        ({"skip": "19,20-24"}, r"layer 19 has to stay, because layers 29,34 use its keys and values\."),
        (
            {"skip": "3"},
            r"layer 4 has full attention and would become layer 3, where the order .* asks for sliding attention\. ",
        ),
        (
            {"skip": "24"},
            r"layer 25 has sliding attention .* asks for full attention\. Skip whole rounds of 5 layers \(0-4, 5-9",
        ),
        ({"skip": "30-35"}, r"skip 30-35 asks for layer 35, and the model has layers 0 to 34\."),
        ({"skip": "0-34"}, r"no layer would be left\."),
        ({"widths": 32768}, r"layer 0 has width 16384, and 32768 was asked for\. A slice only leaves out\."),
        (
            {"widths": 12288},
            r"width 12288 was asked for layer 0, and .* trained to work at width 8192 and 16384 alone\.",
        ),
        ({"widths": 4096}, r"width 4096 was asked for layer 0, and .* trained to work at width 8192 and 16384 alone\."),
        ({"widths": [8192] * 30}, r"30 widths are named, and 35 layers are kept\. Name one for each of those\."),
        ({"widths": {"40": 8192}}, r"widths 40 asks for layer 40"),
        ({"widths": {"0-4": 8192, "4": 16384}}, r"widths name layer 4 twice, by 0-4 and by 4\."),
        (
            {"widths": 16384},
            r"nothing would be left out\. Name a preset, layers to skip, or widths below the source's\.",
        ),
    ],
)
def test_a_combination_that_would_break_the_model_is_refused(choice: dict, text: str, e4b: Any) -> None:
    with pytest.raises(ModelError, match=f"E4B cannot be sliced so: {text}"):
        plan_slice(e4b.text_config, check_slice(choice), "E4B")


def test_e2b_is_not_sliced_further_by_width(e4b: Any) -> None:
    e2b = make_released_config("E2B").text_config
    with pytest.raises(ModelError, match="the feed-forward parts were trained to work at width 8192 alone"):
        plan_slice(e2b, {"widths": 4096}, "E2B")
    with pytest.raises(ModelError, match="e2b is a slice of Gemma 3n E4B, which has 35 layers, and this has 30"):
        plan_slice(e2b, {"preset": "e2b"}, "E2B")
    assert plan_slice(e2b, {"skip": "last 5"}, "E2B").shared == 5


def test_a_layer_that_was_narrowed_before_is_not_widened() -> None:
    text = make_released_config("E4B").text_config
    text.intermediate_size = [8192] * 10 + [16384] * 25
    with pytest.raises(ModelError, match="layer 4 has width 8192, and 16384 was asked for"):
        plan_slice(text, {"preset": "e3.79b"}, "mine")
    assert plan_slice(text, {"widths": {"10-14": 8192}}, "mine").widths == (8192,) * 15 + (16384,) * 20


def test_another_family_cannot_be_planned() -> None:
    llama = SimpleNamespace(model_type="llama", get_text_config=lambda: SimpleNamespace(model_type="llama"))
    with pytest.raises(ModelError, match="it is of the type llama, and only Gemma 3n"):
        apply_slice(llama, {"preset": "e2b"}, "meta/llama")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ("E2B", {"preset": "e2b"}),
        ({"preset": "e2.54b"}, {"preset": "e2.54b"}),
        (
            {"skip": [20, "21-24"], "widths": {4: 16384, "all": 8192}},
            {"skip": "20,21-24", "widths": {"4": 16384, "all": 8192}},
        ),
    ],
)
def test_the_setting_takes_names_and_mappings(value: Any, expected: dict) -> None:
    assert load_config(None, {"model.slice": value}).model.slice == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("e5b", r"one of e2b, .*, e3\.74b-block \('e5b' is none"),
        ({"layers": "3"}, "a mapping of preset, skip, widths; there is no 'layers' in it"),
        ({"preset": "e2b", "widths": 8192}, "a preset, or skip and widths, not both"),
        ({"skip": "0-"}, "numbers and ranges such as 0-9,20 or last 8"),
        ({"widths": 0}, "a mapping whose widths are one number"),
        ({"widths": {"x": 8192}}, "numbers and ranges such as 0-9,20 or last 8"),
        ({"widths": [8192, "wide"]}, "a list with one a kept layer"),
    ],
)
def test_a_setting_that_is_no_slice_is_refused_with_its_meaning(value: Any, text: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"model\.slice is .* \(from notebook\): it should be .*{text}.* Meaning: load a slice"
    ):
        load_config(None, {"model.slice": value})


def test_widths_of_the_command_line() -> None:
    assert read_widths(["8192"]) == 8192
    assert read_widths(["8192", "16384"]) == [8192, 16384]
    assert read_widths(["8192", "20-24=16384"]) == {"all": 8192, "20-24": 16384}
    assert read_widths(["4=x"]) == {"4": "x"}
