"""The guard passes on a right stack, leaves no trace, and goes red for each way in which a stack can be wrong."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from forgekit import ModelError, add_adapter, check_training, load_data, load_model
from forgekit.train import guard, sft


@pytest.fixture
def parts(make_config: Any) -> Any:
    """Returns a function: settings -> (adapted model, processor, training rows, config)."""

    def make(**settings: Any) -> Any:
        config = make_config({name.replace("__", "."): value for name, value in settings.items()})
        model, processor = load_model(config)
        data = load_data(config, processor)
        return add_adapter(model, config), processor, data["train"], config

    return make


def failures(*arguments: Any) -> list[str]:
    """Names of the failed checks; the guard has to stop the run when there are any."""
    try:
        return check_training(*arguments).failed
    except ModelError as error:
        return [check for check in CHECKS if f"BAD {check}" in str(error)]


CHECKS = (
    "learned tokens",
    "one <bos> a row",
    "loss without a cache",
    "gradients with checkpointing",
    "gradients of the fast path",
    "finite values",
    "a gradient for each parameter",
    "a step changes the answer",
)


def test_a_right_stack_passes_every_check_and_nothing_is_left_behind(parts: Any, capsys: Any) -> None:
    import torch

    arguments = parts(train__gradient_checkpointing="on", adapter__lora_dropout=0.1)
    model = arguments[0].train()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before = {n: (p.clone(), p.grad) for n, p in model.named_parameters()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    report = check_training(*arguments)
    assert [check.name for check in report.checks] == [*CHECKS] and report.passed
    assert (torch.rand(3) == expected).all()
    for name, parameter in model.named_parameters():
        assert (parameter == before[name][0]).all() and parameter.grad is before[name][1], name
    assert model.training and not model.is_gradient_checkpointing
    assert all("forward" not in vars(module) for module in model.modules())
    assert {m.p for n, m in model.named_modules() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)} == {0.1}
    assert "ok  gradients of the fast path: differ by" in capsys.readouterr().out


def test_half_precision_is_compared_in_float32_and_put_back(parts: Any) -> None:
    """In bfloat16 itself, sharp attention can put more than half of a gradient between two right ways to it."""
    import torch

    arguments = parts(model__dtype="bfloat16")
    model = arguments[0]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = check_training(*arguments)
    found = next(check.found for check in report.checks if check.name == "gradients of the fast path")
    assert report.passed and found.endswith("0.001 is allowed")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name
    assert torch.bfloat16 in {parameter.dtype for parameter in before.values()}


def test_the_packaged_model_takes_two_seconds(parts: Any) -> None:
    arguments = parts(model__id="tiny")
    started = time.process_time()
    assert check_training(*arguments).passed
    assert time.process_time() - started < 2


def test_sharing_through_a_cache_alone_turns_it_red(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers up to 5.5: without a cache the sharing layers run on keys that nobody trained."""
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAttention

    real = Gemma3nTextAttention.forward

    def forward(self: Any, *args: Any, past_key_values: Any = None, shared_kv_states: Any = None, **kwargs: Any) -> Any:
        states = shared_kv_states
        if past_key_values is None and self.is_kv_shared_layer:
            key, value = shared_kv_states[self.kv_shared_layer_index]
            states = {self.kv_shared_layer_index: (key.flip(-1), value.flip(-1))}
        return real(self, *args, past_key_values=past_key_values, shared_kv_states=states, **kwargs)

    monkeypatch.setattr(Gemma3nTextAttention, "forward", forward)
    assert failures(*parts()) == ["loss without a cache", "gradients of the fast path"]


def test_reentrant_checkpointing_turns_it_red(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "CHECKPOINTING", {"use_reentrant": True})
    arguments = parts(train__gradient_checkpointing="on")
    arguments[0].enable_input_require_grads()
    assert failures(*arguments) == ["gradients with checkpointing"]


