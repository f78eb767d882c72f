"""The table and the picture of what benchmarks/fast_path.py measured.

python -m benchmarks.fast_path_show benchmarks/fast_path.jsonl [--chart benchmarks/fast_path.png]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.fast_path import SHAPES, read_rows

REFERENCE = "unsloth"
NAMES = {
    "trl": "transformers + TRL",
    "unsloth": "Unsloth",
    "forgekit-low-compiled-graphs-park": "forgekit, train.memory: low",
    "forgekit-high-compiled-graphs": "forgekit, train.memory: high",
}
COLOURS = {
    "trl": "#9aa0a6",
    "unsloth": "#c58b2b",
    "forgekit-low-compiled-graphs-park": "#7aa6d8",
    "forgekit-high-compiled-graphs": "#1f5fa8",
}
HEAD = (
    "| model, rows x tokens, prompt | call | side | step | tokens/s | beside Unsloth | peak | first step | slow steps |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def name_shape(shape: str) -> str:
    """Return a shape in words: rows x tokens, share of the prompt, and what is special."""
    rows, tokens, prompt, medium, weights = SHAPES[shape]
    words = [f"{rows}x{tokens}" if medium != "mixed" else f"{rows} x 64 to {tokens}", f"{prompt:.0%}"]
    return ", ".join(words + [word for word in (medium, weights) if word not in ("text", "mixed", "16bit")])


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: those of one shape together, call by call, and in each Unsloth's first, to which it is compared."""
    lines = [HEAD]
    for checkpoint, shape in dict.fromkeys((row["checkpoint"], row["shape"]) for row in rows):
        group = [row for row in rows if (row["checkpoint"], row["shape"]) == (checkpoint, shape)]
        for call in dict.fromkeys(row["call"] for row in group):
            together = [row for row in group if row["call"] == call]
            reference = next((row["ms"] for row in together if row["side"] == REFERENCE), None)
            for row in sorted(together, key=lambda row: (row["side"] != REFERENCE, row["side"])):
                ratio = f"{reference / row['ms']:.2f}" if reference else ""
                lines.append(
                    f"| {checkpoint}, {name_shape(shape)} | {call} | {row['side']} | {row['ms']:.0f} ms | {row['tokens_per_s']:,} | {ratio} "
                    f"| {row['peak_gib']:.2f} GiB | {row['first_step_s']:.0f} s | {row['slow_steps_s']:.0f} s |"
                )
    return "\n".join(lines)


def draw_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw speed and peak memory of each side, newest rows, for the shapes that Unsloth was measured on, and write a PNG."""
    from matplotlib.figure import Figure

    shapes = [
        s
        for s in SHAPES
        if {REFERENCE, "forgekit-high-compiled-graphs"} <= {r["side"] for r in rows if r["shape"] == s}
    ]
    sides = [side for side in NAMES if any(row["side"] == side for row in rows)]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    speed, memory = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(sides)
    for axes, key, label in ((speed, "tokens_per_s", "tokens a second"), (memory, "peak_gib", "peak GiB")):
        for number, side in enumerate(sides):
            found = {row["shape"]: row[key] for row in rows if row["side"] == side and row["checkpoint"] == "e2b"}
            places = [place + (number - (len(sides) - 1) / 2) * width for place, s in enumerate(shapes) if s in found]
            axes.bar(places, [found[s] for s in shapes if s in found], width, label=NAMES[side], color=COLOURS[side])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_xticks(range(len(shapes)), [name_shape(shape).replace(", ", "\n", 1) for shape in shapes])
    memory.set_xlabel("rows x tokens, share of the prompt")
    figure.legend(*speed.get_legend_handles_labels(), frameon=False, ncols=4, loc="outside upper center")
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    """Print the table, and draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--chart", type=Path)
    options = parser.parse_args(arguments)
    rows = [row for row in read_rows(options.file) if "error" not in row]
    print(make_table(rows))
    if options.chart:
        draw_chart(rows, options.chart)


if __name__ == "__main__":
    main(sys.argv[1:])
