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


def test_nothing_sends_the_table_to_the_gpu(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own calls are noted where a GPU would take the weights; a map that names the whole model takes the table along."""
    import accelerate
    import torch
    from accelerate import hooks
    from transformers import AutoConfig, Gemma3nForConditionalGeneration

    from forgekit.model.table import find_table, place_beside_table, settle_table

    move, sent = hooks.set_module_tensor_to_device, []

    def note(module: Any, name: str, device: Any, **settings: Any) -> None:
        if device == 0:
            owner, _, leaf = name.rpartition(".")
            sent.append((module.get_submodule(owner), leaf))
        else:
            move(module, name, device, **settings)

    monkeypatch.setattr(hooks, "set_module_tensor_to_device", note)
    settings = AutoConfig.from_pretrained(tiny_folder)
    plain = Gemma3nForConditionalGeneration.from_pretrained(tiny_folder)
    name = str(find_table(plain))
    ids = torch.arange(300, 340)[None]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
    for places in (place_beside_table(type(plain), settings, 0), {"": 0, name: "cpu"}):
        sent.clear()
        model = Gemma3nForConditionalGeneration.from_pretrained(tiny_folder)
        table = model.get_submodule(name)
        accelerate.dispatch_model(model, places)
        weights = {
            (module, leaf)
            for module in model.modules()
            for leaf, weight in module._parameters.items()
            if weight is not None
        }
        assert weights - {*sent} == (set() if "" in places else {(table, "weight")})
        settle_table(model, torch.device("cpu"))
        assert not any(hasattr(module, "_hf_hook") for module in model.modules()) and "forward" in vars(table)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)
    settle_table(plain, torch.device("meta"))
    assert {b.device.type for b in plain.buffers()} == {"meta"} and {p.device.type for p in plain.parameters()} == {"cpu"}  # fmt: skip


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
