"""Installing: versions agree wherever they are written, the wheel is complete, and importing it is cheap."""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PYTHONS = ("3.11", "3.12", "3.13")

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Written so that no pattern matches its own line.
REGISTRY_HOST = re.compile(
    r"index[-_]url|find[-_]links|\[\[tool\.uv\.index|UV_(?:DEFAULT_)?INDEX|"
    r"https?://[\w.-]*(?:pypi|pythonhosted|anaconda|artifactory|nexus|npmjs)[\w.-]*/",
    re.IGNORECASE,
)
# `someone` is whoever the tests of hiding home folders make up
HOME_FOLDER = re.compile(r"(?<![\w.~-])/(?:root|home/(?!someone)[a-z]\w*|Users/(?!someone)[A-Za-z]\w*)/")


@pytest.fixture(scope="module")
def pyproject(project_folder: Path) -> dict:
    return tomllib.loads((project_folder / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def conda(project_folder: Path) -> dict:
    return yaml.safe_load((project_folder / "environment.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(project_folder)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("forgekit-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was unpacked: what an installation of pure Python code comes down to."""
    folder = tmp_path_factory.mktemp("site packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_installed(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` with the unpacked wheel before the checkout on its path."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def exact_versions(pyproject: dict) -> dict[str, str]:
    return dict(line.split("==") for line in pyproject["tool"]["uv"]["constraint-dependencies"])


def direct_dependencies(pyproject: dict) -> list[Requirement]:
    project = pyproject["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["test"]]


def text_files(folder: Path) -> list[Path]:
    """The files that git tracks, or where there is no git those that no tool has made."""
    if (folder / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
        paths = [folder / name for name in listed.split("\0") if name]
    else:
        names = [path.name for path in folder.iterdir() if path.name not in {"runs", "dist", "build", "uv.lock"}]
        ours = [name for name in names if not name.startswith(".") or name in {".ci", ".gitignore"}]
        paths = [path for name in ours for path in [folder / name, *(folder / name).rglob("*")]]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


# ---- versions -------------------------------------------------------------------------------------------------------


def test_conda_and_uv_install_the_same_versions(pyproject: dict, conda: dict) -> None:
    pip_lines = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    pins = [Requirement(line) for line in pip_lines if not line.startswith("-")]
    assert {pin.name: str(pin.specifier).removeprefix("==") for pin in pins} == exact_versions(pyproject)
    assert "--editable .[test]" in pip_lines


def test_exact_versions_lie_in_the_published_ranges(pyproject: dict) -> None:
    exact = exact_versions(pyproject)
    outside = [
        f"{wanted} but {exact[wanted.name]}"
        for wanted in direct_dependencies(pyproject)
        if wanted.name in exact and not wanted.specifier.contains(exact[wanted.name])
    ]
    assert not outside


def test_every_dependency_of_the_package_has_an_exact_version(pyproject: dict) -> None:
    names = {Requirement(line).name for line in pyproject["project"]["dependencies"]}
    assert names <= exact_versions(pyproject).keys()


def test_torch_range_is_the_tested_one(pyproject: dict) -> None:
    torch = next(wanted for wanted in direct_dependencies(pyproject) if wanted.name == "torch")
    inside = [minor for minor in range(5, 20) if torch.specifier.contains(f"2.{minor}.0")]
    assert inside == [11, 12, 13, 14]


def test_python_bounds_agree_everywhere(pyproject: dict, conda: dict) -> None:
    bounds = SpecifierSet(pyproject["project"]["requires-python"])
    assert tuple(f"3.{minor}" for minor in range(8, 18) if bounds.contains(f"3.{minor}.0")) == PYTHONS
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(pyproject["project"]["classifiers"]))
    assert tuple(classified) == PYTHONS
    assert SpecifierSet(str(conda["dependencies"][0]).removeprefix("python")) == bounds
    assert pyproject["tool"]["ruff"]["target-version"] == "py" + PYTHONS[0].replace(".", "")
    assert pyproject["tool"]["mypy"]["python_version"] == PYTHONS[0]


@needs_make
def test_make_asks_uv_for_the_same_pythons(pyproject: dict, project_folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    command = ["make", "--dry-run", "--always-make", ".venv/bin/python"]
    planned = subprocess.run(command, cwd=project_folder, env=environment, capture_output=True, text=True, check=True)
    asked = re.findall(r'python find .*"([<>=].*?)"', planned.stdout)
    assert [SpecifierSet(text) for text in asked] == [SpecifierSet(pyproject["project"]["requires-python"])]


def test_package_and_project_carry_the_same_version(pyproject: dict, installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, tmp_path, "-c", "import forgekit; print(forgekit.__version__)")
    assert done.stdout.strip() == pyproject["project"]["version"], done.stderr


# ---- what is committed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [REGISTRY_HOST, HOME_FOLDER], ids=["registry host", "home folder"])
def test_no_file_names_the_machine_it_was_made_on(pattern: re.Pattern, project_folder: Path) -> None:
    files = text_files(project_folder)
    assert project_folder / "pyproject.toml" in files
    found = [
        f"{path.relative_to(project_folder)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("pip install --extra-index" + "-url https://host/simple x", REGISTRY_HOST),
        ("url = https:" + "//my-pypi.example.org/simple", REGISTRY_HOST),
        ('"path": "/ro' + 'ot/notes"', HOME_FOLDER),
        ("see /ho" + "me/anna/x", HOME_FOLDER),
    ],
)
def test_the_search_for_machine_names_finds_them(line: str, pattern: re.Pattern) -> None:
    assert pattern.search(line)


def test_lock_file_is_ignored_and_weights_are_not(project_folder: Path) -> None:
    if not (project_folder / ".git").exists():
        pytest.skip("not a git checkout")
    names = ["uv.lock", ".venv/x", "forgekit/model/tiny/model.safetensors"]
    asked = subprocess.run(["git", "check-ignore", *names], cwd=project_folder, capture_output=True, text=True)
    assert asked.stdout.split() == names[:2]


@needs_make
def test_make_help_describes_every_target(project_folder: Path) -> None:
    makefile = (project_folder / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    printed = subprocess.run(["make"], cwd=project_folder, capture_output=True, text=True, check=True).stdout
    described = re.findall(r"^make (\S+) +\S.*$", printed, re.MULTILINE)
    assert described == phony.group(1).split()
    assert {"demo", "test", "lab", "lint", "help", "clean"} <= set(described)


# ---- the wheel ------------------------------------------------------------------------------------------------------


def test_wheel_holds_notebooks_recipes_and_tiny_weights(wheel: Path, project_folder: Path) -> None:
    expected = {
        f"forgekit/_project/{path.relative_to(project_folder).as_posix()}"
        for pattern in ("notebooks/*.ipynb", "params/*.yaml")
        for path in project_folder.glob(pattern)
    } | {
        path.relative_to(project_folder).as_posix()
        for path in (project_folder / "forgekit" / "model" / "tiny").iterdir()
        if path.is_file()
    }
    assert "forgekit/_project/notebooks/01_text.ipynb" in expected
    assert "forgekit/_project/params/text_quick.yaml" in expected
    assert "forgekit/model/tiny/model.safetensors" in expected
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"forgekit", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert not [name for name in names if re.search(r"checkpoint-|/runs?/(?!\w+\.py)|__pycache__", name)]


def test_wheel_imports_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, tmp_path, "-c", "import forgekit; print(forgekit.__file__)")
    assert Path(done.stdout.strip()) == installed / "forgekit" / "__init__.py", done.stderr


def test_init_copies_notebooks_and_recipes_from_the_wheel(
    installed: Path, tmp_path: Path, project_folder: Path
) -> None:
    target = tmp_path / "my work"
    done = run_installed(installed, tmp_path, "-m", "forgekit", "init", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("notebooks/01_text.ipynb", "params/text_quick.yaml", "params/text.yaml"):
        assert (target / name).read_bytes() == (project_folder / name).read_bytes()


# ---- importing ------------------------------------------------------------------------------------------------------


def test_import_is_quick_and_loads_no_heavy_library(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import forgekit; took = time.perf_counter() - start\n"
        "heavy = {'torch', 'unsloth', 'transformers', 'trl', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "print(took, *sorted(heavy))"
    )
    printed = [run_installed(installed, tmp_path, "-c", code).stdout.split() for _ in range(5)]
    assert [line[1:] for line in printed] == [[]] * 5
    assert statistics.median(float(line[0]) for line in printed) < 0.3  # seconds
