"""From the settings and a model's shapes to the modules that learn, or one sentence for everything that cannot."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..config import Config
from ..errors import ConfigError
from ..layer_groups import (
    GROUPS,
    expand_groups,
    find_group,
    find_layer,
    find_layers_by_kind,
    find_tower,
    resolve_layers,
    write_group_regex,
    write_ranges,
)
from ..model.shapes import Module, Shapes
from .names import ends_with, pick
from .refuse import explain_empty, find_idle_patterns, find_unfit


@dataclass(frozen=True)
class PlannedModule:
    """One module that learns: by low-rank matrices beside it ("LoRA"), or its own "full weights" or "bias"."""

    name: str
    group: str
    tower: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    lora_alpha: float | None
    parameters: int  # that learn
    bytes: int  # of them in memory


def choose_modules(
    config: Config, shapes: Shapes, full_bytes: int
) -> tuple[tuple[PlannedModule, ...], tuple[str, ...]]:
    """Return the modules that learn, in the model's order, and notes for a person.

    Args:
        full_bytes: of one weight of the model itself, for modules that learn whole; matrices of LoRA are float32.

    Raises ConfigError with a sentence for every choice that cannot learn.
    """
    if config.model.load_in == "full":
        return choose_full(config, shapes, full_bytes), ()
    layers, problems = choose_layers(config, shapes)
    matched, more = match_targets(config, shapes, layers)
    problems += more + find_unfit(matched, shapes)
    saved, more = match_saved(config, shapes, full_bytes)
    problems += more + [
        f"adapter.modules_to_save: {module.name} is already adapted by LoRA. Leave one of the two out."
        for module in matched
        if any(module.name == planned.name for planned in saved)
    ]
    problems += find_idle_patterns(config, matched)
    if saved and not matched and not problems:
        problems.append(
            f"adapter.layers: nothing but {saved[0].name} would learn, and PEFT wants an adapter beside it. Name a group such as "
            "attention too, or set model.load_in: full."
        )
    if problems:
        raise ConfigError(problems)
    adapted = [plan_lora(config, module) for module in matched]
    biases = choose_biases(config, shapes, {module.name for module in matched}, full_bytes)
    order = {module.name: number for number, module in enumerate(shapes.modules)}
    chosen = sorted([*adapted, *saved, *biases], key=lambda planned: order[planned.name])
    return tuple(chosen), tuple(write_notes(adapted, shapes))


def choose_full(config: Config, shapes: Shapes, full_bytes: int) -> tuple[PlannedModule, ...]:
    """Return every module of the language model that has weights. Raises ConfigError for settings that adapters alone have."""
    unused = [
        name
        for name in ("layers_to_transform", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
        if getattr(config.adapter, name)
    ]
    if unused:
        raise ConfigError(
            f"model.load_in: full trains every weight of the language model, so adapter.{unused[0]} would choose nothing. "
            "Leave it out, or set load_in to 16bit or 4bit."
        )
    own = [module for module in shapes.modules if module.parameters and find_tower(module.name) == "language"]
    return tuple(plan_full(module, full_bytes) for module in own)


def plan_full(module: Module, full_bytes: int) -> PlannedModule:
    """Return the plan of a module that learns with all its own weights."""
    count = sum(number for _, number in module.parameters)
    group, tower = find_group(module.name) or "other", find_tower(module.name)
    return PlannedModule(module.name, group, tower, "full weights", module.shape, None, None, count, count * full_bytes)


def choose_layers(config: Config, shapes: Shapes) -> tuple[tuple[int, ...] | None, list[str]]:
    """Return the decoder layers that `layers_to_transform` chooses (None: all), and what is wrong with it."""
    choice = config.adapter.layers_to_transform
    if choice is None:
        return None, []
    try:
        layers = resolve_layers(choice, list(shapes.layer_types), shapes.shared_layers)
    except ValueError as error:
        return None, [f"adapter.layers_to_transform: {error}."]
    if not config.adapter.target_modules:
        groups = expand_groups(config.adapter.layers)
        if not any(GROUPS[group].tower == "language" and r"layers\.\d+" in GROUPS[group].pattern for group in groups):
            return layers, [
                f"adapter.layers_to_transform is {choice}, but none of adapter.layers ({', '.join(config.adapter.layers)}) "
                "stands in a decoder layer. Leave it out, or name a group such as attention."
            ]
    return layers, []


def match_targets(config: Config, shapes: Shapes, layers: tuple[int, ...] | None) -> tuple[list[Module], list[str]]:
    """Return the modules that the adapter goes beside, and a sentence for each choice that matches none."""
    tests = make_tests(config, layers)
    # names with layers mean the decoder alone, as in PEFT; the expressions of groups hold their layers themselves
    narrow = config.adapter.target_modules and layers is not None
    inside = [m for m in shapes.modules if not narrow or find_layer(m.name) in (layers or ())]
    found = {choice: {module.name for module in inside if test(module)} for choice, test in tests.items()}
    problems = [explain_empty(choice, test, shapes, layers) for choice, test in tests.items() if not found[choice]]
    names = set().union(*found.values()) if found else set()
    return [module for module in shapes.modules if module.name in names], problems


def make_tests(config: Config, layers: tuple[int, ...] | None) -> dict[str, Callable[[Module], bool]]:
    """Return each choice of the recipe, in words, with a function that says whether a module is meant."""

    def full(expression: str) -> Callable[[Module], bool]:
        return lambda module: re.fullmatch(expression, module.name) is not None

    def end(name: str) -> Callable[[Module], bool]:
        return lambda module: ends_with(module.name, name)

    targets = config.adapter.target_modules
    if targets == "all-linear":
        return {"adapter.target_modules: 'all-linear'": lambda m: m.kind == "linear" and m.name != "lm_head"}
    if isinstance(targets, str):
        return {f"adapter.target_modules: {targets!r}": full(targets)}
    if targets:
        return {f"adapter.target_modules: {name!r}": end(name) for name in targets}
    return {
        f"adapter.layers: {name!r}": full(expression)
        for name in config.adapter.layers
        if (expression := write_regex((name,), layers))
    }


def write_regex(names: tuple[str, ...], layers: tuple[int, ...] | None) -> str:
    """Return the regular expression of the whole names of some groups' modules; "" where all of them learn whole."""
    return "|".join(write_group_regex(group, layers) for group in expand_groups(names) if not GROUPS[group].whole)


