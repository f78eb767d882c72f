"""The `forgekit` command; each verb is a thin call of one public function."""

import argparse
import sys

from . import __version__
from .arguments import spread_set
from .command.looks import add_doctor, add_plan
from .command.project import add_init, add_lab, add_slice, start_lab
from .command.runs import add_gates, add_run, add_sweep
from .errors import ConfigError, ForgekitError, RunNameError
from .exit_codes import FAILED, INTERRUPTED, USAGE

VERBS = (add_init, add_run, add_sweep, add_plan, add_gates, add_doctor, add_slice, add_lab)  # as --help lists them


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="forgekit", description="Fine-tune Gemma 3n from notebooks: interactive in JupyterLab, headless from here."
    )
    parser.add_argument("--version", action="version", version=f"forgekit {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add_verb in VERBS:
        add_verb(verbs)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    # `lab` hands everything on, options too, which argparse would keep for itself
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["lab"] and arguments[1:2] not in (["-h"], ["--help"]):
        return start_lab(arguments[1:])
    options = make_parser().parse_args(spread_set(arguments))
    try:
        return options.act(options)
    except (ConfigError, RunNameError) as error:
        print(f"forgekit: {error}", file=sys.stderr)
        return USAGE
    except ForgekitError as error:
        print(f"forgekit: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("forgekit: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
