"""Each defence is taken out of a copy of the package, and a named test that the suite has turns red for that reason.

What a resume forgets is taken out in the running process (test_exact_resume.py), what a verified export has wrong in
tests/export/test_verify.py, and each kind of token in tests/test_secrets.py.
"""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest


class Mutant(NamedTuple):
    """A defence in words, the place where it stands, the text that is left in its place, the test, and what that says."""

    defence: str
    file: str
    text: str
    instead: str
    test: str
    red: str


WRITE_BESIDE = """        with drafted(target) as draft:
            FORMATS[name].write(model, processor, config, draft, scores)
            verdicts[name] = verdict = FORMATS[name].verify(reference, draft, config)
            verdict.save(draft)
            describe_export(draft, name, target, config, run, scores, verdict)
            strike("export")
            written[name] = put(draft, target, run.path / "models", verdict)
"""
WRITE_IN_PLACE = WRITE_BESIDE.replace("with drafted(target) as draft:", "for draft in [target]:").replace(
    'put(draft, target, run.path / "models", verdict)', "target"
)
MUTANTS = {
    "manifest": Mutant(
        "a checkpoint's files are compared with its manifest", "train/checkpoint.py",
        '        if describe_file(found[name], path)["sha256"] != entry["sha256"]:', "        if False:",
        "train/test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over[one bit]", "a damaged checkpoint was taken",
    ),
    "flush": Mutant(
        "a checkpoint is flushed before it gets its name", "train/checkpoint.py",
        "            sync(file)\n", "            pass\n",
        "train/test_checkpoint.py::test_everything_is_flushed_before_it_gets_its_name", "renamed before it was flushed",
    ),
    "written in place": Mutant(
        "a checkpoint is written beside its place", "train/checkpoint.py",
        '    temporary = path.with_name(f"{WRITING}{path.name}")', "    temporary = path",
        "train/test_checkpoint.py::test_everything_is_flushed_before_it_gets_its_name", "Error",
    ),
    "rotation": Mutant(
        "older checkpoints go after the new one was read back", "train/saving.py",
        "        write_whole(path, functools.partial(self.write, whole=whole), about)\n",
        "        rotate(self.folder, (), kept=1)\n        write_whole(path, functools.partial(self.write, whole=whole), about)\n",
        "train/test_checkpoint_resume.py::test_older_checkpoints_go_only_when_the_new_one_was_read_back", "rotated away",
    ),
    "drift": Mutant(
        "a checkpoint of another training is refused", "train/identity.py",
        "    refused = {name: changes for name, changes in drift.items() if name not in allowed}", "    refused = {}",
        "train/test_checkpoint_resume.py::test_another_training_is_refused_by_name_unless_that_is_allowed[config]", "DID NOT RAISE",
    ),
    "finite": Mutant(
        "loss and gradient are looked at before the weights change", "train/exact.py",
        "        self.check_finite(self.exchange_losses(losses), norm)\n", "        self.exchange_losses(losses)\n",
        "train/test_checkpoint_guards.py::test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_rows", "DID NOT RAISE",
    ),
    "same rows a step": Mutant(
        "half the rows at once means twice the accumulation", "train/resume.py",
        "    set_batch(trainer, rows, before[1] * before[0] // rows)", "    set_batch(trainer, rows, before[1])",
        "train/test_checkpoint_guards.py::test_out_of_memory_goes_on_with_half_the_rows_at_once_and_the_same_rows_a_step", "assert",
    ),
    "lock": Mutant(
        "a run's folder is locked", "run_lock.py",
        "            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "            return None\n",
        "test_run_lock.py::test_of_two_runs_in_one_folder_one_wins_each_time_and_the_loser_changes_nothing", "assert",
    ),
    "dead owner": Mutant(
        "the lock of a dead owner is taken over", "run_lock.py",
        '    return owner.get("boot") == boot_id() and', "    return True or",
        "test_run_lock.py::test_without_flock_the_owners_number_start_and_boot_decide[change1-True]", "is in use",
    ),
    "whole files": Mutant(
        "a run's files are written beside their place", "files.py",
        "    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f\".{path.name}.\")",
        "    temporary = path\n    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)",
        "test_files.py::test_a_write_that_fails_leaves_the_old_file_and_no_rest[os.fsync]", "Error",
    ),
    "honest notebook": Mutant(
        "cells that never ran are not marked as completed", "runs/engine.py",
        "        tell_end(self.nb, outcome)\n",
        "        tell_end(self.nb, outcome)\n        for cell in self.nb.cells:\n            cell.metadata.setdefault('papermill', {})['status'] = 'completed'\n",
        "runs/test_engine.py::test_a_killed_kernel_is_recorded_within_five_seconds_and_no_later_cell_says_completed", "'completed' != 'failed'",
    ),
    "atomic notebook": Mutant(
        "the notebook is replaced as a whole", "runs/engine.py",
        "            write_text(self.path if", "            Path.write_text(self.path if",
        "runs/test_engine.py::test_a_full_disk_keeps_the_notebook_of_before_and_the_run_goes_on", "assert",
    ),
    "parameters": Mutant(
        "unknown parameters are refused before a kernel starts", "runs/standalone.py",
        "        check_known(given, own)", "        pass",
        "runs/test_engine.py::test_plain_papermill_is_refused_before_a_kernel_starts[given0-recpie: the notebook has no such parameter. Did you mean recipe?]",
        "PapermillExecutionError",
    ),
    "forwarded signal": Mutant(
        "the supervisor hands SIGTERM on", "runs/supervise.py",
        "        if not self.told and self.executing:", "        if False:",
        "runs/test_supervise.py::test_a_signal_to_the_supervisor_lets_the_cell_clean_up_and_leaves_no_child[SIGTERM-143]", "the kernel was killed",
    ),
    "grace": Mutant(
        "a kernel that does not end is killed", "runs/supervise.py",
        "        if (late or self.hurry) and", "        if False and",
        "runs/test_supervise.py::test_a_kernel_that_does_not_end_is_killed_within_the_grace_period", "assert",
    ),
    "children": Mutant(
        "nothing that a kernel started is left behind", "runs/supervise.py",
        "            if self.pid is not None:\n                kill_group(self.pid)", "            pass",
        "runs/test_engine.py::test_a_killed_kernel_is_recorded_within_five_seconds_and_no_later_cell_says_completed", "was left behind",
    ),
    "hung step": Mutant(
        "a step that hangs is found", "runs/supervise.py",
        "        return max(HANG_SECONDS, HANG_STEPS * median(self.seconds)) if self.seconds else HANG_SECONDS", "        return 1e9",
        "runs/test_supervise.py::test_a_step_hangs_after_ten_minutes_or_twenty_median_steps_and_grace_is_two_steps", "1000000000",
    ),
    "orphan": Mutant(
        "a kernel sees that its supervisor is dead", "runs/inside.py",
        "                    return self.end_alone()", "                    return None",
        "runs/test_supervise.py::test_when_the_supervisor_is_killed_the_kernel_saves_says_so_and_ends", "it did not happen in time",
    ),
    "parent watch": Mutant(
        "ipykernel's own watch, which leaves no time to save, is off", "runs/cells.py",
        '            "independent": True,\n', '            "independent": False,\n',
        "runs/test_supervise.py::test_when_the_supervisor_is_killed_the_kernel_saves_says_so_and_ends", "Error",
    ),
    "fresh process": Mutant(
        "after memory ran out a fresh kernel goes on", "runs/cells.py",
        "        fresh = name == FreshProcessError.__name__", "        fresh = False",
        "runs/test_fresh.py::test_after_memory_ran_out_a_fresh_kernel_goes_on_in_the_same_run", "failed",
    ),
    "room": Mutant(
        "a run keeps room on the disk for its last words", "runs/session.py",
        "        keep_room(run.path)\n", "        pass\n",
        "faults/test_full_disk.py::test_a_run_whose_disk_fills_up_still_says_how_it_ended[print('the end')-completed-0]", "No space left",
    ),
    "fires once": Mutant(
        "a fault strikes once, also over restarts", "faults.py",
        "    if path.exists() and text in path.read_text(encoding=\"utf-8\").splitlines():", "    if False:",
        "test_faults.py::test_a_fault_that_stands_in_the_file_does_not_strike_again", "InjectedError",
    ),
    "links": Mutant(
        "a run is not written through a link", "paths.py",
        '        problem = f"passes a symbolic link ({links[-1].name})" if links else None', "        pass",
        "test_hostile_input.py::test_a_link_below_the_folder_is_refused_and_the_folder_itself_may_be_one", "DID NOT RAISE",
    ),
    "names": Mutant(
        "a name does not lead out of its folder", "paths.py",
        "    problem = explain_path(text)\n", "    problem = None\n",
        "test_hostile_input.py::test_a_path_that_leaves_its_folder_is_refused['../x']", "DID NOT RAISE",
    ),
    "aliases": Mutant(
        "YAML has no aliases and no tags", "recipe.py",
        "        if refused:\n            raise yaml.Marked", "        if False:\n            raise yaml.Marked",
        "test_hostile_input.py::test_settings_given_as_text_are_as_small_and_as_safe_as_a_recipe", "",
    ),
    "pickles": Mutant(
        "a pickle is known by its first bytes", "model/trust.py",
        "        problem = explain_weights(file)\n", "        problem = None\n",
        "test_hostile_input.py::test_a_pickle_is_known_by_its_bytes_whatever_its_name[pickle]", "match",
    ),
    "own code": Mutant(
        "code of a checkpoint is not run", "model/trust.py",
        'NO_CODE: dict[str, Any] = {"trust_remote_code": False}', 'NO_CODE: dict[str, Any] = {"trust_remote_code": True}',
        "test_hostile_input.py::test_a_checkpoints_own_code_is_not_run", "RecursionError",  # its own class, loaded, calls itself
    ),
    "draft": Mutant(
        "an export is written beside its place", "export/model.py", WRITE_BESIDE, WRITE_IN_PLACE,
        "faults/test_points.py::test_every_point_and_every_action[merge-kill9]", "merged/verify.json",
    ),
}  # fmt: skip
CHOSEN = ("lock",)


