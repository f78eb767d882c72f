"""The `forgekit` command; each verb is a thin call of one public function."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from . import __version__
from .arguments import read_assignments, read_folder, read_seconds, spread_set
from .errors import ConfigError, ForgekitError, RunNameError

FAILED, USAGE, GATES_FAILED, INTERRUPTED = 1, 2, 3, 130


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="forgekit", description="Fine-tune Gemma 3n from notebooks: interactive in JupyterLab, headless from here."
    )
    parser.add_argument("--version", action="version", version=f"forgekit {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser(
        "init",
        help="copy the notebooks and recipes into a folder",
        description="Copy the notebooks and recipes into DIR; nothing is written over.",
    )
    verb.add_argument("dir", metavar="DIR", type=Path, help="a folder; made when it is missing")

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

    verb = verbs.add_parser(
        "plan",
        help="show which layers a recipe trains and the memory it needs",
        description="Show which layers learn and the memory a step needs, without weights or a GPU.",
        epilog="example: forgekit plan params/text.yaml params/gpu/16gb.yaml --set adapter.layers=[attention]",
    )
    verb.add_argument("recipe", metavar="RECIPE", nargs="+", help="YAML file with settings; further ones go on top")
    add_set(verb)

    verb = verbs.add_parser(
        "gates",
        help="judge what a run has shown: better than its base, verified",
        description="Judge the gates of a finished run from its files and print them. Exit code: 0 all passed, 3 one did not.",
        epilog="example: forgekit gates runs/first",
    )
    verb.add_argument("run", metavar="RUN", type=Path, help="a run's name, or its folder")

    verb = verbs.add_parser(
        "doctor",
        help="check versions, GPU, memory, engines and disk; with a recipe, whether training is right here",
        description="Check this machine; each finding comes with a remedy. Exit code 1 when something is bad.",
    )
    verb.add_argument(
        "--recipe", metavar="R", help="load its model and rows, and prove on a short batch that training is right"
    )

    add_slice(verbs)

    verb = verbs.add_parser(
        "lab",
        help="start JupyterLab on 127.0.0.1",
        description="Start JupyterLab on 127.0.0.1 with this environment; more arguments go to `jupyter lab`.",
    )
    verb.add_argument(
        "arguments", metavar="ARG", nargs=argparse.REMAINDER, help="for instance --no-browser or a notebook"
    )
    return parser


def add_slice(verbs: Any) -> None:
    """Describe `forgekit slice`, with the table of presets."""
    from .slice_presets import describe_presets

    verb = verbs.add_parser(
        "slice",
        help="cut a smaller Gemma 3n out of a larger one's files, for instance E2B out of E4B",
        description="Write a slice of a Gemma 3n checkpoint into OUT: whole layers left out, feed-forward parts halved. "
        "Nothing is trained and no model is loaded. In a recipe model.slice does the same.",
        epilog="Google's slices of E4B (MMLU of the pre-trained weights; E4B itself: 3.98 billion, 62.3):\n\n"
        f"{describe_presets()}\n\n"
        "example: forgekit slice google/gemma-3n-E4B-it gemma-3n-E2.5B --widths 8192 20-24=16384",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("source", metavar="SOURCE", help="a Gemma 3n checkpoint: a folder or a Hub id")
    verb.add_argument("out", metavar="OUT", type=Path, help="the slice's folder; refused when it exists")
    verb.add_argument("--preset", metavar="P", help="one of the names below, for instance e2b")
    verb.add_argument("--skip", metavar="LAYERS", nargs="+", help="layers to leave out, for instance 20-24")
    verb.add_argument(
        "--widths",
        metavar="[LAYERS=]WIDTH",
        nargs="+",
        help="features of the feed-forward parts: 8192 for all layers; 8192 20-24=16384 by layers; or one number a kept layer",
    )
    verb.add_argument("--revision", metavar="R", help="a commit or tag of the Hub repository")


def add_set(verb: argparse.ArgumentParser) -> None:
    """Give a verb the option that changes settings."""
    verb.add_argument(
        "--set",
        metavar="a.b=c [a.b=c ...]",
        action="append",
        default=[],
        help="change a setting, for instance train.max_steps=60; the value is read as YAML",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    # `lab` hands everything on, options too, which argparse would keep for itself
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["lab"] and arguments[1:2] not in (["-h"], ["--help"]):
        return start_lab(arguments[1:])
    options = make_parser().parse_args(spread_set(arguments))
    verbs = {"init": init, "run": run, "plan": plan, "gates": gates, "doctor": doctor, "slice": slice_model}
    try:
        return verbs[options.verb](options)
    except (ConfigError, RunNameError) as error:
        print(f"forgekit: {error}", file=sys.stderr)
        return USAGE
    except ForgekitError as error:
        print(f"forgekit: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("forgekit: interrupted", file=sys.stderr)
        return INTERRUPTED


def init(options: argparse.Namespace) -> int:
    """Copy notebooks and recipes."""
    from .project import init_project
    from .runs.summary import find_command

    for file in init_project(options.dir):
        print(file)
    print(
        f"\nNext: cd {shlex.quote(str(options.dir))} && {find_command()} run notebooks/01_text.ipynb   (or: {find_command()} lab)"
    )
    return 0


def run(options: argparse.Namespace) -> int:
    """Execute a notebook."""
    from .runs.headless import run_notebook
    from .runs.summary import print_summary

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
    print_summary(finished)
    return finished.record["exit_code"]


def plan(options: argparse.Namespace) -> int:
    """Print what would learn, and the memory it needs."""
    from .adapter.advice import advise_cards
    from .adapter.memory import estimate_memory
    from .adapter.plan import find_shapes, plan_layers
    from .config import load_config

    config = load_config(" + ".join(options.recipe), read_assignments(options.set), origin="--set")
    shapes = find_shapes(config)
    layers = plan_layers(config, shapes)
    print(layers)
    print(f"\n{estimate_memory(layers, config, shapes)}\n\n{advise_cards(config, shapes).to_string(index=False)}")
    return 0


def gates(options: argparse.Namespace) -> int:
    """Print the verdicts on a run."""
    from .evaluate.gates import check_gates
    from .run_folder import find_run

    found = check_gates(find_run(options.run))
    print(found)
    return 0 if found.held else GATES_FAILED


def doctor(options: argparse.Namespace) -> int:
    """Print the findings."""
    from itertools import chain

    from .doctor import BAD, examine, examine_recipe

    states = set()
    for finding in chain(examine(), examine_recipe(options.recipe) if options.recipe else ()):
        print(finding, flush=True)
        states.add(finding.state)
    return FAILED if BAD in states else 0


def slice_model(options: argparse.Namespace) -> int:
    """Write a slice of a checkpoint."""
    from .config import load_config
    from .model.slice import slice_checkpoint
    from .slice_presets import read_widths

    choice: dict[str, Any] = {"preset": options.preset} if options.preset else {}
    choice |= {"skip": ",".join(options.skip)} if options.skip else {}
    choice |= {"widths": read_widths(options.widths)} if options.widths else {}
    if not choice:
        raise ConfigError("Say what the slice leaves out: --preset, --skip or --widths.")
    settings = {"model.id": options.source, "model.revision": options.revision, "model.slice": choice}
    config = load_config(None, {**settings, "model.engine": "huggingface"}, origin="forgekit slice")
    print(slice_checkpoint(config, options.out))
    return 0


def start_lab(arguments: list[str]) -> int:
    """Replace this process by JupyterLab; with the extra `jobs` its job form starts runs."""
    from .environment import set_environment
    from .jobs.server import list_options
    from .runs.session import find_package

    set_environment()
    os.environ |= find_package()
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # Jupyter refuses root otherwise
    os.execv(
        sys.executable,
        [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", *list_options(), *root, *arguments],
    )


if __name__ == "__main__":
    sys.exit(main())
