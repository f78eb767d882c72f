"""Gates: what passes, what each breakage turns red, and what command and headless run do with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from forgekit import check_gates, load_config
from forgekit.__main__ import main
from forgekit.evaluate.convergence import judge_losses
from forgekit.files import read_json, write_json
from forgekit.run_folder import Run, start_run
from forgekit.runs import headless
from forgekit.runs.outcome import Outcome
from forgekit.runs.parameters import find_here
from forgekit.runs.session import Session

from .rows import answer_right, make_scores, write_scores

ALL = ["baseline-established", "model-performance", "no-regression", "quantization-verified"]
LOSSES = [(step, 3.0 * 0.9**step + 0.2) for step in range(60)]
GENERAL = {"path": "general.jsonl", "drop": 0.02}
REGRESSION = {"metric": "exact_match", "higher_is_better": True, "before": 0.5, "after": 0.49, "difference": -0.01, "low": -0.05, "high": 0.03, "rows": 80, **GENERAL}  # fmt: skip
VERIFIED = {
    "verified": True,
    "checks": [{"name": "mean KL", "value": 1e-3, "bound": 1e-2, "held": True}],
    "score": 0.74,
    "merged_score": 0.75,
    "file_bytes": 1000,
    "expected_bytes": 1005,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that has everything that every gate asks for."""
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    settings = {"evaluate.gates": {**dict.fromkeys(ALL), "model-performance": 0.2}, "evaluate.regression": GENERAL}
    run = start_run(load_config(None, settings), "judged")
    write_all(run.path)
    return run


def write_all(folder: Path) -> None:
    write_scores(folder, make_scores(answer_right(4, 80)), make_scores(answer_right(60, 80)))
    write_json(folder / "metrics" / "training-stats.json", {"losses": LOSSES, "held_out_losses": []})
    write_json(folder / "metrics" / "regression.json", REGRESSION)
    write_json(folder / "models" / "quantized" / "verify.json", VERIFIED)
    (folder / "models" / "quantized" / "model-Q8_0.gguf").write_bytes(b"\0" * 1000)


def change_json(path: Path, **values: Any) -> None:
    write_json(path, read_json(path) | values)


def test_a_run_that_shows_everything_passes_every_gate(run: Run) -> None:
    gates = check_gates(run)
    assert gates.held and [verdict.gate for verdict in gates.verdicts] == ALL
    saved = read_json(run.path / "metrics" / "gates.json")
    assert saved["held"] is True and [gate["verdict"] for gate in saved["gates"]] == ["passed"] * 4
    performance = saved["gates"][1]["numbers"]
    assert (performance["before"], performance["after"], performance["margin"]) == (0.05, 0.75, 0.2)
    assert 0.5 < performance["gain_low"] < 0.7 < performance["gain_high"] < 0.9
    assert read_json(run.path / "run.json")["gates"] == dict.fromkeys(ALL, "passed")
    assert "model-performance      passed" in repr(gates) and "exact_match 0.05 -&gt; 0.75" in gates._repr_html_()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def score_again(before: int, after: int, of: int = 80) -> Callable[[Path], None]:
    scores = make_scores(answer_right(before, of)), make_scores(answer_right(after, of))
    return lambda folder: write_scores(folder, *scores)


def change_file(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / name, **values)


STATS, VERIFY, GGUF = "metrics/training-stats.json", "models/quantized/verify.json", "models/quantized/model-Q8_0.gguf"
RISING = [(step, 3.0 - 0.05 * step if step < 30 else 1.5 + 0.05 * (step - 30)) for step in range(60)]
HELD = {"name": "mean KL", "value": 0.5, "bound": 0.01, "held": False}


# gate, how the run is broken, verdict, words of the reason
def keep_apart(folder: Path) -> None:
    """Leave the run as an export does whose only GGUF failed its bound."""
    change_json(folder / VERIFY, checks=[HELD], verified=False)
    (folder / "models/unverified").mkdir()
    (folder / "models/quantized").rename(folder / "models/unverified/quantized")


