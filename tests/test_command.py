"""The `forgekit` command: what it prints, where it writes, and its exit codes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from forgekit import __version__, doctor
from forgekit.__main__ import main
from forgekit.arguments import read_assignments, read_seconds
from forgekit.doctor import BAD, NOTE, OK, Finding
from forgekit.errors import ConfigError
from forgekit.files import read_json
from forgekit.jobs.server import list_options
from forgekit.run_folder import Run
from forgekit.runs import headless
from forgekit.runs.outcome import Outcome
from forgekit.runs.session import Session
from forgekit.runs.summary import find_command

PARAMETERS = 'recipe: str = "recipe.yaml"\nsettings: dict = {}\nrun_name: str = ""'
START = """
import forgekit as fk

config = fk.load_config(recipe, settings)
run = fk.start_run(config, run_name)
print(f"seed {config.train.seed} from {config.origin('train.seed')}")
"""
END = """
if config.train.seed == 13:
    raise ValueError("thirteen\\nis refused")
run.finish()
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test stands in a folder with a recipe; runs go below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    (tmp_path / "recipe.yaml").write_text("train: {seed: 7}\n", encoding="utf-8")
    return tmp_path


def write_notebook(*sources: str, name: str = "toy.ipynb") -> Path:
    """Write a notebook of code cells, the first one tagged `parameters`."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, name)
    return Path(name)


def fail_when_called(*arguments: object, **options: object) -> None:
    pytest.fail("the kernel was started")


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """No notebook may be executed in this test."""
    monkeypatch.setattr(headless, "execute", fail_when_called)


# ---- help and usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["init", "run", "gates", "doctor", "slice", "lab"])
def test_help_names_every_verb_and_each_verb_has_its_own(verb: str, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--help"], [verb, "--help"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
    top, own = capsys.readouterr().out.split("usage: forgekit")[1:]
    assert f"\n    {verb} " in top
    assert own.startswith(f" {verb} ")


def test_help_explains_every_argument_and_the_exit_codes(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    codes = "0 completed, 1 failed, 2 wrong usage or settings, 3 a gate failed and evaluate.gates_action is stop, 128 + n ended by signal n (130 for Ctrl-C)."
    assert f"Exit code: {codes}" in text
    for argument in ("NOTEBOOK one with a cell tagged", "--recipe R YAML file", "--name N the run's name"):
        assert argument in text
    assert "example: forgekit run notebooks/01_text.ipynb" in text


def test_version_is_the_packages(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"forgekit {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["init"], ["run", "a.ipynb", "--frm", "x"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: forgekit" in capsys.readouterr().err


# ---- init ------------------------------------------------------------------------------------------------------------


def test_init_copies_notebooks_and_recipes_and_says_what_next(
    project_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["init", "my work"]) == 0
    names = ["notebooks/01_text.ipynb", "params/text.yaml", "params/text_quick.yaml"]
    for name in names:
        assert (Path("my work") / name).read_bytes() == (project_folder / name).read_bytes()
    printed = capsys.readouterr().out
    assert set(printed.split("\n\n")[0].splitlines()) == {str(p) for p in Path("my work").rglob("*") if p.is_file()}
    assert f"Next: cd 'my work' && {find_command()} run notebooks/01_text.ipynb" in printed


def test_init_writes_nothing_over(capsys: pytest.CaptureFixture) -> None:
    Path("work/params").mkdir(parents=True)
    Path("work/params/text.yaml").write_text("mine")
    assert main(["init", "work"]) == 1
    assert capsys.readouterr().err == (
        "forgekit: work/params/text.yaml exists already, so nothing was copied. Choose an empty folder.\n"
    )
    assert [str(path) for path in Path("work").rglob("*") if path.is_file()] == ["work/params/text.yaml"]
    assert Path("work/params/text.yaml").read_text() == "mine"


def test_init_into_a_folder_that_cannot_be_made_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    assert main(["init", "recipe.yaml/below"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("forgekit: recipe.yaml/below/notebooks/01_text.ipynb cannot be written: ")
    assert error.count("\n") == 1


# ---- run: refused before a kernel starts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.ipynb"], "notebook nothing.ipynb does not exist. `forgekit init DIR` copies the shipped ones."),
        (["recipe.yaml"], "recipe.yaml is no notebook: "),
        (["toy.ipynb", "--recipe", "nothing.yaml"], "recipe 'nothing.yaml': no such file in "),
        (["toy.ipynb", "--set", "train.sede=1"], "train.sede: no such setting (from --set). Did you mean train.seed?"),
        (["toy.ipynb", "--set", "train.seed"], "--set train.seed: write it as name=value, for instance train.max_steps=60."),
        (["toy.ipynb", "--set", "train.seed=[1"], "--set train.seed: no valid YAML: "),
        (["toy.ipynb", "--set", "model.max_length=-1"], "model.max_length is -1 (from --set): it should be greater than 0."),
        (["toy.ipynb", "--set", "train.seed=x", "adapter.r=0"], "2 problems in the settings:\nadapter.r is 0 (from --set)"),
        (["toy.ipynb", "--set", "train.seed=x", "--set", "adapter.r=0"], "2 problems in the settings:\n"),
    ],
)  # fmt: skip
def test_wrong_settings_end_with_2_before_the_kernel_starts(
    arguments: list[str], message: str, no_kernel: None, capsys: pytest.CaptureFixture
) -> None:
    write_notebook(PARAMETERS, START)
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"forgekit: {message}")
    assert "Traceback" not in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "toy.ipynb is no notebook: Notebook does not appear to be JSON"),
        ("[]", "toy.ipynb is no notebook: its JSON does not hold a notebook's cells."),
        ("{}", "toy.ipynb is no notebook: "),
        ('{"nbformat": 99, "cells": []}', "toy.ipynb is no notebook: Unsupported nbformat version 99"),
        ('{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [5]}', "toy.ipynb is no notebook: its JSON"),
        ('{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": []}', "toy.ipynb has no cell with the tag `parameters`"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_notebook_is_refused(
    text: str, message: str, no_kernel: None, capsys: pytest.CaptureFixture
) -> None:
    Path("toy.ipynb").write_text(text, encoding="utf-8")
    assert main(["run", "toy.ipynb"]) == 2
    assert capsys.readouterr().err.startswith(f"forgekit: {message}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "toy.ipynb: the parameters cell lacks recipe, settings, run_name."),
        (
            PARAMETERS.replace('""', "make_name()"),
            "toy.ipynb: the parameter run_name is make_name(); only plain values",
        ),
        ("%matplotlib inline\n" + PARAMETERS, "toy.ipynb: line 1 of the parameters cell is no plain Python: "),
    ],
)
def test_a_parameters_cell_that_cannot_be_read_is_refused(
    source: str, message: str, no_kernel: None, capsys: pytest.CaptureFixture
) -> None:
    write_notebook(source)
    assert main(["run", "toy.ipynb"]) == 2
    assert capsys.readouterr().err.startswith(f"forgekit: {message}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../up", "run name '../up': use up to 100 letters"),
        ("first", "run 'first' exists and is completed: "),
    ],
)
def test_a_name_that_cannot_be_used_ends_with_2(
    name: str, message: str, no_kernel: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_notebook(PARAMETERS, START)
    Run(tmp_path / "runs" / "first", {}).finish()
    before = (tmp_path / "runs" / "first" / "run.json").read_bytes()
    assert main(["run", "toy.ipynb", "--name", name]) == 2
    assert capsys.readouterr().err.startswith(f"forgekit: {message}")
    assert (tmp_path / "runs" / "first" / "run.json").read_bytes() == before


def test_a_runs_folder_that_cannot_be_written_ends_with_1(
    no_kernel: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_notebook(PARAMETERS, START)
    monkeypatch.setenv("FORGEKIT_RUNS", str(Path("recipe.yaml/below").absolute()))
    assert main(["run", "toy.ipynb"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("forgekit: the run's folder ")
    assert error.endswith("Set FORGEKIT_RUNS to a folder that can.\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "train.seed=3", "adapter.r=4", "toy.ipynb"],
        ["--set", "train.seed=3", "--set", "adapter.r=4", "toy.ipynb"],
        ["toy.ipynb", "--set=train.seed=3", "--set", "adapter.r=4", "--name", "x"],
        ["--name", "x", "--set", "train.seed=3", "adapter.r=4", "--", "toy.ipynb"],
    ],
)
def test_set_takes_settings_and_leaves_the_notebook(arguments: list[str], given: dict) -> None:
    write_notebook(PARAMETERS, START)
    assert main(["run", *arguments]) == 0
    assert given["settings"] == {"train.seed": 3, "adapter.r": 4}


def test_set_without_a_value_is_wrong_usage(no_kernel: None, capsys: pytest.CaptureFixture) -> None:
    write_notebook(PARAMETERS, START)
    for arguments in (["toy.ipynb", "--set"], ["--set", "--name", "x", "toy.ipynb"]):
        with pytest.raises(SystemExit) as left:
            main(["run", *arguments])
        assert left.value.code == 2
        assert "argument --set: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("12h", 43200)])
def test_times_are_seconds_or_say_their_unit(text: str, seconds: float) -> None:
    assert read_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5", "0", "soon", "inf", "nan"])
def test_what_is_no_time_is_refused(text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", "toy.ipynb", f"--timeout={text}"])
    assert left.value.code == 2
    assert "is no time: write seconds, or 90m, 12h" in capsys.readouterr().err


def test_a_checkpoint_that_is_none_is_refused(no_kernel: None, capsys: pytest.CaptureFixture) -> None:
    write_notebook(PARAMETERS, START)
    assert main(["run", "toy.ipynb", "--resume", "nowhere"]) == 2
    assert "train.resume is 'nowhere': no such folder." in capsys.readouterr().err
    assert not Path("runs").exists()


def test_resume_and_drift_are_settings_of_the_run(given: dict, own_folder: Path) -> None:
    write_notebook(PARAMETERS, START)
    Path("checkpoint-5").mkdir()
    drift = ["--allow-drift", "versions", "--allow-drift", "dataset"]
    assert main(["run", "toy.ipynb", "--resume", "checkpoint-5", *drift]) == 0
    assert given["settings"] == {
        "train.resume": str(own_folder / "checkpoint-5"),
        "train.allow_drift": ["versions", "dataset"],
    }


def test_a_run_that_did_not_complete_goes_on_under_its_name_unless_told_never(
    given: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_notebook(PARAMETERS, START)
    Run(tmp_path / "runs" / "first", {"name": "first"}).finish("stopped")
    assert main(["run", "toy.ipynb", "--name", "first", "--resume", "never"]) == 2
    assert "run 'first' exists and is stopped: " in capsys.readouterr().err
    assert main(["run", "toy.ipynb", "--name", "first"]) == 0
    record = read_json(tmp_path / "runs" / "first" / "run.json")
    assert (record["state"], [attempt["state"] for attempt in record["attempts"]]) == ("completed", ["stopped"])


def test_runs_without_a_name_that_begin_in_one_second_do_not_meet(
    given: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    class Stopped(datetime):
        @classmethod
        def now(cls, *zone: object) -> datetime:  # type: ignore[override]
            return datetime(2026, 11, 21, 14, 27)

    monkeypatch.setattr("forgekit.runs.session.datetime", Stopped)
    write_notebook(PARAMETERS, START)
    assert [main(["run", "toy.ipynb"]) for _ in range(3)] == [0, 0, 0]
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["20261121-142700", "20261121-142700-2", "20261121-142700-3"]


def test_values_of_set_are_read_as_yaml() -> None:
    read = read_assignments(["train.learning_rate=2e-4", "adapter.layers=[mlp]", "model.id=a/b", " x =", "y=a=b"])
    assert read == {"train.learning_rate": 2e-4, "adapter.layers": ["mlp"], "model.id": "a/b", "x": None, "y": "a=b"}
    with pytest.raises(ConfigError, match="write it as name=value"):
        read_assignments(["train.seed:5"])


# ---- run: executed ---------------------------------------------------------------------------------------------------


def test_a_failed_run_keeps_what_ran_and_says_which_cell(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    write_notebook(PARAMETERS, START, END)
    assert main(["run", "toy.ipynb", "--name", "unlucky", "--set", "train.seed=13"]) == 1
    printed = capfd.readouterr().out
    record = read_json(tmp_path / "runs" / "unlucky" / "run.json")
    assert (record["state"], record["error"]) == ("failed", "cell 4: ValueError: thirteen is refused")
    assert (record["notebook"], record["settings"]["train.seed"]) == ("toy.ipynb", {"value": 13, "from": "--set"})
    assert "seed 13 from --set" in printed
    assert "Run unlucky: failed: cell 4: ValueError: thirteen is refused" in printed
    cells = nbformat.read(tmp_path / "runs" / "unlucky" / "notebook.ipynb", as_version=4).cells
    failed = [cell.execution_count for cell in cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert failed == [4]
    assert "thirteen" in (tmp_path / "runs" / "unlucky" / "notebook.html").read_text(encoding="utf-8")


def test_a_run_that_ends_well_exits_with_0(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    write_notebook(PARAMETERS, START, END)
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")  # the notebook's own recipe is looked for from the notebook's folder
    assert main(["run", "../toy.ipynb", "--name", "lucky"]) == 0
    record = read_json(tmp_path / "runs" / "lucky" / "run.json")
    assert (record["state"], record["error"]) == ("completed", None)
    assert record["settings"]["train.seed"] == {"value": 7, "from": "recipe.yaml"}
    assert "Run lucky: completed\n" in capfd.readouterr().out
    assert "FORGEKIT_RUN" not in os.environ


def test_an_error_of_the_executor_itself_leaves_no_run_that_looks_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(headless, "execute", break_off)
    write_notebook(PARAMETERS, START)
    with pytest.raises(ZeroDivisionError):
        main(["run", "toy.ipynb", "--name", "broken"])
    record = read_json(tmp_path / "runs" / "broken" / "run.json")
    assert (record["state"], record["error"]) == ("failed", "the notebook could not be executed")


# ---- doctor and lab --------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine without a GPU on which every import works; returns the stderr of imports that are to fail, by module."""
    broken: dict[str, str] = {}

    def run(command: list[str], **options: object) -> SimpleNamespace:
        error = next((text for name, text in broken.items() if name in command[-1]), "")
        return SimpleNamespace(returncode=1 if error else 0, stderr=error)

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.subprocess, "run", run)
    return broken


