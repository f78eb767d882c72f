"""What the panel writes chooses exactly what was selected: random selections, through the recipe's text and back."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_config
from forgekit.adapter.plan import find_shapes, plan_layers
from forgekit.config import Config
from forgekit.model.shapes import Shapes, build_shapes, make_released_config
from forgekit.panels.expression import write_expression, write_numbers
from forgekit.panels.selection import Selection, make_selection
from forgekit.panels.write import change_config, write_recipe


@pytest.fixture(scope="module")
def large() -> Shapes:
    return build_shapes(make_released_config("E4B"))


def pick_randomly(selection: Selection, chance: random.Random) -> None:
    """Groups in some layers with ranks by group, then in two of three cases finer changes that no group can say."""
    candidates = [*selection.candidates.values()]
    groups = sorted({c.group for c in candidates if not c.whole})
    some = chance.sample(groups, chance.randint(1, len(groups)))
    layers = set(chance.sample(sorted(selection.by_layer), chance.randint(1, len(selection.by_layer))))
    names = selection.find(lambda c: c.group in some and (c.layer is None or c.layer in layers))
    selection.replace(names or selection.find_groups(["attention"]))
    for group in chance.sample(groups, chance.randint(0, len(groups))):
        selection.set_rank(selection.find_groups([group]), chance.choice([1, 4, 8, 32]))
    if chance.random() < 0.3:
        selection.choose(selection.find_groups(["embeddings"]), True)
    if chance.random() < 0.66:
        selection.choose(chance.sample(sorted(selection.candidates), 7), chance.random() < 0.7)
        selection.set_rank(chance.sample(sorted(selection.candidates), 30), chance.choice([2, 64]))
    if all(selection.candidates[name].whole for name in selection.chosen):
        selection.choose(selection.find_groups(["mlp"]), True)


def expect(selection: Selection) -> dict[str, int | None]:
    whole = {name: selection.candidates[name].whole for name in selection.chosen}
    return {name: None if whole[name] else selection.rank(name) for name in selection.chosen}


def replay(config: Config, file: Path) -> Config:
    """Write a config as a recipe and read it as `forgekit run` would."""
    file.write_text(write_recipe(config, "a comment\nof two lines"), encoding="utf-8")
    return load_config(file)


BASES: list[dict[str, Any]] = [
    {},
    {
        "adapter.layers_to_transform": "last 3",
        "adapter.rank_pattern": {"attention": 4},
        "adapter.alpha_pattern": {"mlp": 3.0},
    },
    {"adapter.target_modules": r".*layers\.\d\.mlp\.up_proj", "adapter.use_dora": True},
    {"adapter.layers": ["attention"], "adapter.modules_to_save": ["altup.prediction_coefs"]},
]


@pytest.mark.parametrize("number", range(len(BASES)))
def test_a_recipe_from_the_panel_trains_what_was_selected(
    make_config: Any, large: Shapes, tmp_path: Path, number: int
) -> None:
    config = make_config({**BASES[number], "adapter.r": 16})
    for model in (find_shapes(config), large):
        for seed in range(5):
            selection = make_selection(config, model, 4)
            pick_randomly(selection, random.Random(f"{number} {seed}"))
            changed = change_config(config, selection, model)
            plan = plan_layers(replay(changed, tmp_path / "panel.yaml"), model)
            locked = {m.name for m in plan.modules if m.name not in selection.candidates}
            assert {m.name: m.r for m in plan.modules if m.name not in locked} == expect(selection), seed
            assert len(locked) == (len(model.layer_types) if number == 3 else 0)


def test_groups_and_layers_are_written_as_such(make_config: Any, large: Shapes) -> None:
    config = make_config()
    selection = make_selection(config, large, 4)
    selection.replace(selection.find_groups(["attention", "mlp", "audio"]))
    selection.set_layers("0-9,20")
    selection.set_rank(selection.find_groups(["audio"]), 4)
    adapter = change_config(config, selection, large).adapter
    assert adapter.layers == ("attention", "mlp", "audio")
    assert (adapter.layers_to_transform, adapter.target_modules) == ("0-9,20", None)
    assert adapter.rank_pattern == {"audio": 4}


def test_finer_choices_are_one_short_expression(make_config: Any, large: Shapes) -> None:
    config = make_config()
    selection = make_selection(config, large, 4)
    selection.replace(selection.find(lambda c: c.part == "self_attn.q_proj"))
    selection.choose(selection.find(lambda c: c.part == "mlp.up_proj" and (c.layer or 0) < 12), True)
    changed = change_config(config, selection, large)
    assert len(str(changed.adapter.target_modules)) < 150
    assert changed.origin("adapter.target_modules") == "panel"
    assert changed.origin("adapter.layers") == "default"


def test_only_what_changed_gets_the_origin_panel(make_config: Any, large: Shapes) -> None:
    config = make_config({"adapter.layers": ["attention"]})
    selection = make_selection(config, large, 4)
    selection.r = 4
    changed = change_config(config, selection, large)
    assert [name for name in ("layers", "r", "lora_alpha") if changed.origin(f"adapter.{name}") == "panel"] == ["r"]


def test_an_expression_that_would_match_more_becomes_whole_names() -> None:
    known = ["model.language_model.gate", "model.other.language_model.gate"]
    assert write_expression(known[:1], known) == re.escape(known[0])


@pytest.mark.parametrize("seed", range(20))
def test_numbers_are_matched_exactly(seed: int) -> None:
    chance = random.Random(seed)
    numbers = set(chance.sample(range(130), chance.randint(1, 100)))
    expression = write_numbers(numbers)
    assert {n for n in range(1200) if re.fullmatch(expression, str(n))} == numbers


def test_numbers_are_written_as_ranges() -> None:
    assert write_numbers(range(35)) == r"(?:\d|[12]\d|3[0-4])"
    assert write_numbers([7]) == "7"
