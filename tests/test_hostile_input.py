"""Names, recipes and checkpoints of strangers: nothing is written outside of a run's folder, and nothing of them is run."""

import ast
import builtins
import functools
import gzip
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_config, load_export, load_model, load_processor, start_run
from forgekit.config import read_settings
from forgekit.errors import ConfigError, ModelError, RunError
from forgekit.model.trust import check_weights, describe_source, explain_weights, find_commit
from forgekit.paths import check_inside, explain_path

# ---- paths -----------------------------------------------------------------------------------------------------------

ESCAPES = {
    "../x": "leads out",
    "..": "leads out",
    "a/../../x": "leads out",
    "a\\..\\..\\x": "leads out",
    "/etc/passwd": "is absolute",
    "C:\\x": "is absolute",
    "C:x": "is absolute",
    "\\\\server\\x": "is absolute",
    "a\0b": "holds a NUL",
    "x" * 256: "has a name of 256 bytes",
    "ü" * 128: "has a name of 256 bytes",
    "a/" + "x" * 300 + "/b": "has a name of 300 bytes",
    "a/" * 2048: "has 4096 bytes",
    "\ud800": "holds half a character",
    "": "is empty",
    ".": "is empty",
}


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: ascii(name[:12]))
def test_a_path_that_leaves_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=ESCAPES[name]):
        check_inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.json", "x" * 255, "ü" * 127, "a..b", "...", "a b", "-x", "~"])
def test_a_path_that_stays_is_returned(name: str, tmp_path: Path) -> None:
    assert explain_path(name) is None
    assert check_inside(tmp_path, name) == tmp_path / name


def test_a_link_below_the_folder_is_refused_and_the_folder_itself_may_be_one(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "link/x", "link/x/y", "dangling"):
        with pytest.raises(RunError, match="passes a symbolic link"):
            check_inside(root, name)
    (tmp_path / "runs").symlink_to(root)
    assert check_inside(tmp_path / "runs", "first/run.json") == tmp_path / "runs" / "first" / "run.json"


def test_a_run_is_not_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "first").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="symbolic link"):
        start_run(load_config(), "first")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", [".bashrc", "status.yaml", "a\0.json", "x" * 256 + ".json", "link.json"], ids=ascii)
def test_a_recipe_cannot_write_over_other_files_by_its_status_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.json").symlink_to(tmp_path / "precious.json")
    with pytest.raises(ConfigError, match="the name of a .json file, and no link"):
        load_config(None, {"train.status_file": name})
    assert load_config(None, {"train.status_file": "../.factory/status.json"}).train.status_file


@pytest.mark.parametrize("setting", ["data.path", "data.train", "data.test", "model.id", "adapter.path"])
@pytest.mark.parametrize("name", ["a\0b", "x" * 300 + ".jsonl"], ids=["NUL", "long"])
def test_a_name_that_no_file_can_have_is_a_sentence(setting: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting} (holds a NUL|has a name of 306 bytes)"):
        load_config(None, {setting: name})
    with pytest.raises(ConfigError, match=r"recipe: the name that was given (holds a NUL|has a name of 306 bytes)"):
        load_config(name)


# ---- YAML (recipes: tests/test_config.py) ----------------------------------------------------------------------------


def test_settings_given_as_text_are_as_small_and_as_safe_as_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="1,000,023 letters; a recipe or settings have at most 1,000,000"):
        read_settings("{train.seed: 1}  # long " + "x" * 999_999)
    with pytest.raises(ConfigError, match="aliases"):
        read_settings("{a: &a [x, x], b: [*a, *a]}")
    for text in ("!!python/object/apply:os.system ['touch hacked']", "{a: !!python/name:os.system }"):
        with pytest.raises(ConfigError, match="tags"):
            read_settings(text)
    with pytest.raises(ConfigError, match="no valid YAML"):
        read_settings("[" * 50_000)


