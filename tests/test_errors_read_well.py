"""Bad input gets one clear sentence and loses nothing: every kind of it, with the sentence a person reads.

Each sentence says what happened, with the values, and what to do; none is a traceback of a library.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from forgekit import hardware, load_config, load_data, load_model, load_processor, start_run
from forgekit.config import check_parameters
from forgekit.errors import ConfigError, DataError, ExportError, ForgekitError, ModelError, RunError
from forgekit.export import merged
from forgekit.files import read_json
from forgekit.hardware import GIB, Hardware

CPU_ALONE = Hardware("cpu", "CPU, 2 cores", 8 * GIB, True)
ON_CPU = {"model.load_in": "16bit", "model.device": "cpu", "model.engine": "huggingface"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test stands in a folder of its own, on a machine without a GPU and offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hardware, "detect_hardware", lambda: CPU_ALONE)
    return tmp_path


def check_sentence(error: BaseException, *parts: str) -> None:
    """Assert that a message holds all parts and reads like a sentence for a person."""
    message = str(error)
    assert [part for part in parts if part not in message] == [], message
    assert message[-1] in ".?", message
    assert len(message) < 700, message
    for noise in ("Traceback", "object at 0x", "<class", "pydantic", "errno", "Errno", "\n"):
        assert noise not in message, message


def test_the_check_of_a_sentence_can_fail() -> None:
    for bad in ("no end", "Traceback: x.", "two\nlines.", "<class 'int'>.", "x" * 800 + "."):
        with pytest.raises(AssertionError):
            check_sentence(DataError(bad))
    with pytest.raises(AssertionError):
        check_sentence(DataError("A sentence."), "another")


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"train.learning_rat": 1}, ("train.learning_rat: no such setting (from notebook).", "Did you mean train.learning_rate?")),
        ({"adaptor.r": 1}, ("adaptor.r: no such setting", "Did you mean adapter.r?")),
        ({"max_seq_length": 512}, ("max_seq_length: no such setting",)),
        ({"train.max_steps": "many"}, ('train.max_steps is "many" (from notebook)', "it should be a whole number")),
        ({"adapter.r": 0}, ("adapter.r is 0", "greater than or equal to 1", "Meaning: rank of the added matrices")),
        ({"model.max_length": -1}, ("model.max_length is -1", "greater than 0", "a fixed, positive number: longer rows are refused, never cut")),
        ("{broken", ("settings: no valid YAML",)),
    ],
)  # fmt: skip
def test_a_wrong_setting(settings: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings)
    check_sentence(caught.value, *parts)


def test_a_missing_recipe(project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("params/text.yaml")
    check_sentence(
        caught.value, "recipe 'params/text.yaml': no such file in ", "`forgekit init DIR` copies the shipped"
    )
    monkeypatch.chdir(project_folder)
    with pytest.raises(ConfigError) as caught:
        load_config("params/txt.yaml")
    check_sentence(caught.value, "There are: ", "text.yaml, text_quick.yaml")


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that a notebook has executed so far."""
    cells: list[str] = []
    running = SimpleNamespace(user_ns={"In": cells})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: running))
    return cells


def test_a_misspelt_parameter(shell: list[str]) -> None:
    shell += ["", 'recipe: str = "a.yaml"', '# Parameters\nrecpie = "b.yaml"\nsteps = 5\nrun_name = "x"\n']
    with pytest.raises(ConfigError) as caught:
        check_parameters()
    assert caught.value.problems == [
        "recpie: the notebook has no such parameter. Did you mean recipe?",
        "steps: the notebook has no such parameter.",
    ]
    with pytest.raises(ConfigError):
        load_config()


def test_known_parameters_and_cells_of_the_users_own_pass(shell: list[str]) -> None:
    shell += [
        '# Parameters\nrecipe = "b.yaml"\nsettings = {"train.seed": 1}\nrun_name = ""\n',
        "steps = 5",
        "# Parameters of mine",
    ]
    check_parameters()


