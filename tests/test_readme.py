"""What README.md says is so: its commands run, its tree is the tree, its recipes, settings and messages exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reliability import RECORD, fill_readme, read_rows
from forgekit.__main__ import main, make_parser
from forgekit.arguments import read_assignments
from forgekit.config import NAMES, load_config
from forgekit.exit_codes import FAILED as EXIT_FAILED
from forgekit.exit_codes import USAGE
from forgekit.model.shapes import make_released_config
from forgekit.model.slice_plan import plan_slice
from forgekit.run_folder import DONE
from forgekit.runs.outcome import CRASHED, FAILED, GATES_FAILED, STOPPED, Outcome

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.strip().splitlines()]
SOURCES = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "forgekit").rglob("*.py"))


def find_command(start: str) -> list[str]:
    """Return the README's one command that starts so, split as a shell splits it."""
    (command,) = [command for command in COMMANDS if command.startswith(start)]
    return shlex.split(command)


def run_module(arguments: list[str], runs: Path) -> subprocess.CompletedProcess:
    """Run `python -m ...` from the root of the tree."""
    variables = {**os.environ, "FORGEKIT_RUNS": str(runs)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300
    )


def test_every_command_is_known_to_these_tests():
    starts = (
        "make demo",
        "make test",
        "make faults",
        "forgekit run notebooks/01_text.ipynb --set adaptor",
        "forgekit plan ",
        "forgekit slice ",
        "papermill ",
        "forgekit sweep params/sweeps/text_quick.yaml",
        "ray start ",
        "forgekit sweep params/sweeps/text_search.yaml --backend",
        "forgekit run notebooks/01_text.ipynb --recipe",
    )
    assert [c for c in COMMANDS if not c.startswith(starts)] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_misspelt_setting_gets_the_sentence_shown(tmp_path):
    done = run_module(find_command("forgekit run notebooks/01_text.ipynb --set adaptor"), tmp_path)
    sentence = re.search(r"says `(adaptor\.r.*?)` and exits", README).group(1)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_plan_example_shows_what_learns_and_where_it_fits(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(find_command("forgekit plan ")[1:]) == 0
    printed = capsys.readouterr().out
    assert "attention" in printed and "mlp" not in printed  # --set is on top of the recipes
    assert "Memory at the peak of a step" in printed and re.search(r"T4 15 GB\s+[\d.]+\s+(yes|no)", printed)


def test_the_slice_example_is_one_that_e4b_allows():
    words = find_command("forgekit slice ")
    options = make_parser().parse_args(words[1:])
    config = load_config(None, {"model.id": options.source, "model.slice": options.preset})
    plan = plan_slice(make_released_config("E4B").text_config, config.model.slice, options.source)
    assert (len(plan.layers), plan.widths.count(16384)) == (35, 6)


def test_the_headless_example_has_valid_settings():
    words = find_command("forgekit run notebooks/01_text.ipynb --recipe")
    recipe, sets = words[words.index("--recipe") + 1], words[words.index("--set") + 1 : words.index("--name")]
    config = load_config(ROOT / recipe, read_assignments(sets))
    assert (config.train.max_steps, config.adapter.r) == (200, 32)


def test_the_states_and_exit_codes_are_those_of_the_package():
    rows = re.findall(r"^\| (`\w+`|\(no run\)) \| (.*?) \| (.*?) \|$", README.split("| state in `run.json` |")[1], re.M)
    codes = {(state.strip("`"), code) for state, _, code in rows[:7]}
    own = {Outcome(state).state for state in (DONE, FAILED, STOPPED, CRASHED, GATES_FAILED)}
    assert {state for state, _ in codes} == own | {"(no run)"}
    for state in (DONE, FAILED, GATES_FAILED):
        assert (state, str(Outcome(state).exit_code)) in codes
    by_signal = "128 + the signal's number"
    for state, without in ((STOPPED, f"{by_signal}; 1"), (CRASHED, f"{by_signal}, 1 without one")):
        assert (state, without) in codes
        assert (Outcome(state, number=15).exit_code, Outcome(state).exit_code) == (128 + 15, 1)
    assert {code for state, code in codes if state == "(no run)"} == {str(USAGE), str(EXIT_FAILED)}


def test_what_was_broken_is_told_as_the_fault_suite_recorded_it():
    assert fill_readme(README, read_rows(RECORD)) == README


def test_settings_shown_as_yaml_are_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        evaluate = load_config(None, block).evaluate
        assert evaluate.gates["model-performance"] == {"margin": 0.2}
        assert (evaluate.gates_action, evaluate.regression["drop"]) == ("stop", 0.02)


def test_the_papermill_example_runs(tmp_path):
    words = find_command("papermill notebooks/01")
    words[words.index("out.ipynb")] = str(tmp_path / "out.ipynb")
    done = run_module(words, tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "models" / "lora" / "adapter_model.safetensors").is_file()


def test_recipes_are_listed_with_their_first_line():
    listed = dict(re.findall(r"^\| `(params/[\w/]+\.yaml)` \| (.*?) \|$", README, re.M))
    first = {
        str(f.relative_to(ROOT)): f.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for f in (ROOT / "params").rglob("*.yaml")
    }
    assert listed == first


def test_the_tree_lists_every_module():
    tree = README.split("## The tree")[1].split("```")[1]
    listed = set(re.findall(r"^  ([\w/]+\.py) ", tree, re.M))
    package = ROOT / "forgekit"
    modules = {str(f.relative_to(package)) for f in package.rglob("*.py") if f.name != "__init__.py"} | {"__init__.py"}
    assert listed == {m for m in modules if not m.startswith(("data/samples/", "_project/"))}
    for folder in re.findall(r"^  ([\w/]+/) ", tree, re.M):
        assert (package / folder).is_dir(), folder


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:data|model|adapter|train|evaluate|export)\.[a-z_]+)", README)))
)
def test_settings_named_exist(name):
    assert name in NAMES


@pytest.mark.parametrize(
    "words", ["The loss is ", "was imported before unsloth", "float16 overflows in Gemma 3n", "needs an NVIDIA GPU"]
)
def test_messages_in_the_table_are_the_package_s(words):
    assert words in README
    assert words in SOURCES


def test_pictures_exist_and_say_what_they_show():
    for text, place in re.findall(r"!\[(.*?)\]\((.*?)\)", README):
        assert len(text) > 20
        assert (ROOT / place).is_file(), place
