"""Every point of a training and of an export, broken in every way: what stands on the disk is whole, and it goes on."""

from typing import Any

import pytest

from forgekit.faults import ACTIONS, NUMBERS, POINTS

from .breaking import EXACT, ONE, SMALLER, STEADY, break_and_export, break_and_resume

# which passing of a point: the ninth step, which has a checkpoint before it; the save after the eighth; the fifth tensor
NTH = {"load": 1, "row": 20, "merge": 5, "export": 2} | {point: 4 for point in POINTS if point.startswith("save_")}
EXPORTING = ("merge", "export")
ENDS = {"kill9": "killed", "exception": "ended by InjectedError", "no_space": "ended by OSError"}
NO_HALF = "no half export"
AGAIN = "the next one equals an undisturbed one"


def expect(point: str, action: str) -> str:
    """Return what is to happen."""
    if point in EXPORTING:
        return expect_of_export(point, action)
    outside = point == "load"
    inside_save = point.startswith("save_")
    ends = ENDS | {
        "term": "ended by SIGTERM" if outside else "stopped after its step, with a checkpoint",
        "nan": "ended by ModelError",
        "out_of_memory": "ended by OutOfMemoryError" if outside else "ended by FreshProcessError",
        "hang": "ended at the time limit" if outside or inside_save else "found hung and ended",
    }
    if inside_save:
        ends["no_space"] = "ended by RunError"
    return f"{ends[action]}; {SMALLER if action == 'out_of_memory' and not outside else EXACT}"


def expect_of_export(point: str, action: str) -> str:
    ends = ENDS | {
        "term": "ended by SIGTERM",
        "out_of_memory": "ended by OutOfMemoryError",
        "hang": "ended at the time limit",
    }
    if (point, action) == ("merge", "no_space"):
        ends["no_space"] = "ended by ExportError"
    return f"kept as unverified; {AGAIN}" if action == "nan" else f"{ends[action]}; {NO_HALF}; {AGAIN}"


CASES = [(point, action) for point in POINTS for action in ACTIONS if action != "nan" or point in NUMBERS]
# one of each kind of end, by default
CHOSEN = {
    ("save_write", "kill9"), ("save_rename", "kill9"), ("save_fsync", "no_space"),
    ("forward", "out_of_memory"), ("backward", "nan"), ("merge", "kill9"), ("merge", "nan"), ("export", "exception"),
}  # fmt: skip
HANG, LIMIT = 3.0, 12.0  # seconds


@pytest.mark.parametrize(
    ("point", "action"),
    [pytest.param(*case, marks=() if case in CHOSEN else pytest.mark.faults, id="-".join(case)) for case in CASES],
)
def test_every_point_and_every_action(warm: Any, point: str, action: str, record_case: Any) -> None:
    case = record_case(what="export" if point in EXPORTING else "training", point=point, action=action)
    fault = f"{point}:{NTH.get(point, 9)}:{action}"
    limits = {"hang": HANG, "timeout": LIMIT} if action == "hang" else {}
    if point in EXPORTING:
        case["happened"] = break_and_export(warm, fault, **limits)
    else:
        settings = STEADY if action == "out_of_memory" else ONE
        case["happened"] = break_and_resume(warm, settings, fault, **limits)
    assert case["happened"] == expect(point, action)


def test_every_point_and_every_action_has_a_case() -> None:
    assert {point for point, _ in CASES} == set(POINTS) and {action for _, action in CASES} == set(ACTIONS)
    assert set(CASES) >= CHOSEN and {point for point, action in CASES if action == "nan"} == set(NUMBERS)
