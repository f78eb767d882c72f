"""The model card (README.md) of an export: base, settings, scores, how to use it, and the terms that apply."""

from pathlib import Path
from typing import Any

from ..config import Config
from ..model.load import find_model
from ..run_folder import find_versions, write_text

TERMS = """\
Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms. Where the base holds
Gemma weights, this adapter or merged model is a Model Derivative under those terms: they, and the Gemma Prohibited Use Policy
at https://ai.google.dev/gemma/prohibited_use_policy, go with every copy. The terms of any other base go with it likewise."""
USE = """\
```python
from forgekit import generate_answer, load_export

model, processor = load_export("{folder}")
generate_answer(model, processor, "...")
```"""


def write_card(folder: Path, config: Config, kind: str, scores: dict[str, Any] | None = None) -> None:
    """Write README.md with the front matter that the Hub reads."""
    settings = config.table().drop(columns="meaning")
    lines = [
        "| setting | value | from |",
        "|---|---|---|",
        *(f"| {name} | {row['value']} | {row['from']} |" for name, row in settings.iterrows()),
    ]
    scored = [f"| {name} | {value} |" for name, value in (scores or {}).items()]
    versions = ", ".join(f"{name} {version}" for name, version in find_versions().items() if version)
    on_hub = not Path(find_model(config)).is_dir()
    text = [
        "---",
        *([f"base_model: {config.model.id}"] if on_hub else []),
        f"library_name: {'peft' if kind == 'adapter' else 'transformers'}",
        "tags: [forgekit]",
        "---",
        f"# {folder.parent.parent.name}: {kind}",
        "",
        f"Fine-tuned from `{config.model.id}` with forgekit.",
        "",
        "## Scores on held-out rows",
        "",
        *(["| | |", "|---|---|", *scored] if scored else ["Not scored."]),
        "",
        "## Settings that differ from the defaults",
        "",
        *lines,
        "",
        f"Made with {versions}.",
        "",
        "## Use",
        "",
        USE.format(folder=folder.name),
        "",
        "## Terms",
        "",
        TERMS,
        "",
    ]
    write_text(folder / "README.md", "\n".join(text))
