"""Look at a whole data set before it is learned from: lengths against the limit, what is learned, what was set aside."""

import base64
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .collate import Markers, get_tokenizer, mark_learned, tokenize_rows
from .messages import Messages
from .parts import FEEDS, find_values
from .split import hash_prompt

if TYPE_CHECKING:
    import pandas
    from datasets import DatasetDict

    from ..config import Config
    from ..run_folder import Run

BATCH = 128  # rows read and tokenised together
SHOWN = 2000  # rows between two lines of progress; counted and not timed, so that a notebook prints the same everywhere


@dataclass(frozen=True)
class RowFacts:
    """One row, measured: its tokens, how many of them are learned, its turns, its media by kind, its prompt's hash."""

    tokens: int
    learned: int
    turns: int
    media: Counter[str]
    prompt: str


@dataclass(frozen=True)
class Audit:
    """What `audit_data` found. In a notebook it shows the table and the figure, elsewhere the table as text."""

    table: "pandas.DataFrame"
    figure: Any  # matplotlib Figure

    def __repr__(self) -> str:
        return self.table.to_string()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.table)
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=100)
        data = base64.b64encode(file.getvalue()).decode()
        display({"image/png": data, "text/plain": "Row lengths in tokens, and rows by what became of them"}, raw=True)


def audit_data(
    data: "DatasetDict",
    processor: Any,
    config: "Config | None" = None,
    run: "Run | None" = None,
    rows: int = 20_000,
) -> Audit:
    """Measure every row as it will be trained on, and show one table and one figure.

    Args:
        data: from `load_data`, or any splits of rows that read as {"messages": [...]}.
        config: says where the cut-off lies (`model.max_length`); None: no line is drawn.
        run: its quarantine.jsonl gives the reasons of rows set aside; None: they are left out.
        rows: at most so many rows of a split are measured, evenly spread; the table says how many.

    Returns an Audit with `table` (one column a split) and `figure`.
    """
    facts = {name: measure_rows(name, table, processor, rows) for name, table in data.items()}
    reasons = read_reasons(run.path / "quarantine.jsonl") if run else Counter()
    limit = config.model.max_length if config else None
    sizes = {name: len(table) for name, table in data.items()}
    return Audit(make_table(facts, sizes, reasons, limit), draw_figure(facts, sizes, reasons, limit))


def measure_rows(name: str, table: Any, processor: Any, most: int) -> list[RowFacts]:
    """Read, tokenise and count the rows of one split, at most `most` of them, evenly spread."""
    chosen = range(len(table)) if len(table) <= most else [i * len(table) // most for i in range(most)]
    markers = Markers.find(get_tokenizer(processor))
    facts: list[RowFacts] = []
    for start in range(0, len(chosen), BATCH):
        chats = table[list(chosen[start : start + BATCH])]["messages"]
        facts += [
            measure_row(ids, messages, markers)
            for ids, messages in zip(tokenize_rows(chats, processor), chats, strict=True)
        ]
        if len(facts) // SHOWN > start // SHOWN and len(facts) < len(chosen):
            print(f"Measuring {name}: {len(facts)} of {len(chosen)} rows", flush=True)
    return facts


def measure_row(ids: list[int], messages: Messages, markers: Markers) -> RowFacts:
    """Count one row."""
    media = Counter({name: len(find_values(messages, name)) for name in FEEDS})
    turns = sum(message["role"] == "assistant" for message in messages)
    return RowFacts(len(ids), sum(mark_learned(ids, markers)), turns, +media, hash_prompt(messages, 0))


def read_reasons(path: Path) -> Counter[str]:
    """Count the rows set aside by their reason code; none when the file does not exist, as nothing was set aside then."""
    if not path.is_file():
        return Counter()
    return Counter(json.loads(line)["code"] for line in path.read_text(encoding="utf-8").splitlines())


def make_table(
    facts: dict[str, list[RowFacts]], sizes: dict[str, int], reasons: Counter[str], limit: int | None
) -> "pandas.DataFrame":
    """Return the facts as a table, one column a split; rows set aside stand in the column "set aside"."""
    from ..table import Table

    columns = {name: describe_split(rows, sizes[name]) for name, rows in facts.items()}
    known = {fact: None for column in columns.values() for fact in column}
    table = {name: {fact: column.get(fact, "") for fact in known} for name, column in columns.items()}
    if limit:
        for name, rows in facts.items():
            longest = max(row.tokens for row in rows)
            table[name]["longest, share of the limit"] = f"{longest / limit:.0%} of {limit}"
    if reasons:
        aside = {"rows": str(reasons.total())} | {f"set aside: {code}": str(n) for code, n in reasons.most_common()}
        table["set aside"] = aside
    frame = Table(table).fillna("")
    return Table(frame.reindex([*{fact: None for column in table.values() for fact in column}]))


def describe_split(rows: list[RowFacts], size: int) -> dict[str, str]:
    """Return one split's facts as words."""
    from statistics import median

    tokens, learned = [row.tokens for row in rows], sum(row.learned for row in rows)
    media: Counter[str] = sum((row.media for row in rows), Counter())
    prompts = Counter(row.prompt for row in rows)
    repeated = sum(number for number in prompts.values() if number > 1)
    return {
        "rows": f"{size}" if len(rows) == size else f"{size}, {len(rows)} measured",
        "tokens a row, median": f"{median(tokens):.0f}",
        "tokens a row, longest": f"{max(tokens)}",
        "tokens in all": f"{sum(tokens)}",
        "learned tokens": f"{learned / sum(tokens):.0%}",
        "answers a row": f"{sum(row.turns for row in rows) / len(rows):.2g}",
        **{f"{name} parts a row": f"{number / len(rows):.2g}" for name, number in sorted(media.items())},
        "rows with a repeated prompt": f"{repeated}",
    }


def draw_figure(
    facts: dict[str, list[RowFacts]], sizes: dict[str, int], reasons: Counter[str], limit: int | None
) -> Any:
    """Draw lengths with the cut-off line on the left, and what became of the rows on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    lengths, fate = figure.subplots(1, 2, width_ratios=(2, 1))
    rows = [row for some in facts.values() for row in some]
    top = max(row.tokens for row in rows)
    edges = [i * (top + 1) / 30 for i in range(31)]
    lengths.hist([row.tokens for row in rows], edges, color="#b9cfe8", label="tokens a row")
    lengths.hist([row.learned for row in rows], edges, histtype="step", color="#1b5e20", lw=2, label="of them learned")
    if limit and limit <= 4 * top:
        lengths.axvline(limit, color="#b35300", linestyle="--", label=f"cut-off: max_length {limit}")
    elif limit:
        lengths.set_title(f"longest row {top} tokens, far below max_length {limit}", fontsize=9, loc="left")
    lengths.set(xlabel="tokens", ylabel="rows", xlim=(0, None))
    lengths.legend(frameon=False, fontsize=8)
    names = [*sizes, *(f"set aside: {code}" for code in reasons)]
    numbers = [*sizes.values(), *reasons.values()]
    bars = fate.barh(names, numbers, color=["#1f5fa8"] * len(sizes) + ["#b35300"] * len(reasons))
    fate.bar_label(bars, padding=3, fontsize=8)
    fate.invert_yaxis()
    fate.set(xlabel="rows", xlim=(0, 1.25 * max(numbers)))
    for axes in (lengths, fate):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