@pytest.fixture
def copied(tmp_path: Path, project_folder: Path) -> Path:
    """A copy of the project's code and tests, by hard links where the disk allows: a file that changes is written anew."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for name in ("forgekit", "tests", "benchmarks"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(project_folder / name, tmp_path / "copy" / name, copy_function=link, ignore=ignore)
    shutil.copy2(project_folder / "pyproject.toml", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def leftovers() -> Iterator[str]:
    """A variable's value that marks every process of a test; those that it leaves behind are ended."""
    mark = uuid.uuid4().hex
    yield mark
    for process in psutil.process_iter():
        try:
            if process.environ().get("FORGEKIT_MUTANT") == mark:
                process.kill()
        except psutil.Error:
            continue


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in CHOSEN else pytest.mark.faults) for n in MUTANTS])
def test_without_the_defence_its_test_turns_red(name: str, copied: Path, leftovers: str, record_case: Any) -> None:
    mutant = MUTANTS[name]
    case = record_case(what="defence", point=mutant.defence, action="taken out")
    file = copied / "forgekit" / mutant.file
    whole = file.read_text(encoding="utf-8")
    assert whole.count(mutant.text) == 1, f"{mutant.file} has changed: the table names a line that is not there once"
    file.unlink()
    file.write_text(whole.replace(mutant.text, mutant.instead), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", f"tests/{mutant.test}", "--faults", "-q", "-x", "-p", "no:cacheprovider"]
    variables = os.environ | {"FORGEKIT_MUTANT": leftovers, "PYTHONPATH": str(copied), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copied, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-3000:]
    assert mutant.red in done.stdout, done.stdout[-3000:]
    case["happened"] = "its test turns red"


def test_every_test_of_the_table_is_there(project_folder: Path) -> None:
    for mutant in MUTANTS.values():
        file, _, test = mutant.test.partition("::")
        source = (project_folder / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test.partition('[')[0]}(" in source, mutant.test
        assert (project_folder / "forgekit" / mutant.file).read_text(encoding="utf-8").count(mutant.text) == 1, (
            mutant.file
        )
