"""Verbs about runs: run, sweep, gates."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from ..arguments import read_assignments, read_folder, read_number, read_seconds
from ..exit_codes import GATES_FAILED


def add_run(verbs: Any) -> None:
    """Describe `forgekit run`."""
    verb = verbs.add_parser(
        "run",
        help="execute a notebook without a browser",
        description="Execute a notebook with a recipe; settings are checked before anything is loaded. Exit code: 0 completed, 1 failed, 2 wrong usage or settings, 3 a gate failed and evaluate.gates_action is stop, 128 + n ended by signal n (130 for Ctrl-C).",
        epilog="example: forgekit run notebooks/01_text.ipynb --recipe params/text.yaml --set train.max_steps=60 adapter.r=32",
    )
    verb.add_argument("notebook", metavar="NOTEBOOK", type=Path, help="one with a cell tagged `parameters`")
    verb.add_argument(
        "--recipe",
        metavar="R",
        action="append",
        help="YAML file with settings; given again it goes on top (params/gpu/16gb.yaml); default: the one the notebook names",
    )
    add_set(verb)
    verb.add_argument("--name", metavar="N", help="the run's name, its folder below runs/; default: the time")
    verb.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        help="train.resume. auto (default): a run of that name that did not complete goes on from its newest checkpoint; never: it is refused; PATH: start from this checkpoint",
    )
    verb.add_argument(
        "--gpus",
        metavar="N",
        type=int,
        help="train.gpus: train on so many GPUs of this machine; a step's rows and their order stay the same",
    )
    verb.add_argument(
        "--allow-drift",
        metavar="NAME",
        action="append",
        choices=["dataset", "config", "base", "versions"],
        help="resume although dataset, config, base or versions have changed since the checkpoint; may be given again",
    )
    verb.add_argument(
        "--timeout",
        metavar="TIME",
        type=read_seconds,
        help="stop the run after this long, with a checkpoint: seconds, or 90m, 12h",
    )
    verb.add_argument(
        "--grace",
        metavar="TIME",
        type=read_seconds,
        help="longest time from a signal to the end of the run; default: 30 s, or two steps where those take longer",
    )
    verb.add_argument("--cwd", metavar="DIR", type=read_folder, help="run the notebook in this folder, not in its own")
    verb.set_defaults(act=run)


def run(options: argparse.Namespace) -> int:
    """Execute a notebook."""
    from ..runs.headless import run_notebook
    from ..runs.summary import print_summary

    own = {"train.resume": options.resume, "train.allow_drift": options.allow_drift, "train.gpus": options.gpus}
    finished = run_notebook(
        options.notebook,
        " + ".join(options.recipe or []) or None,
        read_assignments(options.set) | {name: value for name, value in own.items() if value is not None},
        options.name,
        options.timeout,
        options.grace,
        options.cwd,
    )
    with contextlib.suppress(OSError):  # the terminal has gone; the run's end is its own
        print_summary(finished)
    return finished.record["exit_code"]


def add_sweep(verbs: Any) -> None:
    """Describe `forgekit sweep`."""
    verb = verbs.add_parser(
        "sweep",
        help="execute a notebook with many settings, and compare the runs",
        description="Run every point of a sweep, each as a supervised `forgekit run`, and compare them below "
        "runs/sweeps/NAME. All points (of a search, its bounds and choices) are checked before anything starts; the same file again goes on with a sweep that was "
        "broken off. Exit code: 0 all completed, 1 some did not, 2 wrong usage or settings, 128 + n ended by signal n; the "
        "runs then save and stop.",
        epilog="example: forgekit sweep params/sweeps/text_quick.yaml --slots 2",
    )
    verb.add_argument("file", metavar="SWEEP", type=Path, help="YAML file: notebook, recipe, and how the runs differ")
    verb.add_argument(
        "--backend",
        choices=["local", "ray", "slurm"],
        default="local",
        help="where the runs are made: on this machine (default), on a Ray cluster, or by Slurm",
    )
    verb.add_argument("--address", metavar="A", help="of the Ray cluster, default auto; or Slurm's partition")
    verb.add_argument(
        "--slots",
        metavar="N",
        type=read_number,
        help="runs that go on at once; default: one a GPU, or one where there is none",
    )
    verb.add_argument(
        "--retries",
        metavar="N",
        type=read_number,
        help="how often a run that failed or crashed goes on from its last checkpoint; default: as the file says, else 1",
    )
    verb.add_argument(
        "--only-missing", action="store_true", help="also try again the runs that failed in an earlier call"
    )
    verb.add_argument("--dry-run", action="store_true", help="check everything and print the points; start nothing")
    verb.set_defaults(act=sweep)


def sweep(options: argparse.Namespace) -> int:
    """Run every point of a sweep."""
    from ..sweep.run import run_sweep, show_plan

    if options.dry_run:
        print(show_plan(options.file))
        return 0
    return run_sweep(
        options.file, options.backend, options.address, options.slots, options.retries, options.only_missing
    )


def add_gates(verbs: Any) -> None:
    """Describe `forgekit gates`."""
    verb = verbs.add_parser(
        "gates",
        help="judge what a run has shown: better than its base, verified",
        description="Judge the gates of a finished run from its files and print them. Exit code: 0 all passed, 3 one did not.",
        epilog="example: forgekit gates runs/first",
    )
    verb.add_argument("run", metavar="RUN", type=Path, help="a run's name, or its folder")
    verb.set_defaults(act=gates)


def gates(options: argparse.Namespace) -> int:
    """Print the verdicts on a run."""
    from ..evaluate.gates import check_gates
    from ..run_folder import find_run

    found = check_gates(find_run(options.run))
    print(found)
    return 0 if found.held else GATES_FAILED


def add_set(verb: argparse.ArgumentParser) -> None:
    """Give a verb the option that changes settings."""
    verb.add_argument(
        "--set",
        metavar="a.b=c [a.b=c ...]",
        action="append",
        default=[],
        help="change a setting, for instance train.max_steps=60; the value is read as YAML",
    )
