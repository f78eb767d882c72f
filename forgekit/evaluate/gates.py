"""Gates: what a run has to show before anybody ships it, each judged from the files of its folder alone.

    baseline-established    metrics/baseline.json                       the base was scored, on the rows of metrics/scores.json
    model-performance       both, metrics/training-stats.json           better by more than the margin and than chance; loss fell
    no-regression           metrics/regression.json                     a second, general set lost no more than it may
    quantization-verified   models/[unverified/]quantized/verify.json   the GGUF answers like the merged model, size as expected

So they can be judged again later, by `forgekit gates RUN`, without weights. What was asked for and was never measured counts
as failed.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, RunError
from ..files import read_json, write_json
from ..gate_settings import GATES
from ..run_folder import DONE, Run
from .comparison import compare_scores
from .convergence import judge_losses
from .scores import Scores, read_scores

if TYPE_CHECKING:
    import pandas

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
STOPPED = "gates_failed"  # the state of a run that came to its end and stopped here; it ends once its gates pass
SIZE = (
    0.02  # a GGUF may be so much larger or smaller than calculated, as a share: its header is not counted to the byte
)
FILES = {"score": "metrics/scores.json", "base": "metrics/baseline.json", "stats": "metrics/training-stats.json"}


@dataclass(frozen=True)
class Verdict:
    """What one gate says. verdict: passed, failed or not run. numbers: what it was judged by."""

    gate: str
    verdict: str
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Say whether the gate is open."""
        return self.verdict == PASSED


@dataclass(frozen=True, repr=False)
class Gates:
    """All verdicts of a run; `held` when each gate that was asked for passed."""

    verdicts: list[Verdict]

    @property
    def failed(self) -> list[str]:
        """The gates that did not pass."""
        return [verdict.gate for verdict in self.verdicts if not verdict.held]

    @property
    def held(self) -> bool:
        """Say whether all passed."""
        return not self.failed

    @property
    def table(self) -> "pandas.DataFrame":
        """One row a gate: verdict and reason."""
        from ..table import Table

        rows = [(verdict.gate, verdict.verdict, verdict.reason) for verdict in self.verdicts]
        return Table(Table(rows, columns=["gate", "verdict", "reason"]).set_index("gate"))

    def __repr__(self) -> str:
        lines = [f"{verdict.gate:<22} {verdict.verdict:<8} {verdict.reason}" for verdict in self.verdicts]
        return "\n".join(lines) or "No gates were asked for (evaluate.gates)."

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def check_gates(run: Run | Path, gates: Mapping[str, Mapping[str, float]] | None = None) -> Gates:
    """Judge a run's gates from its files, and write metrics/gates.json and run.json.

    Args:
        run: an open run, or the folder of one; run.json of a run that another process has open is left alone.
        gates: name -> limits; None: `evaluate.gates` of the run's settings, and no-regression where evaluate.regression is set.

    Raises RunError when the folder holds no run.
    """
    opened = run if isinstance(run, Run) else Run(run, read_json(run / "run.json"))
    path, record = opened.path, read_json(opened.path / "run.json")
    wanted = find_wanted(record) if gates is None else gates
    verdicts = [judge(name, path, record, {**GATES[name], **limits}) for name, limits in wanted.items()]
    found = Gates(verdicts)
    if verdicts:
        write_json(path / "metrics" / "gates.json", {"held": found.held, "gates": [asdict(v) for v in verdicts]})
        if opened is run or record.get("state") != "running":
            mended = gates is None and found.held and record.get("state") == STOPPED
            state = {"state": DONE, "error": None} if mended else {}
            opened.update(gates={verdict.gate: verdict.verdict for verdict in verdicts}, **state)
    return found


