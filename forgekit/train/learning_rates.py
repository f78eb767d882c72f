"""A learning rate of its own for some groups of layers: `train.learning_rate_pattern`."""

import functools
from collections.abc import Mapping
from typing import Any

from ..adapter.names import meets
from ..adapter.plan import name_module
from ..errors import ConfigError


def scale_learning_rates(trainer: Any, pattern: Mapping[str, float]) -> None:
    """Let `trainer.create_optimizer` split its parameter groups, so that each group's rate is multiplied as the pattern says.

    The first group keeps `train.learning_rate`, which is the one that is logged. Raises ConfigError, when the optimizer is
    made, for a name that meets nothing that learns.
    """
    if not pattern:
        return
    create = trainer.create_optimizer

    @functools.wraps(create)
    def create_and_split(*args: Any, **kwargs: Any) -> Any:
        fresh = trainer.optimizer is None
        optimizer = create(*args, **kwargs)
        if fresh:
            names = {id(parameter): name_module(name) for name, parameter in trainer.model.named_parameters()}
            split_groups(optimizer, names, pattern)
        return optimizer

    trainer.create_optimizer = create_and_split


def split_groups(optimizer: Any, names: Mapping[int, str], pattern: Mapping[str, float]) -> None:
    """Split an optimizer's parameter groups by the factor on their learning rate; factor 1 comes first."""
    idle = [
        key for key in pattern if not any(meets(key, names[id(p)]) for g in optimizer.param_groups for p in g["params"])
    ]
    if idle:
        raise ConfigError(
            f"train.learning_rate_pattern: {idle[0]!r} meets no module that learns. Leave it out, or choose its group in adapter.layers."
        )
    groups = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            factor = next((value for key, value in pattern.items() if meets(key, names[id(parameter)])), 1.0)
            by_factor.setdefault(factor, []).append(parameter)
        groups += [
            {**group, "params": parameters, "lr": group["lr"] * factor} for factor, parameters in by_factor.items()
        ]
    base = optimizer.defaults["lr"]
    optimizer.param_groups[:] = sorted(groups, key=lambda group: group["lr"] != base)
