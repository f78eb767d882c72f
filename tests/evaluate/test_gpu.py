"""On a GPU: bfloat16 losses by both ways, 8-bit and 4-bit perplexities, and the base of a 4-bit model under its adapter."""

from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, evaluate_model, load_model, measure_precisions, score_baseline, start_run
from forgekit.evaluate.fingerprint import fingerprint_model
from forgekit.evaluate.loss import measure_rows, sum_losses
from forgekit.train import score

from .test_answers import make_rows

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(make_config: Any) -> Any:
    return lambda settings: make_config(
        {"model.device": "cuda", "evaluate.rows": 6, "evaluate.max_new_tokens": 4, **settings}
    )


def test_losses_by_both_ways_agree_in_bfloat16(on_gpu: Any) -> None:
    config = on_gpu({"model.load_in": "16bit"})
    model, processor = load_model(config)
    chats = [row["messages"] for row in make_rows(6, "Monday at the latest")]
    expected = measure_rows(model, processor, chats, sum_losses)
    with score.open_losses(model, config) as losses:
        assert losses is not sum_losses
        found = measure_rows(model, processor, chats, losses)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=2e-2)


def test_every_precision_has_a_perplexity(on_gpu: Any, tiny_folder: Path) -> None:
    config = on_gpu({"model.load_in": "16bit"})
    model, processor = load_model(config)
    found = measure_precisions(model, processor, make_rows(6), config, tiny_folder)
    values = {one.name: one.perplexity for one in found.found}
    assert None not in values.values(), found
    assert all(value == pytest.approx(found.found[0].perplexity, rel=0.2) for value in values.values())


def test_the_base_of_a_4_bit_model_is_scored_under_its_adapter(on_gpu: Any) -> None:
    import torch

    config = on_gpu({"model.load_in": "4bit"})
    model, processor = load_model(config)
    base = evaluate_model(model, processor, make_rows(6), config)
    model = add_adapter(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = score_baseline(model, processor, make_rows(6), config, start_run(config, "first"))
    assert before.key == base.key and before.loss == pytest.approx(base.loss, rel=1e-2)
    assert fingerprint_model(model) != base.key["model"]