def test_yaml_is_read_in_one_place_and_safely(project_folder: Path) -> None:
    calls = find_calls(
        project_folder / "forgekit", {"load", "load_all", "unsafe_load", "full_load", "safe_load"}, "yaml"
    )
    assert [(name, ast.unparse(call)) for name, call in calls] == [("recipe.py", "yaml.load(text, RecipeLoader)")]


# ---- code that comes with weights ------------------------------------------------------------------------------------


def find_calls(folder: Path, names: set[str], owner: str | None = None) -> list[tuple[str, ast.Call]]:
    """Return the calls of a method by any of the names, with the file's name."""
    return [
        (name, call)
        for name, call, method in list_method_calls(folder)
        if method.attr in names and (owner is None or ast.unparse(method.value) == owner)
    ]


@functools.cache
def list_method_calls(folder: Path) -> list[tuple[str, ast.Call, ast.Attribute]]:
    """Return every call of a method in the package, with the file's name; reading it all takes a second."""
    files = [(file.name, ast.parse(file.read_text(encoding="utf-8"))) for file in sorted(folder.rglob("*.py"))]
    calls = [(name, node) for name, tree in files for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(name, call, call.func) for name, call in calls if isinstance(call.func, ast.Attribute)]


def test_every_loading_call_says_that_no_code_may_run(project_folder: Path) -> None:
    calls = find_calls(project_folder / "forgekit", {"from_pretrained"})
    texts = [(name, ast.unparse(call)) for name, call in calls]
    assert len(texts) >= 9
    own = [
        text for name, text in texts if name != "tiny.py" and not text.startswith("PeftModel.")
    ]  # PEFT has no such code
    assert [text for text in own if "**NO_CODE" not in text and "**SAFE_ONLY" not in text] == []


def test_remote_code_is_trusted_nowhere(project_folder: Path) -> None:
    places = [project_folder / name for name in ("forgekit", "notebooks", "params", "benchmarks")]
    files = [file for place in places for file in place.rglob("*") if file.suffix in (".py", ".ipynb", ".yaml")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if "trust_remote" in line]
    assert lines  # the search does find something
    code = [line for line in lines if not line.lstrip().startswith("#")]
    assert [
        line for line in code if '"trust_remote_code": False' not in line and '"trust_remote_code" in str' not in line
    ] == []
    loads = find_calls(project_folder / "forgekit", {"load", "loads", "Unpickler"}, "pickle")
    assert loads == []
    # parts of a checkpoint that its own manifest lists (resume.py verifies it first); weights_only runs no code
    read = find_calls(project_folder / "forgekit", {"load"}, "torch")
    assert {file for file, _ in read} == {"exact.py", "sharded.py"}
    assert [file for file, call in read if "weights_only=True" not in ast.unparse(call)] == []


CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("code of the checkpoint ran")
from transformers import Gemma3nConfig as Config, Gemma3nForConditionalGeneration as Model, Gemma3nProcessor as Processor
"""


@pytest.fixture
def hostile_folder(tiny_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A whole checkpoint whose configs ask for classes of its own file, and the file that its code would write."""
    folder, marker = tmp_path / "hostile", tmp_path / "ran"
    shutil.copytree(tiny_folder, folder)
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoProcessor": "evil.Processor",
               "AutoTokenizer": ["evil.Processor", "evil.Processor"]}  # fmt: skip
    for file in folder.glob("*config.json"):
        change_json(file, auto_map=classes)
    return folder, marker


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_a_checkpoints_own_code_is_not_run(
    make_config: Any, hostile_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, marker = hostile_folder
    monkeypatch.setattr(builtins, "input", lambda *prompt: pytest.fail("somebody was asked whether code may run"))
    model, processor = load_model(make_config({"model.id": str(folder)}))
    assert type(model).__module__.startswith("transformers.") and type(processor).__module__.startswith("transformers.")
    change_json(folder / "config.json", model_type="no_such_type")  # now only its code could load it
    change_json(folder / "processor_config.json", processor_class="NoSuchProcessor")
    with pytest.raises(
        ModelError, match="asks to run code of its own .*forgekit never runs code that comes with weights"
    ):
        load_processor(make_config({"model.id": str(folder)}))
    assert not marker.exists()


def test_that_code_does_run_where_it_is_trusted(hostile_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, Gemma3nConfig

    monkeypatch.setattr(Gemma3nConfig, "_auto_class", Gemma3nConfig._auto_class)  # trusting writes it, for good
    folder, marker = hostile_folder
    change_json(folder / "config.json", model_type="no_such_type")
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_an_architecture_that_is_no_model_is_refused(make_config: Any, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_folder, folder)
    change_json(folder / "config.json", architectures=["pipeline"])
    with pytest.raises(ModelError, match="names pipeline as its architecture, which is no model"):
        load_model(make_config({"model.id": str(folder)}))


# ---- weights that are pickles ----------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def pack_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return file.getvalue()


def pack_tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("data.pkl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


DISGUISES = {
    "pickle": (lambda content: content, "a pickle"),
    "torch.save": (pack_zip, "a zip archive"),
    "tar": (pack_tar, "a tar archive"),
    "gzip": (gzip.compress, "packed by gzip"),
    "HDF5": (lambda content: b"\x89HDF\r\n\x1a\n" + content, "HDF5"),
    "old pickle": (lambda content: b"(lp0\n" + content, "no such header"),
    "header too long": (lambda content: (10**12).to_bytes(8, "little") + b"{}", "no such header"),
}


@pytest.fixture
def bare_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint's folder without its weights."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize("kind", DISGUISES)
def test_a_pickle_is_known_by_its_bytes_whatever_its_name(
    kind: str, make_config: Any, bare_folder: Path, tmp_path: Path
) -> None:
    pack, words = DISGUISES[kind]
    marker = tmp_path / "ran"
    (bare_folder / "model.safetensors").write_bytes(pack(pickle.dumps(Bomb(marker))))
    with pytest.raises(ModelError, match=f"model.safetensors is no safetensors file: .*{words}.*not opened"):
        load_model(make_config({"model.id": str(bare_folder)}))
    assert not marker.exists()


def test_that_pickle_does_run_when_it_is_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.PKL", "model.ckpt"])
def test_weights_in_pickles_alone_are_refused(name: str, make_config: Any, bare_folder: Path, tmp_path: Path) -> None:
    (bare_folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ModelError, match=f"has its weights in {name} and none in safetensors"):
        load_model(make_config({"model.id": str(bare_folder)}))
    assert not (tmp_path / "ran").exists()


def test_the_real_weights_pass_with_a_pickle_beside_them_that_nobody_opens(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_folder, folder)
    (folder / "training_args.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    check_weights(folder, "both")
    assert all(explain_weights(file) is None for file in folder.glob("*.safetensors"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../model.safetensors", "/model.safetensors", "model.bin", "a/b.safetensors", 7])
def test_an_index_names_files_of_its_own_folder(shard: Any, bare_folder: Path) -> None:
    (bare_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(ModelError, match="of the checkpoint's own folder alone"):
        check_weights(bare_folder, "model.id: x")


def test_an_adapter_in_a_pickle_is_refused(make_config: Any, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_folder)}))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ModelError, match="the adapter .* has its weights in adapter_model.bin"):
        load_export(folder, make_config())
    assert not (tmp_path / "ran").exists()


# ---- which weights they were -----------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT, None])
def test_the_commit_that_a_revision_means_is_recorded(
    revision: str | None, make_config: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--some--gemma-3n"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(tiny_folder)
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = make_config({"model.id": "some/gemma-3n", **({"model.revision": revision} if revision else {})})
    model, _ = load_model(config)
    expected = {"id": "some/gemma-3n", "revision": revision, "loaded": "some/gemma-3n", "commit": COMMIT}
    assert describe_source(model, config) == expected
    assert find_commit(repository / "snapshots" / COMMIT) == COMMIT and find_commit(tiny_folder) is None


if sys.platform == "win32":  # links need a right there that few accounts have
    pytestmark = pytest.mark.skip(reason="makes symbolic links")
