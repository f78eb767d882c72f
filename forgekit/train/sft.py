"""Supervised fine-tuning with TRL's SFTTrainer, set up from a Config."""

import contextlib
import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..adapter.plan import TOWER_KINDS, LayerPlan, check_plan_against_data, plan_layers
from ..config import Config, flatten
from ..data.collate import Collator
from ..errors import ConfigError
from ..files import write_text
from ..hardware import choose_device, choose_optimizer
from ..model.load import start_engine
from ..model.slice import record_slice
from ..model.trust import describe_source
from ..run_folder import Run, describe_settings
from ..tracker_settings import check_installed
from .exact import ExactTraining
from .identity import identify
from .learning_rates import scale_learning_rates
from .order import Order
from .resume import resume_training
from .speed import train_fast, weigh_tokens_alike

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl import SFTConfig, SFTTrainer


# Unsloth compiles again for each new batch shape: with rows padded only to the longest of their batch, its first step of
# four batches took 271 s on an H200 (benchmarks/README.md)
GPU_MULTIPLE = 64
# only the non-reentrant kind carries the gradients of Gemma 3n's shared keys and values, which travel through a dict
CHECKPOINTING = {"use_reentrant": False}


def sft_trainer(model: Any, processor: Any, data: "DatasetDict", config: Config, run: Run) -> "SFTTrainer":
    """Return TRL's SFTTrainer, ready for `.train()`: our collator, held-out loss, checkpoints, log, status and curve.

    An interrupt (Ctrl-C, the notebook's Interrupt) ends the optimiser step, saves a checkpoint and lets `.train()` return;
    a second one ends it at once, by KeyboardInterrupt. `.train()` goes on where the newest whole checkpoint of the run's folder
    was taken, to the same weights as if it had never stopped (`train.resume`).

    Args:
        model: from `add_adapter`.
        data: from `load_data`; "validation" is scored every `train.eval_steps`.
        run: from `start_run`; everything is written below its folder.

    Raises ConfigError when a setting names something that transformers does not know; `.train()` raises ModelError before
    a step whose loss or gradient is not finite, and RunError when a checkpoint cannot be written or resumed.
    """
    check_installed(config.train.report_to)
    start_engine(config)
    plan = plan_layers(config, model.config)
    check_towers(plan, data["train"])
    write_text(run.path / "plan.json", plan.to_json() + "\n")
    # a panel may have changed them since the run was started
    run.update(settings=describe_settings(config), model=describe_source(model, config), **record_slice(config))
    from transformers import EarlyStoppingCallback

    from .callbacks import LiveCurve, RunLog, StatusFile  # they subclass transformers' own, so the engine comes first
    from .progress import Progress
    from .stop import StopSwitch
    from .together import train_together
    from .tracking import Tracking

    progress = Progress()
    log, status = RunLog(run, progress), StatusFile(run, config.train.status_file)
    switch = StopSwitch(run, log.write)
    tracking = Tracking(config.train.report_to, run, flatten(config.model_dump()), log.write)
    callbacks: list[Any] = [progress, log, status, switch, tracking]
    if in_notebook():
        callbacks.append(LiveCurve())
    if config.train.early_stopping:
        callbacks.append(EarlyStoppingCallback(config.train.early_stopping))
    trainer = make_trainer(model, processor, data, config, run, callbacks)
    trainer.say = log.write
    train_together(trainer, config, data, plan, run, switch, log.write)
    resume_training(trainer, config, run, log.write)
    guard_training(trainer, switch, log, status, tracking)
    return trainer


def make_trainer(
    model: Any, processor: Any, data: "Mapping[str, Dataset]", config: Config, run: Run, callbacks: list[Any]
) -> "SFTTrainer":
    """Return TRL's trainer with our rows, loss, checkpoints and fast path, as each of several processes makes it (together.py)."""
    engine = start_engine(config)
    from .saving import Checkpoints
    from .tower_cache import cache_while_training

    identity = identify(config, model, data)
    trainer = choose_trainer(config, engine)(
        model=model,
        args=make_arguments(config, engine, run),
        train_dataset=data["train"],
        eval_dataset=data["validation"] if config.train.eval_steps else None,
        data_collator=Collator(processor, GPU_MULTIPLE if choose_device(config) == "cuda" else 1),
        processing_class=processor,
        callbacks=callbacks,
    )
    checkpoints = Checkpoints(trainer, identity, config.train.save_minutes)
    trainer.prepare(Order(len(data["train"]), config.train.seed), checkpoints)
    trainer.add_callback(checkpoints)
    # without the fast path, which sees to it: on plain transformers and for Unsloth on a CPU; on a GPU Unsloth's own loss decides
    if engine == "huggingface" or choose_device(config) == "cpu":
        weigh_tokens_alike(trainer)
    scale_learning_rates(trainer, config.train.learning_rate_pattern)
    remove_default_output(trainer)
    if config.train.fast != "off":
        train_fast(trainer, config, run)
    cache_while_training(trainer, config, run)
    return trainer


