"""The plan of a selection without asking any expression: fast enough for every click, and equal to `plan_layers`."""

from dataclasses import dataclass

from ..adapter.choose import PlannedModule, match_saved
from ..adapter.plan import LayerPlan, TowerTotal, count_towers
from ..config import Config
from ..model.shapes import Shapes
from .selection import Selection


@dataclass(frozen=True)
class Fixed:
    """What no click changes: the place of every module, the base model's parameters, and what learns by modules_to_save."""

    model: str
    source: str
    order: dict[str, int]
    towers: tuple[TowerTotal, ...]
    saved: tuple[PlannedModule, ...]


def measure_fixed(config: Config, shapes: Shapes, selection: Selection, full_bytes: int) -> Fixed:
    """Count once what stands beside every selection."""
    order = {module.name: number for number, module in enumerate(shapes.modules)}
    saved = tuple(m for m in match_saved(config, shapes, full_bytes)[0] if m.name not in selection.candidates)
    return Fixed(shapes.type, shapes.source, order, count_towers((), shapes), saved)


def preview_plan(selection: Selection, fixed: Fixed) -> LayerPlan:
    """Return the plan of a selection, without notes and without the biases that `adapter.bias` adds."""
    planned = [*fixed.saved, *(plan_candidate(selection, name) for name in selection.chosen)]
    planned.sort(key=lambda module: fixed.order[module.name])
    by_tower: dict[str, list[int]] = {total.tower: [] for total in fixed.towers}
    for module in planned:
        by_tower[module.tower].append(module.parameters)
    totals = tuple(
        TowerTotal(tower.tower, len(by_tower[tower.tower]), sum(by_tower[tower.tower]), tower.total)
        for tower in fixed.towers
    )
    return LayerPlan(fixed.model, fixed.source, tuple(planned), totals)


def plan_candidate(selection: Selection, name: str) -> PlannedModule:
    """Return the plan of one chosen module."""
    candidate, count = selection.candidates[name], selection.parameters(name)
    kind = "full weights" if candidate.whole else "LoRA"
    r = None if candidate.whole else selection.rank(name)
    alpha = None if candidate.whole else candidate.own_alpha or selection.lora_alpha
    where = (candidate.name, candidate.group, candidate.tower, kind, candidate.shape)
    return PlannedModule(*where, r, alpha, count, count * candidate.size)