def test_a_misspelt_parameter_under_papermill_itself(
    tmp_path: Path, project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `papermill in.ipynb out.ipynb -p recpie x`: papermill itself only warns."""
    import papermill

    cells = [
        nbformat.v4.new_code_cell(source)
        for source in ('recipe: str = ""', "import forgekit as fk\n\nfk.load_config(recipe)")
    ]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), "in.ipynb")
    monkeypatch.setenv("PYTHONPATH", str(project_folder))
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            "in.ipynb", "out.ipynb", {"recpie": "x"}, kernel_name="python3", language="python", progress_bar=False
        )
    assert caught.value.ename == "ConfigError"
    assert caught.value.evalue == "recpie: the notebook has no such parameter. Did you mean recipe?"


@pytest.mark.parametrize("recipe", [5, 2.5, ["a.yaml"]])
def test_a_recipe_that_papermill_made_a_number_of(recipe: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    check_sentence(caught.value, f"recipe is {recipe!r}: it must be the name of a YAML file")


# ---- data ------------------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "1?", "completion": "2"}\n'


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("rows.jsonl", None, ("data.path: rows.jsonl does not exist (looked in ",)),
        ("rows.jsonl", b"", ("rows.jsonl is empty (0 bytes).", "Write one row on each line")),
        ("rows.csv", b"", ("rows.csv is empty (0 bytes).",)),
        ("rows.jsonl", b"\n\n", ("rows.jsonl holds no row that can be read.",)),
        ("rows.jsonl", (GOOD * 6 + '{"prompt": "1').encode(), ("1 of 7 rows", "rows.jsonl:7: no valid JSON: Unterminated string", "data.max_bad")),
        ("rows.jsonl", GOOD.encode() + b'{"prompt": "\xe9"}\n', ("rows.jsonl:2: byte 12 is not UTF-8", "Mend the rows")),
        ("rows.json", b'[{"prompt": "1?", "completion": "2"},\n {"prompt": ', ("rows.json:2: the JSON list is broken", "Mend that line")),
        ("rows.csv", b'prompt,completion\n1?,2\n"3?,4\n5?,6\n', ("2 of 3 rows", "rows.csv:3: ", "a quote that opens on line 3 may not be closed")),
        ("rows.csv", b"prompt,completion\n1?\n", ("rows.csv:2: the header has 2 columns, this line has 1",)),
        ("rows.parquet", b"not parquet", ("rows.parquet is no whole parquet file", "Write or fetch it again.")),
        ("rows.xlsx", b"x", ("rows.xlsx ends in .xlsx; known kinds are .jsonl, .json, .csv",)),
        ("rows.jsonl", b'{"question": "1?"}\n', ("The rows' columns (question) fit no known format", "Define to_example(row)")),
        (
            "rows.jsonl",
            b'{"messages": [{"role": "user", "content": "1?"}]}\n',
            ("1 of 1 rows cannot be learned from", "no_assistant_turn", "rows.jsonl:1: no assistant turn to learn from (roles: user)", "Mend the rows"),
        ),
        ("rows.jsonl", (GOOD + json.dumps({"prompt": "x " * 4000, "completion": "y"})).encode(), ("too_long", "rows.jsonl:2: ", "model.max_length is 2048")),
    ],
)  # fmt: skip
def test_data_that_cannot_be_learned_from(
    name: str, content: bytes | None, parts: tuple[str, ...], small_tokenizer: Any
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_data(load_config(None, {"data.path": name}), small_tokenizer)
    check_sentence(caught.value, *parts)
    assert content is None or Path(name).read_bytes() == content


def test_data_of_the_hub_offline(small_tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        load_data(load_config(None, {"data.path": "nobody/no-such-rows"}), small_tokenizer)
    check_sentence(
        caught.value, "data.path: nobody/no-such-rows (train) cannot be loaded from the Hub", "check its name"
    )


# ---- models ----------------------------------------------------------------------------------------------------------


def load(model: str | Path, **settings: Any) -> Any:
    return load_model(load_config(None, {**ON_CPU, "model.id": str(model), **settings}))


def test_an_unknown_model_offline() -> None:
    with pytest.raises(ModelError) as caught:
        load("nobody/no-such-model")
    parts = "model.id: nobody/no-such-model cannot be loaded: ", "offline (HF_HUB_OFFLINE=1)", "name a folder or `tiny`"
    check_sentence(caught.value, *parts)


def test_a_folder_that_is_no_checkpoint() -> None:
    Path("model").mkdir()
    with pytest.raises(ModelError) as caught:
        load("model")
    check_sentence(
        caught.value, "model.id: model is a folder but no checkpoint: it has no config.json (it holds nothing)."
    )
    Path("model/rows.csv").write_text("x")
    with pytest.raises(ModelError) as caught:
        load("model")
    check_sentence(caught.value, "it has no config.json (it holds rows.csv).")


@pytest.mark.parametrize("name", ["./model", "~/no-such-folder-at-home", "/no/such/folder"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(name)
    check_sentence(caught.value, f"model.id: the folder {name} does not exist.")


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Any) -> Path:
    """A random text model of one layer, with tokenizer and chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "whole"
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(small_tokenizer), max_position_embeddings=64, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(whole_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "model"))


def test_a_whole_checkpoint_loads(checkpoint: Path) -> None:
    model, _ = load(checkpoint)
    assert model.num_parameters() > 0


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | values
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


