"""Rows that tests write and read back: sums, whose number says which row it is, and two that test the writing."""

import json
from pathlib import Path
from typing import Any

from forgekit.data.messages import get_text

ROWS = [{"prompt": "1?", "completion": "2"}, {"prompt": "größer\n😀?", "completion": 'ja, "sehr"'}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def make_pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(first, first + count)]


def write_rows(rows: list[Any], name: str = "rows.jsonl") -> None:
    """Write rows as JSON lines; a row that is text already stays as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_file(name: str, content: str | bytes) -> Path:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(name)


def questions(table: Any) -> list[str]:
    return [get_text(row["messages"][0]) for row in table]


def numbers(table: Any) -> list[int]:
    return [int(question.split()[2]) for question in questions(table)]
