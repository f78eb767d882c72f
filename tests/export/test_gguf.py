"""A GGUF file says what the merged model says: every tensor, name, number format and line of metadata."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from forgekit import ask_gguf
from forgekit.errors import ExportError
from forgekit.export import gguf, merged
from forgekit.export.gguf import export_gguf, read_license, write_gguf
from forgekit.export.gguf_seal import read_seal
from forgekit.export.gguf_tensors import check_architecture, plan_tensors
from forgekit.export.gguf_types import choose_type, quantize, stored_bytes
from forgekit.export.llama import open_gguf

ABOUT = {"name": "some-model", "base": "google/gemma-3n-E2B-it", "license": "gemma"}


@pytest.fixture(scope="session")
def half_file(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(llama_folder, tmp_path_factory.mktemp("gguf") / "model-F16.gguf", "F16", ABOUT)


def read_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read_field(path: Path, name: str) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path).fields[name].contents()


def test_the_metadata_is_complete(half_file: Path, llama_folder: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(half_file)
    text = read_settings(llama_folder)["text_config"]
    expected = {
        "general.architecture": "gemma3n",
        "general.name": "some-model",
        "general.license": "gemma",
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.base_model.0.name": "gemma-3n-E2B-it",
        "general.base_model.0.organization": "google",
        "general.base_model.0.repo_url": "https://huggingface.co/google/gemma-3n-E2B-it",
        "gemma3n.context_length": text["max_position_embeddings"],
        "gemma3n.block_count": 22,
        "gemma3n.attention.shared_kv_layers": 2,
        "tokenizer.chat_template": (llama_folder / "chat_template.jinja").read_text(),
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {name: reader.fields[name].contents() for name in expected} == expected
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == text["vocab_size"]


def test_every_tensor_stands_in_the_file_as_it_was_planned(half_file: Path, llama_folder: Path) -> None:
    from gguf import GGUFReader

    planned = {tensor.name: tensor for tensor in plan_tensors(llama_folder, read_settings(llama_folder))}
    found = {tensor.name: tensor for tensor in GGUFReader(half_file).tensors}
    assert found.keys() == planned.keys() and len(found) > 500
    for name, tensor in planned.items():
        assert tuple(reversed(found[name].shape.tolist())) == tensor.shape
        assert numpy.allclose(found[name].data.astype(numpy.float32), tensor.read(), rtol=1e-3, atol=1e-7), name


def test_rows_read_in_pieces_are_the_same_rows(llama_folder: Path) -> None:
    for tensor in plan_tensors(llama_folder, read_settings(llama_folder)):
        whole, step = tensor.read(), tensor.shape[0] // 3 + 1
        pieces = [tensor.rows(start, min(start + step, len(whole))) for start in range(0, len(whole), step)]
        assert whole.shape == tensor.shape and numpy.array_equal(numpy.concatenate(pieces), whole), tensor.name


def test_widening_changes_no_logit(llama_folder: Path, make_llama_folder: Any, tmp_path: Path) -> None:
    """The same widening through transformers: a model with 256 wide per-layer embeddings and LAuReL of rank 64."""
    import torch
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import Gemma3nForConditionalGeneration

    narrow = Gemma3nForConditionalGeneration.from_pretrained(llama_folder)
    folder = make_llama_folder(tmp_path / "wide", 32, hidden_size_per_layer_input=256, laurel_rank=64)
    wide = Gemma3nForConditionalGeneration.from_pretrained(folder)
    planned = {tensor.name: tensor for tensor in plan_tensors(llama_folder, read_settings(llama_folder))}
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3N, 22)
    text = wide.model.language_model
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            found = names.get_name(f"model.{name.removesuffix('.weight')}.weight", try_suffixes=(".weight",))
            if found:
                parameter.copy_(torch.from_numpy(planned[found].read()[: len(parameter)]))
            elif "projections" in name:
                kind, place = name.split(".")[:2]
                parameter.copy_(
                    torch.from_numpy(planned[names.get_name(f"model.{kind}") + ".weight"].read()[int(place)])
                )
        ids = torch.randint(
            8, narrow.config.text_config.vocab_size - 8, (2, 40), generator=torch.Generator().manual_seed(1)
        )
        difference = wide.eval()(input_ids=ids).logits - narrow.eval()(input_ids=ids).logits
    assert difference.abs().max() < 1e-4 and wide.lm_head.weight is text.embed_tokens.weight


def test_size_and_checksum_stand_in_the_file(half_file: Path, tmp_path: Path) -> None:
    assert read_seal(half_file) == (half_file.stat().st_size, True)
    data = half_file.read_bytes()
    copy = tmp_path / "copy.gguf"
    for place in (100, len(data) // 2, len(data) - 1):
        copy.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert not read_seal(copy)[1], place
    copy.write_bytes(data[:-100])
    assert read_seal(copy) == (len(data), False)
    copy.write_bytes(b"GGUF")
    assert read_seal(copy) == (0, False)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K_M"])
def test_quantised_rows_are_near_the_numbers(kind: str) -> None:
    from gguf import quants

    data = numpy.random.default_rng(1).standard_normal((4, 512)).astype(numpy.float32)
    for name in ("blk.0.attn_q.weight", "token_embd.weight", "blk.0.laurel_l.weight", "blk.0.attn_norm.weight"):
        type = choose_type(name, data.shape, kind, 30)
        stored = quantize(data, type)
        assert stored.nbytes == stored_bytes(data.shape, type)
        if kind == "Q4_K_M":
            stored = stored.reshape(4, -1)
        back = quants.dequantize(stored, type)
        bound = {"F32": 0, "F16": 1e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q4_K": 0.25, "Q6_K": 0.08}[type.name]
        assert numpy.abs(back - data).max() <= bound, type


def test_types_follow_the_mix_of_llama_cpp() -> None:
    def name_type(name: str, width: int, kind: str = "Q4_K_M") -> str:
        return choose_type(name, (64, width), kind, 30).name

    assert name_type("blk.5.attn_q.weight", 2048) == "Q4_K"
    assert name_type("token_embd.weight", 2048) == name_type("blk.0.ffn_down.weight", 8192) == "Q6_K"
    assert name_type("blk.4.attn_v.weight", 2048) == "Q4_K"
    assert name_type("altup_proj.weight", 2048) == name_type("blk.3.laurel_r.weight", 64) == "F16"
    assert name_type("blk.5.attn_q.weight", 96) == "Q8_0"  # no multiple of 256
    assert name_type("blk.5.attn_q.weight", 90) == "F16"  # nor of 32
    assert name_type("blk.5.attn_norm.weight", 2048) == "F32"
    assert name_type("blk.5.attn_q.weight", 96, "BF16") == "BF16"


def test_a_model_that_llama_cpp_cannot_run_is_refused_with_every_reason(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as error:
        write_gguf(tiny_folder, tmp_path / "model-F16.gguf", "F16", ABOUT)
    assert "2 layers have keys and values of their own, and it wants 20; it cuts small activations" in str(error.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="this checkpoint is llama"):
        check_architecture({"model_type": "llama"})
    text = read_settings(tiny_folder)["text_config"] | {"hidden_size_per_layer_input": 512, "laurel_rank": 65}
    with pytest.raises(
        ExportError, match="512 wide, and it takes 256; LAuReL has rank 65, and it takes 64; the feed-f"
    ):
        check_architecture(text | {"intermediate_size": [64, 64, 64, 128]})


def test_too_little_disk_leaves_nothing_behind(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "free_disk", lambda folder: 1000)
    with pytest.raises(ExportError, match=r"needs .* and the disk has .* \(1,000 bytes\) free"):
        write_gguf(llama_folder, tmp_path / "model-F16.gguf", "F16", ABOUT)
    assert not list(tmp_path.iterdir())


def test_a_write_that_breaks_off_leaves_no_file(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "append_tensors", fail)
    with pytest.raises(OSError, match="No space"):
        write_gguf(llama_folder, tmp_path / "model-F16.gguf", "F16", ABOUT)
    assert not list(tmp_path.iterdir())


def test_the_merged_model_is_made_on_the_way_and_removed(make_learned: Any, llama_folder: Path, tmp_path: Path) -> None:
    learned = make_learned({"model.id": str(llama_folder)})
    path = tmp_path / "models" / "quantized" / "model-Q8_0.gguf"
    assert export_gguf("Q8_0", *learned, path) == path
    assert sorted(file.name for file in path.parent.iterdir()) == ["README.md", "model-Q8_0.gguf"]
    assert read_field(path, "general.name") == "random-gemma3n-forgekit"
    first = path.read_bytes()
    merged.export_merged(*learned, tmp_path / "models" / "merged")
    export_gguf("Q8_0", *learned, path)  # now from the folder that stands there
    assert path.read_bytes() == first


def test_the_licence_is_the_one_of_the_bases_card(make_config: Any, tmp_path: Path) -> None:
    config = make_config({"model.id": "google/gemma-3n-E2B-it"})
    assert read_license(tmp_path, config) == "gemma"
    assert read_license(tmp_path, make_config()) == "gemma"  # random-gemma3n
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert read_license(tmp_path, config) == "apache-2.0"


def test_a_question_is_answered_from_the_file_alone(tmp_path: Path, make_config: Any) -> None:
    """The practice model, copied as GGUF, says word for word what it says in transformers."""
    from forgekit import generate_answer, load_model
    from forgekit.model.load import BUILT_IN

    path = write_gguf(BUILT_IN["tiny"], tmp_path / "alone.gguf", "F16", ABOUT)
    model, processor = load_model(make_config({"model.id": "tiny"}))
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "List: tea, rice."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "tea"}]},
        {"role": "user", "content": [{"type": "text", "text": "And then?"}]},
    ]
    for question in ("What is 2+2?", "Ana ordered 3 boxes of tea. Who ordered?", turns):
        expected = generate_answer(model, processor, question, 12, temperature=0, stream=False)
        assert ask_gguf(path, question, 12) == expected != ""


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such GGUF file. Name gguf:q8_0 in export.formats"):
        ask_gguf(tmp_path / "absent.gguf", "hi")
    (tmp_path / "bad.gguf").write_text("no")
    with pytest.raises(ExportError, match="llama.cpp cannot load this file"), open_gguf(tmp_path / "bad.gguf"):
        pass