def check_towers(plan: LayerPlan, rows: "Dataset") -> None:
    """Raise ConfigError when a tower learns and no row holds a part of its kind; rows are read until each is seen."""
    wanted = {kind for total in plan.totals if total.modules for kind in TOWER_KINDS.get(total.tower, ())[:1]}
    kinds: set[str] = set()
    for row in rows if wanted else ():
        kinds |= {part["type"] for message in row["messages"] for part in message["content"]}
        if kinds >= wanted:
            break
    check_plan_against_data(plan, kinds)


def guard_training(trainer: Any, switch: Any, *tellers: Any) -> None:
    """Let `trainer.train` end its step when it is interrupted, and tell the tellers of an error before it goes on."""
    from .stop import catch_interrupt

    train = trainer.train

    @functools.wraps(train)
    def train_and_report(*args: Any, **kwargs: Any) -> Any:
        try:
            with catch_interrupt(switch):
                return train(*args, **kwargs)
        except BaseException as error:
            for teller in tellers:
                with contextlib.suppress(OSError):  # the disk may be full, and that may be the error
                    teller.fail(error)
            raise

    trainer.train = train_and_report


def choose_trainer(config: Config, engine: str) -> "type[SFTTrainer]":
    """Return TRL's trainer that resumes exactly; without a GPU and without Unsloth, one whose loss is transformers' own.

    TRL 1.15 computes the loss in a Triton kernel also on a CPU, where Triton finds no driver ("0 active drivers").
    """
    from transformers import Trainer
    from trl import SFTTrainer

    class ExactSFTTrainer(ExactTraining, SFTTrainer):
        pass

    if engine == "unsloth" or choose_device(config) == "cuda":
        return ExactSFTTrainer

    class CpuSFTTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs["use_cache"] = False  # as TRL sets it: a cache is of no use without generation
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    class ExactCpuSFTTrainer(ExactTraining, CpuSFTTrainer):
        pass

    return ExactCpuSFTTrainer


def make_arguments(config: Config, engine: str, run: Run) -> "SFTConfig":
    """Translate `config.train` to TRL's SFTConfig."""
    from trl import SFTConfig

    train, cuda = config.train, choose_device(config) == "cuda"
    save_steps = train.save_steps or train.eval_steps
    try:
        arguments = SFTConfig(
            output_dir=str(run.path / "checkpoints"),
            per_device_train_batch_size=train.per_device_train_batch_size,
            per_device_eval_batch_size=config.evaluate.per_device_eval_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            learning_rate=train.learning_rate,
            warmup_steps=train.warmup_steps,
            max_steps=-1 if train.max_steps is None else train.max_steps,
            num_train_epochs=train.num_train_epochs,
            optim=choose_optimizer(config, choose_device(config)),
            weight_decay=train.weight_decay,
            lr_scheduler_type=train.lr_scheduler_type,
            max_grad_norm=train.max_grad_norm,
            seed=train.seed,
            data_seed=train.seed,
            logging_steps=train.logging_steps,
            logging_nan_inf_filter=False,  # its default logs a NaN loss as 0.0
            eval_strategy="steps" if train.eval_steps else "no",
            eval_steps=train.eval_steps,
            save_strategy="steps" if save_steps else "no",
            save_steps=save_steps or 500,
            restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
            load_best_model_at_end=bool(train.eval_steps),
            metric_for_best_model="eval_loss" if train.eval_steps else None,
            greater_is_better=False if train.eval_steps else None,
            # Unsloth sets its own kind up while it adapts the model
            gradient_checkpointing=use_checkpointing(config) and engine != "unsloth",
            gradient_checkpointing_kwargs=dict(CHECKPOINTING),
            bf16=cuda and model_is_half(config, "bfloat16"),
            fp16=cuda and model_is_half(config, "float16"),
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            max_length=config.model.max_length if engine == "unsloth" else None,  # rows were measured by load_data
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            report_to="none",  # trackers run in processes of their own (tracking.py)
            disable_tqdm=True,
        )
        use_one_gpu(arguments)
        return arguments
    except ValueError as error:
        raise ConfigError(f"train: transformers refuses a setting: {' '.join(str(error).split())}") from error


def use_one_gpu(arguments: Any) -> None:
    """Keep transformers from spreading a process's batches over all GPUs that it sees, with another batch size (DataParallel)."""
    arguments._n_gpu = min(1, arguments.n_gpu)


def use_checkpointing(config: Config) -> bool:
    """Resolve `train.gradient_checkpointing: auto`: on with a GPU."""
    switch = config.train.gradient_checkpointing
    return choose_device(config) == "cuda" if switch == "auto" else switch == "on"


def model_is_half(config: Config, dtype: str) -> bool:
    """Say whether the run computes in this half precision."""
    from ..hardware import choose_dtype

    return str(choose_dtype(config)) == f"torch.{dtype}"


def in_notebook() -> bool:
    """Say whether a notebook's kernel runs this, so that a figure can be shown."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and shell.__class__.__name__ != "TerminalInteractiveShell"


def remove_default_output(trainer: Any) -> None:
    """Take away transformers' own printing, which repeats what RunLog writes in one plain line."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils.notebook import NotebookProgressCallback

    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
