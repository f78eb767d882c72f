"""The README's table of what was broken on purpose, made from what the fault suite wrote down.

make faults                                   breaks everything, writes benchmarks/reliability.jsonl, and runs
python -m benchmarks.reliability              this: the table goes into README.md, between its two marks
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD, README = ROOT / "benchmarks" / "reliability.jsonl", ROOT / "README.md"
BEGIN, END = "<!-- written by benchmarks/reliability.py -->", "<!-- end -->"
ACTIONS = {  # in the order of the table
    "kill9": "`kill -9`",
    "term": "SIGTERM",
    "exception": "an exception",
    "out_of_memory": "out of memory",
    "no_space": "no space left (ENOSPC)",
    "disk_full": "no file may grow (RLIMIT_FSIZE)",
    "full tmpfs": "a full disk (a small tmpfs)",
    "nan": "NaN",
    "hang": "a hang",
}
SHOWN = 14  # points named in a line; of more only the number is told


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the recorded cases."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each thing that was broken in one way with one end: where, how often, and what happened."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=find_place):
        happened = row["happened"] if row["passed"] else "**not what was to happen**"
        groups.setdefault((row["what"], row["action"], happened), []).append(row)
    lines = ["| what | broken by | where | times | what happened |", "|---|---|---|---|---|"]
    for (what, action, happened), found in groups.items():
        times = sum(row["times"] for row in found)
        lines.append(f"| {what} | {ACTIONS.get(action, action)} | {list_points(found)} | {times} | {happened} |")
    return "\n".join(lines)


def find_place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows are sorted by: things in the order of a run, actions in that of the table."""
    things = ("training", "checkpoint", "export", "run", "folder", "defence")
    actions = list(ACTIONS)
    place = actions.index(row["action"]) if row["action"] in actions else len(actions)
    return things.index(row["what"]), place, row["action"], row["happened"] or ""


def list_points(rows: list[dict[str, Any]]) -> str:
    """Return the points of some cases in the order of the package's own list, or their number when they are many."""
    from forgekit.faults import POINTS

    order = {point: number for number, point in enumerate(POINTS)}
    points = sorted({row["point"] for row in rows}, key=lambda point: (order.get(point, len(order)), point))
    return f"{len(points)} places" if len(points) > SHOWN else ", ".join(points)


def count_cases(rows: list[dict[str, Any]]) -> str:
    """Return one sentence: how often something was broken, and how often that ended otherwise than it was to."""
    failed = sum(row["times"] for row in rows if not row["passed"])
    return f"{sum(row['times'] for row in rows)} times something was broken; {failed or 'none'} ended otherwise than it was to."


def fill_readme(text: str, rows: list[dict[str, Any]]) -> str:
    """Return the README with the table between its marks."""
    body = f"{BEGIN}\n{count_cases(rows)}\n\n{make_table(rows)}\n{END}"
    filled, number = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda found: body, text, flags=re.DOTALL)
    if number != 1:
        raise SystemExit(f"README.md should have the marks {BEGIN} and {END} once; it has them {number} times.")
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, default=RECORD, help="what the fault suite wrote down")
    rows = read_rows(parser.parse_args().record)
    README.write_text(fill_readme(README.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(make_table(rows))


if __name__ == "__main__":
    main()
