"""Learning rates by group: the optimizer's groups, and that a factor really reaches the weights."""

from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, load_data, load_model, sft_trainer, start_run
from forgekit.adapter.plan import read_plan
from forgekit.errors import ConfigError


def make_trainer(config: Any, name: str) -> Any:
    model, processor = load_model(config)
    run = start_run(config, name)
    return sft_trainer(add_adapter(model, config), processor, load_data(config, processor), config, run)


def test_groups_get_their_factor_and_learn_by_it(make_config: Any) -> None:
    """One step of Adam moves every weight by its learning rate (B starts at zero, so its size is what it moved)."""
    settings = {
        "train.max_steps": 1,
        "train.warmup_steps": 0,
        "train.lr_scheduler_type": "constant",
        "train.weight_decay": 0.0,
    }
    config = make_config({**settings, "train.learning_rate_pattern": {"mlp": 0.1}, "train.optim": "adamw_torch"})
    trainer = make_trainer(config, "rates")
    trainer.train()
    plan = read_plan(Path(trainer.args.output_dir).parent / "plan.json")
    assert plan.parameters == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    moved = {"mlp": 0.0, "self_attn": 0.0}
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            part = next(part for part in moved if f".{part}." in name)
            moved[part] = max(moved[part], float(parameter.detach().abs().max()))
    assert moved["self_attn"] == pytest.approx(2e-3, rel=0.02)
    assert moved["mlp"] == pytest.approx(2e-4, rel=0.02)
    groups = [group for group in trainer.optimizer.param_groups if group["params"]]
    assert groups[0]["lr"] == 2e-3 and min(group["lr"] for group in groups) == pytest.approx(2e-4)
    learning = sum(parameter.requires_grad for parameter in trainer.model.parameters())
    assert sum(len(group["params"]) for group in groups) == learning


def test_a_factor_for_what_does_not_learn_is_refused(make_config: Any) -> None:
    trainer = make_trainer(make_config({"train.learning_rate_pattern": {"audio": 0.5}}), "idle")
    with pytest.raises(ConfigError, match="'audio' meets no module that learns"):
        trainer.train()


def test_a_factor_for_no_group_is_refused_at_once(make_config: Any) -> None:
    with pytest.raises(ConfigError, match="'attenton' is no group of layers. Did you mean attention?"):
        make_config({"train.learning_rate_pattern": {"attenton": 0.5}})