BROKEN = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "half the weights": (lambda folder: cut(folder / "model.safetensors", 0.5), "file not fully covered"),
    "empty weights": (lambda folder: cut(folder / "model.safetensors", 0), "header too small"),
    "a tensor is missing": (drop_tensor, "lacks 1 of the weights that its config.json describes, or has them in another shape, for instance model.layers.0.mlp.up_proj.weight; they would be random."),
    "another shape": (lambda folder: change_config(folder, intermediate_size=32), "lacks 3 of the weights"),
    "half a config": (lambda folder: cut(folder / "config.json", 0.5), "cannot be loaded: "),
    "an unknown kind": (lambda folder: change_config(folder, model_type="nope"), "cannot be loaded: "),
    "half a tokenizer": (lambda folder: cut(folder / "tokenizer.json", 0.5), "cannot be loaded: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_half_a_checkpoint(case: str, checkpoint: Path) -> None:
    """Not filled with random numbers, as transformers does with a warning."""
    spoil, part = BROKEN[case]
    spoil(checkpoint)
    with pytest.raises(ModelError) as caught:
        load(checkpoint)
    check_sentence(
        caught.value,
        f"model.id: {checkpoint} ",
        part,
        "Its files do not make a whole checkpoint: fetch or save it again.",
    )


def test_a_model_without_a_chat_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(ModelError) as caught:
        load_processor(load_config(None, {**ON_CPU, "model.id": str(checkpoint)}))
    check_sentence(caught.value, "has no chat template", "Use an instruction-tuned (-it) checkpoint.")


def test_a_kind_of_model_that_transformers_lacks(checkpoint: Path) -> None:
    change_config(checkpoint, architectures=["NopeForCausalLM"])
    with pytest.raises(ModelError) as caught:
        load(checkpoint)
    check_sentence(caught.value, "has no NopeForCausalLM", "Update transformers.")


# ---- hardware --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"model.device": "cuda"}, ("model.device: cuda was asked for, and torch sees no CUDA device here.", "`forgekit doctor`")),
        ({"model.load_in": "4bit", "model.device": "auto"}, ("model.load_in: 4bit needs an NVIDIA GPU (bitsandbytes), and this machine has none.", "Set model.load_in: 16bit")),
        ({"model.load_in": "8bit"}, ("model.load_in: 8bit needs an NVIDIA GPU",)),
        ({"model.dtype": "float16"}, ("float16 overflows in Gemma 3n", "model.dtype: float32")),
    ],
)  # fmt: skip
def test_what_this_machine_cannot_do(settings: dict[str, Any], parts: tuple[str, ...], checkpoint: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(checkpoint, **settings)
    check_sentence(caught.value, *parts)


def test_the_shipped_gpu_recipe_without_a_gpu(project_folder: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_processor(load_config(project_folder / "params" / "text.yaml"))
    check_sentence(caught.value, "model.load_in: 4bit needs an NVIDIA GPU")


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_the_name_of_a_completed_run(tmp_path: Path) -> None:
    start_run(load_config(None, {"train.seed": 1}), "first").finish()
    with pytest.raises(RunError) as caught:
        start_run(load_config(None, {"train.seed": 2}), "first")
    check_sentence(
        caught.value, "run 'first' exists and is completed: ", "Its files are kept; choose another run_name."
    )
    assert read_json(tmp_path / "runs" / "first" / "run.json")["settings"]["train.seed"]["value"] == 1


def test_a_folder_without_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a file nobody may write, the administrator neither."""
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(RunError) as caught:
        start_run(load_config(), "first")
    check_sentence(
        caught.value, "file/runs/first cannot be written: Not a directory.", "Set FORGEKIT_RUNS to a folder that can."
    )
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["../up", "a b", 1.5])
def test_a_run_name_that_is_none(name: Any) -> None:
    with pytest.raises(RunError) as caught:
        start_run(load_config(), name)
    check_sentence(caught.value, f"run name {name!r}: use up to 100 letters, digits")


# ---- export ----------------------------------------------------------------------------------------------------------


def test_too_little_disk_for_the_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tokenizer: Any
) -> None:
    """Nothing is begun that could not be ended: the folder is not made, and what stands beside it stays."""
    from peft import LoraConfig, get_peft_model

    model, _ = load(checkpoint)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(0.1)  # as after training
    (tmp_path / "models" / "lora").mkdir(parents=True)
    needed = (checkpoint / "model.safetensors").stat().st_size
    monkeypatch.setattr(merged, "free_disk", lambda folder: needed)  # exactly the weights, nothing for the rest
    config, folder = load_config(None, {**ON_CPU, "model.id": str(checkpoint)}), tmp_path / "models" / "merged"
    with pytest.raises(ExportError) as caught:
        merged.export_merged(model, small_tokenizer, config, folder)
    parts = f"({needed:,} bytes) and the disk has", "free. Free some space and call export_model again"
    check_sentence(caught.value, str(folder), "the export needs ", *parts)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["lora"]
    monkeypatch.setattr(merged, "free_disk", lambda folder: 2 * needed)
    assert (merged.export_merged(model, small_tokenizer, config, folder) / "model.safetensors").is_file()


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_one_base_class_catches_every_kind() -> None:
    for kind in (ConfigError, DataError, ModelError, RunError, ExportError):
        assert issubclass(kind, ForgekitError)
        assert kind.__doc__
