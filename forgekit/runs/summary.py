"""What a finished run prints: scores, five answers, where things are, how to open them."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from ..errors import DataError, RunError
from ..evaluate.comparison import compare_scores
from ..evaluate.scores import read_scores
from ..files import read_json
from ..run_folder import Run
from ..scrub import remove_tokens


def print_summary(run: Run, answers: int = 5) -> None:
    """Print the end of a run from its files."""
    state, error, by = run.record["state"], run.record.get("error"), run.record.get("stopped_by")
    line = f"\nRun {run.record['name']}: {state}" + (f" by {by}" if by else "") + (f": {error}" if error else "")
    print(remove_tokens(line))
    baseline, scores = run.path / "metrics" / "baseline.json", run.path / "metrics" / "scores.json"
    if baseline.exists() and scores.exists():
        print_scores(read_json(baseline), read_json(scores), answers)
        print_change(baseline, scores)
    gates = run.path / "metrics" / "gates.json"
    if gates.exists():
        print("\nGates")
        for verdict in read_json(gates)["gates"]:
            print(f"  {verdict['gate']:<22} {verdict['verdict']:<8} {verdict['reason']}")
    print("\nWhere things are")
    for title, place in find_places(run).items():
        print(f"  {title:<11}{place}")
    if "notebook" in find_places(run):
        print(f"\nOpen it in JupyterLab:  {find_command()} lab {shlex.quote(str(run.path / 'notebook.ipynb'))}")


def print_change(baseline: Path, scores: Path) -> None:
    """Print how sure the change is, by the metric that decides."""
    try:
        print(f"\n  {compare_scores(read_scores(baseline), read_scores(scores)).change}")
    except (DataError, RunError) as error:  # the notebook scored other rows the second time, or wrote another file
        print(f"\n  {error}")


def print_scores(before: dict[str, Any], after: dict[str, Any], answers: int) -> None:
    """Print both scores and the first answers of each."""
    print(f"\nScore on {len(after['rows'])} held-out rows     before     after")
    if None not in (before["exact_match"], after["exact_match"]):  # no answers are asked for where the loss alone counts
        print(f"  exact match               {before['exact_match']:>7.1%}   {after['exact_match']:>7.1%}")
    print(f"  loss, nats a token        {before['loss']:>7.3f}   {after['loss']:>7.3f}")
    pairs = zip(before["rows"], after["rows"], strict=False)  # the notebook may have scored other rows the second time
    for old, new in [(old, new) for old, new in pairs if old["question"] == new["question"]][:answers]:
        print(f"\n  question  {' '.join(new['question'].split())}")
        print(f"  before    {' '.join(old['prediction'].split())[:160]}")
        print(
            f"  after     {new['prediction']}   {'(right)' if new['right'] else '(right would be: ' + new['reference'] + ')'}"
        )


def find_places(run: Run) -> dict[str, Path]:
    """Return what stands in the run's folder, by title."""
    places = {
        "run": run.path,
        "notebook": run.path / "notebook.ipynb",
        "as HTML": run.path / "notebook.html",
        "log": run.path / "logs" / "training.log",
    }
    places |= {name: run.path / place for name, place in run.record.get("exports", {}).items()}
    return {title: place for title, place in places.items() if place.exists()}


def find_command() -> str:
    """Return how this forgekit is called from a shell: its name when that is found, else this Python."""
    return "forgekit" if shutil.which("forgekit") else f"{shlex.quote(sys.executable)} -m forgekit"
