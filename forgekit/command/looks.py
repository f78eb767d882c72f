"""Verbs that look and change nothing: plan, doctor."""

import argparse
from typing import Any

from ..arguments import read_assignments
from ..exit_codes import FAILED
from .runs import add_set


def add_plan(verbs: Any) -> None:
    """Describe `forgekit plan`."""
    verb = verbs.add_parser(
        "plan",
        help="show which layers a recipe trains and the memory it needs",
        description="Show which layers learn and the memory a step needs, without weights or a GPU.",
        epilog="example: forgekit plan params/text.yaml params/gpu/16gb.yaml --set adapter.layers=[attention]",
    )
    verb.add_argument("recipe", metavar="RECIPE", nargs="+", help="YAML file with settings; further ones go on top")
    add_set(verb)
    verb.set_defaults(act=plan)


def plan(options: argparse.Namespace) -> int:
    """Print what would learn, and the memory it needs."""
    from ..adapter.advice import advise_cards
    from ..adapter.memory import estimate_memory
    from ..adapter.plan import find_shapes, plan_layers
    from ..config import load_config

    config = load_config(" + ".join(options.recipe), read_assignments(options.set), origin="--set")
    shapes = find_shapes(config)
    layers = plan_layers(config, shapes)
    print(layers)
    print(f"\n{estimate_memory(layers, config, shapes)}\n\n{advise_cards(config, shapes).to_string(index=False)}")
    return 0


def add_doctor(verbs: Any) -> None:
    """Describe `forgekit doctor`."""
    verb = verbs.add_parser(
        "doctor",
        help="check versions, GPU, memory, engines and disk; with a recipe, whether training is right here",
        description="Check this machine; each finding comes with a remedy. Exit code 1 when something is bad.",
    )
    verb.add_argument(
        "--recipe", metavar="R", help="load its model and rows, and prove on a short batch that training is right"
    )
    verb.set_defaults(act=doctor)


def doctor(options: argparse.Namespace) -> int:
    """Print the findings."""
    from itertools import chain

    from ..doctor import BAD, examine, examine_recipe

    states = set()
    for finding in chain(examine(), examine_recipe(options.recipe) if options.recipe else ()):
        print(finding, flush=True)
        states.add(finding.state)
    return FAILED if BAD in states else 0
