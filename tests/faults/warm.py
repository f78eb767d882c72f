"""A process that has imported everything and forks one training after another: a job a line in, how it ended a line out.

A job is a JSON object: folder (of the checkpoint, the rows and the runs), run, settings, environment, and what is to go wrong
beside FORGEKIT_FAULT: full_disk_at (a step at which files can no longer grow), kill_worker_at (a step), kill_after (seconds),
mutant (a defence that is taken out). With train.gpus the other processes are forked too. `kill_after` is counted from the beginning of the training. Started with one thread, because a forked process may not use a parent's thread pool.
"""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

FULL_DISK = 6000  # bytes that a file may grow to: a line of the log, and no checkpoint


def make_checkpoint(folder: Path) -> None:
    """Write a random text-only Gemma 3n of the library's own classes, with shared keys and both kinds of attention."""
    import torch
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    from forgekit.data.samples.orders import load_orders
    from forgekit.model.tiny import build_tokenizer

    rows = load_orders(300)
    tokenizer = build_tokenizer((row["message"] for row in rows), text_vocabulary=300)
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=len(tokenizer), vocab_size_per_layer_input=len(tokenizer), hidden_size=16, intermediate_size=24,
        num_hidden_layers=4, num_kv_shared_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        hidden_size_per_layer_input=8, laurel_rank=4, sliding_window=12, activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"] * 2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Gemma3nForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [{"prompt": f"{row['message'][:24]}?", "completion": row["order"]["city"]} for row in rows[:30]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def train(job: dict[str, Any], began: int | None = None) -> None:
    """Train one run of the job's folder, or what is left of it; write a byte to `began` when the first step comes."""
    import random

    from forgekit import add_adapter, load_config, load_data, load_model, sft_trainer, start_run

    def vary(row: dict[str, Any]) -> dict[str, Any]:
        """A row that is written another way each time it is read: an augmentation."""
        greeting = random.choice(["", "Hi, ", "Hello, ", "So, "])
        turns = [("user", greeting + row["prompt"]), ("assistant", row["completion"])]
        return {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]}

    folder = Path(job["folder"])
    fork_workers()
    if job.get("mutant") in EARLY:
        EARLY[job["mutant"]]()
    os.environ.update({"FORGEKIT_RUNS": str(folder / "runs"), "FORGEKIT_RUN": job["run"], **job.get("environment", {})})
    settings = {
        "data.path": str(folder / "rows.jsonl"), "model.id": str(folder / "model"), "model.engine": "huggingface",
        "model.device": "cpu", "model.load_in": "16bit", "model.max_length": 128, "adapter.r": 4, "adapter.lora_dropout": 0.1,
        "train.max_steps": 24, "train.learning_rate": 0.01, "train.warmup_steps": 2, "train.gradient_accumulation_steps": 1,
        "train.save_steps": 2, "train.lr_scheduler_type": "cosine",
    }  # fmt: skip
    config = load_config(None, settings | job.get("settings", {}))
    run = start_run(config, job["run"])
    model, processor = load_model(config)
    data = load_data(config, processor, vary)
    trainer = sft_trainer(add_adapter(model, config), processor, data, config, run)
    if job.get("full_disk_at"):
        fill_disk(trainer, job["full_disk_at"])
    if began is not None:
        tell_begin(trainer, began)
    if job.get("kill_worker_at"):
        kill_worker(trainer, job["kill_worker_at"])
    if job.get("mutant") in MUTANTS:
        MUTANTS[job["mutant"]](trainer)
    trainer.train()
    run.finish("stopped" if trainer.state.global_step < trainer.state.max_steps else "completed")


def fill_disk(trainer: Any, step: int) -> None:
    """Let no file grow in this process any more once a step has begun."""
    from transformers import TrainerCallback

    class Filler(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK, resource.RLIM_INFINITY))

    trainer.add_callback(Filler())


def fork_workers() -> None:
    """Let the processes of train.gpus be forked from this one, which has imported everything."""
    from types import SimpleNamespace

    import forgekit.train.workers as workers

    workers.subprocess = SimpleNamespace(
        Popen=Forked, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired
    )


