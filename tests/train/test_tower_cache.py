"""Features of a frozen tower are found again, and nothing else changes."""

from typing import Any

import pytest

from forgekit import add_adapter, load_data, load_model, sft_trainer, start_run
from forgekit.files import read_json
from forgekit.train.tower_cache import TIMED, TowerCache, cache_towers

PICTURES = {"data.path": "sample:digits", "data.validation": 4, "data.test": 4}
SOUND = {"data.path": "sample:tones", "data.validation": 4, "data.test": 4}


class CountedTower:
    """Stands for a tower: doubles its input and counts the items that it was given."""

    def __init__(self) -> None:
        self.items = 0

    def forward(self, values: Any, mask: Any = None) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        self.items += len(values)
        return BaseModelOutput(last_hidden_state=values * 2 + (0 if mask is None else mask.to(values.dtype)))


def test_items_are_computed_once_and_come_back_in_their_places() -> None:
    import torch

    tower = CountedTower()
    cache = TowerCache(tower, timed=TIMED)  # doubling takes no time, so it would give up
    values = torch.arange(12.0).view(4, 3)
    first = cache(values[[0, 1]]).last_hidden_state
    mixed = cache(values[[2, 1, 0, 3]]).last_hidden_state
    assert torch.equal(first, values[[0, 1]] * 2) and torch.equal(mixed, values[[2, 1, 0, 3]] * 2)
    assert tower.items == 4 and (cache.found, cache.computed) == (2, 4)
    mixed += 1  # as the library scales a tower's output in place
    assert torch.equal(cache(values).last_hidden_state, values * 2) and tower.items == 4


def test_another_mask_precision_or_shape_is_another_item() -> None:
    import torch

    values, mask = torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    variants = [[values], [values, mask], [values, ~mask], [values.double()], [torch.ones(1, 3, 1)]]
    cache = TowerCache(CountedTower())
    assert len({cache.make_keys(inputs)[0] for inputs in [[values.double()], *variants]}) == len(variants)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "bool"])
def test_a_fingerprint_depends_on_each_number_and_its_place(dtype: str) -> None:
    """Numbers changed in one bit, moved, or taken from one item to another; and the same item, at another place of another batch."""
    import torch

    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, 5, generator=draw)
    values = values > 0 if dtype == "bool" else values.to(getattr(torch, dtype))
    values[1] = values[0]
    values[1, 3, 4] = ~values[0, 3, 4] if dtype == "bool" else torch.nextafter(values[0, 3, 4], values[0, 3, 4] + 1)
    values[2] = values[0].roll(1, 0)
    cache = TowerCache(CountedTower())
    state = torch.random.get_rng_state()
    keys = cache.make_keys([values])
    assert len(set(keys)) == 3 and torch.equal(state, torch.random.get_rng_state())
    assert cache.make_keys([values[[2, 0]]]) == [keys[2], keys[0]]


def test_larger_items_come_later() -> None:
    """Longer clips than before need more factors; what was kept is found all the same."""
    import torch

    cache = TowerCache(CountedTower(), timed=TIMED)
    for numbers in (3, 5, 3):
        assert torch.equal(cache(torch.ones(1, numbers)).last_hidden_state, torch.full((1, numbers), 2.0))
    assert (cache.found, cache.computed, cache.bytes) == (1, 2, 32)


def test_a_full_store_goes_on_computing() -> None:
    import torch

    tower = CountedTower()
    cache = TowerCache(tower, limit=3 * 4, timed=TIMED)
    values = torch.arange(6.0).view(2, 3)
    for _ in range(2):
        assert torch.equal(cache(values).last_hidden_state, values * 2)
    assert tower.items == 3 and cache.bytes == 12


def test_it_gives_up_where_looking_up_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    clock = iter(range(1000))
    monkeypatch.setattr("forgekit.train.tower_cache.time.perf_counter", lambda: float(next(clock)))
    cache = TowerCache(CountedTower())
    for number in (0, 1, 1, 2):  # it gives up in the third batch, which has found its item
        assert torch.equal(cache(torch.full((1, 3), float(number))).last_hidden_state, torch.full((1, 3), 2.0 * number))
    assert cache.off and "looking up takes 1.5 times what it saves" in str(cache) and not cache.store


@pytest.mark.parametrize(("items", "why"), [(10, "looking up takes 0.6 times what it saves"), (8, None), (None, None)])
def test_it_gives_up_where_the_store_holds_too_little_of_the_data(items: int | None, why: str | None) -> None:
    """A store for two items, when looking up takes an eighth of the tower's time: it pays for a quarter of the data, not for a fifth."""
    import torch

    cache = TowerCache(CountedTower(), limit=2 * 3 * 4, items=items, timed=TIMED, seconds={"hash": 0.12, "tower": 1.0})
    for number in [*range(10)] * 2:
        assert torch.equal(cache(torch.full((1, 3), float(number))).last_hidden_state, torch.full((1, 3), 2.0 * number))
    assert cache.off == why and cache.found == (0 if why else 2)


@pytest.mark.parametrize(("settings", "name", "least"), [(PICTURES, "vision_tower", 8), (SOUND, "audio_tower", 1)])
def test_training_is_the_same_with_it(make_config: Any, settings: dict[str, Any], name: str, least: int) -> None:
    """Two epochs of eight rows: each step's loss is that of a run without a cache, and the second epoch finds the pictures.

    A clip is found only beside a clip as long as the longest of its batch was before: the tower is given the batch's padding.
    """
    losses = {}
    for switch in ("off", "on"):
        changes = {"train.max_steps": 8, "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 1, "train.logging_steps": 1}  # fmt: skip
        config = make_config({**settings, **changes, "train.cache_towers": switch, "model.id": "tiny"})
        model, processor = load_model(config)
        data = load_data(config, processor)
        data["train"] = data["train"].select(range(8))
        run = start_run(config)
        trainer = sft_trainer(add_adapter(model, config), processor, data, config, run)
        trainer.train()
        losses[switch] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        tower = getattr(model.model, name)
        assert "forward" not in vars(tower)
        found = read_json(run.path / "run.json").get("tower_caches")
    assert found and [*found] == [name] and found[name]["off"] is None
    assert found[name]["found"] >= least and found[name]["found"] + found[name]["computed"] == 16
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4) and len(losses["on"]) == 8


def test_a_tower_that_learns_or_draws_is_left_alone(media_model: Any, capsys: Any) -> None:
    import torch

    vision = media_model.model.vision_tower
    with cache_towers(media_model, {"image"}) as caches:
        assert caches == {}
    vision.requires_grad_(False)
    with cache_towers(media_model, {"image", "audio"}) as caches:
        assert [*caches] == ["vision_tower"]
    next(m for m in vision.modules() if isinstance(m, torch.nn.Dropout)).p = 0.1
    with cache_towers(media_model, {"image"}) as caches:
        assert caches == {} and "draws random numbers" in capsys.readouterr().out


@pytest.fixture
def media_model(tiny_folder: Any) -> Any:
    from transformers import Gemma3nForConditionalGeneration

    return Gemma3nForConditionalGeneration.from_pretrained(tiny_folder)
