"""The base's scores: with the adapter off, computed once, found again by their key alone; and a second set that may not drop."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import (
    add_adapter,
    check_gates,
    check_regression,
    evaluate_model,
    load_config,
    load_general,
    load_model,
    score_baseline,
    start_run,
)
from forgekit.errors import ConfigError
from forgekit.evaluate import answers, baseline
from forgekit.files import read_json

from .test_answers import make_rows


@pytest.fixture
def tuned(make_config: Any) -> Any:
    """(model with an adapter that changes its answers, processor, config, the base's own scores)."""
    import torch

    config = make_config({"evaluate.rows": 4, "evaluate.per_device_eval_batch_size": 4, "evaluate.max_new_tokens": 3})
    model, processor = load_model(config)
    base = evaluate_model(model, processor, make_rows(4), config)
    model = add_adapter(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model, processor, config, base


def test_the_base_is_scored_with_the_adapter_off_and_left_on(tuned: Any) -> None:
    model, processor, config, base = tuned
    run = start_run(config, "first")
    before = score_baseline(model, processor, make_rows(4), config, run)
    assert before.loss == pytest.approx(base.loss, abs=1e-6)
    assert [row["prediction"] for row in before.rows] == [row["prediction"] for row in base.rows]
    assert (before.key, before.metrics.keys()) == (base.key, base.metrics.keys())
    after = evaluate_model(model, processor, make_rows(4), config)
    assert abs(after.loss - base.loss) > 1e-2 and after.key != base.key
    assert read_json(run.path / "metrics" / "baseline.json")["key"] == base.key


CHANGES: dict[str, Any] = {
    "nothing": (4, "x", {}),
    "fewer rows": (3, "x", {}),
    "other answers": (4, "y", {}),
    "another metric": (4, "x", {"evaluate.metric": "wer"}),
    "longer answers": (4, "x", {"evaluate.max_new_tokens": 4}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_runs_baseline_is_taken_when_its_key_is_the_same(
    change: str, tuned: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, processor, config, _ = tuned
    first = score_baseline(model, processor, make_rows(4), config, start_run(config, "first"))
    number, answer, settings = CHANGES[change]
    calls: list[int] = []
    real = answers.answer_batch
    monkeypatch.setattr(answers, "answer_batch", lambda *args: calls.append(1) or real(*args))
    second = start_run(config, "second")
    capsys.readouterr()
    found = score_baseline(model, processor, make_rows(number, answer), config.change(settings), second)
    printed = capsys.readouterr().out
    assert bool(calls) is (change != "nothing")
    assert ("The base was scored on these rows before: " in printed) is (change == "nothing")
    if change == "nothing":
        assert found == first
        copy = read_json(second.path / "metrics" / "baseline.json")
        assert copy["found_in"] == "first/metrics/baseline.json" and copy["rows"] == first.rows
        calls.clear()
        assert score_baseline(model, processor, make_rows(4), config, second) == first and not calls


def test_a_broken_file_beside_is_passed_over(tuned: Any) -> None:
    model, processor, config, _ = tuned
    run = start_run(config, "second")
    for name, text in (("broken", "{"), ("list", "[]")):
        file = run.path.parent / name / "metrics" / "baseline.json"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    assert baseline.find_scores(run.path / "metrics" / "baseline.json", {"model": "m"}) is None


def test_another_base_is_not_taken(tuned: Any) -> None:
    model, processor, config, _ = tuned
    first = score_baseline(model, processor, make_rows(4), config, start_run(config, "first"))
    next(p for n, p in model.named_parameters() if n.endswith("norm.weight")).data.mul_(1.1)
    assert score_baseline(model, processor, make_rows(4), config, start_run(config, "second")).key != first.key


# ---- a second, general set -------------------------------------------------------------------------------------------


@pytest.fixture
def general(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "general.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": f"{i}"} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(file), "drop": 0.5, "metric": "loss", "rows": 5}


def test_base_and_tuned_model_are_compared_on_the_general_set(
    tuned: Any, general: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    model, processor, config, _ = tuned
    config = config.change({"evaluate.regression": general, "data.validation": 5, "data.format": "alpaca"})
    config = config.change({"train.eval_steps": 2, "train.early_stopping": 3, "data.test": 2})  # of the task alone
    run = start_run(config, "first")
    capsys.readouterr()
    rows = load_general(config, processor)
    assert capsys.readouterr().out.startswith(f"General set {general['path']}: ")
    found = check_regression(model, processor, rows, config, run)
    saved = read_json(run.path / "metrics" / "regression.json")
    assert (saved["metric"], saved["rows"], saved["drop"], saved["higher_is_better"]) == ("loss", 5, 0.5, False)
    assert saved["difference"] == pytest.approx(found.after.loss - found.before.loss) and saved["difference"] != 0
    with model.disable_adapter():
        settings = config.change({"evaluate.metric": "loss", "evaluate.rows": 5})
        assert found.before.loss == pytest.approx(evaluate_model(model, processor, rows, settings).loss, abs=1e-6)
    (verdict,) = check_gates(run).verdicts
    assert (verdict.gate, verdict.held) == ("no-regression", saved["difference"] <= 0.5)


def test_a_model_without_an_adapter_needs_the_base_scored_before(tuned: Any, general: dict[str, Any]) -> None:
    model, processor, config, _ = tuned
    config = config.change({"evaluate.regression": general})
    run, rows = start_run(config, "first"), load_general(config, processor)
    plain, name = model.unload(), "regression-baseline.json"
    with pytest.raises(ConfigError, match="load_in: full has overwritten it. Call score_baseline"):
        check_regression(plain, processor, rows, config, run)
    settings = config.change({"evaluate.metric": "loss", "evaluate.rows": 5})
    before = score_baseline(plain, processor, rows, settings, run, name=name)
    next(p for n, p in plain.named_parameters() if n.endswith("language_model.norm.weight")).data.mul_(1.5)
    found = check_regression(plain, processor, rows, config, run)
    assert found.before.loss == before.loss != found.after.loss


def test_without_the_setting_there_is_nothing_to_compare(make_config: Any) -> None:
    with pytest.raises(ConfigError, match="evaluate.regression is not set"):
        baseline.check_regression(None, None, None, make_config(), None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"evaluate.metric": "werr"}, "nearest to 'werr': wer"),
        ({"evaluate.metric": ["wer", "wer"]}, "each once"),
        ({"evaluate.metric": "regex"}, "regex needs evaluate.pattern"),
        ({"evaluate.metric": "regex", "evaluate.pattern": "("}, "is no regular expression"),
        ({"evaluate.gates": ["model-perfomance"]}, "a list of baseline-established"),
        ({"evaluate.gates": {"model-performance": {"margn": 1}}}, "a mapping with limits"),
        ({"evaluate.gates": "no-regression"}, "which needs evaluate.regression"),
        ({"evaluate.regression": {"path": "x"}}, "a mapping such as"),
        ({"evaluate.regression": {"path": "x", "drop": -1}}, "a mapping such as"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, settings)


def test_gates_and_metrics_take_short_forms() -> None:
    evaluate = load_config(None, {"evaluate.metric": "wer", "evaluate.gates": {"model-performance": 0.2}}).evaluate
    assert (evaluate.metric, evaluate.gates) == (("wer",), {"model-performance": {"margin": 0.2}})
    evaluate = load_config(None, {"evaluate.gates": ["quantization-verified"]}).evaluate
    assert evaluate.gates == {"quantization-verified": {"drop": 0.05}}
