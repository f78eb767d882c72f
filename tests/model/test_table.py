"""The per-layer table outside of the GPU: the same rows, the same answers, and no hook that sends all of it."""

from typing import Any

import pytest


def test_a_lent_table_answers_bit_for_bit_and_goes_back() -> None:
    import torch
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextScaledWordEmbedding

    from forgekit.model.table import lend_table

    table = Gemma3nTextScaledWordEmbedding(20, 6, 0, embed_scale=2.5).requires_grad_(False)
    ids = torch.tensor([[5, 9, 5, 7], [9, 9, 1, 0]])
    before = table(ids)
    with lend_table(table, torch.device("cpu")):
        assert "forward" in vars(table) and torch.equal(table(ids), before)
    assert "forward" not in vars(table)


@pytest.mark.gpu
@pytest.mark.parametrize("load_in", ["16bit", "4bit"])
def test_a_model_loaded_without_its_table_on_the_gpu_answers_as_before(
    make_config: Any, load_in: str, capsys: Any
) -> None:
    import torch

    from forgekit import load_model
    from forgekit.evaluate.generate import generate_answers

    models = {}
    for switch in ("off", "on"):
        config = make_config({"model.offload_ple": switch, "model.load_in": load_in, "model.device": "cuda", "model.id": "tiny"})  # fmt: skip
        models[switch] = load_model(config)
    plain, lent = models["off"][0], models["on"][0]
    table = lent.model.language_model.embed_tokens_per_layer
    assert table.weight.device.type == "cpu" and plain.model.language_model.embed_tokens_per_layer.weight.is_cuda
    assert not any(hasattr(module, "_hf_hook") for module in lent.modules()) and lent.device.type == "cuda"
    ids = torch.arange(300, 340, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, lent(input_ids=ids).logits)
    chat = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "Two teas."), ("assistant", ""))
    ]
    answers = {switch: generate_answers(model, processor, [chat], 8) for switch, (model, processor) in models.items()}
    assert answers["on"] == answers["off"]
