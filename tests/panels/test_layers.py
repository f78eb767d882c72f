"""The layer panel: clicks and typed ranges change the plan that is shown, and untouched it changes nothing."""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forgekit import LayerPanel, load_config
from forgekit.adapter.plan import plan_layers
from forgekit.errors import ConfigError
from forgekit.hardware import GIB
from forgekit.model import shapes
from forgekit.model.shapes import Shapes, build_shapes, make_released_config
from forgekit.panels import view
from forgekit.panels.layer_widgets import LayerWidgets
from forgekit.panels.presets import PRESETS
from forgekit.panels.totals import Totals, describe_change


@pytest.fixture(scope="module")
def large() -> Shapes:
    return build_shapes(make_released_config("E4B"))


@pytest.fixture
def panel(make_config: Any, large: Shapes) -> LayerPanel:
    return LayerPanel(make_config({"adapter.rank_pattern": {"mlp": 4}}), large)


@pytest.fixture
def widgets(panel: LayerPanel) -> LayerWidgets:
    return panel.widget and panel._widget


def press(widgets: LayerWidgets, label: str) -> None:
    buttons = widgets.controls.box.children[0].children
    next(button for button in buttons if button.description == label).click()


def find_row(widgets: LayerWidgets, label: str) -> Any:
    return next(row for row in widgets.rows.rows if row.node.label == label)


def count_learning(panel: LayerPanel) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in panel.plan.modules:
        counts[module.group] = counts.get(module.group, 0) + 1
    return counts


def test_untouched_it_changes_nothing(panel: LayerPanel, widgets: LayerWidgets) -> None:
    assert panel.config is panel.given
    assert panel.preview.modules == panel.plan.modules == plan_layers(panel.given, panel.shapes).modules
    press(widgets, "Audio")
    press(widgets, "As given")
    assert panel.config is panel.given


def test_a_click_on_a_layer_takes_it_out_and_a_second_one_brings_it_back(
    panel: LayerPanel, widgets: LayerWidgets
) -> None:
    widgets.strip.cells[20].click()
    assert panel.config.adapter.layers_to_transform == "0-19,21-34"
    assert panel.config.origin("adapter.layers_to_transform") == "panel"
    assert widgets.strip.cells[20].description == "20\ns ○"
    assert widgets.strip.field.value == "0-19,21-34"
    assert "-5 modules" in widgets.change.value  # q, o, gate, up, down: layer 20 shares its keys and values
    widgets.strip.cells[20].click()
    assert panel.config is panel.given


def test_a_change_too_small_to_be_shown_has_no_minus() -> None:
    before = Totals(2, 200, 1000, 800, 2.0 * GIB)
    assert describe_change(before, replace(before, modules=1, memory=2.0 * GIB - 1000, file=790)) == (
        "-1 modules · +0 parameters · file +0.0 MB · memory +0.00 GiB"
    )


def test_a_typed_range_is_what_learns(panel: LayerPanel, widgets: LayerWidgets) -> None:
    widgets.strip.field.value = "last 3, 4"
    assert panel.config.adapter.layers_to_transform == "4,32-34"
    assert [i for i, cell in widgets.strip.cells.items() if "fk-on" in cell._dom_classes] == [4, 32, 33, 34]
    widgets.strip.field.value = "3-99"
    assert "layers 0 to 34" in widgets.strip.message.value
    assert panel.config.adapter.layers_to_transform == "4,32-34"


def test_a_box_of_which_a_part_is_on_switches_all_of_it_on(panel: LayerPanel, widgets: LayerWidgets) -> None:
    language = find_row(widgets, "language")
    assert (language.check.value, language.check._dom_classes) == (False, ("fk-part",))
    language.toggle()
    find_row(widgets, "mlp").check.value = False
    assert count_learning(panel) == {"attention": 110}
    language.check.value = True
    assert {"attention", "mlp", "laurel", "altup", "per_layer", "embeddings"} < count_learning(panel).keys()
    assert "fk-part" not in language.check._dom_classes


def test_one_projection_of_one_layer_can_be_left_out(panel: LayerPanel, widgets: LayerWidgets) -> None:
    for label in ("language", "attention", "layer 7"):
        find_row(widgets, label).toggle()
    find_row(widgets, "self_attn.k_proj").check.value = False
    assert len(panel.plan.modules) == 214
    assert not any("layers.7.self_attn.k_proj" in module.name for module in panel.plan.modules)
    assert widgets.strip.cells[7].description == "7\nS ◐"
    assert find_row(widgets, "layer 7").check._dom_classes == ("fk-part",)


def test_a_rank_counts_for_what_stands_below_it(panel: LayerPanel, widgets: LayerWidgets) -> None:
    find_row(widgets, "language").toggle()
    assert find_row(widgets, "mlp").rank.value == 4
    find_row(widgets, "attention").rank.value = 32
    assert panel.config.adapter.rank_pattern == {"attention": 32, "mlp": 4}
    widgets.controls.r.value = 32
    assert (panel.config.adapter.r, panel.config.adapter.rank_pattern) == (32, {"mlp": 4})


