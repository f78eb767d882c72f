"""A GGUF file that is not the trained model is found out, whatever is wrong with it, and kept apart."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from forgekit import check_gates, export_model, start_run
from forgekit.data.messages import check_example, get_answer
from forgekit.data.samples.orders import load_orders
from forgekit.evaluate.generate import generate_answers
from forgekit.export import gguf, gguf_metadata, gguf_verify
from forgekit.export import model as export_module
from forgekit.export.compare import Reference
from forgekit.export.gguf import export_gguf, write_gguf
from forgekit.export.gguf_reference import divide_as_llama, list_chats, list_texts, read_reference
from forgekit.export.gguf_tensors import Tensor
from forgekit.export.gguf_verify import OWN_ANSWER, answer_chats, verify_gguf
from forgekit.export.verdict import Verdict
from tests.export.drawn import draw_adapter

SAME = "mean KL with llama.cpp's cut-off, nats a token"


def make_rows(number: int, answer: Any = lambda order: order["item"]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "messages": check_example(
                    {
                        "messages": [
                            {"role": "user", "content": row["message"]},
                            {"role": "assistant", "content": answer(row["order"])},
                        ]
                    }
                )
            }
            for row in load_orders(number)
        ]
    )


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare four rows instead of sixteen."""
    monkeypatch.setattr(gguf_verify, "ROWS", 4)
    monkeypatch.setattr(gguf_verify, "PERPLEXITY_ROWS", 4)


@pytest.fixture(scope="module")
def learned(llama_folder: Path, orders_file: Path) -> Any:
    """A random model with an adapter that says something, made once; no test changes it."""
    return make_learned_model(llama_folder, orders_file)


def make_learned_model(folder: Path, orders_file: Path, size: float = 0.1) -> Any:
    """Returns (model, processor, config); every matrix of the adapter is drawn, none is zero."""

    from forgekit import add_adapter, load_config, load_model

    settings = {"data.path": str(orders_file), "model.id": str(folder), "model.engine": "huggingface"}
    settings |= {"model.device": "cpu", "model.load_in": "16bit", "adapter.r": 8, "evaluate.max_new_tokens": 8}
    config = load_config(None, settings)
    model, processor = load_model(config)
    model = add_adapter(model, config)
    draw_adapter(model, 11, size)
    return model.eval(), processor, config


def test_the_perplexity_of_a_file_is_the_models(learned: Any, tmp_path: Path) -> None:
    import math

    from forgekit.evaluate.loss import measure_loss
    from forgekit.export.gguf_reference import measure_perplexity

    model, processor, config = learned
    chats = [row["messages"] for row in make_rows(3)]
    expected = math.exp(measure_loss(model, processor, chats, 3)[0])
    found = measure_perplexity(export_gguf("F16", *learned, tmp_path / "model-F16.gguf"), processor, chats)
    assert found == pytest.approx(expected, rel=1e-2) and expected > 50


def find_values(verdict: Verdict) -> dict[str, float]:
    return {check.name: check.value for check in verdict.checks}


def export_and_verify(learned: Any, path: Path, kind: str = "F16", rows: Any = None) -> Verdict:
    model, processor, config = learned
    export_gguf(kind, model, processor, config, path)
    return verify_gguf(kind, Reference(model, processor, rows or make_rows(4)), path, config)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_each_kind_is_the_trained_model_within_its_bounds(learned: Any, tmp_path: Path, kind: str) -> None:
    verdict = export_and_verify(learned, tmp_path / f"model-{kind}.gguf", kind)
    assert verdict.verified, verdict.describe()
    assert len(verdict.checks) == 8 and verdict.rows == 4 and verdict.tokens >= 8
    assert verdict.file_bytes == verdict.expected_bytes == (tmp_path / f"model-{kind}.gguf").stat().st_size
    assert kind in verdict.notes["types"] and verdict.score == verdict.merged_score == 0
    if kind == "F32":  # nothing is rounded: only the order of sums differs
        assert find_values(verdict)[SAME] < 1e-4


def test_four_bit_types_at_hidden_256(make_llama_folder: Any, orders_file: Path, tmp_path: Path) -> None:
    """At smaller widths K types fall back to Q8_0, so this one model is wide enough for blocks of 256."""
    folder = make_llama_folder(tmp_path / "wide", 256, intermediate_size=[256] * 22, head_dim=64)
    learned = make_learned_model(folder, orders_file, 0.05)
    verdict = export_and_verify(learned, tmp_path / "model-Q4_K_M.gguf", "Q4_K_M", make_rows(4, json.dumps))
    types = verdict.notes["types"]
    assert types["Q4_K"] > 100 and types["Q6_K"] > 10 and "Q8_0" not in types
    assert verdict.verified, verdict.describe()


