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
from typing import Any

from ..config import Config
from ..data.collate import TURN_END, get_tokenizer, render_chats
from ..data.messages import Messages, get_text, make_message
from ..errors import ExportError
from ..files import write_text
from .card import TERMS
from .compare import Reference
from .gguf import export_gguf
from .gguf_reference import list_chats
from .gguf_verify import verify_gguf
from .verdict import Verdict, at_most

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
    """Write a Modelfile for the run's verified GGUF file and let Ollama take it in where it is installed.

    Without such a file one is written beside the Modelfile; Ollama does not take it in by itself, because it is verified
    only afterwards. Raises ExportError for a model that llama.cpp cannot run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = find_gguf(folder)
    own = file or export_gguf("Q8_0", model, processor, config, folder / "model-Q8_0.gguf")
    text = write_modelfile(os.path.relpath(own, folder), model, config)
    write_text(folder / "Modelfile", text)
    command = ["ollama", "create", name_model(config), "-f", "Modelfile"]
    if file and shutil.which("ollama"):
        create_in_ollama(folder, command)
    else:
        print(f"For Ollama, where the Modelfile stands: {' '.join(command)}")
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


def create_in_ollama(folder: Path, command: list[str]) -> bool:
    """Run `ollama create` and return whether it worked; a failure is told and stops nothing, because the files are whole."""
    said = " ".join(command)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60 * MINUTES)
    except (subprocess.TimeoutExpired, OSError) as error:
        print(f"{said} did not work: {error}. Run it again where the Modelfile stands.")
        return False
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        print(f"{said} failed: {reason}. Start Ollama (ollama serve) and run it again where the Modelfile stands.")
        return False
    print(f"Ollama has it: ollama run {command[2]}")
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


def verify_ollama(trained: Reference, folder: Path, config: Config) -> Verdict:
    """Compare the Modelfile's template and stop token with the training template, on held-out rows and built-in ones.

    A GGUF file of models/quantized was verified there; one beside the Modelfile is verified here.
    """
    found = read_modelfile(folder / "Modelfile")
    chats = add_systems(list_chats(trained.chats, 25)[0])
    rendered = render_chats(chats, trained.processor, answer=False)
    bos = get_tokenizer(trained.processor).bos_token
    written = [bos + write_as_ollama(trim_turns(chat[:-1])) for chat in chats]
    file = folder / found["from"]
    size = file.stat().st_size if file.is_file() else 0
    checks = (
        at_most("GGUF files that are missing", int(not size), 0),
        at_most("templates other than Gemma's", int(found["template"] != TEMPLATE), 0),
        at_most(f"chats of {len(chats)} written otherwise", sum(map(str.__ne__, rendered, written)), 0),
        at_most("stop tokens that are missing", int(TURN_END not in found["parameters"].get("stop", "")), 0),
    )
    verdict = Verdict(checks, size, size, rows=len(chats))
    if size and file.parent == folder:  # written beside the Modelfile, so no other format verified it
        return verdict.add(*verify_gguf("Q8_0", trained, file, config).checks)
    return verdict


def trim_turns(messages: Messages) -> list[dict[str, str]]:
    """Return turns as programs send them to Ollama: the trimmed text of each."""
    return [{"role": turn["role"], "content": get_text(turn).strip()} for turn in messages]


def add_systems(chats: list[Messages]) -> list[Messages]:
    """Return the chats, and each once more with a system text and an earlier exchange in front."""
    system = make_message("system", "Answer briefly.")
    return [*chats, *([system, *before, *chat] for before, chat in zip(chats[1:] + chats[:1], chats, strict=True))]
