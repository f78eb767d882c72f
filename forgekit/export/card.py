"""The model card (README.md) of an export: base, data, plan, settings, scores, gates, hardware, how to use it, its terms."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..adapter.plan import LayerPlan, describe_rows, group_modules, read_plan
from ..config import Config
from ..files import read_json, write_text
from ..hardware import detect_hardware
from ..model.load import BUILT_IN, find_model
from ..model.shapes import read_config
from ..run_folder import Run, find_versions
from .verdict import Verdict

TERMS = """\
Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms. Where the base holds
Gemma weights, this adapter or merged model is a Model Derivative under those terms: they, and the Gemma Prohibited Use Policy
at https://ai.google.dev/gemma/prohibited_use_policy, go with every copy. The terms of any other base go with it likewise."""
USE = """\
```python
from forgekit import generate_answer, load_export

model, processor = load_export("{folder}")
generate_answer(model, processor, "...")
```

Without forgekit:

```python
{plain}
```"""
PLAIN_ADAPTER = """\
from peft import PeftModel
from transformers import AutoProcessor, {kind}

model = PeftModel.from_pretrained({kind}.from_pretrained("{base}"), "{folder}")
processor = AutoProcessor.from_pretrained("{folder}")"""
PLAIN_WHOLE = """\
from transformers import AutoProcessor, {kind}

model = {kind}.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")"""


def write_card(
    folder: Path,
    config: Config,
    kind: str,
    scores: dict[str, Any] | None = None,
    run: Run | None = None,
    verdict: Verdict | None = None,
    place: Path | None = None,
) -> None:
    """Write README.md with the front matter that the Hub reads.

    Args:
        kind: the format's name, for instance adapter.
        scores: figures beside those in the run's folder, name -> value.
        run: its metrics, plan and training figures go into the card.
        verdict: what the verification found.
        place: where the export will stand, when it is written elsewhere first.
    """
    place = place or folder
    base = write_value(config.model.id)
    text = [
        "---",
        *([f"base_model: {config.model.id}"] if not Path(find_model(config)).is_dir() else []),
        f"library_name: {'peft' if kind == 'adapter' else 'transformers'}",
        "tags: [forgekit]",
        "---",
        f"# {place.parent.parent.name}: {kind}",
        "",
        f"Fine-tuned from {'a slice of ' if config.model.slice else ''}`{base}` with forgekit, on {describe_data(config)}.",
        *write_section("Scores on held-out rows", describe_scores(run, scores)),
        *write_section("Gates", describe_gates(run)),
        *write_section("What learned", describe_plan(run)),
        *write_section("Verification", describe_verdict(verdict)),
        *write_section("Settings that differ from the defaults", describe_settings(config)),
        *write_section("Made with", describe_origin(run)),
        *write_section("Use", [write_use(place.name, config, kind, base)]),
        *write_section("Terms", [TERMS]),
        "",
    ]
    write_text(folder / "README.md", "\n".join(text))


def write_section(title: str, lines: list[str]) -> list[str]:
    """Return a heading and its lines; nothing without lines."""
    return ["", f"## {title}", "", *lines] if lines else []


