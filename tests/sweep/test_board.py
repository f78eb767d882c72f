"""What a sweep prints: lines in a log, and on a terminal a table below them that is written over."""

import io
import json
from pathlib import Path

import pytest

from forgekit.sweep import board
from forgekit.sweep.board import Board, write_table
from forgekit.sweep.entry import RUNNING, WAITING, Entry
from forgekit.sweep.points import Point
from forgekit.sweep.watch import Watch

pytestmark = pytest.mark.usefixtures("own_folder")


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and shows what would stand there."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines after each "cursor up so many, forget what stands below" was obeyed."""
        lines: list[str] = [""]
        text = self.getvalue()
        while text:
            if text.startswith("\033["):
                number, _, text = text[2:].partition("A")
                assert text.startswith("\033[J")
                lines, text = [*lines[: len(lines) - 1 - int(number)], ""], text[3:]
            elif text[0] == "\n":
                lines, text = [*lines, ""], text[1:]
            else:
                lines[-1], text = lines[-1] + text[0], text[1:]
        return lines[:-1]


class HungUp(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def make_entry(name: str, state: str = RUNNING, step: int = 0) -> Entry:
    folder = Path("runs", name)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "logs/metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.5}) + "\n")
    (folder / "status.json").write_text(
        json.dumps({"running": True, "step": step, "total_steps": 60, "eta_seconds": 7.3})
    )
    return Entry(Point(name, {}), Watch(folder).read(), state)


def test_on_a_terminal_lines_stand_above_one_table() -> None:
    terminal = Terminal()
    shown = Board(terminal)
    shown.say("first  running")
    shown.draw([make_entry("first", step=10), make_entry("second", WAITING)])
    shown.draw([make_entry("first", step=20), make_entry("second", WAITING)])
    shown.say("first  completed")
    table = ["", "1 running, 1 waiting", "first  running       step 20/60  loss 1.5000  7 s left"]
    assert [line[10:] for line in terminal.screen()[:2]] == ["first  running", "first  completed"]
    assert terminal.screen()[2:] == table
    shown.end()
    assert len(terminal.screen()) == 2


def test_a_table_fits_its_terminal_and_running_ones_stand_first() -> None:
    entries = [make_entry(f"run-{number}", "completed" if number < 20 else RUNNING) for number in range(22)]
    lines = write_table(entries, (40, 12))
    assert len(lines) <= 12 and max(map(len, lines)) < 40
    assert [line.split()[0] for line in lines[2:4]] == ["run-20", "run-21"] and "run-19" in lines[-1]
    assert len(write_table(entries[20:] * 30, (40, 12))) <= 12


def test_in_a_log_there_is_a_line_a_minute_and_no_table(monkeypatch) -> None:
    log = io.StringIO()
    shown = Board(log)
    entries = [make_entry("first", step=10), make_entry("second", "completed")]
    shown.draw(entries)
    assert log.getvalue() == ""
    monkeypatch.setattr(board, "QUIET_SECONDS", 0)
    shown.draw(entries)
    words = "1 running, 1 completed; first step 10/60  loss 1.5000  7 s left\n"
    assert log.getvalue()[10:] == words and "\033" not in log.getvalue()


def test_a_hang_up_ends_no_sweep_and_tokens_are_not_printed() -> None:
    Board(HungUp()).say("on it goes")
    log, token = io.StringIO(), "hf_" + "a1B2" * 9
    Board(log).say(f"failed: {token}")
    assert token not in log.getvalue()
