"""From a selection to the settings of a recipe: groups and layers where they say it, else an expression; and the recipe's text."""

from collections.abc import Iterable
from typing import Any

import yaml

from ..adapter.names import meets
from ..config import Config, flatten, nest
from ..layer_groups import GROUPS, SETS, find_group, find_layer, write_ranges
from ..model.shapes import Shapes
from .expression import write_expression
from .selection import Selection

CHOOSERS = (
    "layers",
    "layers_to_transform",
    "target_modules",
)  # settings that choose modules, of which the panel writes the fewest


def change_config(config: Config, selection: Selection, shapes: Shapes) -> Config:
    """Return the config with a selection in it, origin "panel"; settings that need not change keep their origin.

    Raises ConfigError when nothing is chosen.
    """
    wanted = write_settings(config, selection, shapes)
    now = flatten(config.model_dump())
    changed = {name: value for name, value in wanted.items() if value is not None and value != now[name]}
    dropped = [name for name, value in wanted.items() if value is None and now[name] is not None]
    return config.change(changed, "panel", without=dropped)


def write_settings(config: Config, selection: Selection, shapes: Shapes) -> dict[str, Any]:
    """Return every setting that the panel decides; None takes a setting back to its default."""
    chosen = selection.find(lambda candidate: candidate.name in selection.chosen)
    values = dict.fromkeys(CHOOSERS) | choose_modules(config, selection, shapes, chosen)
    adapted = [name for name in chosen if not selection.candidates[name].whole]
    values |= {
        "r": selection.r,
        "lora_alpha": selection.lora_alpha,
        "rank_pattern": write_ranks(selection, adapted),
        "alpha_pattern": keep_used(config.adapter.alpha_pattern, adapted),
    }
    rates = keep_used(config.train.learning_rate_pattern, chosen)
    return {**{f"adapter.{name}": value for name, value in values.items()}, "train.learning_rate_pattern": rates}


def choose_modules(config: Config, selection: Selection, shapes: Shapes, chosen: list[str]) -> dict[str, Any]:
    """Return the settings that choose exactly these modules: groups, in some decoder layers or in all, or an expression."""
    saved = config.adapter.modules_to_save
    groups = tuple(group for group in GROUPS if any(selection.candidates[name].group == group for name in chosen))
    layers = find_common_layers(selection, chosen)
    if set(chosen) == set(expand(selection, groups, layers)) and not has_locked(selection, shapes, groups, layers):
        some = layers if layers != tuple(selection.by_layer) else None
        return {
            "layers": name_groups(groups),
            "layers_to_transform": write_ranges(some) if some else None,
            "modules_to_save": saved,
        }
    known = [module.name for module in shapes.modules]
    adapted = [name for name in chosen if not selection.candidates[name].whole]
    whole = [GROUPS[selection.candidates[name].group].whole for name in chosen if selection.candidates[name].whole]
    return {"target_modules": write_expression(adapted, known), "modules_to_save": (*saved, *whole)}


def find_common_layers(selection: Selection, chosen: Iterable[str]) -> tuple[int, ...] | None:
    """Return the decoder layers that hold any of these modules, or None when none does."""
    layers = {selection.candidates[name].layer for name in chosen} - {None}
    return tuple(sorted(layer for layer in layers if layer is not None)) or None


def expand(selection: Selection, groups: Iterable[str], layers: tuple[int, ...] | None) -> list[str]:
    """Return what groups in some decoder layers choose; modules outside the decoder's layers always belong to their group."""
    return selection.find(lambda c: c.group in groups and (c.layer is None or layers is None or c.layer in layers))


def has_locked(selection: Selection, shapes: Shapes, groups: Iterable[str], layers: tuple[int, ...] | None) -> bool:
    """Say whether groups would also choose modules that learn by modules_to_save already."""
    others = (module.name for module in shapes.modules if module.name not in selection.candidates)
    wanted: set[str | None] = {*groups}
    return any(
        find_group(name) in wanted and (layers is None or find_layer(name) in (None, *layers)) for name in others
    )


def name_groups(groups: Iterable[str]) -> tuple[str, ...]:
    """Return the shortest names of some groups: a set of several where all of it is there."""
    names, left = [], set(groups)
    for group in GROUPS:
        whole = [name for name, parts in SETS.items() if len(parts) > 1 and group in parts and left.issuperset(parts)]
        if group in left:
            names += whole or [group]
            left -= set(SETS[whole[0]] if whole else (group,))
    return tuple(names)


def write_ranks(selection: Selection, adapted: list[str]) -> dict[str, int]:
    """Return `rank_pattern`: by group where all of it has one rank, else by expression; the common rank needs no entry."""
    by_group: dict[str, dict[int, list[str]]] = {}
    for name in adapted:
        by_group.setdefault(selection.candidates[name].group, {}).setdefault(selection.rank(name), []).append(name)
    even: dict[int, list[str]] = {}
    uneven: dict[int, list[str]] = {}
    for group, ranks in by_group.items():
        for r, names in ranks.items():
            # a group's name would also meet modules of another tower that have the same last names
            if r != selection.r and len(ranks) == 1 and "other" not in by_group:
                even.setdefault(r, []).append(group)
            elif r != selection.r:
                uneven.setdefault(r, []).extend(names)
    pattern = {name: r for r, groups in even.items() for name in name_groups(groups)}
    for r, names in uneven.items():
        pattern[write_expression(names, adapted, lambda key, name: meets(key, name))] = r
    return pattern


def keep_used(pattern: dict[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return the entries of a pattern that are about a module that learns; the plan refuses the others."""
    names = list(names)
    return {key: value for key, value in pattern.items() if any(meets(key, name) for name in names)}


def write_recipe(config: Config, comment: str = "") -> str:
    """Return a config as the YAML of a recipe: what differs from the defaults, with the file that it came from.

    `load_config` reads it back to an equal config.
    """
    values = {name: value for name, value in config.list_values().items() if config.origin(name) != "default"}
    plain = {section: {key: make_plain(value) for key, value in own.items()} for section, own in nest(values).items()}
    order = [section for section in type(config).model_fields if section in plain]
    text = yaml.dump(
        {section: plain[section] for section in order},
        Dumper=RecipeDumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
    )
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + text


class RecipeDumper(yaml.SafeDumper):
    """YAML as recipes are written: one setting a line, lists in brackets."""

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


RecipeDumper.add_representer(list, RecipeDumper.represent_list)


def make_plain(value: Any) -> Any:
    """Return a setting as YAML knows it: lists for tuples."""
    return [make_plain(item) for item in value] if isinstance(value, tuple | list) else value