@pytest.mark.parametrize(
    ("key", "modules"),
    [("text", 215), ("attention", 110), ("last", 40), ("vision", 237), ("audio", 134), ("everything", 838)],
)
def test_presets_choose_what_they_say(panel: LayerPanel, widgets: LayerWidgets, key: str, modules: int) -> None:
    press(widgets, PRESETS[key].label)
    assert len(panel.plan.modules) == modules
    assert panel.preview.modules == panel.plan.modules
    assert f"{modules:,} modules learn" in widgets.totals.value


def test_unsloths_notebook_trains_as_many_parameters_as_it_does_there(panel: LayerPanel, widgets: LayerWidgets) -> None:
    press(widgets, "Unsloth's notebook")
    assert panel.plan.parameters == 18_595_840  # E4B, r 8, attention and MLP
    assert (panel.config.adapter.r, panel.config.adapter.lora_alpha) == (8, 8)


def test_what_cannot_learn_is_said_beside_it(widgets: LayerWidgets) -> None:
    find_row(widgets, "language").toggle()
    find_row(widgets, "vision").toggle()
    assert "Layers 20-34 have no keys and values" in find_row(widgets, "attention").text.value
    assert "grouped convolutions in here cannot learn" in find_row(widgets, "vision_stage3").text.value
    find_row(widgets, "altup").check.value = True
    assert "fewer rows or columns than their rank" in find_row(widgets, "altup").text.value


def test_nothing_chosen_is_said_and_refused(panel: LayerPanel, widgets: LayerWidgets) -> None:
    widgets.strip.field.value = ""
    assert "nothing would learn" in widgets.problems.value and widgets.totals.value == ""
    with pytest.raises(ConfigError, match="nothing would learn"):
        panel.config  # noqa: B018
    assert "nothing would learn" in repr(panel)
    press(widgets, "Text only")
    assert widgets.problems.value == ""


def test_a_config_that_cannot_learn_is_shown_with_the_reason(make_config: Any, large: Shapes) -> None:
    panel = LayerPanel(make_config({"adapter.target_modules": r".*layers\.30\.self_attn\.k_proj"}), large)
    assert "asks for keys or values of layers 30" in repr(panel)
    assert "asks for keys or values" in (panel.widget and panel._widget.problems.value)
    assert panel.config is panel.given


def test_the_recipe_reproduces_the_choice(panel: LayerPanel, widgets: LayerWidgets, tmp_path: Path) -> None:
    press(widgets, "Last n layers")
    widgets.show_recipe.value = True
    text = panel.to_yaml(tmp_path / "mine.yaml")
    assert repr(text) == text == (tmp_path / "mine.yaml").read_text()
    assert "layers_to_transform: 27-34" in widgets.recipe.value
    assert plan_layers(load_config(tmp_path / "mine.yaml"), panel.shapes).modules == panel.plan.modules


def test_memory_is_compared_with_the_chosen_card(panel: LayerPanel, widgets: LayerWidgets) -> None:
    widgets.controls.card.value = "RTX 3060 12 GB"
    assert "GiB too much" in widgets.memory.value and "fk-warning" in widgets.memory.value
    widgets.controls.card.value = "H100 80 GB"
    assert "fits" in widgets.memory.value and "(H100 80 GB)" in repr(panel)


def test_full_training_offers_no_layers(make_config: Any, large: Shapes) -> None:
    panel = LayerPanel(make_config({"model.load_in": "full", "export.formats": ["merged"]}), large)
    assert panel.config is panel.given
    assert "no layers to choose" in "".join(getattr(child, "value", "") for child in panel.widget.children[:2])


def test_every_field_has_a_name(widgets: LayerWidgets) -> None:
    find_row(widgets, "language").toggle()
    fields = [row.check for row in widgets.rows.rows] + [row.rank for row in widgets.rows.rows]
    controls = widgets.controls
    fields += [controls.number, controls.r, controls.alpha, controls.card, widgets.strip.field]
    assert all(field.description for field in fields)


def test_a_notebook_gets_the_widget_and_a_text(panel: LayerPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    headless = panel._repr_mimebundle_()
    assert headless.keys() == {"text/plain", "text/html"} and panel._widget is None
    monkeypatch.setattr(view, "has_front_end", lambda: True)
    bundle = panel._repr_mimebundle_()
    assert bundle[view.WIDGET]["model_id"] == panel.widget.model_id
    assert "215 modules learn" in bundle["text/plain"]


def test_without_a_front_end_no_widget_is_needed(panel: LayerPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "forgekit.panels.layer_widgets")
    panel.selection.set_layers("0-9")
    assert "0-9" in repr(panel) and "layers_to_transform: 0-9" in panel.to_yaml()
    with pytest.raises(ImportError):  # so nothing above asked for it
        panel.widget  # noqa: B018


def test_it_is_quick_for_e4b(make_config: Any, large: Shapes) -> None:
    """Processor time, which a busy machine does not change: built in 2 s from the config, a click answered in 100 ms."""
    config, settings = make_config(), make_released_config("E4B")
    shapes.build_once.cache_clear()
    start = time.process_time()
    panel = LayerPanel(config, settings)
    assert panel.widget and time.process_time() - start < 2
    times = []
    for layer in range(12):
        start = time.process_time()
        panel._widget.strip.cells[layer].click()
        times.append(time.process_time() - start)
    assert statistics.median(times) < 0.1