def test_doctor_reports_every_part_and_exits_with_0(machine: dict, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "Python 3.",
        "transformers 5.",
        "no GPU: ",
        "memory: ",
        "engine huggingface: ",
        "engine unsloth: ",
        "runs: ",
        "disk: ",
    ):
        assert part in printed
    assert " bad  " not in printed


def test_doctor_exits_with_1_and_gives_a_remedy_for_what_is_broken(
    machine: dict, capsys: pytest.CaptureFixture
) -> None:
    machine["torchvision"] = "Traceback ...\nRuntimeError: operator torchvision::nms does not exist\n"
    machine["unsloth"] = "ImportError: no certifi\n"
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    bad = [(line.removeprefix(" bad  "), lines[i + 1]) for i, line in enumerate(lines) if line.startswith(" bad  ")]
    assert bad == [
        (
            "torchvision cannot be imported: RuntimeError: operator torchvision::nms does not exist",
            "      -> Install torch and torchvision from the same index.",
        ),
        ("engine unsloth: ImportError: no certifi", "      -> Reinstall forgekit in a fresh environment."),
    ]


@pytest.mark.parametrize(
    ("versions", "finding"),
    [
        ({"trl": None}, Finding(BAD, "missing: trl", "pip install forgekit installs what it needs.")),
        (
            {"transformers": "5.5.4"},
            Finding(
                BAD,
                "transformers 5.5.4 trains Gemma 3n's shared layers on the wrong keys and values",
                "pip install 'transformers>=5.17'",
            ),
        ),
        (
            {"ipykernel": "7.4.0"},
            Finding(NOTE, "ipykernel 7.4.0 answers widgets only between cells", "pip install 'ipykernel<7.4'"),
        ),
    ],
)
def test_doctor_knows_bad_versions(
    versions: dict[str, str | None], finding: Finding, machine: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finding not in doctor.check_packages()
    real = doctor.find_version
    monkeypatch.setattr(doctor, "find_version", lambda name: versions[name] if name in versions else real(name))
    assert finding in doctor.check_packages()


def test_doctor_still_reports_when_torch_is_broken(machine: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    [finding] = doctor.check_hardware()
    assert finding.state == BAD
    assert finding.what.startswith("torch cannot be imported: ")


def test_doctor_finds_a_folder_of_runs_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEKIT_RUNS", str(Path("recipe.yaml/below").absolute()))
    found = {finding.what.split(":")[0]: finding for finding in doctor.check_folders()}
    assert (found["runs"].state, found["runs"].remedy) == (BAD, "Set FORGEKIT_RUNS to a folder that can be written.")
    monkeypatch.setenv("FORGEKIT_RUNS", str(Path("runs").absolute()))
    found = {finding.what.split(":")[0]: finding for finding in doctor.check_folders()}
    assert found["runs"].state == OK


@pytest.mark.parametrize(("user", "root"), [(0, ["--allow-root"]), (1000, [])])
def test_lab_starts_jupyterlab_on_this_machine_alone_and_hands_options_on(
    user: int, root: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the server is to find this forgekit
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append((program, arguments)))
    main(["lab", "--no-browser", "notebooks"])
    options = list_options()
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ServerApp.ip=127.0.0.1",
        *options,
        *root,
        "--no-browser",
        "notebooks",
    ]
    assert started == [(sys.executable, command)]


def test_the_module_is_the_command(project_folder: Path) -> None:
    command = [sys.executable, "-m", "forgekit", "run", "nothing.ipynb"]
    done = subprocess.run(command, cwd=project_folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("forgekit: notebook nothing.ipynb does not exist.")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What a notebook would have been executed with: the file that its kernel reads."""
    seen: dict = {}

    def execute(notebook: Path, output: Path, session: Session) -> Outcome:
        assert session.parameters is not None
        seen.update(read_json(session.parameters))
        return session.finish(Outcome())

    monkeypatch.setattr(headless, "execute", execute)
    return seen


def test_the_notebook_s_own_settings_and_name_are_heeded_and_set_is_stronger(given: dict) -> None:
    own = 'recipe: str = "recipe.yaml"\nsettings: dict = {"train.seed": 5, "adapter.r": 4}\nrun_name: str = "mine"'
    assert main(["run", str(write_notebook(own, START, END)), "--set", "train.seed=9"]) == 0
    assert (given["settings"], given["run_name"]) == ({"train.seed": 9, "adapter.r": 4}, "mine")
    assert Path("runs/mine/run.json").is_file()


def test_a_wrong_setting_in_the_notebook_is_found_before_the_kernel(
    no_kernel: None, capsys: pytest.CaptureFixture
) -> None:
    own = PARAMETERS.replace("{}", '{"train.sed": 5}')
    assert main(["run", str(write_notebook(own, START, END))]) == 2
    assert "train.sed: no such setting (from notebook). Did you mean train.seed?" in capsys.readouterr().err


def test_files_are_those_of_the_folder_one_stands_in(given: dict, own_folder: Path) -> None:
    Path("rows.jsonl").write_text("{}")
    Path("lora").mkdir()
    notebook = write_notebook(PARAMETERS, START, END)
    assert (
        main(["run", str(notebook), "--set", "data.path=rows.jsonl", "adapter.path=lora", "model.id=some/model"]) == 0
    )
    assert given["settings"] == {
        "data.path": str(own_folder / "rows.jsonl"),
        "adapter.path": str(own_folder / "lora"),
        "model.id": "some/model",
    }


def test_plan_shows_layers_and_memory_without_weights(project_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = [str(project_folder / "params" / name) for name in ("text.yaml", "gpu/16gb.yaml")]
    assert main(["plan", *recipes, "--set", "adapter.layers=[attention]", "adapter.layers_to_transform=last 4"]) == 0
    printed = capsys.readouterr().out
    assert "sizes from the released sizes of Gemma 3n E2B" in printed
    assert "attention  26-29        8" in printed and "length 2048" in printed and "T4 15 GB" in printed
    assert main(["plan", recipes[0], "--set", "adapter.layers_to_transform=99"]) == 2
