"""The candidates as a tree for a person: towers, groups, layers or blocks, modules; with what cannot learn said in place.

language ── attention ── layer 0 ── self_attn.q_proj
vision ──── vision_stage3 ── block 9 ── attn.query.proj
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..layer_groups import GROUPS, TOWERS, find_group, write_ranges
from ..model.shapes import Module, Shapes
from .selection import Candidate, Selection


@dataclass(frozen=True)
class Node:
    """Modules that one box switches. `hint` says what a person may not expect of them; a leaf is one module."""

    label: str
    help: str
    names: tuple[str, ...]
    children: tuple["Node", ...] = ()
    contents: str = ""  # what the children are: "35 layers"
    hint: str = ""


def build_tree(selection: Selection, shapes: Shapes) -> tuple[Node, ...]:
    """Return the towers that the model has, with everything below them."""
    hints = find_hints(selection, shapes)
    found: dict[str, dict[str, list[Candidate]]] = {tower: {} for tower in TOWERS}
    names = [*GROUPS, "other"]
    for candidate in sorted(selection.candidates.values(), key=lambda c: names.index(c.group)):
        found[candidate.tower].setdefault(candidate.group, []).append(candidate)
    return tuple(
        join(tower, f"{sum(len(part.names) for part in parts)} modules can learn", parts, count(parts, "group"))
        for tower, groups in found.items()
        if (parts := [build_group(name, own, hints.get(name, "")) for name, own in groups.items()])
    )


def build_group(name: str, members: list[Candidate], hint: str) -> Node:
    """Return a group with its layers or blocks; modules in no block stand beside them."""
    blocks: dict[int, list[Candidate]] = {}
    alone = []
    for candidate in members:
        if candidate.block is None:
            alone.append(build_leaf(candidate))
        else:
            blocks.setdefault(candidate.block, []).append(candidate)
    word = "layer" if any(candidate.layer is not None for candidate in members) else "block"
    parts = [
        join(f"{word} {number}", "", [build_leaf(c) for c in own], count(own, "module"))
        for number, own in sorted(blocks.items())
    ]
    help = GROUPS[name].help if name in GROUPS else "chosen by the recipe, in no group"
    if len(members) == 1:
        return Node(name, help, (members[0].name,), hint=hint)
    contents = f"{count(parts, word)}{f' + {len(alone)}' if alone else ''}" if parts else count(alone, "module")
    return join(name, help, [*parts, *alone], contents, hint)


def build_leaf(candidate: Candidate) -> Node:
    """Return one module with its shape."""
    return Node(candidate.part, " x ".join(map(str, candidate.shape)), (candidate.name,))


def join(label: str, help: str, children: Iterable[Node], contents: str, hint: str = "") -> Node:
    """Return a node of several."""
    children = tuple(children)
    return Node(label, help, tuple(name for child in children for name in child.names), children, contents, hint)


def count(parts: Sequence[object], word: str) -> str:
    """Return a number with its word: "1 layer", "35 layers"."""
    return f"{len(parts)} {word}{'s' * (len(parts) != 1)}"


def find_hints(selection: Selection, shapes: Shapes) -> dict[str, str]:
    """Return group -> what of it cannot learn, or learns whatever is chosen here."""
    hints: dict[str, list[str]] = {}
    if selection.kinds["kv_shared"]:
        hints["attention"] = [
            f"Layers {write_ranges(selection.kinds['kv_shared'])} have no keys and values of their own (they use those of "
            f"{write_ranges(selection.kinds['kv_source'])}): there only queries and outputs can learn."
        ]
    for group, many in count_grouped(shapes.modules).items():
        hints.setdefault(group, []).append(f"{many} grouped convolutions in here cannot learn.")
    for group, many in count_by_group(m for m in shapes.modules if m.name not in selection.candidates).items():
        hints.setdefault(group, []).append(f"{many} more learn with all their weights (adapter.modules_to_save).")
    return {group: " ".join(sentences) for group, sentences in hints.items()}


def count_by_group(modules: Iterable[Module]) -> dict[str, int]:
    """Count modules by the group that they belong to."""
    counts: dict[str, int] = {}
    for module in modules:
        if (group := find_group(module.name)) is not None:
            counts[group] = counts.get(group, 0) + 1
    return counts


def count_grouped(modules: Iterable[Module]) -> dict[str, int]:
    """Count the grouped convolutions by the group of their neighbours in the same stage or block."""
    places: dict[str, str] = {}
    modules = tuple(modules)
    for module in modules:
        if (group := find_group(module.name)) is not None:
            places[find_place(module.name)] = group
    counts: dict[str, int] = {}
    for module in modules:
        if module.kind == "conv" and module.groups > 1 and (group := places.get(find_place(module.name))):
            counts[group] = counts.get(group, 0) + 1
    return counts


def find_place(name: str) -> str:
    """Return what the modules of one stage have in common: the name up to its first number."""
    return re.sub(r"(\.\d+)\..*", r"\1", name)