BROKEN: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "no baseline": (ALL[0], remove("metrics/baseline.json"), "not run", "score the base before training"),
    "baseline of other rows": (
        ALL[0],
        lambda folder: make_scores(answer_right(1, 3)).save(folder / "metrics" / "baseline.json"),
        "failed",
        "different rows",
    ),
    "half a file": (
        ALL[0],
        lambda folder: (folder / "metrics" / "baseline.json").write_text("{"),
        "failed",
        "cannot be read",
    ),
    "no scores": (ALL[1], remove("metrics/scores.json"), "not run", "metrics/scores.json: missing"),
    "below the margin": (ALL[1], score_again(40, 52), "failed", "the gain is +0.15, and 0.2 is asked for"),
    "chance": (ALL[1], score_again(1, 3, 4), "failed", "does not exclude zero"),
    "worse": (ALL[1], score_again(60, 4), "failed", "does not exclude zero"),
    "loss not finite": (ALL[1], change_file(STATS, losses=[*LOSSES, (60, None)]), "failed", "1 of the losses are no numbers"),
    "loss rising": (ALL[1], change_file(STATS, losses=RISING), "failed", "climbed again"),
    "an error": (ALL[1], change_file("run.json", error="cell 9: out of memory"), "failed", "cell 9: out of memory"),
    "general set lost": (ALL[2], change_file("metrics/regression.json", difference=-0.03), "failed", "may lose 0.02"),
    "general set not scored": (ALL[2], remove("metrics/regression.json"), "not run", "check_regression was not called"),
    "no GGUF": (ALL[3], remove(VERIFY), "not run", "no GGUF was exported"),
    "a bound that failed": (ALL[3], change_file(VERIFY, checks=[HELD], verified=False), "failed", "mean KL is 0.5, bound 0.01"),
    "a GGUF kept apart": (ALL[3], keep_apart, "failed", "mean KL is 0.5, bound 0.01; what was exported stands in models/unverified/quantized"),
    "GGUF answers worse": (ALL[3], change_file(VERIFY, score=0.70), "failed", "more than 5% lost"),
    "GGUF too large": (ALL[3], change_file(VERIFY, expected_bytes=500), "failed", "500 were expected"),
    "GGUF changed": (ALL[3], lambda folder: (folder / GGUF).write_bytes(b"x"), "failed", "no GGUF here has the 1000 bytes"),
    "verify.json of another shape": (ALL[3], lambda folder: write_json(folder / VERIFY, {"verified": True}), "failed", "lacks 'checks'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_breakage_turns_its_gate_red_and_no_other(name: str, run: Run) -> None:
    gate, damage, verdict, words = BROKEN[name]
    damage(run.path)
    gates = check_gates(run.path)
    found = {verdict.gate: verdict for verdict in gates.verdicts}
    assert (found[gate].verdict, gates.held) == (verdict, False)
    assert words in found[gate].reason
    others = {"baseline-established", "model-performance"} if "baseline" in name or "half" in name else {gate}
    assert set(gates.failed) <= others | ({"baseline-established"} if name == "no scores" else set())


def test_of_error_rates_the_gguf_may_not_make_more(run: Run) -> None:
    for score, held in ((0.24, True), (0.26, True), (0.27, False)):
        change_json(run.path / VERIFY, score=score, merged_score=0.25, higher_is_better=False)
        assert check_gates(run.path, {"quantization-verified": {}}).held is held


def test_one_of_two_files_that_failed_is_enough(run: Run) -> None:
    apart = run.path / "models/unverified/quantized"
    apart.mkdir(parents=True)
    write_json(apart / "verify.json", {"verified": False, "checks": [HELD], "file_bytes": 3, "expected_bytes": 3})
    (verdict,) = check_gates(run.path, {"quantization-verified": {}}).verdicts
    assert verdict.verdict == "failed" and "mean KL is 0.5" in verdict.reason


def test_a_gguf_whose_answers_were_not_scored_rests_on_its_checks(run: Run) -> None:
    change_json(run.path / VERIFY, score=None)
    (verdict,) = check_gates(run.path, {"quantization-verified": {}}).verdicts
    assert verdict.held and "1 checks held; its answers were not scored" in verdict.reason


def test_a_regression_set_is_a_gate_without_being_named(run: Run) -> None:
    record = read_json(run.path / "run.json")
    record["settings"]["evaluate.gates"]["value"] = {}
    write_json(run.path / "run.json", record)
    assert [verdict.gate for verdict in check_gates(run.path).verdicts] == ["no-regression"]


# ---- the course of the loss ------------------------------------------------------------------------------------------


def noise(step: int) -> float:
    return 0.3 * ((step * 7919) % 13 / 6 - 1)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (LOSSES, None),
        ([(s, value + noise(s)) for s, value in LOSSES], None),  # single batches scatter
        ([(s, 2.0 - 0.002 * s + noise(s)) for s in range(60)], None),  # little to learn, more scatter than fall
        ([(s, 1.0) for s in range(60)], "did not fall"),
        ([(s, 1.0 + 0.01 * s) for s in range(60)], "did not fall"),
        (RISING, "climbed again"),
        ([(s, 3.0 - (s / 59) ** 8 * 2.5) for s in range(60)], "still falling fast"),
        (LOSSES[:5], "only 5 losses were logged"),
        ([(0, 3.0), (5, float("nan")), *LOSSES], "1 of the losses are no numbers"),
    ],
)
def test_the_course_of_a_loss(losses: list[tuple[int, float]], words: str | None) -> None:
    problems = judge_losses({"losses": losses}).problems
    assert (not problems) if words is None else (len(problems) == 1 and words in problems[0])


