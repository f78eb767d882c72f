"""SWEEP.yaml: what is refused, with which words, and which points it stands for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from forgekit.errors import ConfigError
from forgekit.sweep.file import read_sweep
from forgekit.sweep.plan import plan_sweep
from forgekit.sweep.points import list_points, name_point

from .conftest import NAMES, RATES, write_sweep

pytestmark = pytest.mark.usefixtures("own_folder")

BASE = {"name": "s", "notebook": "toy.ipynb"}


def read(**changes: Any) -> list[str]:
    """The names of a file's points, without the sweep's."""
    return [point.name.removeprefix("s-") for point in list_points(read_sweep(write_sweep(BASE | changes)))]


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nme": "x"}, "nme: a sweep has no such setting (from sweep.yaml). Did you mean name?"),
        ({"notebook": None}, "notebook is null (from sweep.yaml): it should be text"),
        ({}, "sweep.yaml has none of grid, list, random and search: say in one of the four ways"),
        ({"grid": {"adapter.r": [8]}, "list": [{}]}, "sweep.yaml has grid and list: say in one"),
        ({"grid": {"adapter.rr": [8]}}, "adapter.rr: no such setting (from sweep.yaml). Did you mean adapter.r?"),
        ({"grid": {"adapter.r": 8}}, "grid.adapter.r is 8 (from sweep.yaml): it should be a list, for instance [a, b]."),
        ({"grid": {}}, "sweep.yaml: grid is empty, so there is nothing to run."),
        ({"list": [5]}, "list.0 is 5 (from sweep.yaml): it should be settings and their values"),
        ({"settings": {"train": {"sed": 1}}, "list": [{}]}, "train.sed: no such setting (from sweep.yaml). Did you mean train.seed?"),
        ({"settings": {"adapter.r": 4}, "grid": {"adapter.r": [8]}}, "adapter.r stands under settings and under grid"),
        ({"settings": {"recipe": "x"}, "grid": {"adapter.r": [8]}}, "settings.recipe (from sweep.yaml): a recipe is no setting."),
        ({"random": {"space": {"adapter.r": [8]}}}, "random.runs is missing in sweep.yaml. Meaning: how many points"),
        ({"random": {"runs": 2, "space": {"adapter.r": {"unifrm": [1, 2]}}}}, "'unifrm' is none. Did you mean uniform?"),
        ({"random": {"runs": 2, "space": {"train.learning_rate": {"log_uniform": [0, 1]}}}}, "log_uniform: both above zero"),
        ({"random": {"runs": 2, "space": {"adapter.r": {"integers": [8, 4]}}}}, "integers: [lowest, highest], two whole numbers, the lower first"),
        ({"search": {"runs": 2, "space": {"adapter.r": [8]}, "prune": {"first": 5}}}, "search.prune.first: a sweep has no such setting (from sweep.yaml). Did you mean first_step? There are: by, first_step, reduction."),
        ({"name": "../up", "list": [{}]}, 'name is "../up" (from sweep.yaml): it should be a folder\'s name'),
        ({"name": "x" * 61, "list": [{}]}, "at most 60 letters"),
        ({"timeout": "soon", "list": [{}]}, "'soon' is no time: write seconds, or 90m, 12h"),
        ({"retries": -1, "list": [{}]}, "retries is -1 (from sweep.yaml): it should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_place_and_the_remedy(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(**changes)
    assert message in str(error.value), str(error.value)


def test_a_token_in_a_point_is_refused_and_not_repeated() -> None:
    token = "hf_" + "a1B2" * 9
    with pytest.raises(ConfigError) as error:
        read(list=[{"model.id": token}])
    assert token not in str(error.value)


@pytest.mark.parametrize("text", ["a: &x 1\nb: *x", "!!python/object:os.system {}", "[1]", ""])
def test_it_is_read_as_carefully_as_a_recipe(text: str) -> None:
    Path("sweep.yaml").write_text(text)
    with pytest.raises(ConfigError):
        read_sweep(Path("sweep.yaml"))


# ---- points ----------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_the_file_s_order() -> None:
    found = read(grid={"train.learning_rate": [1e-3, 2e-4], "adapter.r": [8, 16]})
    assert found == [f"learning_rate-{rate}-r-{r}" for rate in ("0.001", "0.0002") for r in (8, 16)]


def test_a_list_may_nest_and_name_another_recipe_and_a_point_that_stands_twice_is_one() -> None:
    points = list_points(
        read_sweep(
            write_sweep(BASE, list=[{"adapter": {"r": 8}}, {"adapter.r": 8}, {"recipe": "params/other.yaml"}, {}])
        )
    )
    assert [dict(point.settings) for point in points] == [{"adapter.r": 8}, {"recipe": "params/other.yaml"}, {}]
    assert points[0].name == "s-r-8" and points[1].name.startswith("s-recipe-other-")


SPACE = {
    "train.learning_rate": {"log_uniform": [1e-5, 1e-3]},
    "adapter.lora_dropout": {"uniform": [0, 0.2]},
    "train.warmup_steps": {"integers": [1, 20]},
    "adapter.r": [8, 16],
}


def draw(seed: int) -> list[dict]:
    sweep = read_sweep(write_sweep(BASE, random={"runs": 30, "seed": seed, "space": SPACE}))
    return [dict(point.settings) for point in list_points(sweep)]


def test_random_points_lie_in_their_ranges_and_come_again_with_the_seed() -> None:
    points = draw(1)
    assert points == draw(1) != draw(2) and len(points) == 30
    rates = sorted(point["train.learning_rate"] for point in points)
    assert 1e-5 <= rates[0] < 1e-4 < rates[-1] <= 1e-3  # each decade is as likely
    assert all(0 <= point["adapter.lora_dropout"] <= 0.2 for point in points)
    assert {type(point["train.warmup_steps"]) for point in points} == {int}
    assert {point["adapter.r"] for point in points} == {8, 16}
    assert all(float(f"{rate:.3g}") == rate for rate in rates)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"train.max_steps": 1}, {"train.max_steps": -1}),
        ({"data.train": 8}, {"data.train": "8"}),
        ({"adapter.layers": ["mlp"]}, {"adapter.layers": "mlp"}),
        ({"recipe": "a/text.yaml"}, {"recipe": "b/text.yaml"}),
        ({"data.path": "x" * 200}, {"data.path": "x" * 201}),
        ({"data.path": "a/b"}, {"data.path": "a-b"}),
        ({}, {"adapter.r": 8}),
    ],
)
def test_points_that_differ_have_names_that_differ_and_fit(one: dict, other: dict) -> None:
    names = name_point("s", one), name_point("s", other)
    assert names[0] != names[1] and max(map(len, names)) <= 100
    assert names == (name_point("s", one), name_point("s", other))


def test_settings_that_end_alike_stand_with_their_whole_names() -> None:
    settings = {"data.path": "rows", "adapter.path": "weights", "adapter.r": 8}
    assert name_point("s", settings) == "s-data.path-rows-adapter.path-weights-r-8"


# ---- with the recipe -------------------------------------------------------------------------------------------------


def test_every_point_is_checked_with_its_recipe_and_all_problems_come_at_once() -> None:
    grid = {"adapter.r": [0, 8], "train.learning_rate": [2.0, 1e-3]}
    with pytest.raises(ConfigError) as error:
        plan_sweep(write_sweep(BASE, grid=grid, settings={"train.early_stopping": 2}))
    text = str(error.value)
    assert "adapter.r is 0 (from sweep.yaml): it should be greater than or equal to 1." in text
    assert "(run s-r-0-learning_rate-2.0 and 1 more)" in text
    assert "train.learning_rate is 2.0 (from sweep.yaml): it should be less than or equal to 1." in text
    assert not Path("runs").exists()


def test_corners_of_a_search_are_checked() -> None:
    space = {"adapter.r": {"integers": [1, 2000]}, "train.optim": ["adamw_torch", "sgd", "auto"]}
    with pytest.raises(ConfigError, match=r"adapter.r is 2000 \(from sweep.yaml\): it should be less"):
        plan_sweep(write_sweep(BASE, search={"runs": 3, "space": space}))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({}, ("json_equal", True)),
        ({"score": "loss"}, ("loss", False)),
        ({"score": "exact_match", "direction": "minimize"}, ("exact_match", False)),
    ],
)
def test_the_score_is_the_deciding_metric_or_the_one_named(objective: dict, expected: tuple) -> None:
    plan = plan_sweep(write_sweep(RATES, objective=objective))
    assert (plan.score, plan.maximize) == expected


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"score": "bleu"}, "objective.score is 'bleu', and not every run has it. There are: json_equal, exact_match"),
        ({"score": "held_out_loss"}, "held_out_loss is measured during training: set train.eval_steps"),
    ],
)
def test_a_score_that_runs_would_not_have_is_refused(objective: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_sweep(write_sweep(RATES, objective=objective))


def test_a_job_is_the_command_that_a_person_would_type(own_folder: Path) -> None:
    Path("extra.yaml").write_text("adapter: {r: 4}\n")
    plan = plan_sweep(
        write_sweep(RATES, recipe=["recipe.yaml", "extra.yaml"], timeout="2h", settings={"adapter.layers": ["mlp"]})
    )
    job = plan.make_job(plan.points[0], has_gpu=False)
    recipes = [word for name in ("recipe.yaml", "extra.yaml") for word in ("--recipe", str(own_folder / name))]
    assert job.arguments == (
        "run", str(own_folder / "toy.ipynb"), "--name", NAMES[0], *recipes,
        '--set=adapter.layers=["mlp"]', "--set=train.learning_rate=0.0005", "--timeout", "2h",
    )  # fmt: skip
    assert (job.gpus, job.environment) == (0, {"FORGEKIT_RUNS": str(own_folder / "runs")})
    assert plan.make_job(plan.points[0], has_gpu=True).gpus == 1


def test_a_run_of_a_sweep_goes_on_in_its_own_folder_whatever_the_recipe_says() -> None:
    plan = plan_sweep(write_sweep(RATES, settings={"train.resume": "never"}))
    assert plan.make_job(plan.points[0], has_gpu=False).arguments[-2:] == ("--resume", "auto")


def test_gpus_are_asked_for_where_a_gpu_is_used() -> None:
    cpu = plan_sweep(write_sweep(RATES, settings={"model.device": "cpu"}))
    assert cpu.make_job(cpu.points[0], has_gpu=True).gpus == 0
    two = plan_sweep(write_sweep(RATES, gpus=2))
    assert two.make_job(two.points[0], has_gpu=True).gpus == 2
    together = plan_sweep(write_sweep(RATES, settings={"train.gpus": 4}))
    assert together.make_job(together.points[0], has_gpu=True).gpus == 4
    assert [plan.count_gpus() for plan in (cpu, two, together)] == [0, 2, 4]


def test_shipped_sweeps_are_right(project_folder: Path) -> None:
    files = sorted((project_folder / "params" / "sweeps").glob("*.yaml"))
    assert len(files) > 1
    for file in files:
        plan = plan_sweep(file)
        assert plan.sweep.name == file.stem
        assert yaml.safe_load(file.read_text())["notebook"].startswith("notebooks/")
