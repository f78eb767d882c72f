"""What evaluate.metric, evaluate.gates and evaluate.regression may say, and the one form that each is brought to.

metric: wer                                    ("wer",)
gates: [model-performance]                     {"model-performance": {"margin": 0.0}}
gates: {model-performance: 0.2}                {"model-performance": {"margin": 0.2}}
"""

import difflib
import re
from typing import Any

METRICS = (  # evaluate/metrics.py holds how each is computed
    "exact_match", "normalized_match", "token_f1", "contains", "regex", "json_equal", "cer", "wer", "bleu", "chrf",
    "rouge_l", "choice", "loss", "perplexity",
)  # fmt: skip
GATES: dict[str, dict[str, float]] = {  # name -> its limits; evaluate/gates.py says what they mean
    "baseline-established": {},
    "model-performance": {"margin": 0.0},
    "no-regression": {},
    "quantization-verified": {"drop": 0.05},
}
REGRESSION = ("path", "drop", "metric", "rows")


def check_metrics(value: Any) -> Any:
    """Return the names of metrics as a tuple. One name or a list; a metric of the user's is written module:function."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    wrong = [name for name in names if name not in METRICS and not re.fullmatch(r"[\w.]+:\w+", str(name))]
    if not names or wrong or len(set(names)) < len(names):
        near = [difflib.get_close_matches(str(name), METRICS, 1) for name in wrong]
        hint = f" (nearest to {wrong[0]!r}: {near[0][0]})" if near and near[0] else ""
        raise ValueError(f"names of metrics, each once, or module:function of your own{hint}")
    return names


def check_gates(value: Any) -> Any:
    """Return {gate: {limit: number}}, from one name, a list of names, or a mapping with limits."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        names = dict.fromkeys(names)
    if isinstance(names, dict) and all(name in GATES for name in names):
        found = {name: read_limits(name, limits) for name, limits in names.items()}
        if None not in found.values():
            return found
    raise ValueError(
        f"a list of {', '.join(GATES)}, or a mapping with limits such as {{model-performance: {{margin: 0.2}}}}"
    )


def read_limits(name: str, limits: Any) -> dict[str, float] | None:
    """Return a gate's limits over its defaults, or None when they are none of its own; a bare number is its only limit."""
    known = GATES[name]
    if isinstance(limits, int | float) and not isinstance(limits, bool) and len(known) == 1:
        limits = dict.fromkeys(known, limits)
    limits = limits or {}
    right = isinstance(limits, dict) and limits.keys() <= known.keys()
    right = right and all(isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in limits.values())
    return {**known, **{key: float(value) for key, value in limits.items()}} if right else None


def check_regression(value: Any) -> Any:
    """Return {path, drop, metric?, rows?}, or {} for no such check."""
    if not value:
        return {}
    if isinstance(value, dict) and {"path", "drop"} <= value.keys() <= set(REGRESSION):
        drop, rows, metric = value["drop"], value.get("rows"), value.get("metric")
        numbers = isinstance(drop, int | float) and not isinstance(drop, bool) and drop >= 0
        whole = rows is None or (isinstance(rows, int) and not isinstance(rows, bool) and rows >= 1)
        if isinstance(value["path"], str) and numbers and whole and (metric is None or isinstance(metric, str)):
            return value | ({"metric": check_metrics(metric)[0]} if metric else {})
    raise ValueError(
        "a mapping such as {path: general.jsonl, drop: 0.02}, with metric and rows if they are others than evaluate's"
    )