def test_reentrant_checkpointing_that_a_model_came_with_is_found(parts: Any) -> None:
    arguments = parts()
    arguments[0].enable_input_require_grads()
    arguments[0].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert failures(*arguments) == ["gradients with checkpointing"]


def test_a_masked_row_turns_it_red(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from forgekit.data import collate

    monkeypatch.setattr(collate, "mark_learned", lambda ids, markers: [False] * len(ids))
    assert failures(*parts()) == ["learned tokens"]


def test_a_second_bos_turns_it_red(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from forgekit.data import collate

    arguments = parts()
    real = collate.render_chats
    monkeypatch.setattr(collate, "render_chats", lambda *args: ["<bos>" + text for text in real(*args)])
    assert failures(*arguments) == ["one <bos> a row"]


def test_a_frozen_adapter_turns_it_red(parts: Any) -> None:
    arguments = parts()
    for parameter in arguments[0].parameters():
        parameter.requires_grad_(False)
    assert failures(*arguments) == ["a gradient for each parameter"]


def test_a_parameter_that_nothing_reaches_is_named(parts: Any) -> None:
    """An adapter on the sound tower, and rows of text."""
    arguments = parts(adapter__layers=["attention", "audio"], train__guard="warn")
    report = check_training(*arguments)
    assert report.failed == ["a gradient for each parameter"]
    assert "No row of the batch holds what audio needs" in str(report)


def test_an_adapter_that_is_switched_off_turns_it_red(parts: Any) -> None:
    arguments = parts()
    for name, module in arguments[0].named_modules():
        if name.endswith("_proj") and hasattr(module, "scaling"):
            module.scaling = {"default": 0.0}
    assert "a step changes the answer" in failures(*arguments)


def test_nan_turns_it_red(parts: Any) -> None:
    arguments = parts(train__fast="off")
    norm = arguments[0].get_base_model().model.language_model.norm
    norm.weight.data[0] = float("nan")
    assert "finite values" in failures(*arguments)


def test_a_wrong_fast_path_turns_it_red(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from forgekit.train import rows

    real = rows.find_first
    monkeypatch.setattr(rows, "find_first", lambda f, c, t, window: real(f, c, t, 3))
    assert failures(*parts()) == ["gradients of the fast path"]


def test_warn_reports_and_goes_on(parts: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(guard.GRADIENT_TOLERANCE, "float32", -1.0)
    report = check_training(*parts(train__guard="warn"))
    assert report.failed == ["gradients with checkpointing", "gradients of the fast path"]
    assert "-> A reentrant checkpoint cuts the gradient" in capsys.readouterr().out


def test_rows_with_and_without_pictures_are_both_tried(parts: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    picture = [{"type": "image", "image": str(tmp_path / "red.png")}, {"type": "text", "text": "Colour?"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}
        for content in [*["What?"] * 4, picture]
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = parts(data__path=str(tmp_path / "mixed.jsonl"), adapter__layers=["attention", "vision"])
    assert check_training(*arguments).passed


@pytest.mark.parametrize(("guarded", "state"), [(True, "ok"), (False, "bad")])
def test_the_doctor_examines_a_recipe(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool, state: str) -> None:  # fmt: skip
    import yaml

    from forgekit.doctor import examine_recipe

    if not guarded:
        monkeypatch.setitem(guard.GRADIENT_TOLERANCE, "float32", -1.0)
    config = make_config()
    recipe = tmp_path / "recipe.yaml"
    model = {"id": config.model.id, "engine": "huggingface", "device": "cpu", "load_in": "16bit", "max_length": 256}
    recipe.write_text(yaml.safe_dump({"data": {"path": config.data.path}, "model": model}))
    found = {finding.what.split(":")[0]: finding.state for finding in examine_recipe(str(recipe))}
    assert found["gradients with checkpointing"] == found["gradients of the fast path"] == state
    assert found["learned tokens"] == "ok"
