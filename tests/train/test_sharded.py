"""What sharing weights out asks of the settings, and the pieces of it that need no second process; tests/faults/test_sharded.py has the rest."""

from types import SimpleNamespace
from typing import Any

import pytest

from forgekit import hardware, load_config
from forgekit.errors import ConfigError, RunError

FULL = {"model.load_in": "full", "export.formats": ["merged"]}


def test_an_optimizer_that_knows_no_parts_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.optim: adamw_8bit .* Take one of auto, adamw_torch, adamw_torch_fused"
    ):
        load_config(None, FULL | {"train.gpus": 2, "train.optim": "adamw_8bit"})
    load_config(None, FULL | {"train.optim": "adamw_8bit"})
    load_config(None, {"train.gpus": 2, "train.optim": "adamw_8bit"})


def test_auto_is_an_optimizer_that_knows_parts() -> None:
    found = [
        hardware.choose_optimizer(load_config(None, settings | {"train.gpus": gpus}), device)
        for settings in (FULL, {"model.load_in": "16bit"})
        for gpus in (1, 2)
        for device in ("cuda", "cpu")
    ]
    eight, whole, fused = "adamw_8bit", "adamw_torch", "adamw_torch_fused"
    assert found == [eight, whole, fused, whole, eight, whole, eight, whole]


def test_a_checkpoint_of_another_auto_is_another_training(monkeypatch: pytest.MonkeyPatch, small: Any) -> None:
    from forgekit.train import identity

    def name(gpus: int, **settings: Any) -> str:
        config = load_config(None, FULL | {"train.gpus": gpus, "model.device": "cpu"} | settings)
        return identity.identify(config, small.text_model(), {})["config"]["train.optim"]

    assert name(1) == name(2) == "auto"  # on a CPU it is the same one
    monkeypatch.setattr(identity, "choose_device", lambda config: "cuda")
    assert (name(1), name(2)) == ("auto", "adamw_torch_fused")
    assert name(1, **{"train.optim": "adamw_torch_fused"}) == name(2)


def test_shared_gradients_and_moments_take_a_share_of_the_memory(make_config: Any) -> None:
    from forgekit.adapter.memory import estimate_memory
    from forgekit.adapter.plan import plan_layers

    def estimate(gpus: int) -> Any:
        settings = FULL | {"train.gpus": gpus, "train.optim": "adamw_torch", "model.engine": "huggingface"}
        config = make_config(settings | {"train.gradient_accumulation_steps": 4})
        return estimate_memory(plan_layers(config), config)

    one, four = estimate(1), estimate(4)
    assert four.optimizer == one.optimizer / 4 > 0 and four.gradients == one.gradients / 4 > 0


def test_a_model_and_its_twin_have_the_same_weights_and_modules(small: Any) -> None:
    from forgekit.train.sharded import Shards

    model = small.text_model()
    own, layers = list(model.parameters()), model.model.layers
    shards = Shards(model)
    assert all(a is b for a, b in zip(own, shards.twin.parameters(), strict=True))
    assert shards.twin is not model and shards.twin.model is model.model and model.model.layers is not layers
    shards.close()
    assert model.model.layers is layers and shards.twin.model is not model.model
    assert shards.twin.lm_head.weight is shards.twin.model.embed_tokens.weight


def test_a_model_that_lost_its_weights_wants_a_checkpoint() -> None:
    from forgekit.train.together import check_weights

    trainer = SimpleNamespace(checkpoints=SimpleNamespace(lost=None))
    check_weights(trainer, None)
    trainer.checkpoints.lost = [(3, 2)]
    check_weights(trainer, "checkpoints/checkpoint-2")
    with pytest.raises(RunError, match="load the model again"):
        check_weights(trainer, None)


def test_another_optimizers_moments_are_refused(tmp_path: Any) -> None:
    import torch

    from forgekit.train.sharded import load_moments

    weight = torch.nn.Parameter(torch.zeros(4, 3))
    state = {"state": {0: {"state1": torch.zeros(12, dtype=torch.uint8)}}, "param_groups": [{"params": [0]}]}
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(RunError, match=r"state1, \(12,\)\) is not of the kind that is shared over processes"):
        load_moments(torch.optim.SGD([weight]), tmp_path / "optimizer.pt")
