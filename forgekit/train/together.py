"""`train.gpus`: `trainer.train` as one of several processes, each with a GPU of its own, and a copy of the model or a part of it.

The notebook goes on before and after with its own model alone. What a step learns from does not depend on the number of processes,
so a run may also be resumed with another number.
"""

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..adapter.plan import LayerPlan
from ..config import Config
from ..errors import ConfigError, ModelError, RunError
from ..hardware import choose_device, shares_weights
from ..run_folder import Run
from .group import abort_group, join_group
from .resume import set_batch
from .share import split_batch
from .workers import open_workers


def train_together(
    trainer: Any,
    config: Config,
    data: Mapping[str, Any],
    plan: LayerPlan,
    run: Run,
    switch: Any,
    say: Callable[[str], None],
) -> None:
    """Let `trainer.train` start `train.gpus` - 1 more processes and take its steps with them; nothing changes where it is 1.

    Args:
        switch: a StopSwitch; a stop while the others still load ends the wait.

    Raises ConfigError or ModelError at once when there are not so many GPUs or their number does not divide a step's rows.
    """
    size = config.train.gpus
    if size == 1:
        return
    check_gpus(config)
    split_batch(trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps, size)
    train, arguments = trainer.train, list_arguments(trainer)

    @functools.wraps(train)
    def train_in_group(resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:
        check_weights(trainer, resume_from_checkpoint)
        check_arguments(trainer, arguments)
        rows, accumulated = split_batch(
            trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps, size
        )
        set_batch(trainer, rows, accumulated)
        find_unused, sharded = leaves_out(plan), shares_weights(config)
        with (
            tempfile.TemporaryDirectory(prefix="forgekit-") as folder,
            open_workers(run.path / "logs", abort_group) as workers,
        ):
            say(f"Starting {size - 1} more processes, each loads the model; their logs are logs/rank1.log and so on.")
            first: dict[str, Any] = {
                "size": size, "meeting": str(Path(folder) / "meeting"), "checkpoint": resume_from_checkpoint, "rows": rows,
                "accumulated": accumulated, "find_unused": find_unused, "sharded": sharded, "run": str(run.path), "path": list_imports(),
            }  # fmt: skip
            rest = pack_job(config, data)
            workers.start(
                {rank: (first | {"rank": rank}, rest) for rank in range(1, size)}, choose_device(config) == "cuda"
            )
            check_base(workers.wait_until_ready(switch.stop.is_set), trainer.checkpoints.identity)
            say(
                f"{size} processes train together: each {rows} rows at once, {accumulated // size} times before a step; "
                f"{rows * accumulated} rows a step."
            )
            run.update(processes={"number": size, "rows": rows, "accumulated": accumulated // size})
            with join_group(trainer, 0, size, Path(first["meeting"]), find_unused, sharded), workers.judge():
                return train(resume_from_checkpoint, *args, **kwargs)

    trainer.train = train_in_group


def check_weights(trainer: Any, checkpoint: str | None) -> None:
    """Raise RunError when a training that failed took the model's weights with it, and no checkpoint brings them back."""
    if trainer.checkpoints.lost and checkpoint is None:
        raise RunError(
            "The weights that learned were shared over processes that are gone, and there is no checkpoint of them: load the model "
            "again (in a notebook, from load_model on)."
        )


def list_arguments(trainer: Any) -> dict[str, Any]:
    """Return the trainer's arguments that other processes make for themselves from the settings."""
    told = ("per_device_train_batch_size", "gradient_accumulation_steps", "ddp_find_unused_parameters")
    return {name: value for name, value in trainer.args.to_dict().items() if name not in told}


def check_arguments(trainer: Any, before: Mapping[str, Any]) -> None:
    """Raise ConfigError when a cell has changed arguments since the trainer was made: one process would wait for the others for ever."""
    changed = [name for name, value in list_arguments(trainer).items() if value != before[name]]
    if changed:
        raise ConfigError(
            f"trainer.args.{changed[0]} was changed after the trainer was made, and the other processes of train.gpus take theirs from "
            "the settings. Change the setting (config.change) and make the trainer anew."
        )


def check_gpus(config: Config) -> None:
    """Raise ModelError when this machine has not as many GPUs as processes are asked for; on a CPU they share its cores."""
    import torch

    if choose_device(config) == "cuda" and config.train.gpus > torch.cuda.device_count():
        raise ModelError(
            f"train.gpus: {config.train.gpus} was asked for, and torch sees {torch.cuda.device_count()} GPUs here "
            "(CUDA_VISIBLE_DEVICES limits them)."
        )


def list_imports() -> list[str]:
    """Return where this process finds modules, for what the notebook's `to_example` imports."""
    import os
    import sys

    return [os.path.abspath(path) for path in sys.path]


def pack_job(config: Config, data: Mapping[str, Any]) -> bytes:
    """Return what a worker needs as bytes, the notebook's `to_example` with it. Raises ConfigError when that cannot be sent.

    They go to processes of our own through a socket pair, and never to a disk.
    """
    import dill

    # trackers hear of one training, not of several
    job = {"config": config.change({"train.report_to": []}), "data": dict(data)}
    try:
        return dill.dumps(job, recurse=True)
    except Exception as error:  # whatever an object that refuses to be packed raises
        raise ConfigError(
            f"train.gpus: the rows cannot be handed to other processes ({type(error).__name__}: {error}). to_example may use plain "
            "values, functions and modules, but no open file, connection or model; or give load_data a file that needs no to_example."
        ) from error


def leaves_out(plan: LayerPlan) -> bool:
    """Say whether a batch may leave something that learns without a gradient.

    A tower, where no row has a part for it; and an adapter on AltUp's correction, which transformers passes by while it trains,
    because it clamps the weight below (`decoder.correct`).
    """
    towers = any(total.modules for total in plan.totals if total.tower != "language")
    return towers or any(module.name.endswith("correction_coefs") for module in plan.modules)


def check_base(ready: Mapping[int, Any], identity: Mapping[str, Any]) -> None:
    """Raise ModelError when a worker loaded other weights than this process trains."""
    others = [rank for rank, base in ready.items() if base != identity["base"]]
    if others:
        raise ModelError(
            f"train.gpus: the base model here is not the one that rank {others[0]} loaded from model.id. Weights that a cell changed "
            "stay in this process: save them as a checkpoint, and name its folder in model.id."
        )
