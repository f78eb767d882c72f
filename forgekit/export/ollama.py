"""A Modelfile, so that Ollama runs the GGUF file with the template, the stop token and the sampling that belong to it.

The template below is Gemma's chat template in the language of Go's text/template. It writes no <bos>, because the
tokenizer in the file adds it, and puts the system's text into the first user turn, because Gemma has no system role.
`write_as_ollama` says the same in Python, so that an export can be compared without Go; a test holds the two equal.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.collate import TURN_END, get_tokenizer, render_chats
from ..data.messages import Messages, get_text, make_message
from ..errors import ExportError
from .card import TERMS
from .gguf import export_gguf
from .gguf_reference import list_chats
from .verdict import Verdict, at_most

if TYPE_CHECKING:
    from datasets import Dataset

TEMPLATE = """\
{{- $system := "" }}
{{- range $i, $turn := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "system" }}{{ $system = .Content }}
{{- else if eq .Role "user" }}<start_of_turn>user
{{ if $system }}{{ $system }}

{{ end }}{{ .Content }}<end_of_turn>
{{ $system = "" }}{{ if $last }}<start_of_turn>model
{{ end }}
{{- else }}<start_of_turn>model
{{ .Content }}{{ if not $last }}<end_of_turn>
{{ end }}
{{- end }}
{{- end }}"""
PREFERRED = ("Q8_0", "Q4_K_M", "F16", "BF16")  # which GGUF of a run is taken
MINUTES = 30  # `ollama create` reads and copies the whole file


def export_ollama(
    model: Any, processor: Any, config: Config, folder: Path, scores: dict[str, Any] | None = None
) -> Path:
    """Write a Modelfile for the run's GGUF file, or for one written beside it, and let Ollama take it in where it is installed.

    Raises ExportError for a model that llama.cpp cannot run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = find_gguf(folder) or export_gguf("Q8_0", model, processor, config, folder / "model-Q8_0.gguf")
    text = write_modelfile(os.path.relpath(file, folder), model, config)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    create_in_ollama(folder, name_model(config))
    return folder


def find_gguf(folder: Path) -> Path | None:
    """Return the run's GGUF file, the most useful kind first, or None."""
    places = [parent / "quantized" / f"model-{kind}.gguf" for parent in folder.parents[:2] for kind in PREFERRED]
    return next((place for place in places if place.is_file()), None)


def write_modelfile(file: str, model: Any, config: Config) -> str:
    """Return the text of a Modelfile.

    Args:
        file: the GGUF's path, relative to the Modelfile.
    """
    context = min(max(config.model.max_length, 4096), model.config.get_text_config().max_position_embeddings)
    parameters = {"stop": f'"{TURN_END}"', "num_ctx": context, "repeat_penalty": 1.0, **choose_sampling(model)}
    return "\n".join(
        [
            f"FROM ./{file}" if not file.startswith(".") else f"FROM {file}",
            f'TEMPLATE """{TEMPLATE}"""',
            *(f"PARAMETER {name} {value}" for name, value in parameters.items()),
            f'LICENSE """{TERMS}"""',
            "",
        ]
    )


def choose_sampling(model: Any) -> dict[str, float]:
    """Return how the checkpoint's generation_config.json draws tokens: 1.0, 64 and 0.95 in Gemma 3n; without it greedily."""
    settings = model.generation_config
    if not settings.do_sample:
        return {"temperature": 0}
    found = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p}  # fmt: skip
    return {"temperature": 1.0, "min_p": 0.0} | {name: value for name, value in found.items() if value is not None}


def name_model(config: Config) -> str:
    """Return a name that Ollama takes."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(config.model.id).name.lower()).strip("-") + "-forgekit"


def create_in_ollama(folder: Path, name: str) -> bool:
    """Run `ollama create` where ollama is installed, and say what to do where it is not or fails. Returns whether it ran."""
    command = ["ollama", "create", name, "-f", "Modelfile"]
    if shutil.which("ollama") is None:
        print(f"Ollama is not installed here; where it is: {' '.join(command)}, in {folder.name}")
        return False
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        print(f"{' '.join(command)} did not end within {MINUTES} minutes; run it again in {folder.name}")
        return False
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        print(f"{' '.join(command)} failed: {reason}. Start Ollama (ollama serve) and run it again in {folder.name}")
        return False
    print(f"Ollama has it: ollama run {name}")
    return True


def write_as_ollama(messages: Sequence[dict[str, str]]) -> str:
    """Return what TEMPLATE makes of turns {"role", "content"}; the model's turn is begun, or its last one left open."""
    written, system = "", ""
    for place, turn in enumerate(messages):
        last = place == len(messages) - 1
        if turn["role"] == "system":
            system = turn["content"]
        elif turn["role"] == "user":
            first = f"{system}\n\n" if system else ""
            written += f"<start_of_turn>user\n{first}{turn['content']}<end_of_turn>\n"
            written += "<start_of_turn>model\n" if last else ""
            system = ""
        else:
            written += f"<start_of_turn>model\n{turn['content']}" + ("" if last else "<end_of_turn>\n")
    return written


def read_modelfile(path: Path) -> dict[str, Any]:
    """Read a Modelfile: {"from", "template", "license", "parameters": {name: text}}. Raises ExportError without FROM or TEMPLATE."""
    text = path.read_text(encoding="utf-8")
    source = re.search(r"^FROM (.+)$", text, re.MULTILINE)
    blocks = dict(re.findall(r'^(TEMPLATE|LICENSE) """(.*?)"""$', text, re.MULTILINE | re.DOTALL))
    if not source or "TEMPLATE" not in blocks:
        raise ExportError(f"{path}: no FROM or no TEMPLATE in it.")
    parameters = dict(re.findall(r"^PARAMETER (\S+) (.+)$", text, re.MULTILINE))
    return {"from": source[1], "template": blocks["TEMPLATE"], "license": blocks.get("LICENSE", ""), "parameters": parameters}  # fmt: skip


def verify_ollama(model: Any, processor: Any, folder: Path, dataset: "Dataset | None", config: Config) -> Verdict:
    """Compare the Modelfile's template and stop token with the training template, on held-out rows and built-in ones.

    The GGUF that it names is verified under its own name in export.formats.
    """
    found = read_modelfile(folder / "Modelfile")
    chats = add_systems(list_chats(dataset or (), 25)[0])
    rendered = render_chats(chats, processor, answer=False)
    bos = get_tokenizer(processor).bos_token
    written = [bos + write_as_ollama([{"role": t["role"], "content": get_text(t).strip()} for t in chat[:-1]]) for chat in chats]  # fmt: skip
    file = folder / found["from"]
    size = file.stat().st_size if file.is_file() else 0
    return Verdict(
        (
            at_most("GGUF files that are missing", int(not size), 0),
            at_most("templates that are not the one below", int(found["template"] != TEMPLATE), 0),
            at_most(f"chats of {len(chats)} written otherwise", sum(map(str.__ne__, rendered, written)), 0),
            at_most("stop tokens that are missing", int(TURN_END not in found["parameters"].get("stop", "")), 0),
        ),
        size,
        size,
        rows=len(chats),
    )


def add_systems(chats: list[Messages]) -> list[Messages]:
    """Return the chats, and each once more with a system text and an earlier exchange in front."""
    system = make_message("system", "Answer briefly.")
    return [*chats, *([system, *before, *chat] for before, chat in zip(chats[1:] + chats[:1], chats, strict=True))]
