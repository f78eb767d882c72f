"""`train.fast`, `train.memory` and `train.compile` for a trainer: the fast path is on while it trains, and says what it saved."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

from ..config import Config
from ..errors import ModelError
from ..hardware import choose_device
from ..model.compiler import wait_for_stores
from ..run_folder import Run

# Compiling took 66 s in a fresh process, and a compiled forward and backward of E2B was 0.2 s faster than an eager one (an H200,
# 4 x 1024 tokens, benchmarks/README.md), most of it launches: after so many batches the one has paid for the other.
BATCHES_TO_COMPILE = 300
LOOKED_AT = 64  # rows that say which towers are used; reading all of them would decode every file


def train_fast(trainer: Any, config: Config, run: Run) -> None:
    """Let `trainer.train` turn the fast path on before it starts and off when it ends.

    While it is off, evaluation, generation, copies and exports meet the library's own model.
    """
    from .fast_path import disable_fast_path, enable_fast_path

    train = trainer.train

    @functools.wraps(train)
    def train_with_fast_path(*args: Any, **kwargs: Any) -> Any:
        compiled, why = choose_compile(trainer, config)
        first = trainer.args.gradient_accumulation_steps  # the batches of the first optimiser step
        path = enable_fast_path(
            trainer.model,
            memory=choose_memory(config),
            compiled=compiled,
            uncompiled_batches=first,
            recorded=config.train.cuda_graphs != "off",
            left=functools.partial(count_batches_left, trainer),
        )
        if path is None:
            if config.train.fast == "on":
                raise ModelError(
                    "train.fast: on was asked for, and the fast path does not apply. Set it to auto or off."
                )
            return train(*args, **kwargs)
        print(f"fast path: on, attention by {path.kernel}, {why}")
        weigh_tokens_alike(trainer)
        try:
            with park_weights(trainer, config, path):
                return train(*args, **kwargs)
        finally:
            disable_fast_path(trainer.model)
            print(path)
            with contextlib.suppress(OSError):  # a full disk may be why training ended, and that is what has to be told
                run.update(fast_path=path.summarize())

    trainer.train = train_with_fast_path


def weigh_tokens_alike(trainer: Any) -> None:
    """Divide the loss by all learned tokens of an optimiser step, however they are spread over accumulated batches.

    transformers' Gemma 3n declares `accepts_loss_kwargs = False`, after which Trainer takes the mean of the batches' means,
    and a token in a batch of short answers weighs more. Its forward does take `num_items_in_batch`.
    """
    trainer.model_accepts_loss_kwargs = True


@contextlib.contextmanager
def park_weights(trainer: Any, config: Config, path: Any) -> Iterator[None]:
    """Free the GPU of towers that no row feeds, and of the per-layer table where `model.offload_ple` says so."""
    from .park import compact, park_table, park_towers

    switch = config.model.offload_ple
    offload = choose_memory(config) == "low" if switch == "auto" else switch == "on"
    with contextlib.ExitStack() as stack:
        if choose_device(config) == "cuda":
            parked = stack.enter_context(park_towers(path.base, find_media(trainer.train_dataset)))
            if offload and stack.enter_context(park_table(path.text)):
                parked.append("per-layer table")
            if parked and path.graphs:
                compact(path.base)
            if parked:
                print(f"in the machine's memory while training: {', '.join(parked)}")
        yield


def find_media(dataset: Any) -> set[str]:
    """Return the kinds of parts in the first rows of a data set, as they are read: a film is pictures then."""
    rows = (dataset[number] for number in range(min(LOOKED_AT, len(dataset))))
    return {part["type"] for example in rows for turn in example["messages"] for part in turn["content"]}


def choose_memory(config: Config) -> str | float:
    """Resolve `train.memory: auto` where `train.gradient_checkpointing` already says it."""
    if config.train.memory == "auto":
        return {"on": "low", "off": "high", "auto": "auto"}[config.train.gradient_checkpointing]
    return config.train.memory


def choose_compile(trainer: Any, config: Config) -> tuple[bool, str]:
    """Resolve `train.compile: auto`; return it with its reason."""
    if config.train.compile != "auto":
        return config.train.compile == "on", f"compiled: {config.train.compile}"
    if choose_device(config) != "cuda":
        return False, "not compiled: no GPU"
    batches = count_batches(trainer)
    if batches < BATCHES_TO_COMPILE:
        return False, f"not compiled: {batches} batches would not pay for it (train.compile: on does it anyway)"
    if not wait_for_stores():
        return False, "not compiled: this torch's compiler makes mistakes in gradients (torch 2.14 does not)"
    return True, f"compiled from the second step on: {batches} batches pay for that minute"


def count_rows(trainer: Any) -> float:
    """Return how many rows the training will see, over all processes."""
    args = trainer.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return float(args.max_steps * step if args.max_steps > 0 else len(trainer.train_dataset) * args.num_train_epochs)


def count_batches(trainer: Any) -> int:
    """Return how many forward passes the training will take in this process."""
    return math.ceil(count_rows(trainer) / trainer.args.per_device_train_batch_size / trainer.args.world_size)


def count_batches_left(trainer: Any) -> int:
    """Return how many of them are still to come, in a resumed training too."""
    return count_batches(trainer) - int(trainer.state.global_step) * int(trainer.args.gradient_accumulation_steps)
