"""Files of rows, whole and broken: every line is either a row or named with what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit.data.clean import BadRow
from forgekit.data.lines import parse_row
from forgekit.data.read import open_file
from forgekit.errors import DataError
from tests.data.rows import LINES, ROWS, write_file

pytestmark = pytest.mark.usefixtures("own_folder")


def read(name: str, content: str | bytes) -> tuple[dict[str, Any], list[tuple[str, str, str]], int]:
    """Read a file; return its rows by place, the bad lines as (place, code, reason), and how many were seen."""
    rows = open_file(write_file(name, content), "train")
    seen, bad = 0, []
    for place, row, key in rows:
        seen += 1
        if isinstance(row, BadRow):
            bad.append((place, row.code, row.reason))
        else:
            rows.keep(key)
    kept = rows.finish()
    good = dict(zip(kept.places(range(len(kept.table))), kept.decode(kept.table[:]), strict=True))
    assert len(good) + len(bad) == seen
    return good, bad, seen


def refusal(name: str, content: str | bytes | None) -> str:
    if content is not None:
        write_file(name, content)
    with pytest.raises(DataError) as caught:
        list(open_file(Path(name), "train"))
    return str(caught.value)


# ---- whole files -----------------------------------------------------------------------------------------------------

CSV = 'prompt,completion\n1?,2\n"größer\n😀?","ja, ""sehr"""\n'


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", "\n".join(LINES), ["a.jsonl:1", "a.jsonl:2"]),
        ("a.jsonl", "\n".join(LINES) + "\n", ["a.jsonl:1", "a.jsonl:2"]),
        ("a.jsonl", "\r\n".join(LINES) + "\r\n", ["a.jsonl:1", "a.jsonl:2"]),
        ("a.jsonl", "\ufeff" + "\n".join(LINES), ["a.jsonl:1", "a.jsonl:2"]),
        ("a.jsonl", "\n\n".join(["", *LINES, " \t"]), ["a.jsonl:3", "a.jsonl:5"]),
        ("A.JSONL", "\n".join(LINES), ["A.JSONL:1", "A.JSONL:2"]),
        ("a.json", json.dumps(ROWS), ["a.json:1", "a.json:2"]),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2), ["a.json:1", "a.json:2"]),
        ("a.json", "\n".join(LINES), ["a.json:1", "a.json:2"]),
        ("a.csv", CSV, ["a.csv:2", "a.csv:4"]),
        ("a.csv", "\ufeff" + CSV, ["a.csv:2", "a.csv:4"]),
        ("a.tsv", CSV.replace("prompt,", "prompt\t").replace("?,2", "?\t2").replace('","', '"\t"'), ["a.tsv:2", "a.tsv:4"]),
    ],
)  # fmt: skip
def test_a_whole_file_gives_its_rows_with_their_lines(name: str, content: str, places: list[str]) -> None:
    rows, bad, _ = read(name, content)
    assert bad == []
    assert rows == dict(zip(places, ROWS, strict=True))


def test_rows_need_not_share_a_schema() -> None:
    mixed = [{"a": 1}, {"a": "x", "b": [1, {"c": None}]}, {"d": {}}]
    rows, bad, _ = read("a.jsonl", "\n".join(map(json.dumps, mixed)))
    assert (list(rows.values()), bad) == (mixed, [])


def test_parquet_keeps_its_columns() -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet("a.parquet")
    assert [row for _, row, _ in open_file(Path("a.parquet"), "train")] == ROWS


# ---- half-broken files -----------------------------------------------------------------------------------------------


def test_broken_lines_are_named_and_the_others_kept() -> None:
    lines = [
        LINES[0].encode(),
        b'{"prompt": "1?", "completion": ',
        b'{"prompt": "caf\xe9", "completion": "2"}',
        b'["1?", "2"]',
        b"null",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        LINES[1].encode(),
        b'{"prompt": "cut',
    ]
    rows, bad, seen = read("a.jsonl", b"\n".join(lines))
    assert rows == {"a.jsonl:1": ROWS[0], "a.jsonl:8": ROWS[1]}
    assert [(place, code) for place, code, _ in bad] == [
        ("a.jsonl:2", "broken_json"),
        ("a.jsonl:3", "not_utf8"),
        ("a.jsonl:4", "not_an_object"),
        ("a.jsonl:5", "not_an_object"),
        ("a.jsonl:6", "too_deep"),
        ("a.jsonl:7", "broken_json"),
        ("a.jsonl:9", "broken_json"),
    ]
    assert seen == 9
    reasons = [reason for *_, reason in bad]
    assert reasons[0] == "no valid JSON: Expecting value at column 32"
    assert reasons[1] == "byte 15 is not UTF-8"
    assert reasons[2] == "a row is a JSON object, this is a list"
    assert reasons[-1] == "no valid JSON: Unterminated string starting at at column 12"


def test_a_line_with_two_rows_is_no_row() -> None:
    assert parse_row((LINES[0] + LINES[0]).encode())[0].reason == "no valid JSON: Extra data at column 36"  # type: ignore[union-attr]


