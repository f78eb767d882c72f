"""llama.cpp sees with the mmproj file what the trained model sees, and a file with anything wrong in it is found out."""

import copy
import ctypes
import os
from pathlib import Path
from typing import Any

import numpy
import pytest

from forgekit.errors import ExportError
from forgekit.export import gguf_vision
from forgekit.export.compare import Reference
from forgekit.export.formats import FORMATS, find_format
from forgekit.export.gguf_tensors import Tensor
from forgekit.export.gguf_vision import check_tower, export_vision
from forgekit.export.gguf_vision_verify import (
    LARGEST,
    MEAN,
    ROUNDED,
    choose_picture,
    draw_picture,
    measure_difference,
    read_tower,
    verify_vision,
)
from forgekit.export.llama_vision import Settings, load_mtmd, read_soft_tokens
from tests.export.drawn import draw_adapter

os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a failed assertion there would start a debugger


def make_folder(folder: Path, seed: int = 0, released: bool = False) -> Path:
    """Write a random Gemma 3n of width 2048 in bfloat16 that reads 768 x 768 pixels, 256 soft tokens a picture.

    Args:
        released: give it the whole tower of 84 blocks; else the practice model's nine narrow ones.
    """
    import torch
    from transformers import Gemma3nForConditionalGeneration

    from forgekit.data.samples.orders import load_orders
    from forgekit.model.timm_args import set_model_args
    from forgekit.model.tiny import build_config, build_processor, build_tokenizer

    tokenizer = build_tokenizer(row["message"] for row in load_orders(300))
    config = build_config(tokenizer, hidden_size=2048, layers=3, shared_layers=1)
    blocks = config.vision_config.model_args | {"msfa_output_resolution": 16}
    config.vision_config.model_args = {"layer_scale_init_value": 0.3} if released else copy.deepcopy(blocks)
    config.vision_soft_tokens_per_image = 256
    torch.manual_seed(seed)
    model = Gemma3nForConditionalGeneration(config)
    if not released:
        set_model_args(model, blocks)
    for name, parameter in model.named_parameters():
        if "vision" in name and parameter.ndim == 1:  # norms and scales, which all begin alike
            parameter.data.mul_(0.5 + torch.rand(parameter.shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    processor = build_processor(tokenizer)
    processor.image_processor.size = {"height": 768, "width": 768}
    processor.image_seq_length = 256
    processor.save_pretrained(folder)
    return folder


def make_seeing(folder: Path, orders_file: Path) -> Any:
    """Returns (model, processor, config): tower and projection have an adapter of which no matrix is zero."""

    from forgekit import add_adapter, load_config, load_model

    settings = {"data.path": str(orders_file), "model.id": str(folder), "model.engine": "huggingface"}
    settings |= {"model.device": "cpu", "model.load_in": "16bit", "adapter.r": 4, "adapter.layers": ["vision", "vision_tower"]}  # fmt: skip
    config = load_config(None, settings)
    model, processor = load_model(config)
    model = add_adapter(model, config)
    draw_adapter(model, 11)
    return model.eval(), processor, config


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, orders_file: Path) -> Any:
    """A model with a narrow tower that learned something; no test changes it."""
    return make_seeing(make_folder(tmp_path_factory.mktemp("seeing") / "random"), orders_file)


@pytest.fixture(scope="module")
def written(seeing: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mmproj file of that model."""
    return export_vision(*seeing, tmp_path_factory.mktemp("quantized") / "mmproj-F16.gguf")


def verify(seeing: Any, path: Path) -> dict[str, float]:
    model, processor, config = seeing
    verdict = verify_vision(Reference(model, processor, None), path, config)
    return {check.name: check.value for check in verdict.checks} | {"verified": verdict.verified}


def test_llama_sees_what_the_trained_model_sees(seeing: Any, written: Path) -> None:
    found = verify(seeing, written)
    print(found)
    assert found["verified"] and len(found) == 7
    assert found["mean relative difference to the model in memory"] < ROUNDED / 4
    assert 0 < found["mean relative difference of the soft tokens"] < MEAN < LARGEST
    assert "--mmproj mmproj-F16.gguf" in (written.parent / "mmproj.md").read_text(encoding="utf-8")


def test_other_pictures_other_tokens(seeing: Any, written: Path) -> None:
    """The bound is far below what tells two pictures apart, and square pictures are scaled alike."""
    model, processor, _ = seeing
    picture = draw_picture()
    turned, large = picture.rotate(90), picture.resize((900, 900))
    found = read_soft_tokens(written, turned, 2048)
    assert measure_difference(read_tower(model, processor, turned), found)[0] < ROUNDED
    assert measure_difference(read_tower(model, processor, picture), found)[0] > ROUNDED
    assert measure_difference(read_tower(model, processor, large), read_soft_tokens(written, large, 2048))[0] < ROUNDED


@pytest.mark.parametrize("mutant", ["zeroed adapter", "swapped tensor", "flipped byte"])
def test_a_file_that_is_not_the_trained_tower_fails(
    seeing: Any, written: Path, tmp_path: Path, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, config = seeing
    path = tmp_path / "mmproj-F16.gguf"
    if mutant == "flipped byte":
        data = bytearray(written.read_bytes())
        data[-5000] ^= 1
        path.write_bytes(data)
    elif mutant == "zeroed adapter":
        base = Path(config.model.id)
        gguf_vision.write_vision(base, path, gguf_vision.describe_model(config))
    else:
        plan = gguf_vision.plan_tower
        monkeypatch.setattr(gguf_vision, "plan_tower", lambda folder: swap(plan(folder)))
        export_vision(model, processor, config, path)
    found = verify(seeing, path)
    print(mutant, found)
    assert not found["verified"]


def swap(tensors: list[Tensor]) -> list[Tensor]:
    """Exchange the numbers of two tensors of one shape."""
    first, second = next(
        (a, b) for a in tensors for b in tensors if a.name < b.name and a.shape == b.shape and len(a.shape) == 4
    )
    names = {first.name: second.name, second.name: first.name}
    return [Tensor(names.get(tensor.name, tensor.name), tensor.shape, tensor.rows) for tensor in tensors]


def test_the_tower_is_as_it_was_behind_a_comparison(seeing: Any) -> None:
    import torch

    model, processor = copy.deepcopy(seeing[0]).to(torch.bfloat16), seeing[1]
    before = {name: (value.dtype, value.data_ptr()) for name, value in model.named_parameters()}
    read_tower(model, processor, draw_picture())
    assert {name: (value.dtype, value.data_ptr()) for name, value in model.named_parameters()} == before
    assert {dtype for dtype, _ in before.values()} == {torch.bfloat16}


def test_the_first_held_out_picture_is_compared(seeing: Any) -> None:
    from PIL import Image

    red = Image.new("RGB", (40, 30), (255, 0, 0))
    trained = Reference(seeing[0], seeing[1], None)
    assert numpy.array_equal(choose_picture(trained), draw_picture())
    trained.chats = [*trained.chats, [{"role": "user", "content": [{"type": "image", "image": red}]}]]
    assert choose_picture(trained).size == (768, 768) and choose_picture(trained).getpixel((5, 5)) == (255, 0, 0)


def test_towers_that_llama_cannot_build_are_refused_by_their_shape(make_learned: Any, tmp_path: Path) -> None:
    """The practice model among them: each size that does not fit is named."""
    model, processor, config = make_learned()
    with pytest.raises(ExportError) as caught:
        export_vision(model, processor, config, tmp_path / "mmproj-F16.gguf")
    width = model.config.get_text_config().hidden_size
    assert f"the text model is {width} wide, and it takes 2048" in str(caught.value)
    assert "16 soft tokens, and it makes 256" in str(caught.value)
    assert "64 x 64 pixels, and it takes 768 x 768" in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="no picture tower"):
        check_tower(model.config.text_config, processor)


def test_a_library_with_other_settings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: one field more in front shifts all others."""
    from forgekit.export import llama_vision

    class Shifted(ctypes.Structure):
        _fields_ = (("more", ctypes.c_int64), *Settings._fields_)

    monkeypatch.setitem(llama_vision.FUNCTIONS, "mtmd_context_params_default", (Shifted,))
    with pytest.raises(ExportError, match="xllamacpp"):
        load_mtmd.__wrapped__()
    monkeypatch.undo()
    load_mtmd.__wrapped__()  # declares the functions rightly again


def test_a_file_without_a_tower_is_refused(written: Path, tmp_path: Path) -> None:
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ExportError, match="cannot read pictures with this file"):
        read_soft_tokens(tmp_path / "mmproj-F16.gguf", draw_picture(), 2048)
    with pytest.raises(ExportError, match="mismatch between text model"):
        read_soft_tokens(written, draw_picture(), 64)


def test_mmproj_is_a_format() -> None:
    assert FORMATS["gguf:mmproj"].place == "models/quantized/mmproj-F16.gguf"
    assert find_format(Path("runs/x/models/quantized/mmproj-F16.gguf")) == "gguf:mmproj"


@pytest.mark.slow
def test_the_whole_released_tower(tmp_path: Path, orders_file: Path) -> None:
    """All 84 blocks: about four minutes on two cores."""
    seeing = make_seeing(make_folder(tmp_path / "random", released=True), orders_file)
    found = verify(seeing, export_vision(*seeing, tmp_path / "quantized" / "mmproj-F16.gguf"))
    print(found)
    assert found["verified"]