# ---- the command and the headless run --------------------------------------------------------------------------------


def test_the_command_prints_verdicts_and_exits_with_3_when_one_failed(run: Run, capsys: pytest.CaptureFixture) -> None:
    run.finish()
    assert main(["gates", "judged"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[gate, "passed"] for gate in ALL]
    (run.path / VERIFY).unlink()
    assert main(["gates", str(run.path)]) == 3
    assert "quantization-verified  not run" in capsys.readouterr().out
    assert read_json(run.path / "metrics" / "gates.json")["held"] is False
    assert read_json(run.path / "run.json")["gates"]["quantization-verified"] == "not run"


def test_a_run_that_stopped_at_a_gate_is_completed_once_it_passes(run: Run) -> None:
    """The GGUF is exported and verified later; nothing else of the run is an error."""
    verify = read_json(run.path / VERIFY)
    (run.path / VERIFY).unlink()
    run.finish("gates_failed", "gates that did not pass: quantization-verified")
    assert check_gates(run.path).failed == ["quantization-verified"]
    assert read_json(run.path / "run.json")["state"] == "gates_failed"
    write_json(run.path / VERIFY, verify)
    assert check_gates(run.path).held
    record = read_json(run.path / "run.json")
    assert (record["state"], record["error"]) == ("completed", None)


def test_a_run_that_another_process_has_open_is_read_only(run: Run) -> None:
    before = (run.path / "run.json").read_bytes()
    assert check_gates(run.path).held
    assert (run.path / "run.json").read_bytes() == before


def test_a_run_that_does_not_exist_ends_with_1(run: Run, capsys: pytest.CaptureFixture) -> None:
    assert main(["gates", "nothing"]) == 1
    assert "forgekit: no run 'nothing': there is no run.json in nothing or " in capsys.readouterr().err


def test_a_general_set_of_the_current_folder_is_found_from_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "general.jsonl").write_text("{}")
    for path, found in (("general.jsonl", str(tmp_path / "general.jsonl")), ("not/here.jsonl", "not/here.jsonl")):
        settings = find_here({"evaluate.regression": {"path": path, "drop": 0.02}})
        assert settings == {"evaluate.regression": {"path": found, "drop": 0.02}}


@pytest.mark.parametrize(
    ("action", "broken", "state", "code"),
    [("stop", True, "gates_failed", 3), ("warn", True, "completed", 0), ("stop", False, "completed", 0)],
)
def test_a_headless_run_stops_at_a_gate_that_failed(
    action: str, broken: bool, state: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    cell = nbformat.v4.new_code_cell('recipe = ""\nsettings = {}\nrun_name = ""', metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), "toy.ipynb")

    def execute(notebook: Path, output: Path, session: Session) -> Outcome:
        """What the cells of a notebook leave behind."""
        assert session.parameters is not None
        given = json.loads(session.parameters.read_text())
        started = start_run(load_config(None, given["settings"]), given["run_name"])
        write_all(started.path)
        if broken:
            (started.path / "metrics" / "baseline.json").unlink()
        started.finish()
        return session.finish(Outcome())

    monkeypatch.setattr(headless, "execute", execute)
    monkeypatch.setenv("FORGEKIT_RUN", "toy")  # as in a kernel
    monkeypatch.setenv("FORGEKIT_SUPERVISED", "{}")
    sets = ["evaluate.gates=[baseline-established, quantization-verified]", f"evaluate.gates_action={action}"]
    assert main(["run", "toy.ipynb", "--name", "toy", "--set", *sets]) == code
    record = json.loads((tmp_path / "runs" / "toy" / "run.json").read_text())
    assert record["state"] == state
    assert record["gates"]["baseline-established"] == ("not run" if broken else "passed")
    assert record["error"] == ("gates that did not pass: baseline-established" if state == "gates_failed" else None)
    printed = capsys.readouterr().out
    assert f"Run toy: {state}" in printed and "quantization-verified  passed" in printed
