"""The queue: one job at a time, in order, also with two servers, and nothing is lost when a server is."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupyter_scheduler", reason="needs jupyter-scheduler: pip install forgekit[jobs]")

from jupyter_scheduler.exceptions import InputUriError, SchedulerError
from jupyter_scheduler.models import CreateJob, CreateJobDefinition, CreateJobFromDefinition, Status
from jupyter_scheduler.orm import create_tables

from forgekit.jobs import server as job_server
from forgekit.jobs.executor import RunExecutor
from forgekit.jobs.outputs import RunEnvironment
from forgekit.jobs.parameters import name_run, read_parameters
from forgekit.jobs.record import read_record
from forgekit.jobs.scheduler import RunScheduler

from .conftest import START, wait_for, write_notebook

ENDED = (Status.COMPLETED, Status.FAILED, Status.STOPPED)


class Counted(RunExecutor):
    """Counts how many run at the same time, instead of running."""

    running: list[str] = []
    order: list[str] = []
    most = 0
    lock = threading.Lock()

    def execute(self) -> None:
        with self.lock:
            self.running.append(self.job_id)
            self.order.append(self.job_id)
            Counted.most = max(Counted.most, len(self.running))
        time.sleep(0.1)
        with self.lock:
            self.running.remove(self.job_id)


@pytest.fixture
def make_scheduler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunScheduler]:
    """Returns a function: options -> a scheduler on the same database and staged files as those before."""
    url = f"sqlite:///{folder.parent / 'jobs.sqlite'}"
    create_tables(url)
    monkeypatch.setattr("forgekit.jobs.scheduler.LOOK_SECONDS", 0.1)

    def make(**options: Any) -> RunScheduler:
        staging = str(folder.parent / "staging")
        return RunScheduler(
            root_dir=str(folder),
            environments_manager=RunEnvironment(),
            db_url=url,
            staging_path=staging,
            task_runner_class=None,
            **options,
        )

    return make


def submit(scheduler: RunScheduler, name: str = "toy.ipynb", **parameters: str) -> str:
    job = CreateJob(input_uri=name, name="toy", runtime_environment_name="forgekit", parameters=parameters)
    return scheduler.create_job(job)


def wait_until_ended(scheduler: RunScheduler, *jobs: str) -> list[Any]:
    return wait_for(lambda: (found := [scheduler.get_job(job) for job in jobs]) and all(job.status in ENDED for job in found) and found)  # fmt: skip


def test_ten_jobs_share_one_slot_also_between_two_servers(make_scheduler: Callable[..., Any], folder: Path) -> None:
    write_notebook(folder / "toy.ipynb", START)
    Counted.order.clear()
    servers = [make_scheduler(execution_manager_class=Counted) for _ in range(2)]
    assert servers[0].max_running == 1
    jobs = [submit(servers[number % 2]) for number in range(10)]
    ended = wait_until_ended(servers[0], *jobs)
    assert {job.status for job in ended} == {Status.COMPLETED}
    assert Counted.most == 1 and Counted.order == jobs
    assert all(job.start_time >= job.create_time for job in ended)


def test_the_number_of_slots_is_set_by_a_variable(make_scheduler: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("FORGEKIT_JOBS", "3")
    assert make_scheduler(execution_manager_class=Counted).max_running == 3
    assert make_scheduler(execution_manager_class=Counted, max_running=2).max_running == 2


@pytest.mark.slow
def test_a_run_that_goes_on_without_its_server_is_taken_over_by_the_next(
    make_scheduler: Callable[..., Any], folder: Path
) -> None:
    slow = START + "\n(run.path / 'waits').touch()\nimport time\nwhile not (run.path / 'go').exists(): time.sleep(0.1)"
    write_notebook(folder / "slow.ipynb", slow)
    write_notebook(folder / "toy.ipynb", START + "\nraise ValueError('not today')")
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from jupyter_scheduler.models import CreateJob\n"
        "from forgekit.jobs.scheduler import RunScheduler\nfrom forgekit.jobs.outputs import RunEnvironment\n"
        f"s = RunScheduler(root_dir={str(folder)!r}, environments_manager=RunEnvironment(), task_runner_class=None,\n"
        f"    db_url='sqlite:///{folder.parent / 'jobs.sqlite'}'.replace(chr(39), chr(39)), staging_path={str(folder.parent / 'staging')!r})\n"
        "for name in ('slow', 'toy'):\n"
        "    print(s.create_job(CreateJob(input_uri=f'{name}.ipynb', name=name, runtime_environment_name='forgekit', parameters={'run_name': name})), flush=True)\n"
        "time.sleep(600)"
    )
    path = os.pathsep.join(name for name in sys.path if name)
    old = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert old.stdout is not None
    slow_job, toy_job = old.stdout.readline().strip(), old.stdout.readline().strip()
    waits = folder / "runs" / "slow" / "waits"
    wait_for(waits.exists)
    old.send_signal(signal.SIGKILL)
    old.wait()
    old.stdout.close()
    scheduler = make_scheduler()
    time.sleep(1)
    # the run of the dead server still has the only slot
    states = [scheduler.get_job(job).status for job in (slow_job, toy_job)]
    assert states == [Status.IN_PROGRESS, Status.QUEUED]
    (waits.parent / "go").touch()
    done, failed = wait_until_ended(scheduler, slow_job, toy_job)
    assert (done.status, done.output_formats[:3]) == (Status.COMPLETED, ["ipynb", "html", "run.json"])
    assert failed.status == Status.FAILED
    assert failed.status_message.startswith("The run failed: cell 3: ValueError: not today. Its files: ")


def test_a_job_that_forgekit_run_refuses_says_what_it_said(make_scheduler: Callable[..., Any], folder: Path) -> None:
    write_notebook(folder / "toy.ipynb", START)
    (folder / "runs" / "taken").mkdir(parents=True)
    (folder / "runs" / "taken" / "mine.txt").touch()
    scheduler = make_scheduler()
    (job,) = wait_until_ended(scheduler, submit(scheduler, run_name="taken"))
    assert job.status == Status.FAILED
    assert "exists and holds no run. Its files are kept; choose another run_name." in job.status_message
    scheduler.delete_job(job.job_id)
    assert not (folder.parent / "staging" / job.job_id).exists()
    with pytest.raises(InputUriError):
        submit(scheduler, "nothing.ipynb")


class Unlucky(RunExecutor):
    """Meets a locked database when its first job begins."""

    met: list[str] = []

    def before_start(self) -> None:
        self.met.append(self.job_id)
        if len(self.met) == 1:
            raise OSError("database is locked")
        super().before_start()

    def execute(self) -> None:
        pass


def test_the_queue_outlives_an_error_of_its_own(make_scheduler: Callable[..., Any], folder: Path) -> None:
    write_notebook(folder / "toy.ipynb", START)
    scheduler = make_scheduler(execution_manager_class=Unlucky)
    first, second = submit(scheduler), submit(scheduler)
    wait_until_ended(scheduler, second)
    assert Unlucky.met == [first, second]


class Planned(RunExecutor):
    """Notes where a run would take place, instead of running."""

    where: list[Path] = []

    def execute(self) -> None:
        self.where.append(Path(read_record(self.staging)["folder"]))


def test_jobs_of_a_schedule_run_where_the_notebook_stands(make_scheduler: Callable[..., Any], folder: Path) -> None:
    write_notebook(folder / "deep" / "toy.ipynb", START)
    scheduler = make_scheduler(execution_manager_class=Planned)
    template = {"input_uri": "deep/toy.ipynb", "name": "nightly run", "runtime_environment_name": "forgekit"}
    formats = {"output_formats": ["ipynb"]}
    with pytest.raises(SchedulerError, match="token"):
        scheduler.create_job_definition(CreateJobDefinition(**template, **formats, parameters={"hf_token": "x"}))
    made = scheduler.create_job_definition(CreateJobDefinition(**template, **formats, parameters={"train.seed": "3"}))
    job = scheduler.create_job_from_definition(made, CreateJobFromDefinition())
    (ended,) = wait_until_ended(scheduler, job)
    assert (ended.status, ended.parameters) == (Status.COMPLETED, {"train.seed": "3"})
    assert Planned.where == [folder / "deep"]


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_values_are_read_as_yaml_and_text_stays_text(folder: Path) -> None:
    given = {
        "train.learning_rate": "2e-4",
        "settings.model.offload_ple": "off",
        "adapter.layers": "[attention, mlp]",
        "data.instruction": "'7'",
        "settings": "{adapter.r: 4}",
        "run_name": "007",
        "train.save_steps": "",
    }
    found = read_parameters(given, folder)
    assert found.run_name == "007" and found.recipes == ()
    assert found.settings == {
        "adapter.r": 4,
        "train.learning_rate": 2e-4,
        "model.offload_ple": "off",
        "adapter.layers": ["attention", "mlp"],
        "data.instruction": "7",
        "train.save_steps": None,
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"recipes": "a.yaml"}, r"recipes: no such parameter or setting. Did you mean recipe\?"),
        ({"settings": "{train.seed: 1}", "train.seed": "2"}, "train.seed stands twice"),
        ({"train.seed": "1", "settings.train.seed": "2"}, "train.seed stands twice"),
        ({"train.seed": "!!python/object/apply:os.system [ls]"}, "tags .* are not allowed"),
        ({"recipe": "nowhere.yaml"}, "no such file"),
        ({"run_name": "../up"}, "run name"),
        ({"hub_token": "x"}, "Tokens are no parameters"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, str], words: str, folder: Path) -> None:
    with pytest.raises(Exception, match=words) as error:
        read_parameters(given, folder)
    assert type(error.value).__module__ == "forgekit.errors"


def test_a_recipe_is_found_beside_the_notebook_before_the_server_s_folder(folder: Path) -> None:
    for place in (folder, folder / "own"):
        place.mkdir(exist_ok=True)
        (place / "a.yaml").write_text("train: {seed: 1}")
    (folder / "b.yaml").write_text("train: {seed: 2}")
    assert read_parameters({"recipe": "a.yaml + b.yaml"}, folder / "own", folder).recipes == (
        folder / "own" / "a.yaml",
        folder / "b.yaml",
    )
    other = folder.parent / "other"
    other.mkdir()
    assert read_parameters({"recipe": "b.yaml"}, other, folder).recipes == (folder / "b.yaml",)


def test_a_job_without_a_run_name_gets_one_of_its_own() -> None:
    assert name_run("My job: 2 (copy).ipynb", "0f3a5b7c-1234") == "My-job-2-copy-0f3a5b7c"
    assert name_run("???", "0f3a5b7c-1234") == "job-0f3a5b7c"


def test_lab_runs_jobs_only_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "not yet"))
    options = job_server.list_options()
    assert "--SchedulerApp.scheduler_class=forgekit.jobs.scheduler.RunScheduler" in options and len(options) == 3
    assert (tmp_path / "not yet").is_dir()
    monkeypatch.setattr(job_server.importlib.util, "find_spec", lambda name: None)
    assert job_server.list_options() == []