def list_saved(config: Config) -> list[str]:
    """Return `modules_to_save` for PEFT, with the groups that learn with all their weights."""
    groups = () if config.adapter.target_modules else expand_groups(config.adapter.layers)
    whole = [GROUPS[group].whole for group in groups if GROUPS[group].whole]
    return [*config.adapter.modules_to_save, *(name for name in whole if name not in config.adapter.modules_to_save)]


def write_targets(config: Config, shapes: Shapes) -> str | list[str]:
    """Return `target_modules` for PEFT: an expression, or for a list or all-linear the whole names that they resolve to."""
    layers, _ = choose_layers(config, shapes)
    targets = config.adapter.target_modules
    if not targets:
        return write_regex(config.adapter.layers, layers)
    if isinstance(targets, str) and targets != "all-linear":
        return targets
    return [module.name for module in match_targets(config, shapes, layers)[0]]


def match_saved(config: Config, shapes: Shapes, full_bytes: int) -> tuple[list[PlannedModule], list[str]]:
    """Return the modules below `modules_to_save`, and a sentence for each name that matches none.

    A name matches as PEFT does it: the end of a module's name; everything below that module learns.
    """
    problems, chosen = [], []
    for end in list_saved(config):
        roots = [module.name for module in shapes.modules if module.name.endswith(end)]
        below = [m for m in shapes.modules if m.parameters and any(f"{m.name}.".startswith(f"{r}.") for r in roots)]
        if not below:
            problems.append(
                f"adapter.modules_to_save: {end!r} matches no module of {shapes.type} with weights. Leave it out."
            )
        chosen += [module for module in below if module not in chosen]
    return [plan_full(module, full_bytes) for module in chosen], problems


def choose_biases(config: Config, shapes: Shapes, adapted: set[str], full_bytes: int) -> list[PlannedModule]:
    """Return the modules whose biases learn. Raises ConfigError when the setting finds none."""
    if config.adapter.bias == "none":
        return []
    chosen = []
    for module in shapes.modules:
        count = sum(number for key, number in module.parameters if "bias" in key)
        if count and (config.adapter.bias == "all" or module.name in adapted):
            group, tower = find_group(module.name) or "other", find_tower(module.name)
            chosen.append(
                PlannedModule(module.name, group, tower, "bias", (count,), None, None, count, count * full_bytes)
            )
    if not chosen:
        raise ConfigError(
            f"adapter.bias: {config.adapter.bias} finds no bias in {shapes.type}, so it would change nothing. Set it to none."
        )
    return chosen


def plan_lora(config: Config, module: Module) -> PlannedModule:
    """Return the plan of an adapted module: A is (r, in), B is (out, r); a convolution's A has its kernel's size."""
    adapter = config.adapter
    r = pick(adapter.rank_pattern, module.name, adapter.r)
    alpha = pick(adapter.alpha_pattern, module.name, adapter.lora_alpha)
    out, *rest = module.shape
    # DoRA learns a length for each output; an Embedding's is as wide as its rows
    lengths = 0 if not adapter.use_dora else module.shape[1] if module.kind == "embedding" else out
    count = r * (out + math.prod(rest)) + lengths
    group = find_group(module.name) or "other"
    return PlannedModule(module.name, group, find_tower(module.name), "LoRA", module.shape, r, alpha, count, 4 * count)


def write_notes(adapted: list[PlannedModule], shapes: Shapes) -> list[str]:
    """Return what a person may not expect: shared keys and values, and ranks that are larger than the matrix."""
    notes = []
    kinds = find_layers_by_kind(list(shapes.layer_types), shapes.shared_layers)
    attention = {find_layer(planned.name) for planned in adapted if planned.group == "attention"}
    shared = tuple(layer for layer in kinds["kv_shared"] if layer in attention)
    if shared:
        notes.append(
            f"Layers without keys and values of their own: {write_ranges(shared)} (they use those of "
            f"{write_ranges(kinds['kv_source'])}). There only queries and outputs learn."
        )
    wide = [planned for planned in adapted if planned.r and planned.r > min(planned.shape[:2])]
    if wide:
        weights = sum(math.prod(planned.shape) for planned in wide)
        notes.append(
            f"{len(wide)} modules have fewer rows or columns than their rank, for instance {wide[0].name} "
            f"{wide[0].shape[0]} x {wide[0].shape[1]}: a lower rank in adapter.rank_pattern, or modules_to_save "
            f"({weights:,} weights), learns as much."
        )
    return notes
