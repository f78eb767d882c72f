"""Imports point one way, and loading a module of forgekit loads no heavy library: held by the syntax trees of the package."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

# A module imports from its own tier and from those above it in this list, never from one below.
TIERS = (
    ("errors", "exit_codes", "scrub"),
    (
        "layer_groups",
        "gate_settings",
        "conflicts",
        "environment",
        "link",
        "run_lock",
        "faults",
        "settings",
        "slice_presets",
        "tracker_settings",
        "recipe",
        "files",
        "run_folder",
        "paths",
        "tokens",
        "table",
        "config",
        "hardware",
    ),
    ("data",),
    ("model",),
    ("adapter",),
    ("evaluate",),
    ("train",),
    ("export",),
    ("panels", "runs", "jobs", "project", "doctor", "arguments"),
    ("sweep",),
    ("command",),
    ("__main__",),
)
RANKS = {name: rank for rank, names in enumerate(TIERS) for name in names}
CONTENTS = "__init__"  # forgekit/__init__.py names everything and is imported by the command alone

HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "unsloth",
    "unsloth_zoo",
    "datasets",
    "timm",
    "matplotlib",
    "pandas",
    "ipywidgets",
}
# the layer panel's widgets, subclasses of transformers' and pandas' own classes, and the code that makes the built-in model
MAY_BE_HEAVY = (
    "panels/layer_*.py",
    "train/callbacks.py",
    "train/stop.py",
    "train/saving.py",
    "train/progress.py",
    "train/tracking.py",
    "table.py",
    "model/tiny*.py",
    "model/timm_args.py",
    "model/table.py",
    *(
        f"train/{name}.py"
        for name in (
            "fast_path",
            "row_skip",
            "graphs",
            "proof",
            "recording",
            "rows",
            "decoder",
            "attention",
            "flash",
            "loss",
            "recompute",
            "trial",
            "park",
            "sharded",
            "tower_cache",
        )
    ),
)


@pytest.fixture(scope="session")
def package(project_folder: Path) -> Path:
    return project_folder / "forgekit"


def module_name(file: Path, package: Path) -> str:
    """forgekit/data/read.py -> "data.read"; a package's __init__.py carries the package's name."""
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk_module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_type_checking(node):
            yield node
            yield from walk_module_level(node)


def find_own_imports(nodes: Iterator[ast.AST], file: Path, package: Path) -> set[str]:
    """Return the modules of the package that are imported, however the import is written."""
    here = (package.name, *file.relative_to(package).parts[:-1])
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            first, *parts = target.split(".")
            if first == package.name:
                while parts and not is_module(package.joinpath(*parts)):
                    parts = parts[:-1]
                found.add(".".join(parts) or CONTENTS)
    return found


def is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def find_imports_upwards(package: Path) -> list[str]:
    """Return every import, also in functions and for type checkers, of a module that stands later in TIERS."""
    wrong = []
    for file in sorted(package.rglob("*.py")):
        name = module_name(file, package)
        if name == CONTENTS:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for target in sorted(find_own_imports(ast.walk(tree), file, package)):
            rank = RANKS["__main__"] if target == CONTENTS else RANKS[target.split(".")[0]]
            if rank > RANKS[name.split(".")[0]]:
                wrong.append(f"{name} -> {target}")
    return wrong


def find_heavy_imports(package: Path) -> list[str]:
    """Return every heavy library that a module imports while it is imported itself."""
    wrong = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).as_posix()
        for node in walk_module_level(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                heavy = {name.split(".")[0] for name in names} & HEAVY if not getattr(node, "level", 0) else set()
                if heavy and not any(fnmatch(path, pattern) for pattern in MAY_BE_HEAVY):
                    wrong.append(f"{path} -> {', '.join(sorted(heavy))}")
    return wrong


def sort_modules(package: Path) -> list[str]:
    """Return the modules in an order in which each one's imports come before it. Raises graphlib.CycleError."""
    graph = {}
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        graph[module_name(file, package)] = find_own_imports(walk_module_level(tree), file, package)
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_every_module_has_a_tier(package: Path) -> None:
    names = {module_name(file, package).split(".")[0] for file in package.rglob("*.py")}
    assert names - {CONTENTS} == set(RANKS)


def test_imports_point_one_way(package: Path) -> None:
    assert find_imports_upwards(package) == []


def test_no_module_imports_itself_in_a_circle(package: Path) -> None:
    order = sort_modules(package)
    assert order.index("errors") < order.index("config") < order.index("model.load") < order.index("train.sft")


def test_modules_bring_heavy_libraries_only_when_called(package: Path) -> None:
    assert find_heavy_imports(package) == []


def test_importing_the_modules_really_loads_no_heavy_library(package: Path) -> None:
    files = [file.relative_to(package) for file in sorted(package.rglob("*.py"))]
    light = [
        module_name(package / file, package)
        for file in files
        if not any(fnmatch(file.as_posix(), pattern) for pattern in MAY_BE_HEAVY)
    ]
    assert len(light) > 25
    names = ["forgekit" if name == CONTENTS else f"forgekit.{name}" for name in light]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print(*sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


# ---- the checks themselves go red -----------------------------------------------------------------------------------


def write_package(folder: Path, **files: str) -> Path:
    """Write modules; "data__read" stands for data/read.py."""
    package = folder / "forgekit"
    for name, text in files.items():
        file = package / (name.replace("__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    "line",
    [
        "from ..train.sft import sft_trainer",
        "import forgekit.train.sft",
        "from forgekit.train import sft",
        "from forgekit import train",
        "from .. import train",
        "def read():\n    from ..train import sft",
        "if TYPE_CHECKING:\n    from ..train.sft import sft_trainer",
    ],
)
def test_an_import_that_points_back_is_found(line: str, tmp_path: Path) -> None:
    package = write_package(tmp_path, data__read=line, train__sft="")
    assert [found.split(" -> ")[0] for found in find_imports_upwards(package)] == ["data.read"]


@pytest.mark.parametrize("line", ["from .. import load_config", "import forgekit", "from forgekit import load_config"])
def test_using_the_table_of_contents_inside_the_package_is_found(line: str, tmp_path: Path) -> None:
    package = write_package(tmp_path, data__read=line)
    assert find_imports_upwards(package) == ["data.read -> __init__"]


def test_an_import_that_points_forward_is_not_found(tmp_path: Path) -> None:
    lines = "from ..errors import DataError\nfrom ..data.read import read_file\nfrom . import guard"
    package = write_package(tmp_path, train__sft=lines, train__guard="", data__read="", errors="")
    assert find_imports_upwards(package) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = write_package(tmp_path, data__read="from .clean import BadRow", data__clean="from .read import read_file")
    with pytest.raises(graphlib.CycleError):
        sort_modules(package)


@pytest.mark.parametrize(
    "line", ["import torch", "from torch.nn import Linear", "try:\n    import trl.trainer\nfinally: pass"]
)
def test_a_heavy_import_is_found(line: str, tmp_path: Path) -> None:
    assert len(find_heavy_imports(write_package(tmp_path, data__read=line))) == 1


@pytest.mark.parametrize(
    "line", ["def read():\n    import torch", "if TYPE_CHECKING:\n    import torch", "from .torch import x"]
)
def test_an_import_that_costs_nothing_is_not_found(line: str, tmp_path: Path) -> None:
    assert find_heavy_imports(write_package(tmp_path, data__read=line)) == []