def write_table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return a Markdown table; a bar in a value is escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([write_value(value).replace("|", "\\|") for value in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def write_value(value: Any) -> str:
    """Return a setting as a recipe would have it, in one line; of a file on this machine only its name."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(write_item(key, item) for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(write_value, value)) or "none"
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return " ".join(str(value).split())


def write_item(key: str, item: Any) -> str:
    """Return one item of a mapping; a name alone when nothing stands behind it."""
    if isinstance(item, Mapping):
        return f"{key}: {{{write_value(item)}}}" if item else key
    return f"{key}: {write_value(item)}"


def describe_data(config: Config) -> str:
    """Return where the rows came from."""
    data = config.data
    return f"rows of `{write_value(data.path or data.train)}`" if data.path or data.train else "rows given in memory"


def describe_settings(config: Config) -> list[str]:
    """Return every setting that is not the default's, with where its value came from."""
    rows = [(name, row["value"], row["from"]) for name, row in config.table().iterrows()]
    return write_table(("setting", "value", "from"), rows)


def describe_scores(run: Run | None, scores: dict[str, Any] | None) -> list[str]:
    """Return both scores with their intervals, from the run's metrics, and the figures that were given."""
    before, after = (read_metrics(run, name) for name in ("baseline", "scores"))
    measured = write_table(
        ("metric", "before", "after"),
        [(name, before.get(name, "not scored"), after.get(name, "not scored")) for name in {**before, **after}],
    )
    given = write_table(("", ""), (scores or {}).items())
    if before or after:
        return [*measured, *(["", *given] if scores else [])]
    return given if scores else ["Not scored."]


def read_metrics(run: Run | None, name: str) -> dict[str, str]:
    """Return metric -> score in words, with its 95 % interval where one was computed."""
    file = run.path / "metrics" / f"{name}.json" if run else None
    if file is None or not file.is_file():
        return {}
    saved = read_json(file)
    metrics = saved.get("metrics") or {"exact_match": {"score": saved["exact_match"]}}
    found = {metric.replace("_", " "): write_score(values) for metric, values in metrics.items()}
    found.setdefault("loss, nats a token", f"{saved['loss']:.3f}")
    return found | {"rows": str(len(saved["rows"]))}


def write_score(values: dict[str, Any]) -> str:
    """Return a score with its interval: 0.93 (0.87 to 0.97)."""
    low, high = values.get("low"), values.get("high")
    return f"{values['score']:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")


def describe_gates(run: Run | None) -> list[str]:
    """Return each gate's verdict with its reason, from metrics/gates.json."""
    file = run.path / "metrics" / "gates.json" if run else None
    if file is None or not file.is_file():
        return []
    rows = [(gate["gate"], gate["verdict"], gate["reason"]) for gate in read_json(file)["gates"]]
    return write_table(("gate", "verdict", "reason"), rows)


def update_gates(card: Path, run: Run) -> None:
    """Put the gates' verdicts as they stand now into a card, behind its scores; one of them waits for the exports."""
    parts = re.split(r"^(?=## )", card.read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = [part for part in parts if not part.startswith("## Gates\n")]
    place = max(i for i, part in enumerate(parts) if i == 0 or part.startswith("## Scores"))
    parts.insert(place + 1, "\n".join([*write_section("Gates", describe_gates(run))[1:], "", ""]))
    write_text(card, "".join(parts))


def describe_plan(run: Run | None) -> list[str]:
    """Return what learned, a row for each group of modules, from plan.json."""
    file = run.path / "plan.json" if run else None
    if file is None or not file.is_file():
        return []
    plan: LayerPlan = read_plan(file)
    rows = [describe_rows(key, modules) for key, modules in group_modules(plan.modules).items()]
    head = ("tower", "group", "layers", "modules", "learns by", "r", "parameters", "MB")
    share = plan.parameters / plan.total
    return [*write_table(head, rows), "", f"{plan.parameters:,} of {plan.total:,} parameters learned ({share:.2%})."]


def describe_verdict(verdict: Verdict | None) -> list[str]:
    """Return each check with its figure and bound."""
    if verdict is None:
        return []
    rows = [(c.name, f"{c.value:.3g}", f"{c.bound:g}", "yes" if c.held else "NO") for c in verdict.checks]
    head = "Read back and compared with the trained model in memory"
    state = "verified" if verdict.verified else "NOT VERIFIED"
    where = f" on {verdict.tokens} learned tokens of {verdict.rows} rows" if verdict.rows else ""
    return [f"{head}{where}: {state}.", "", *write_table(("check", "value", "bound", "held"), rows)]


def describe_origin(run: Run | None) -> list[str]:
    """Return training figures, hardware and versions."""
    versions = run.record.get("versions") if run else None
    made = ", ".join(f"{name} {version}" for name, version in (versions or find_versions()).items() if version)
    lines = [f"{detect_hardware()}.", "", f"{made}."]
    training = (run.record.get("training") if run else None) or {}
    if training.get("steps"):
        peak = training.get("peak_gpu_memory_bytes")
        memory = f", {peak / 2**30:.1f} GiB of GPU memory at the peak" if peak else ""
        lines[:0] = [f"{training['steps']} optimiser steps in {training['seconds']:,.0f} seconds{memory}.", ""]
    return lines


def write_use(folder: str, config: Config, kind: str, base: str) -> str:
    """Return how to load the export, with forgekit and without."""
    if kind not in ("adapter", "merged"):
        return f"See the files in {folder}."
    architecture = (read_config(config)[0].architectures or ["AutoModelForCausalLM"])[0]
    if kind == "adapter" and (config.model.id in BUILT_IN or config.model.slice):  # bases that forgekit alone can make
        return USE.partition("\n\nWithout")[0].format(folder=folder)
    plain = (PLAIN_ADAPTER if kind == "adapter" else PLAIN_WHOLE).format(kind=architecture, base=base, folder=folder)
    return USE.format(folder=folder, plain=plain)
