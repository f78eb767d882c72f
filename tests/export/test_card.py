"""The card of an export: what it is made of, how it scored, how to use it, and the terms that go with it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from forgekit import start_run
from forgekit.adapter.plan import plan_layers
from forgekit.export import card
from forgekit.export.card import update_gates, write_card, write_value
from forgekit.export.verdict import Verdict, at_least, at_most
from forgekit.files import write_json, write_text
from forgekit.run_folder import Run


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text below it."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "my-run" / "models" / "lora"


@pytest.mark.parametrize(("kind", "library"), [("adapter", "peft"), ("merged", "transformers")])
def test_front_matter_is_what_the_hub_reads(make_config: Any, folder: Path, kind: str, library: str) -> None:
    write_card(folder, make_config({"model.id": "unsloth/gemma-3n-E2B-it"}), kind)
    front, text = read_card(folder)
    assert front == {"base_model": "unsloth/gemma-3n-E2B-it", "library_name": library, "tags": ["forgekit"]}
    assert f"# my-run: {kind}" in text


def test_a_base_that_is_a_folder_is_not_named_to_the_hub(make_config: Any, folder: Path) -> None:
    write_card(folder, make_config(), "adapter")
    assert "base_model" not in read_card(folder)[0]


def test_scores_stand_in_a_table_and_their_lack_is_said(make_config: Any, folder: Path) -> None:
    write_card(folder, make_config(), "adapter", {"exact match before": 0.01, "exact match after": 0.93})
    assert "| exact match before | 0.01 |\n| exact match after | 0.93 |" in read_card(folder)[1]
    write_card(folder, make_config(), "adapter")
    assert "Not scored." in read_card(folder)[1] and "0.93" not in read_card(folder)[1]


def test_changed_settings_stand_with_their_origin_and_defaults_do_not(make_config: Any, folder: Path) -> None:
    write_card(folder, make_config({"adapter.r": 24}), "adapter")
    text = read_card(folder)[1]
    assert "| adapter.r | 24 | notebook |" in text
    assert "adapter.use_dora" not in text


def test_use_and_terms_and_versions_are_there(make_config: Any, folder: Path) -> None:
    import transformers

    write_card(folder, make_config(), "adapter")
    text = read_card(folder)[1]
    assert 'load_export("lora")' in text
    assert "Gemma Terms of Use found at https://ai.google.dev/gemma/terms" in text
    assert f"transformers {transformers.__version__}" in text


def test_a_card_without_the_terms_turns_that_check_red(
    make_config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "TERMS", "")
    with pytest.raises(AssertionError):
        test_use_and_terms_and_versions_are_there(make_config, folder)


@pytest.fixture
def run(make_config: Any) -> Run:
    """A run as it stands behind training and scoring."""
    config = make_config()
    run = start_run(config, "my-run")
    rows = [{"question": "1?", "reference": "2", "prediction": "2", "right": True}]
    for name, score in (("baseline", 0.0), ("scores", 0.93)):
        metrics = {"exact_match": {"score": score, "low": max(0.0, score - 0.06), "high": score + 0.04}}
        saved = {"exact_match": score, "loss": 2.5 - 2 * score, "tokens": 3, "seconds": 1.0, "rows": rows}
        write_json(run.path / "metrics" / f"{name}.json", {**saved, "metric": "exact_match", "metrics": metrics})
    write_text(run.path / "plan.json", plan_layers(config).to_json())
    run.update(training={"steps": 60, "seconds": 71.4, "peak_gpu_memory_bytes": 3 * 2**30})
    return run


def test_scores_stand_with_their_intervals(make_config: Any, folder: Path, run: Run) -> None:
    write_card(folder, make_config(), "merged", run=run)
    text = read_card(folder)[1]
    assert "| exact match | 0.000 (0.000 to 0.040) | 0.930 (0.870 to 0.970) |" in text
    assert "| loss, nats a token | 2.500 | 0.640 |" in text and "| rows | 1 | 1 |" in text


def test_scores_without_intervals_do_too(make_config: Any, folder: Path, run: Run) -> None:
    write_json(run.path / "metrics/scores.json", {"exact_match": 0.5, "loss": 1.0, "tokens": 3, "rows": [1, 2]})
    write_card(folder, make_config(), "merged", run=run)
    assert "| exact match | 0.000 (0.000 to 0.040) | 0.500 |" in read_card(folder)[1]


def test_gates_stand_with_verdict_and_reason(make_config: Any, folder: Path, run: Run) -> None:
    gates = [{"gate": "model-performance", "verdict": "failed", "reason": "0.01 | 0.02", "numbers": {}}]
    write_json(run.path / "metrics/gates.json", {"held": False, "gates": gates})
    write_card(folder, make_config(), "merged", run=run)
    assert "| model-performance | failed | 0.01 \\| 0.02 |" in read_card(folder)[1]


def test_gates_judged_later_take_the_place_of_earlier_ones(make_config: Any, folder: Path, run: Run) -> None:
    write_text(folder / "README.md", "# model\n\n## Terms\n\nThese.\n")  # as that of the GGUF files, without scores
    verdicts = ("not run", "passed")
    for verdict in verdicts:
        gates = [{"gate": "quantization-verified", "verdict": verdict, "reason": "score 1", "numbers": {}}]
        write_json(run.path / "metrics/gates.json", {"held": True, "gates": gates})
        update_gates(folder / "README.md", run)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count("## Gates") == 1 and "not run" not in text
    assert "| quantization-verified | passed | score 1 |\n\n## Terms\n\nThese.\n" in text
    write_card(folder, make_config(), "merged", run=run)
    whole = (folder / "README.md").read_text(encoding="utf-8")
    update_gates(folder / "README.md", run)
    assert (folder / "README.md").read_text(encoding="utf-8") == whole


def test_plan_training_hardware_and_verification_are_there(make_config: Any, folder: Path, run: Run) -> None:
    verdict = Verdict((at_most("largest difference", 2e-7, 1e-5), at_least("share", 0.5, 0.9)), 1, 1, 6, 200)
    write_card(folder, make_config(), "merged", run=run, verdict=verdict)
    text = read_card(folder)[1]
    assert "| language | attention | 0-3 | 12 | LoRA | 8 |" in text
    assert "60 optimiser steps in 71 seconds, 3.0 GiB of GPU memory at the peak." in text and "CPU, " in text
    assert "on 200 learned tokens of 6 rows: NOT VERIFIED." in text
    assert "| largest difference | 2e-07 | 1e-05 | yes |" in text and "| share | 0.5 | 0.9 | NO |" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (("adapter", "merged"), "adapter, merged"),
        ({"mlp": 4}, "mlp: 4"),
        ({"a": {}, "b": {"margin": 0.2}}, "a, b: {margin: 0.2}"),
        ({}, "none"),
        ("/data/me/rows.jsonl", "rows.jsonl"),
        ("two\nlines", "two lines"),
        (0.0002, "0.0002"),
    ],
)
def test_values_stand_as_in_a_recipe(value: Any, text: str) -> None:
    assert write_value(value) == text


def test_no_python_and_no_path_of_this_machine(make_config: Any, folder: Path, run: Run, tmp_path: Path) -> None:
    config = make_config({"adapter.rank_pattern": {"mlp": 4}, "export.formats": ["adapter", "merged"]})
    write_card(folder, config, "merged", run=run)
    text = (folder / "README.md").read_text(encoding="utf-8").partition("## Use")[0]
    for trace in ("None", "True", "False", "('", "{'", "[]", "()", "<class", str(tmp_path), "/tmp/"):
        assert trace not in text, trace
    assert "| adapter.rank_pattern | mlp: 4 | notebook |" in text


def test_its_lines_on_use_run(make_learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones without forgekit, in the folder that holds the exports, with the base beside them by its own name."""
    from forgekit import export_model

    model, processor, config = make_learned({"export.formats": ["adapter", "merged"]})
    written = export_model(model, processor, config, start_run(config, "use"))
    monkeypatch.chdir(written["adapter"].parent)
    Path(Path(config.model.id).name).symlink_to(config.model.id)
    for folder in written.values():
        block = (folder / "README.md").read_text(encoding="utf-8").partition("Without forgekit:\n\n```python\n")[2]
        names: dict[str, Any] = {}
        exec(block.partition("```")[0], names)
        assert names["model"].num_parameters() > 10**6 and len(names["processor"].tokenizer) > 500