def find_wanted(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the gates that a run's settings ask for, with their limits."""
    settings = record.get("settings", {})
    wanted = dict(read_setting(settings, "evaluate.gates") or {})
    if read_setting(settings, "evaluate.regression"):
        wanted.setdefault("no-regression", {})
    return wanted


def read_setting(settings: Mapping[str, Any], name: str) -> Any:
    """Return a setting's value as run.json has it; an empty mapping is left out there."""
    return settings.get(name, {}).get("value")


def judge(name: str, path: Path, record: Mapping[str, Any], limits: Mapping[str, float]) -> Verdict:
    """Judge one gate; a file that is missing or broken is a verdict and no error."""
    try:
        return JUDGES[name](path, record, limits)
    except (RunError, DataError, KeyError, TypeError) as error:
        reason = f"a file of the run lacks {error}" if isinstance(error, KeyError) else str(error)
        return Verdict(name, FAILED, reason)


def judge_baseline(path: Path, record: Mapping[str, Any], limits: Mapping[str, float]) -> Verdict:
    """The base was scored, and on the rows that the tuned model was scored on."""
    name = "baseline-established"
    if not (path / FILES["base"]).is_file():
        return Verdict(name, NOT_RUN, f"{FILES['base']} does not exist: score the base before training.")
    before = read_scores(path / FILES["base"])
    numbers = describe(before)
    if (path / FILES["score"]).is_file():
        compare_scores(before, read_scores(path / FILES["score"]))
    return Verdict(
        name, PASSED, f"{before.metric} of the base is {before.score:.4g} on {len(before.rows)} rows.", numbers
    )


def judge_performance(path: Path, record: Mapping[str, Any], limits: Mapping[str, float]) -> Verdict:
    """Better than the base by more than the margin and than chance; the loss fell and stayed down; nothing broke."""
    name = "model-performance"
    missing = [file for file in FILES.values() if not (path / file).is_file()]
    if missing:
        return Verdict(name, NOT_RUN, f"{', '.join(missing)}: missing, so there is nothing to compare.")
    found = compare_scores(read_scores(path / FILES["base"]), read_scores(path / FILES["score"]))
    change, margin = found.change, limits["margin"]
    low, high = change.gain_bounds
    course = judge_losses(read_json(path / FILES["stats"]))
    numbers = {
        "metric": change.metric.name,
        "before": change.before,
        "after": change.after,
        "gain": change.gain,
        "gain_low": low,
        "gain_high": high,
        "margin": margin,
        "rows": len(found.after.rows),
        "p": change.p,
        **course.numbers,
    }
    problems = list(course.problems)
    if not change.gain > margin and not (margin and change.gain == margin):
        problems.insert(0, f"the gain is {change.gain:+.4g}, and {margin:g} is asked for")
    if not low > 0:
        problems.insert(0, f"the gain's 95 % interval, {low:+.4g} to {high:+.4g}, does not exclude zero")
    if record.get("error") and record.get("state") != STOPPED:
        problems.append(f"the run ended with an error: {record['error']}")
    words = f"{change.metric.name} {change.before:.4g} -> {change.after:.4g}, gain {change.gain:+.4g} (95 %: {low:+.4g} to {high:+.4g}); {course.summary}"
    return Verdict(name, FAILED if problems else PASSED, "; ".join(problems) or words, numbers)


def judge_regression(path: Path, record: Mapping[str, Any], limits: Mapping[str, float]) -> Verdict:
    """A second, general set lost no more than evaluate.regression allows."""
    name, file = "no-regression", path / "metrics" / "regression.json"
    if not file.is_file():
        return Verdict(name, NOT_RUN, "metrics/regression.json does not exist: check_regression was not called.")
    found = read_json(file)
    loss = -found["difference"] if found["higher_is_better"] else found["difference"]
    words = (
        f"{found['metric']} on {found['rows']} rows of {found['path']}: {found['before']:.4g} -> {found['after']:.4g}, "
        f"change {found['difference']:+.4g} (95 %: {found['low']:+.4g} to {found['high']:+.4g}), may lose {found['drop']:g}"
    )
    return Verdict(name, PASSED if loss <= found["drop"] else FAILED, words, found)


def judge_quantization(path: Path, record: Mapping[str, Any], limits: Mapping[str, float]) -> Verdict:
    """The GGUF was verified against the merged model, scores like it, and is as large as was calculated."""
    name, places = "quantization-verified", ("models/unverified/quantized", "models/quantized")
    folder = next((path / place for place in places if (path / place / "verify.json").is_file()), None)
    if folder is None:  # one file that did not verify counts for all, so its place is looked at first
        return Verdict(name, NOT_RUN, "models/quantized/verify.json does not exist: no GGUF was exported and verified.")
    found, drop = read_json(folder / "verify.json"), limits["drop"]
    problems = [
        f"{check['name']} is {check['value']}, bound {check['bound']}" for check in found["checks"] if not check["held"]
    ]
    if not found["verified"] and not problems:
        problems.append("verify.json says that the file was not verified")
    if folder.parent.name == "unverified":
        problems.append(f"what was exported stands in {places[0]}")
    size, expected = found["file_bytes"], found["expected_bytes"]
    if abs(size - expected) > SIZE * expected:
        problems.append(f"the file has {size} bytes, and {expected} were expected")
    sizes = [file.stat().st_size for file in folder.glob("*.gguf")]
    if size not in (*sizes, sum(sizes)):
        problems.append(f"no GGUF here has the {size} bytes that were verified")
    score, merged = found.get("score"), found.get("merged_score")
    numbers = {"score": score, "merged_score": merged, "drop": drop, "file_bytes": size, "expected_bytes": expected}
    if score is None or merged is None:
        words = f"{len(found['checks'])} checks held; its answers were not scored"
    else:
        words = f"score {score:.4g}, merged {merged:.4g}"
        sign = (
            1 if found.get("higher_is_better", True) else -1
        )  # a share of right answers, unless the file says otherwise
        loss = sign * (merged - score)
        if loss > drop * abs(merged):
            problems.append(f"{words}: more than {drop:.0%} lost")
    return Verdict(name, FAILED if problems else PASSED, "; ".join(problems) or f"{words}; {size} bytes", numbers)


def describe(scores: Scores) -> dict[str, Any]:
    """Return a score's figures."""
    return {
        "metric": scores.metric,
        "score": scores.score,
        "rows": len(scores.rows),
        **scores.metrics.get(scores.metric, {}),
    }


JUDGES: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, float]], Verdict]] = {
    "baseline-established": judge_baseline,
    "model-performance": judge_performance,
    "no-regression": judge_regression,
    "quantization-verified": judge_quantization,
}
