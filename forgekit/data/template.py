"""A text with {columns} that says how a row becomes turns, for rows that fit no format.

    user: <problem>{problem}</problem>
    assistant: {thoughts}
    {solution}

Without such heads, what stands before {response} (or {completion}, {answer}, {output}) is asked and the rest is answered.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from .clean import BadRow
from .messages import make_message

# For reasoning sets whose rows keep thoughts and solution apart: ServiceNow-AI/R1-Distill-SFT (subset v1) has these columns.
# The <think> tags are the ones that DeepSeek-R1 and its distilled models write.
NAMED = {
    "r1_distill": "user: {problem}\nassistant: {reannotated_assistant_content}\n\n{solution}",
    "reasoning": "user: {question}\nassistant: <think>\n{reasoning}\n</think>\n\n{answer}",
}
HEAD = re.compile(r"^(system|user|assistant):[ \t]*", re.MULTILINE)
COLUMN = re.compile(r"\{(\w+)\}")
ANSWERS = ("response", "completion", "answer", "output")


def read_template(template: str) -> list[tuple[str, str]]:
    """Return a template's turns as (role, text with {columns}). Raises DataError for one that has no question or answer."""
    text = NAMED.get(template, template)
    pieces = HEAD.split(text)
    if len(pieces) > 1:
        turns = [(role, words.strip()) for role, words in zip(pieces[1::2], pieces[2::2], strict=True)]
        lost = pieces[0].strip()
    else:
        cut = next((text.index(f"{{{name}}}") for name in ANSWERS if f"{{{name}}}" in text), 0)
        turns, lost = [("user", text[:cut].strip()), ("assistant", text[cut:].strip())], ""
    if lost or not all(words for _, words in turns) or turns[-1][0] != "assistant" or not COLUMN.search(turns[-1][1]):
        raise DataError(
            f"data.template {template!r:.200} does not say what is asked and what is answered. Write turns, each begun with user: or "
            f"assistant:, with the columns in braces; or one text that holds {{{ANSWERS[0]}}}; or name one of {', '.join(NAMED)}."
        )
    return turns


def find_columns(turns: list[tuple[str, str]]) -> list[str]:
    """Return the names of the columns that the turns write."""
    return list(dict.fromkeys(name for _, words in turns for name in COLUMN.findall(words)))


def fill_template(turns: list[tuple[str, str]], row: Mapping[str, Any]) -> dict[str, Any]:
    """Put a row's columns into the turns. Raises BadRow for a column that is missing or no text."""

    def put(match: re.Match[str]) -> str:
        return get_field(row, match[1])

    return {"messages": [make_message(role, COLUMN.sub(put, words)) for role, words in turns]}


def get_field(row: Mapping[str, Any], *names: str) -> str:
    """Return the first named column as text. Raises BadRow when it is missing or no text."""
    name = next((name for name in names if name in row), names[0])
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(
            "wrong_type", f"column {name!r} should hold text, not {value if value is None else type(value).__name__}"
        )
    return str(value)
