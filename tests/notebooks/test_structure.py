"""What every notebook of the project keeps to: few cells, small outputs, no trace of a machine; those that train: six headings."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMPARE = "04_compare_runs"  # reads what others have made
TRAINING = [path for path in NOTEBOOKS if path.stem != COMPARE]
COMPARE = "04_compare_runs"  # reads what others have made
TRAINING = [path for path in NOTEBOOKS if path.stem != COMPARE]
SIX = ["Data", "Model", "Adapter", "Train", "Evaluate", "Export"]
# two folders deep and from the root; a web address or a closing tag does not look like that
ABSOLUTE = re.compile(r"(?<![\w.<~/])/[A-Za-z][\w.-]*/[\w.-]+|[A-Z]:\\\w")
LARGEST = 400_000  # bytes of stored outputs

PARAMETERS = {COMPARE: [("sweep", "str"), ("runs", "str")]}

PARAMETERS = {COMPARE: [("sweep", "str"), ("runs", "str")]}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_training = pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
every_training = pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)


def read_code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def plain_python(source: str) -> ast.Module:
    """Parse a cell; a line for IPython, such as %pip, counts as `pass`."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE))


def test_there_is_a_notebook() -> None:
    assert {"01_text", COMPARE} <= {path.stem for path in NOTEBOOKS}


@every_training
def test_few_cells_under_the_six_words(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert len(cells) <= 36
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.*)$", prose, re.MULTILINE) == SIX


@every_notebook
def test_papermill_shows_every_parameter_with_its_help(path: Path) -> None:
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in read_code(path)) == 1
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^  (\w+): (\w+) \(default .*?\)\s+(\S.*)$", shown, re.MULTILINE)
    usual = [("recipe", "str"), ("settings", "dict"), ("run_name", "str")]
    assert [(name, kind) for name, kind, _ in found] == PARAMETERS.get(path.stem, usual)
    assert all(len(words) > 10 for *_, words in found)


@every_notebook
def test_to_example_is_the_only_function(path: Path) -> None:
    nodes = [node for cell in read_code(path) for node in ast.walk(plain_python(cell.source))]
    defined = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    assert defined == ([] if path.stem == COMPARE else ["to_example"])
    assert not [node for node in nodes if isinstance(node, ast.If) and isinstance(node.test, ast.Constant)]


@every_notebook
def test_installing_happens_on_colab_alone(path: Path) -> None:
    lines = [line for cell in read_code(path) for line in cell.source.splitlines() if re.search(r"\bpip\b", line)]
    installing = [cell.source for cell in read_code(path) if re.search(r"\bpip\b", cell.source)]
    assert len(installing) == len(lines) == 1
    (guard,) = [node for node in plain_python(installing[0]).body if isinstance(node, ast.If)]
    assert ast.unparse(guard.test) == "'google.colab' in sys.modules"
    assert lines[0].startswith("    ")


def test_no_code_is_commented_out(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "ERA001"]
    done = subprocess.run([*check, str(ROOT / "notebooks")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("# model = load_model(config)")])
    nbformat.write(notebook, tmp_path / "mutant.ipynb")
    assert subprocess.run([*check, str(tmp_path / "mutant.ipynb")], capture_output=True).returncode == 1


@every_notebook
def test_stored_outputs_are_whole_small_and_without_widgets(path: Path) -> None:
    cells = read_code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert len(json.dumps([cell.outputs for cell in cells])) < LARGEST
    assert "widgets" not in nbformat.read(path, as_version=4).metadata
    assert "widget-view" not in path.read_text(encoding="utf-8")
    assert {key for cell in cells for key in cell.metadata} <= {"tags"}


@every_notebook
def test_stored_outputs_name_no_machine_and_no_hour(path: Path) -> None:
    texts = [text for cell in read_code(path) for output in cell.outputs for text in read_texts(output)]
    assert texts
    assert not [found.group() for text in texts if (found := ABSOLUTE.search(text))]
    assert not [found.group() for text in texts if (found := re.search(r"20\d\d-?\d\d-?\d\d", text))]


def read_texts(output: nbformat.NotebookNode) -> list[str]:
    """Return what an output says in words or HTML; pictures and sound, also those inside HTML, are left out."""
    if output.output_type == "stream":
        return [output.text]
    texts = [text for kind, text in output.data.items() if kind.startswith("text/")]
    return [re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", text) for text in texts]


@pytest.mark.parametrize(
    "text", ["see /home" + "/anna/x", "'/tmp/a/b'", "run: /data/runs", r"C:\Users", "(/work" + "space/x)"]
)
def test_the_search_for_machine_paths_finds_them(text: str) -> None:
    assert ABSOLUTE.search(text)


@pytest.mark.parametrize("text", ["../runs/text/models", "https://host/a/b", "<b>x</b> a</td></tr>", "4bit/8bit/16bit"])
def test_the_search_for_machine_paths_passes_others(text: str) -> None:
    assert not ABSOLUTE.search(text)
