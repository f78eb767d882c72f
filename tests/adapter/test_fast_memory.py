"""The estimate for the fast path against peaks that were measured on a GPU, and what hangs on its settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_config
from forgekit.adapter.fast_memory import FastStep, choose_fast_step, find_parked
from forgekit.adapter.memory import estimate_memory
from forgekit.adapter.plan import plan_layers
from forgekit.hardware import GIB
from forgekit.model.shapes import Shapes, build_shapes, make_released_config

ROOT = Path(__file__).parents[2]
MEASURED = [
    json.loads(line) for line in (ROOT / "benchmarks/fast_memory.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def released() -> dict[str, Shapes]:
    return {size: build_shapes(make_released_config(size.upper())) for size in ("e2b", "e4b")}


def make(**settings: Any) -> Any:
    names = {name.replace("__", "."): value for name, value in settings.items()}
    return load_config(None, {"model.engine": "huggingface", **names})


def test_every_measured_peak_is_met(released: dict[str, Shapes]) -> None:
    """35 peaks: E2B and E4B, 16 and 4 bit, 1,024 to 16,384 tokens, a tenth to all of them learned, compiled and not."""
    ratios = []
    for row in MEASURED:
        config = make(
            model__load_in=row["load_in"], model__offload_ple="on" if row["park"] else "off", model__max_length=row["tokens"],
            train__fast="on", train__memory=row["memory"], train__compile="on" if row["compiled"] else "off",
            train__per_device_train_batch_size=row["rows"], train__gradient_accumulation_steps=1, train__optim="adamw_torch",
            adapter__r=8,
        )  # fmt: skip
        shapes = released[row["size"]]
        media = {} if row["park"] else {"images": 1, "clips": 1}  # then the towers are on the GPU too
        found = estimate_memory(plan_layers(config, shapes), config, shapes, learned=row["learned"], **media)
        ratios.append((found.peak - found.towers) / GIB / row["peak_gib"])
    assert len(ratios) == 35
    assert min(ratios) > 0.95 and max(ratios) < 1.05, ratios


def test_it_runs_where_training_runs_it() -> None:
    assert choose_fast_step(make(train__fast="off"), "huggingface") is None
    low = FastStep("low", False, True)
    assert choose_fast_step(make(), "huggingface") == choose_fast_step(make(model__dtype="bfloat16"), "unsloth") == low
    assert choose_fast_step(make(), "unsloth") is choose_fast_step(make(model__dtype="float16"), "unsloth") is None
    high = make(train__memory="high", train__compile="on", model__load_in="16bit")
    assert choose_fast_step(high, "huggingface") == FastStep("high", True, False)


def test_what_waits_elsewhere_follows_settings_and_media() -> None:
    fast = FastStep("low", False, True)
    assert find_parked(make(train__memory="low"), fast, 0, 1) == ("vision_tower", "embed_tokens_per_layer")
    assert find_parked(make(model__offload_ple="off", train__memory="low"), fast, 1, 1) == ()


def test_weights_that_wait_must_still_be_loaded(released: dict[str, Shapes]) -> None:
    """Unless they never come to the GPU, which is what the recipe for 8 GB is about."""
    shapes = released["e2b"]
    settings = {"model__load_in": "4bit", "train__fast": "on", "train__memory": "low", "model__max_length": 512, "train__per_device_train_batch_size": 1}  # fmt: skip
    totals = {}
    for switch in ("auto", "on"):
        config = make(model__offload_ple=switch, **settings)
        found = estimate_memory(plan_layers(config, shapes), config, shapes)
        totals[switch] = found.total / GIB
        assert found.peak / GIB < 4.5
    assert totals["auto"] > 8 > totals["on"]
