"""Verbs that make or open something: init, slice, lab."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def add_init(verbs: Any) -> None:
    """Describe `forgekit init`."""
    verb = verbs.add_parser(
        "init",
        help="copy the notebooks and recipes into a folder",
        description="Copy the notebooks and recipes into DIR; nothing is written over.",
    )
    verb.add_argument("dir", metavar="DIR", type=Path, help="a folder; made when it is missing")
    verb.set_defaults(act=init)


def init(options: argparse.Namespace) -> int:
    """Copy notebooks and recipes."""
    from ..project import init_project
    from ..runs.summary import find_command

    for file in init_project(options.dir):
        print(file)
    print(
        f"\nNext: cd {shlex.quote(str(options.dir))} && {find_command()} run notebooks/01_text.ipynb   (or: {find_command()} lab)"
    )
    return 0


def add_slice(verbs: Any) -> None:
    """Describe `forgekit slice`, with the table of presets."""
    from ..slice_presets import describe_presets

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
    verb.set_defaults(act=slice_model)


def slice_model(options: argparse.Namespace) -> int:
    """Write a slice of a checkpoint."""
    from ..config import load_config
    from ..model.slice import slice_checkpoint
    from ..slice_presets import read_widths

    choice: dict[str, Any] = {"preset": options.preset} if options.preset else {}
    choice |= {"skip": ",".join(options.skip)} if options.skip else {}
    choice |= {"widths": read_widths(options.widths)} if options.widths else {}
    if not choice:
        raise ConfigError("Say what the slice leaves out: --preset, --skip or --widths.")
    settings = {"model.id": options.source, "model.revision": options.revision, "model.slice": choice}
    config = load_config(None, {**settings, "model.engine": "huggingface"}, origin="forgekit slice")
    print(slice_checkpoint(config, options.out))
    return 0


def add_lab(verbs: Any) -> None:
    """Describe `forgekit lab`."""
    verb = verbs.add_parser(
        "lab",
        help="start JupyterLab on 127.0.0.1",
        description="Start JupyterLab on 127.0.0.1 with this environment; more arguments go to `jupyter lab`.",
    )
    verb.add_argument(
        "arguments", metavar="ARG", nargs=argparse.REMAINDER, help="for instance --no-browser or a notebook"
    )


def start_lab(arguments: list[str]) -> int:
    """Replace this process by JupyterLab; with the extra `jobs` its job form starts runs."""
    from ..environment import set_environment
    from ..jobs.server import list_options
    from ..runs.session import find_package

    set_environment()
    os.environ |= find_package()
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # Jupyter refuses root otherwise
    os.execv(
        sys.executable,
        [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", *list_options(), *root, *arguments],
    )