class Forked:
    """A worker, forked; with what `Workers` asks of a subprocess.Popen."""

    def __init__(self, command: list[str], pass_fds: Any, stdout: Any, env: dict[str, str], **_: Any):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            os.environ.clear()
            os.environ.update(env)
            from forgekit.train.worker import main

            main(int(command[-1]))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.01)
        return self.returncode or 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def kill_worker(trainer: Any, step: int) -> None:
    """Kill the process of rank 1 when a step begins, and note when."""
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == step:
                log = (trainer.checkpoints.folder.parent / "logs" / "rank1.log").read_text(encoding="utf-8")
                print(f"killed at {time.time()}", flush=True)
                os.kill(int(log.split("process ")[1].split()[0]), signal.SIGKILL)

    trainer.add_callback(Killer())


def tell_begin(trainer: Any, pipe: int) -> None:
    """Write a byte when training begins."""
    from transformers import TrainerCallback

    class Teller(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.write(pipe, b"!")

    trainer.add_callback(Teller())


def restart_schedule(trainer: Any) -> None:
    """Load the optimiser and not the schedule, as transformers does when scheduler.pt is missing."""
    load = trainer._load_optimizer_and_scheduler

    def forget(checkpoint: Any) -> None:
        fresh = trainer.lr_scheduler.state_dict()
        load(checkpoint)
        if checkpoint:
            trainer.lr_scheduler.load_state_dict(fresh)

    trainer._load_optimizer_and_scheduler = forget


def lose_random_numbers(trainer: Any) -> None:
    """Go on with the random numbers of the new process."""
    trainer._load_rng_state = lambda checkpoint: None


def lose_the_epoch(trainer: Any) -> None:
    """Read the rows of every epoch in the order of the first."""
    trainer.checkpoints.on_epoch_begin = lambda *args, **kwargs: None


def draw_rows_together(trainer: Any) -> None:
    """Let the rows draw from training's own random numbers."""
    import contextlib

    import forgekit.train.order as order

    order.own_random_numbers = lambda *seeds: contextlib.nullcontext()


def save_inside_the_step(trainer: Any) -> None:
    """Save at once when a signal comes, between the gradients and the optimiser."""
    from transformers import TrainerCallback

    class Hasty(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer.checkpoints.stepping and state.global_step % 2:
                trainer.checkpoints.save()

    trainer.add_callback(Hasty())


def take_means_of_ranks() -> None:
    """Take the mean of the processes' means, so that a token in a process with short answers weighs more."""
    import forgekit.train.sft as sft

    make = sft.make_arguments

    def forget(*args: Any) -> Any:
        arguments = make(*args)
        arguments.average_tokens_across_devices = False
        return arguments

    sft.make_arguments = forget


def learn_from_fillings() -> None:
    """Learn from the rows that fill up an epoch's last batches, as accelerate does."""
    import forgekit.train.share as share

    share.collate_shared = lambda collate: collate


# taken out before the trainer is made, in all processes
EARLY = {mutant.__name__: mutant for mutant in (take_means_of_ranks, learn_from_fillings)}
MUTANTS = {
    mutant.__name__: mutant
    for mutant in (restart_schedule, lose_random_numbers, lose_the_epoch, draw_rows_together, save_inside_the_step)
}


def run_job(job: dict[str, Any]) -> int:
    """Fork, train in the child, and return its exit status: minus the signal that ended it, or its code."""
    wait, began = os.pipe()
    child = os.fork()
    if child == 0:
        log = os.open(Path(job["folder"]) / f"{job['run']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            train(job, began)
            code = 0
        except BaseException:  # noqa: BLE001  # the child must not return into the parent's loop
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(began)
    if "kill_after" in job and os.read(wait, 1):
        time.sleep(job["kill_after"])
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(wait)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what is printed while the libraries load is no answer
    folder = Path(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    make_checkpoint(folder)
    # the first training imports what is imported late; forked ones then share it
    train({"folder": str(folder), "run": "warm", "settings": {"train.max_steps": 1}})
    gc.collect()
    gc.freeze()  # a collection before each training would go through, and copy, the memory of all these libraries
    answers.write('"ready"\n')
    answers.flush()
    for line in sys.stdin:
        answers.write(f"{run_job(json.loads(line))}\n")
        answers.flush()


if __name__ == "__main__":
    main()