def test_a_file_without_the_adapter_is_found_out(learned: Any, llama_folder: Path, tmp_path: Path) -> None:
    model, processor, config = learned
    path = write_gguf(llama_folder, tmp_path / "model-F16.gguf", "F16", {"name": "x", "base": None, "license": "other"})
    verdict = verify_gguf("F16", Reference(model, processor, make_rows(4)), path, config)
    assert {SAME, "mean KL as a share of the base's"} <= {check.name for check in verdict.failed}


def test_two_tensors_in_each_others_place_are_found_out(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf.plan_tensors

    def swap(folder: Path, settings: dict[str, Any]) -> list[Tensor]:
        names = {"blk.3.attn_q.weight": "blk.4.attn_q.weight", "blk.4.attn_q.weight": "blk.3.attn_q.weight"}
        return [Tensor(names.get(one.name, one.name), one.shape, one.rows) for one in real(folder, settings)]

    monkeypatch.setattr(gguf, "plan_tensors", swap)
    verdict = export_and_verify(learned, tmp_path / "model-F16.gguf")
    assert SAME in {check.name for check in verdict.failed}


def test_another_template_is_found_out(learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gguf.add_metadata

    def change(writer: Any, folder: Path, *rest: Any) -> None:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("<end_of_turn>\\n", "<end_of_turn>"))
        real(writer, folder, *rest)

    monkeypatch.setattr(gguf, "add_metadata", change)
    verdict = export_and_verify(learned, tmp_path / "model-F16.gguf")
    assert {check.name.split(" of ")[0] for check in verdict.failed} == {"chats"}


def test_a_vocabulary_that_is_off_by_one_is_found_out(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf_metadata.read_tokenizer

    def shift(folder: Path, size: int) -> Any:
        tokens, *rest = real(folder, size)
        pieces = tokens[300:-20]
        return [*tokens[:300], pieces[-1], *pieces[:-1], *tokens[-20:]], *rest

    monkeypatch.setattr(gguf_metadata, "read_tokenizer", shift)
    verdict = export_and_verify(learned, tmp_path / "model-F16.gguf")
    assert "texts" in {check.name.split(" of ")[0] for check in verdict.failed}


@pytest.mark.parametrize("place", [0.001, 0.5, 0.999])
def test_a_flipped_byte_is_found_out_before_llama_cpp_reads_it(learned: Any, tmp_path: Path, place: float) -> None:
    model, processor, config = learned
    path = export_gguf("Q8_0", model, processor, config, tmp_path / "model-Q8_0.gguf")
    with path.open("r+b") as file:
        file.seek(int(place * path.stat().st_size))
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    verdict = verify_gguf("Q8_0", Reference(model, processor, None), path, config)
    assert [check.name for check in verdict.failed] == ["files whose bytes differ from those written"]


def test_a_bound_that_fails_keeps_the_file_apart_and_the_run_says_so(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor, config = learned
    config = config.change({"export.formats": ["gguf:f16", "gguf:q8_0"]}, "test")
    monkeypatch.setitem(gguf_verify.BOUNDS, "Q8_0", (0.0, 0.01, 0.5))
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    run = start_run(config, "apart")
    written = export_model(model, processor, config, run, dataset=make_rows(4))
    assert written == {
        "gguf:f16": run.path / "models/quantized/model-F16.gguf",
        "gguf:q8_0": run.path / "models/unverified/quantized/model-Q8_0.gguf",
    }
    assert run.record["verified"] == {"gguf:f16": True, "gguf:q8_0": False}
    found = sorted(path.relative_to(run.path / "models").as_posix() for path in (run.path / "models").rglob("*.*"))
    assert found == [
        "quantized/README.md",
        "quantized/model-F16.gguf",
        "quantized/model-F16.verify.json",
        "quantized/verify.json",
        "unverified/quantized/README.md",
        "unverified/quantized/model-Q8_0.gguf",
        "unverified/quantized/model-Q8_0.verify.json",
        "unverified/quantized/verify.json",
    ]
    assert check_gates(run.path, {"quantization-verified": {}}).verdicts[0].verdict == "failed"
    verdict = json.loads((run.path / "models/quantized/model-F16.verify.json").read_text())
    assert verdict["verified"] and verdict["types"]["F16"] > 100 and verdict["score"] == verdict["merged_score"] == 0
    assert "NOT VERIFIED" in capsys.readouterr().out


def test_after_4_bit_training_the_merged_model_is_what_the_file_has_to_equal(learned: Any, tmp_path: Path) -> None:
    """A reference with 4-bit weights would fail every bound; here the weights in memory are shaken in their place."""
    import torch

    model, processor, config = learned
    path = export_gguf("F16", model, processor, config, tmp_path / "model-F16.gguf")
    before = {name: parameter.data for name, parameter in model.named_parameters() if "base_layer" in name}
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name] * (1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    trained = Reference(model, processor, make_rows(4))
    wrong = verify_gguf("F16", trained, path, config)
    verdict = verify_gguf("F16", trained, path, config.change({"model.load_in": "4bit"}, "test"))
    for name, parameter in model.named_parameters():
        parameter.data = before.get(name, parameter.data)
    assert not wrong.verified and verdict.verified, verdict.describe()


def test_the_other_cut_off_is_llama_cpps_and_is_put_back(llama_folder: Path) -> None:
    import torch
    from transformers import Gemma3nForConditionalGeneration

    model = Gemma3nForConditionalGeneration.from_pretrained(llama_folder).eval()
    sparse = [module for module in model.modules() if getattr(module, "activation_sparsity", 0) > 0]
    x = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(2))
    before = sparse[0]._gaussian_topk(x)
    ids = [[2, 300, 301, 302]]
    plain = read_reference(model, ids, [0])[0]
    with divide_as_llama(model):
        expected = torch.relu(x - x.mean(-1, keepdim=True) - 1.6448536 * x.std(-1, keepdim=True))
        assert torch.allclose(sparse[0]._gaussian_topk(x), expected, atol=1e-5)
        assert numpy.abs(read_reference(model, ids, [0])[0] - plain).max() > 1e-5
    assert len(sparse) == 10 and torch.equal(sparse[0]._gaussian_topk(x), before)
    assert not torch.equal(before, expected)
    assert numpy.array_equal(read_reference(model, ids, [0])[0], plain)


def test_rows_read_together_are_the_rows_read_alone(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Gemma3nForConditionalGeneration

    model = Gemma3nForConditionalGeneration.from_pretrained(llama_folder).eval()
    rows = [[2, 300, 301], [2, 310, 311, 312, 313, 314], [2, 320]]
    together = read_reference(model, rows, [0, 2, 1])
    monkeypatch.setattr("forgekit.export.gguf_reference.TABLE", 1)
    for one, row, first, table in zip(read_reference(model, rows, [0, 2, 1]), rows, (0, 2, 1), together, strict=True):
        assert one.shape == table.shape == (len(row) - first, model.config.text_config.vocab_size)
        assert numpy.allclose(one, table, atol=1e-4)


def test_rows_with_media_are_compared_by_their_text() -> None:
    picture = {"type": "image", "image": None}
    rows = [
        [
            {"role": "user", "content": [picture, {"type": "text", "text": f"Which digit is this? {i}"}]},
            {"role": "assistant", "content": [{"type": "text", "text": str(i)}]},
        ]
        for i in range(3)
    ]
    chats, own = list_chats(rows, 6)
    assert own == 0 and len(chats) == 6
    assert chats[0][0]["content"] == [{"type": "text", "text": "Which digit is this? 0"}]
    whole = [example["messages"] for example in make_rows(4)]
    assert list_chats([*rows, *whole], 3) == (whole[:3], 3)
    texts = list_texts(chats, 200)
    assert len(texts) == 200 == len(set(texts)) + (200 - len(set(texts))) and len(set(texts)) > 190


def test_where_no_held_out_row_is_whole_perplexity_is_of_the_models_own_answers(
    learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, config = learned
    chats, own = list_chats([], 4)
    known = answer_chats(model, processor, chats)
    assert own == 0 and [chat[:-1] for chat in known] == [chat[:-1] for chat in chats]
    assert [get_answer(chat) for chat in known] == generate_answers(model, processor, chats, OWN_ANSWER)
    assert [get_answer(chat) for chat in known] != [get_answer(chat) for chat in chats]
    given: list[Any] = []
    measure = gguf_verify.compare_perplexity
    monkeypatch.setattr(gguf_verify, "compare_perplexity", lambda *all: given.append(all[3]) or measure(*all))
    path = export_gguf("F16", model, processor, config, tmp_path / "model-F16.gguf")
    assert verify_gguf("F16", Reference(model, processor, None), path, config).verified
    rows = make_rows(5)
    assert verify_gguf("F16", Reference(model, processor, rows), path, config).verified
    held_out = [example["messages"] for example in rows][:4]
    assert given == [gguf_verify.mark_rows(some, processor) for some in (known, held_out)]


def test_the_formats_have_their_place() -> None:
    from forgekit.export.formats import FORMATS, find_format
    from forgekit.settings import Export

    assert FORMATS["gguf:q8_0"].place == "models/quantized/model-Q8_0.gguf"
    assert find_format(Path("runs/x/models/quantized/model-Q4_K_M.gguf")) == "gguf:q4_k_m"
    assert Export(formats=[*FORMATS]).formats == tuple(FORMATS) == tuple(export_module.FORMATS)
