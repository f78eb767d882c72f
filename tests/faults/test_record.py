"""The recorded results are those of the suite as it is: a case that is new, or gone, asks for `make faults`."""

from pathlib import Path

import pytest

from benchmarks.reliability import END, RECORD, count_cases, fill_readme, make_table, read_rows

from . import test_exact_resume, test_full_disk, test_mutants, test_points

FOLDER = "tests/faults"


def list_cases() -> set[str]:
    """Return the names of the tests that break something, one for each place and way."""
    exact = f"{FOLDER}/test_exact_resume.py"
    found = {
        f"{exact}::test_every_step_and_every_fault[{a}-{step}-{fault}]" for a, step, fault in test_exact_resume.CASES
    }
    found.add(f"{exact}::{test_exact_resume.test_two_hundred_kills_at_random_moments.__name__}")
    name = test_points.test_every_point_and_every_action.__name__
    found |= {f"{FOLDER}/test_points.py::{name}[{point}-{action}]" for point, action in test_points.CASES}
    name = test_mutants.test_without_the_defence_its_test_turns_red.__name__
    found |= {f"{FOLDER}/test_mutants.py::{name}[{mutant}]" for mutant in test_mutants.MUTANTS}
    name = test_full_disk.test_a_training_on_a_disk_that_fills_up_goes_on_when_there_is_room.__name__
    return found | {f"{FOLDER}/test_full_disk.py::{name}[{step}]" for step in test_full_disk.STEPS}


def test_the_record_holds_every_case_of_the_suite_and_each_went_as_it_was_to(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--record"):
        pytest.skip("the record is being written: what failed before stands in it until it has run again")
    rows = {row["test"]: row for row in read_rows(RECORD)}
    mine = {
        name
        for name in rows
        if name.startswith(FOLDER) and "test_a_run" not in name and "test_checkpoints_fill" not in name
    }
    assert mine == list_cases()
    assert [name for name, row in rows.items() if not row["passed"]] == []


ROW = {
    "test": "t",
    "what": "training",
    "point": "row",
    "action": "kill9",
    "times": 1,
    "happened": "killed",
    "passed": True,
}


def test_the_table_counts_cases_and_shows_failures() -> None:
    rows = [
        ROW,
        {**ROW, "point": "load", "times": 20},
        {**ROW, "passed": False},
        {**ROW, "action": "nan", "what": "export"},
    ]
    assert make_table(rows).splitlines()[2:] == [
        "| training | `kill -9` | load, row | 21 | killed |",
        "| training | `kill -9` | row | 1 | **not what was to happen** |",
        "| export | NaN | row | 1 | killed |",
    ]
    assert count_cases(rows) == "23 times something was broken; 1 ended otherwise than it was to."
    with pytest.raises(SystemExit, match="has them 0 times"):
        fill_readme(f"no mark {END}", rows)


def test_a_readme_with_another_figure_is_noticed(project_folder: Path) -> None:
    text = (project_folder / "README.md").read_text(encoding="utf-8")
    rows = read_rows(RECORD)
    assert fill_readme(text, [*rows, {**ROW, "times": 7}]) != text
