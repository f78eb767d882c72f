"""What a plan costs in one line, and what changed since the last one."""

from dataclasses import dataclass

from ..adapter.plan import LayerPlan
from ..hardware import GIB

MB = 1e6  # bytes


@dataclass(frozen=True)
class Totals:
    """Of everything that learns. `file` is the size of the saved adapter's weights, `memory` the predicted peak, in bytes."""

    modules: int
    parameters: int
    base: int  # parameters of the model itself
    file: int
    memory: float


def count_totals(plan: LayerPlan, memory: float) -> Totals:
    """Return a plan's totals."""
    return Totals(len(plan.modules), plan.parameters, plan.total, plan.bytes, memory)


def describe_totals(totals: Totals) -> str:
    """Return one line: modules, parameters, their share of the base model's, and the adapter's file."""
    return (
        f"{totals.modules:,} modules learn · {totals.parameters:,} parameters ({totals.parameters / totals.base:.2%} of "
        f"{totals.base:,}) · adapter file {totals.file / MB:,.1f} MB"
    )


def describe_change(before: Totals, after: Totals) -> str:
    """Return what a change did, or "" when the totals are the same."""
    if before == after:
        return ""
    return (
        f"{after.modules - before.modules:+,} modules · {after.parameters - before.parameters:+,} parameters · "
        f"file {(after.file - before.file) / MB:+z,.1f} MB · memory {(after.memory - before.memory) / GIB:+z,.2f} GiB"
    )