def test_a_json_list_names_the_entries_that_are_no_rows() -> None:
    rows, bad, _ = read("a.json", json.dumps([ROWS[0], "x", ROWS[1]]))
    assert list(rows) == ["a.json:1", "a.json:3"]
    assert bad == [("a.json:2", "not_an_object", "a row is a JSON object, this is a str")]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (json.dumps(ROWS, indent=2)[:-30], "a.json:"),
        ("[\n" + LINES[0] + ",\n" + LINES[1] + ",\n]", "a.json:"),
        ("[\n" + LINES[0] + "\n" + LINES[1] + "]", "a.json:3: "),
    ],
)
def test_a_broken_json_list_is_refused_with_the_line(content: str, where: str) -> None:
    message = refusal("a.json", content)
    assert message.startswith(where)
    assert ": the JSON list is broken: " in message
    assert message.endswith("Mend that line, or write one row on each line.")


def test_csv_lines_with_too_few_or_too_many_columns_are_named() -> None:
    rows, bad, _ = read("a.csv", "prompt,completion\n1?,2\n3?\n\n5?,6,7\n8?,9\n")
    assert rows == {"a.csv:2": {"prompt": "1?", "completion": "2"}, "a.csv:6": {"prompt": "8?", "completion": "9"}}
    assert bad == [
        ("a.csv:3", "wrong_columns", "the header has 2 columns, this line has 1"),
        ("a.csv:5", "wrong_columns", "the header has 2 columns, this line has 3"),
    ]


def test_a_quote_that_is_not_closed_costs_every_line_that_it_swallows() -> None:
    """Read without care it would be one long last row, and hundreds of rows would be gone without a word."""
    lines = [
        "prompt,completion",
        *(f"{n}?,{n}" for n in range(2, 500)),
        '500?,"500',
        *(f"{n}?,{n}" for n in range(501, 1001)),
    ]
    rows, bad, seen = read("a.csv", "\n".join(lines))
    assert len(rows) == 498
    assert [place for place, *_ in bad] == [f"a.csv:{n}" for n in range(500, 1001)]
    assert bad[0][1:] == ("broken_csv", "unexpected end of data; a quote that opens on line 500 may not be closed")
    assert seen == 999


def test_csv_goes_on_after_a_broken_line() -> None:
    rows, bad, _ = read("a.csv", 'prompt,completion\n1?,2\n"3"?,4\n5?,6\n')
    assert list(rows) == ["a.csv:2", "a.csv:4"]
    assert [(place, code) for place, code, _ in bad] == [("a.csv:3", "broken_csv")]


def test_csv_bytes_that_are_no_utf8_are_named() -> None:
    rows, bad, _ = read("a.csv", b"prompt,completion\ncaf\xe9,2\n3?,4\n")
    assert list(rows) == ["a.csv:3"]
    assert bad == [("a.csv:2", "not_utf8", "bytes that are not UTF-8")]


def test_a_column_that_stands_twice_is_refused() -> None:
    assert refusal("a.csv", "prompt,text,prompt\n1,2,3\n") == (
        "a.csv:1: the column 'prompt' stands twice in the header. Rename one of the two."
    )


# ---- files without rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_an_empty_file_is_refused(name: str) -> None:
    assert refusal(name, "") == f"{name} is empty (0 bytes). Write one row on each line, or name another file."


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n"), ("a.csv", "\n")]
)
def test_a_file_without_rows_is_refused(name: str, content: str) -> None:
    assert refusal(name, content).startswith(f"{name} holds no row that can be read.")


def test_a_file_of_broken_lines_alone_names_the_first_of_each_kind() -> None:
    assert refusal("a.jsonl", "x\ny\n5\n") == (
        "a.jsonl holds no row that can be read. 2 x broken_json (first: a.jsonl:1: no valid JSON: Expecting value at column 1); "
        "1 x not_an_object (first: a.jsonl:3: a row is a JSON object, this is a int)."
    )


@pytest.mark.parametrize(("name", "end"), [("a.txt", ".txt"), ("a.jsonl.gz", ".gz"), ("rows", "nothing")])
def test_a_file_of_another_kind_is_refused_with_the_known_ones(name: str, end: str) -> None:
    assert refusal(name, "x") == f"{name} ends in {end}; known kinds are .jsonl, .json, .csv, .tsv, .parquet, .arrow."


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_that_is_none_is_refused(name: str) -> None:
    message = refusal(name, b"PAR1 but not for long")
    assert message.startswith(f"{name} is no whole {name[2:]} file: ")
    assert message.endswith(" Write or fetch it again.")


def test_half_a_parquet_file_is_refused() -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS * 100).to_parquet("whole.parquet")
    content = Path("whole.parquet").read_bytes()
    assert "a.parquet is no whole parquet file: " in refusal("a.parquet", content[: len(content) // 2])


def test_a_parquet_file_without_rows_is_refused() -> None:
    from datasets import Dataset

    Dataset.from_dict({"prompt": [], "completion": []}).to_parquet("a.parquet")
    assert refusal("a.parquet", None) == "a.parquet holds no rows. Name another file."


def test_a_file_that_cannot_be_opened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)
    assert refusal("a.jsonl", "x") == "a.jsonl cannot be read: Permission denied."
