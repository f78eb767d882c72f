"""What a slice refuses, each with a sentence, and what is left when one fails: nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from forgekit import slice_checkpoint
from forgekit.__main__ import main
from forgekit.errors import ModelError
from forgekit.model import slice as slicing

HALF = {"skip": "6-8", "widths": 32}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "Say what the slice leaves out: --preset, --skip or --widths."),
        (["--preset", "e2x"], 2, "('e2x' is none; did you mean e2b?). Meaning:"),
        (["--preset", "e2b", "--skip", "6-8"], 2, "a preset, or skip and widths, not both: e2b already says"),
        (["--preset", "E2B"], 1, "e2b is a slice of Gemma 3n E4B, which has 35 layers, and this has 12."),
        (["--skip", "six"], 2, "numbers and ranges such as 0-9,20 or last 8"),
        (["--skip", "40"], 1, "skip 40 asks for layer 40, and the model has layers 0 to 11"),
        (["--widths", "0-2=wide"], 2, "a mapping whose widths are one number, a list"),
        (["--widths", "128"], 1, "layer 0 has width 64, and 128 was asked for. A slice only leaves out"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], code: int, text: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["slice", str(source), str(tmp_path / "out"), *arguments]) == code
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def spoil(folder: Path, how: str) -> None:
    """Damage a checkpoint in one way."""
    from safetensors.torch import load_file, save_file

    config = folder / "config.json"
    settings = json.loads(config.read_text())
    shard = next(file for file in folder.glob("*.safetensors") if any("layers.0.mlp.up" in n for n in load_file(file)))
    if how == "llama":
        config.write_text(json.dumps({**settings, "model_type": "llama"}))
    elif how == "packed":
        config.write_text(json.dumps({**settings, "quantization_config": {"load_in_4bit": True}}))
    elif how == "config":
        config.unlink()
    elif how == "gone":
        shard.unlink()
    elif how == "damaged":
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        tensors = load_file(shard)
        name = next(name for name in tensors if "layers.0.mlp.up_proj" in name)
        tensors |= {name: tensors[name][:5].clone()} if how == "short" else {}
        if how == "lost":
            del tensors[name]
        save_file(tensors, shard, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("llama", r"bad is of the type llama, and only Gemma 3n was trained so that parts of it work alone"),
        ("packed", r"bad holds quantised weights, which cannot be cut. Slice the 16-bit checkpoint"),
        ("config", r"is a folder but no checkpoint: it has no config.json"),
        ("gone", r"bad lacks model-0.*safetensors, which its index names. Fetch it again"),
        ("damaged", r"model-0.*safetensors cannot be read .* Fetch or save it again"),
        ("short", r"up_proj.weight has shape \[5, 32\], and config.json describes one of 64 in dimension 0"),
        ("lost", r"bad has 28 of the 29 tensors that a slice is cut from"),
    ],
)
def test_a_source_that_cannot_be_sliced_is_a_sentence(
    how: str, text: str, make_sliced: Callable, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "bad")
    spoil(tmp_path / "bad", how)
    config = make_sliced(HALF, **{"model.id": str(tmp_path / "bad")})
    with pytest.raises(ModelError, match=text):
        slice_checkpoint(config, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_too_small_a_disk_is_found_before_anything_is_written(
    make_sliced: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slicing, "free_disk", lambda folder: 12_345)
    with pytest.raises(
        ModelError, match=r"out: the slice needs 0.1. GiB \([\d,]+ bytes\) and .* \(12,345 bytes\) free"
    ):
        slice_checkpoint(make_sliced(HALF), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_slice_that_fails_half_way_leaves_nothing(
    make_sliced: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, folder: Path) -> None:
        assert list(folder.glob("*.safetensors"))  # the weights stand in the temporary folder
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slicing, "copy_beside", fail)
    with pytest.raises(ModelError, match=r"out cannot be written: .*No space left on device. Nothing of it is left"):
        slice_checkpoint(make_sliced(HALF), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_hub_checkpoint_is_refused_by_its_config_before_its_weights_are_fetched(
    make_sliced: Callable, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    fetched = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append((name, revision, allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    hub = {"model.id": "some/gemma-3n", "model.revision": "abc"}
    with pytest.raises(
        ModelError, match=r"some/gemma-3n cannot be sliced so: layer 5 has to stay, because layers 8,11 use"
    ):
        slice_checkpoint(make_sliced({"skip": "5"}, **hub), tmp_path / "out")
    assert fetched == [("some/gemma-3n", "abc", ["config.json"])]
    folder = slice_checkpoint(make_sliced(HALF, **hub), tmp_path / "out")
    assert [patterns[0] for *_, patterns in fetched[1:]] == ["config.json", "*.safetensors"]
    record = json.loads((folder / "slice.json").read_text())
    assert (record["source"], record["revision"]) == ("some/gemma-3n", "abc")


def test_a_hub_checkpoint_that_cannot_be_had_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["slice", "some/gemma-3n", str(tmp_path / "out"), "--preset", "e2b"]) == 1
    assert "forgekit: model.id: some/gemma-3n cannot be loaded: " in capsys.readouterr().err
