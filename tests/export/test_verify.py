"""The verification holds for what was exported and fails for anything else: a mutant for each defect a file can have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, load_config, load_data, load_model, verify_export
from forgekit.errors import ExportError
from forgekit.export import verify_merged as module
from forgekit.export.adapter import export_adapter
from forgekit.export.compare import Reference, measure_distance, read_logits
from forgekit.export.merged import export_merged
from forgekit.export.shard import read_header
from forgekit.export.verdict import Verdict
from forgekit.export.verify_adapter import (
    AGREEMENT,
    DIVERGENCE,
    DIVERGENCE_HALF,
    FLOAT32_MERGED,
    FLOAT32_RELOAD,
    verify_adapter,
)
from forgekit.export.verify_merged import verify_merged
from tests.export.drawn import draw_adapter


@pytest.fixture(scope="module")
def config(tiny_folder: Path, orders_file: Path) -> Any:
    settings = {
        "data.path": str(orders_file),
        "data.test": 6,
        "model.id": str(tiny_folder),
        "model.engine": "huggingface",
        "model.device": "cpu",
        "model.load_in": "16bit",
        "adapter.r": 4,
        "adapter.layers": ["attention", "mlp", "vision", "audio"],
    }
    return load_config(None, settings)


@pytest.fixture(scope="module")
def trained(config: Any) -> tuple[Any, Any, Any]:
    """A model whose adapter says something, its processor, and held-out rows."""

    model, processor = load_model(config)
    model = add_adapter(model, config)
    draw_adapter(model, 5)
    rows = load_data(config, processor)["test"]
    return model.eval(), processor, rows


@pytest.fixture(scope="module")
def reference(trained: Any) -> Reference:
    """Computed once: each mutant costs the reading back alone."""
    return Reference(*trained)


@pytest.fixture(scope="module")
def originals(trained: Any, config: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model, processor, _ = trained
    place = tmp_path_factory.mktemp("exports")
    return {
        "adapter": export_adapter(model, processor, config, place / "lora"),
        "merged": export_merged(model, processor, config, place / "merged"),
    }


VERIFY = {"adapter": verify_adapter, "merged": verify_merged}


@pytest.fixture
def verify(reference: Reference, originals: dict[str, Path], config: Any, tmp_path: Path) -> Any:
    """Returns a function: (format, change) -> the verdict on a copy that was changed."""

    def run(kind: str, change: Callable[[Path], None]) -> Verdict:
        folder = Path(shutil.copytree(originals[kind], tmp_path / kind))
        change(folder)
        return VERIFY[kind](reference, folder, config)

    return run


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def swap(tensors: dict[str, Any]) -> None:
    first, second = (next(name for name in sorted(tensors) if f"layers.{number}.mlp.up_proj" in name) for number in (0, 1))  # fmt: skip
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


def zero(tensors: dict[str, Any]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def flip(folder: Path) -> None:
    """Turn the lowest bit of one weight: no logit shows it."""
    (file,) = folder.glob("*.safetensors")
    place = next(tensor.start for name, tensor in read_header(file).items() if "layers.1.mlp.down_proj" in name)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def flip_header(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[20] ^= 64
    file.write_bytes(content)


def cut(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def change_template(folder: Path) -> None:
    edit(folder / "chat_template.jinja", "<start_of_turn>", "<turn>")


def drop_word(folder: Path) -> None:
    """A vocabulary with its last plain word missing."""
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = saved["model"]["vocab"]
    special = {token["content"] for token in saved["added_tokens"]}
    merged = {part if isinstance(part, str) else "".join(part) for part in saved["model"].get("merges", [])}
    last = max((word for word in vocabulary if word not in special), key=vocabulary.get)
    del vocabulary[last]
    saved["model"]["merges"] = [m for m in saved["model"].get("merges", []) if "".join(m) != last and last not in m]
    assert merged
    (folder / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")


def one_word_more(folder: Path) -> None:
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved["text_config"]["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(saved), encoding="utf-8")


def keep_base(folder: Path, base: Path) -> None:
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")


def double_scale(folder: Path) -> None:
    edit(folder / "adapter_config.json", '"lora_alpha": 16', '"lora_alpha": 32')


def name_another_base(folder: Path) -> None:
    edit(folder / "adapter_config.json", "random-gemma3n", "another")


SAME = "largest difference of logits"
MUTANTS: list[tuple[str, Any, set[str]]] = [
    ("adapter", lambda folder: rewrite(folder, zero), {"tensors that differ", SAME}),
    ("adapter", lambda folder: rewrite(folder, swap), {"tensors that differ", SAME}),
    ("adapter", lambda folder: rewrite(folder, lambda t: t.pop(sorted(t)[0])), {"tensors missing or unexpected"}),
    ("adapter", flip, {"tensors that differ"}),
    ("adapter", flip_header, {"tensors missing or unexpected", SAME}),
    ("adapter", cut, {"tensors missing or unexpected", SAME}),
    ("adapter", change_template, {"rows that template or tokenizer write otherwise"}),
    ("adapter", drop_word, {"words more or fewer"}),
    ("adapter", double_scale, {SAME}),
    ("adapter", name_another_base, {"other base than the recipe's"}),
    ("merged", lambda folder: rewrite(folder, swap), {"tensors with other bytes than base or sum", SAME}),
    ("merged", flip, {"tensors with other bytes than base or sum"}),
    ("merged", flip_header, {"tensors missing, unexpected or of another shape", SAME}),
    ("merged", cut, {"tensors missing, unexpected or of another shape", SAME}),
    ("merged", change_template, {"rows that template or tokenizer write otherwise"}),
    ("merged", drop_word, {"words more or fewer"}),
    ("merged", one_word_more, {SAME}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_a_mutant_is_caught(verify: Any, number: int) -> None:
    kind, change, expected = MUTANTS[number]
    verdict = verify(kind, change)
    assert not verdict.verified
    assert expected <= {check.name for check in verdict.failed}


@pytest.mark.parametrize("kind", VERIFY)
def test_the_export_itself_is_verified(verify: Any, kind: str) -> None:
    verdict = verify(kind, lambda folder: None)
    assert verdict.verified and verdict.rows == 6 and verdict.tokens > 50
    assert verdict.expected_bytes <= verdict.file_bytes < verdict.expected_bytes + 20_000


def test_the_base_in_place_of_the_merged_model_is_caught(verify: Any, tiny_folder: Path) -> None:
    verdict = verify("merged", lambda folder: keep_base(folder, tiny_folder))
    failed = {check.name for check in verdict.failed}
    assert {SAME, "difference from the base, logits", "divergence left, as a share of the base's"} <= failed


def test_what_learns_is_as_before(trained: Any, reference: Reference, originals: Any, config: Any) -> None:
    model = trained[0]
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    verify_adapter(reference, originals["adapter"], config)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert any(before.values()) and list(model.peft_config) == ["default"] and not model.training


def test_verify_export_writes_its_figures(trained: Any, originals: Any, config: Any, tmp_path: Path) -> None:
    model, processor, rows = trained
    folder = Path(shutil.copytree(originals["adapter"], tmp_path / "lora"))
    verdict = verify_export(model, processor, folder, rows, config)
    saved = json.loads((folder / "verify.json").read_text(encoding="utf-8"))
    assert saved["verified"] is True and saved["file_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert saved["checks"] == [
        {"name": c.name, "value": c.value, "bound": c.bound, "held": c.held} for c in verdict.checks
    ]


def test_a_folder_that_is_no_export(trained: Any, config: Any, tmp_path: Path) -> None:
    model, processor, rows = trained
    with pytest.raises(ExportError, match="is no export: it holds neither an adapter nor a model"):
        verify_export(model, processor, tmp_path, rows, config)


def test_without_rows_it_compares_chats_in_words(trained: Any) -> None:
    model, processor, _ = trained
    assert len(Reference(model, processor, None).trained) == 8


def test_logits_of_a_batch_are_those_of_single_rows(reference: Reference) -> None:
    alone = [read_logits(reference.model, reference.processor, [chat])[0] for chat in reference.chats[:3]]
    assert measure_distance(alone, reference.trained[:3]).largest < 1e-4


def test_after_training_on_packed_weights_the_reference_is_the_16_bit_base_with_the_adapter(
    reference: Reference, originals: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here nothing is packed, so both references agree; a mutant of the merged file is still caught by it."""
    monkeypatch.setattr(module, "is_packed", lambda model: True)
    verdict = verify_merged(reference, originals["merged"], config)
    assert verdict.verified
    unpacked = module.read_unpacked(reference, config)
    assert measure_distance(unpacked, reference.trained).largest < 1e-5


def test_the_readme_names_the_bounds(project_folder: Path) -> None:
    text = (project_folder / "README.md").read_text(encoding="utf-8")
    lines = {
        "| adapter, float32: largest difference of two logits": f"{FLOAT32_RELOAD:g}".replace("e-0", "e-"),
        "| merged, float32: largest difference of two logits": f"{FLOAT32_MERGED:.0e}".replace("e-0", "e-"),
        "or one tied with it": f"{DIVERGENCE:.0e}; {AGREEMENT:.0%}".replace("e-0", "e-").replace("%", " %"),
        "| the same where the trained model computes in 16 bit too": f"{DIVERGENCE_HALF:.0e}; {AGREEMENT:.0%}".replace("e-0", "e-").replace("%", " %"),
        "as a share of the base's; where it computes in 16 bit": f"{module.KEPT}; {module.KEPT_HALF}",
    }  # fmt: skip
    for start, bound in lines.items():
        (line,) = [line for line in text.splitlines() if start in line]
        assert line.endswith(f"| {bound} |"), line
