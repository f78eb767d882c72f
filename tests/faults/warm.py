"""A process that has imported everything and forks one training after another: a job a line in, how it ended a line out.

A job is a JSON object: folder (of the checkpoint, the rows and the runs), run, settings, environment, export (instead of a
training: an adapter that is drawn), and what is to go wrong beside FORGEKIT_FAULT: full_disk_at (a step at which files can no
longer grow), kill_worker_at (a step), fill_at (a step at which the disk is filled), kill_after (seconds since the training began), mutant (a defence that
is taken out), look_back (at the model, behind the training). With `supervised` (hang and timeout, in seconds) the Supervisor of `forgekit run` watches the child.
With train.gpus the other processes are forked too. Started with one thread, because a forked process may not use a parent's thread pool.
"""

import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import parts  # beside this script

FULL_DISK = 8000  # bytes that a file may grow to: the log with the error, and no checkpoint


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


def start(job: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Begin the job's run, or go on with it; return config, run, model with adapter, and processor."""
    from forgekit import add_adapter, load_config, load_model, start_run

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
    return config, run, add_adapter(model, config), processor


def export(job: dict[str, Any]) -> None:
    """Export an adapter whose matrices are drawn, as `export.formats` says."""
    import torch

    from forgekit import export_model

    config, run, model, processor = start(job)
    generator = torch.Generator().manual_seed(11)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero before training
            weight.data.normal_(0, 0.1, generator=generator)
    export_model(model.eval(), processor, config, run)
    run.finish()


def train(job: dict[str, Any], began: int | None = None) -> None:
    """Train one run of the job's folder, or what is left of it; write a byte to `began` when the first step comes."""
    import random

    from forgekit import load_data, sft_trainer

    def vary(row: dict[str, Any]) -> dict[str, Any]:
        """A row that is written another way each time it is read: an augmentation."""
        greeting = random.choice(["", "Hi, ", "Hello, ", "So, "])
        turns = [("user", greeting + row["prompt"]), ("assistant", row["completion"])]
        return {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]}

    config, run, model, processor = start(job)
    trainer = sft_trainer(model, processor, load_data(config, processor, vary), config, run)
    if job.get("full_disk_at"):
        at_step(trainer, job["full_disk_at"], stop_growth)
    if job.get("fill_at"):
        at_step(trainer, job["fill_at"], lambda: fill_disk(run.path.parent / "ballast"))
    if began is not None:
        tell_begin(trainer, began)
    if job.get("kill_worker_at"):
        kill_worker(trainer, job["kill_worker_at"])
    if job.get("mutant") in MUTANTS:
        MUTANTS[job["mutant"]](trainer)
    trainer.train()
    if job.get("look_back"):
        parts.look_back(trainer, model)
    run.finish("stopped" if trainer.state.global_step < trainer.state.max_steps else "completed")


def at_step(trainer: Any, step: int, act: Any) -> None:
    """Do something when a step begins."""
    from transformers import TrainerCallback

    class Actor(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == step:
                act()

    trainer.add_callback(Actor())


def stop_growth() -> None:
    """Let no file grow in this process any more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK, resource.RLIM_INFINITY))


def fill_disk(ballast: Path) -> None:
    """Fill the disk with a file, but for room for a few lines of the log."""
    with open(ballast, "wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                continue
    os.truncate(ballast, ballast.stat().st_size - FULL_DISK)


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


def use_trls_loss() -> None:
    """Not a mutant: train by TRL's own loss and figures, as on a GPU; on a CPU the fast path gives it what its kernel would."""
    import forgekit.train.sft as sft

    choose = sft.choose_trainer
    sft.choose_trainer = lambda config, engine: choose(config, "unsloth")


def gather_in_each_batch() -> None:
    """Let TRL gather its figures of each batch over all processes."""
    import contextlib

    from forgekit.train.group import Group

    use_trls_loss()
    Group.alone = lambda self, trainer: contextlib.nullcontext()


# before the trainer is made, in all processes
EARLY_ONES = (take_means_of_ranks, learn_from_fillings, use_trls_loss, gather_in_each_batch, *parts.EARLY)
EARLY = {mutant.__name__: mutant for mutant in EARLY_ONES}
MUTANTS = {
    mutant.__name__: mutant
    for mutant in (restart_schedule, lose_random_numbers, lose_the_epoch, draw_rows_together, save_inside_the_step)
}


def supervise(job: dict[str, Any], child: int, link: socket.socket) -> tuple[int, str | None]:
    """Watch a child as `forgekit run` watches a kernel; return how it ended and who stopped it."""
    from forgekit.runs import supervise

    supervise.HANG_SECONDS = job.get("hang", supervise.HANG_SECONDS)
    supervisor = supervise.Supervisor(grace=2, timeout=job.get("timeout"))
    with link, supervisor.watch(link):
        supervisor.pid = child
        supervisor.cell_begins()
        status = os.waitpid(child, 0)[1]
        supervisor.pid = None  # another process may get the number
    return status, supervisor.stop and supervisor.stop.by


def run_job(job: dict[str, Any]) -> list[Any]:
    """Fork, do the job in the child; return how it ended (minus the signal, or its exit code) and who stopped it."""
    wait, began = os.pipe()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        if job.get("supervised"):
            from forgekit.link import connect

            connect(theirs.detach())
        ours.close()
        log = os.open(Path(job["folder"]) / f"{job['run']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            export(job) if job.get("export") else train(job, began)
            code = 0
        except BaseException:  # noqa: BLE001  # the child must not return into the parent's loop
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(began)
    theirs.close()
    if "kill_after" in job and os.read(wait, 1):
        time.sleep(job["kill_after"])
        os.kill(child, signal.SIGKILL)
    by = None
    if job.get("supervised"):
        status, by = supervise(job, child, ours)
    else:
        status = os.waitpid(child, 0)[1]
        ours.close()
    os.close(wait)
    return [-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), by]


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
        answers.write(json.dumps(run_job(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
