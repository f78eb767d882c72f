"""The fast path in use: media, attention kernels, TRL's contract, the trainer, and weights that wait elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, load_data, load_model, sft_trainer, start_run
from forgekit.train import attention, flash, rows
from forgekit.train.fast_path import disable_fast_path, enable_fast_path, get_fast_path


@pytest.fixture(scope="module")
def media_batch(tiny_folder: Path) -> Any:
    """The random model with all towers learning, and a batch of a picture, a clip and two lengths of text."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, Gemma3nForConditionalGeneration

    from forgekit.data.collate import Collator
    from forgekit.data.samples.tones import load_tones

    processor = AutoProcessor.from_pretrained(tiny_folder)
    model = Gemma3nForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parts = [
        [{"type": "image", "image": Image.linear_gradient("L").resize((64, 64)).convert("RGB")}],
        [{"type": "audio", "audio": load_tones(2)[0]["audio"]["array"]}],
        [],
        [],
    ]
    texts = [
        "What is it?",
        "Which keys?",
        "Say something that takes many more words than the others do, please.",
        "Hi.",
    ]
    chats = [
        [
            {"role": "user", "content": [*media, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": "seven tea"}]},
        ]
        for media, text in zip(parts, texts, strict=True)
    ]
    return model, Collator(processor)([{"messages": chat} for chat in chats])


def test_pictures_sound_and_text_with_learning_towers(small: Any, media_batch: Any) -> None:
    """In float32, where the sums of two towers and four layers differ by some 1e-6."""
    model, batch = media_batch
    right = small.gradients(model, [batch])
    towers = {name.split(".")[1] for name in right[1]}
    assert {"vision_tower", "audio_tower", "embed_vision", "embed_audio", "language_model"} <= towers
    path = enable_fast_path(model)
    got = small.gradients(model, [batch])
    assert path and path.batches == 1 and path.tokens < path.places
    assert small.difference(right, got) < 1e-4
    disable_fast_path(model)


def test_token_by_token_output_is_what_trl_asks_for(small: Any) -> None:
    import torch

    model = small.add_lora(small.text_model())
    batch = small.draw_batch(3)
    labels = batch["labels"][:, 1:]
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_probs = logits.log_softmax(-1)
    learned = labels != -100
    enable_fast_path(model.train())
    found = model(**batch, fused_lm_head=True, num_items_in_batch=torch.tensor(7))
    wanted = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0] * learned
    entropy = -(log_probs.exp() * log_probs).sum(-1) * learned
    assert torch.allclose(found.log_probs.double(), wanted, atol=1e-5) and (found.label_mask == learned).all()
    assert torch.allclose(found.entropy.double(), entropy, atol=1e-4)
    assert (found.is_top1 == ((logits.argmax(-1) == labels) & learned)).all()
    assert found.loss.item() == pytest.approx(-wanted.sum().item() / 7, rel=1e-5)
    found.log_probs.sum().backward()  # TRL sums these itself
    assert any(p.grad is not None and (p.grad != 0).any() for p in model.parameters())


def attend_row_by_row(q: Any, k: Any, v: Any, starts: Any, key_starts: Any, limits: Any) -> Any:
    """What flash attention promises: each row apart, the last query beside the last key, a window of keys behind each."""
    import torch

    longest, longest_keys, window = limits.tolist()
    out = []
    for row in range(len(starts) - 1):
        a, b = q[starts[row] : starts[row + 1]], slice(int(key_starts[row]), int(key_starts[row + 1]))
        keys, values = (x[b].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        assert len(a) <= longest and len(keys) <= longest_keys
        distance = torch.arange(len(a))[:, None] + len(keys) - len(a) - torch.arange(len(keys))
        allowed = (distance >= 0) & ((distance <= window) if window >= 0 else True)
        assert allowed.any(1).all()  # no query is left without a key, the filling's neither
        scores = torch.einsum("qhd,khd->hqk", a, keys).masked_fill(~allowed, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(out)


@pytest.fixture
def flash_by_contract(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts `attend_row_by_row` in place of the GPU's operator; returns a list that grows with each call."""
    calls: list[int] = []

    def stand_in(*arguments: Any) -> Any:
        calls.append(1)
        return attend_row_by_row(*arguments), None

    monkeypatch.setattr(attention, "flash", stand_in)
    return calls


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_rows_given_to_flash_attention_are_the_right_ones(
    small: Any, flash_by_contract: list[int], multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgekit.train import row_skip

    monkeypatch.setattr(row_skip, "choose_rows", lambda *arguments: rows.choose_rows(*arguments[:3], multiple))
    model = small.text_model()
    for seed in range(4):
        batch = small.draw_batch(30 + seed)
        right = small.gradients(model, [batch])
        enable_fast_path(model, kernel="flash")
        flash_by_contract.clear()
        assert small.difference(right, small.gradients(model, [batch])) < 1e-6
        assert len(flash_by_contract) >= 2  # the lower layers always; the upper ones where no gap is in a row
        disable_fast_path(model)


@pytest.mark.parametrize("kernel", ["flash", "padded"])
@pytest.mark.parametrize("multiple", [1, 64])
def test_a_batch_that_teaches_nothing_changes_nothing(
    small: Any, flash_by_contract: list[int], multiple: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the rows that fill up a round of several processes; the query that stands for the learned ones sees a key, too."""
    from forgekit.train import row_skip

    monkeypatch.setattr(row_skip, "choose_rows", lambda *arguments: rows.choose_rows(*arguments[:3], multiple))
    model = small.text_model()
    enable_fast_path(model, kernel=kernel)
    for seed in range(4):
        batch = small.draw_batch(30 + seed)
        batch["labels"] = batch["labels"].fill_(-100)
        losses, gradients = small.gradients(model, [batch | {"num_items_in_batch": 7}])
        assert losses == [0.0] and gradients and not any(gradient.any() for gradient in gradients.values())
    assert len(flash_by_contract) == (4 * 5 if kernel == "flash" else 0)


def test_answers_at_the_end_use_flash_attention_in_every_layer(small: Any, flash_by_contract: list[int]) -> None:
    batch = small.draw_batch(31)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, : batch["labels"].shape[1] * 3 // 4] = -100
    model = small.text_model()
    right = small.gradients(model, [batch])
    enable_fast_path(model, kernel="flash")
    flash_by_contract.clear()
    assert small.difference(right, small.gradients(model, [batch])) < 1e-6
    assert len(flash_by_contract) == 5


def test_flash_is_not_chosen_without_a_gpu() -> None:
    import torch

    assert not attention.flash_is_right(torch.device("cpu"), torch.bfloat16, 4, 2, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 256])
def test_flash_agrees_with_padded_attention_on_a_gpu(width: int) -> None:
    import torch

    assert attention.flash_is_right(torch.device("cuda"), torch.bfloat16, 8, 2, width)


def test_operators_tell_a_compiler_the_right_shapes() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(10, 4, 8), torch.empty(16, 2, 8)
        starts, limits = torch.empty(3, dtype=torch.int32), torch.empty(3, dtype=torch.int64)
        out, logsumexp = flash.flash(q, k, k, starts, starts, limits)
        assert out.shape == q.shape and logsumexp.shape == (4, 10)
        grads = flash.flash_backward(out, q, k, k, out, logsumexp, starts, starts, limits)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]


def run_trainer(make_config: Any, name: str, **settings: Any) -> tuple[list[float], Any, Any]:
    """Train; return losses, trainer and run."""
    config = make_config({f"train.{key}": value for key, value in settings.items()})
    model, processor = load_model(config)
    run = start_run(config, name)
    trainer = sft_trainer(add_adapter(model, config), processor, load_data(config, processor), config, run)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer, run


def test_the_trainer_s_losses_are_the_library_s_and_the_run_records_what_was_skipped(make_config: Any, capsys: Any) -> None:  # fmt: skip
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 3}
    library, _, plain = run_trainer(make_config, "off", fast="off", **settings)
    fast, trainer, run = run_trainer(make_config, "on", fast="on", memory="low", **settings)
    assert fast == pytest.approx(library, rel=1e-5)
    record = json.loads((run.path / "run.json").read_text())["fast_path"]
    assert record["batches"] >= 6 and 0.1 < record["upper_rows_skipped"] < 1 and not record["library_batches"]
    assert "fast_path" not in json.loads((plain.path / "run.json").read_text())
    printed = capsys.readouterr().out
    assert "fast path: on, attention by padded, not compiled: no GPU" in printed and "of the upper rows" in printed
    own = vars(trainer.model.get_base_model()).get("forward")  # TRL put one there
    assert get_fast_path(trainer.model) is None and getattr(own, "_forgekit", None) is None


def test_compiling_pays_from_a_number_of_batches(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from forgekit.train import speed

    monkeypatch.setattr(speed, "choose_device", lambda config: "cuda")
    config = make_config()

    def trainer(steps: int) -> Any:
        settings = {
            "max_steps": steps,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
            "world_size": 2,
        }
        return SimpleNamespace(args=SimpleNamespace(**settings), state=SimpleNamespace(global_step=100))

    assert speed.choose_compile(trainer(150), config)[0]
    compiled, why = speed.choose_compile(trainer(149), config)
    assert not compiled and "298 batches would not pay for it" in why
    assert speed.choose_compile(trainer(1), make_config({"train.compile": "on"}))[0]
    assert speed.count_batches_left(trainer(150)) == 100


def test_rows_of_a_parked_table_are_bit_for_bit_the_same(small: Any) -> None:
    import torch

    from forgekit.train.park import park_table

    model = small.text_model().requires_grad_(False)
    text, ids = model.model, torch.tensor([[5, 9, 5, 7], [9, 9, 1, 0]])
    before = text.embed_tokens_per_layer(ids)
    with park_table(text) as parked:
        assert parked and (text.embed_tokens_per_layer(ids) == before).all()
    assert "forward" not in vars(text.embed_tokens_per_layer)
    text.embed_tokens_per_layer.requires_grad_(True)
    with park_table(text) as parked:
        assert not parked  # a table that learns stays


def test_whoever_sends_the_whole_model_somewhere_passes_by_what_is_parked(small: Any) -> None:
    """accelerate sends it to the GPU as training begins; here it is sent to another precision, which takes the same way."""
    import torch

    from forgekit.train.park import park, park_table

    model = small.text_model(dtype="float32").requires_grad_(False)
    table, layer = model.model.embed_tokens_per_layer, model.model.layers[0].mlp
    with park_table(model.model), park(layer, torch.device("cpu")):
        model.double()
        assert model.lm_head.weight.dtype == torch.float64
        assert table.weight.dtype == layer.up_proj.weight.dtype == torch.float32
        layer(torch.zeros(1, 1, 32))  # it is called, so it is a part of the model again
        model.double()
        assert layer.up_proj.weight.dtype == torch.float64 and table.weight.dtype == torch.float32
    model.double()
    assert table.weight.dtype == torch.float64


@pytest.mark.gpu
def test_parked_weights_leave_the_gpu_and_come_back(media_batch: Any) -> None:
    import torch

    from forgekit.train.park import park_table, park_towers

    model, batch = media_batch
    model.cuda().requires_grad_(False)
    batch = {name: value.cuda() for name, value in batch.items()}
    with torch.no_grad():
        before = model.eval()(**batch).loss
        with park_towers(model, {"audio"}) as parked, park_table(model.model.language_model) as moved:
            assert parked == ["vision_tower"] and moved
            model.to("cuda")
            assert next(model.model.vision_tower.parameters()).device.type == "cpu"
            assert model.model.language_model.embed_tokens_per_layer.weight.device.type == "cpu"
            assert model(**batch).loss == before  # a tower that is called comes back
        assert model(**batch).loss == before
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    model.cpu().requires_grad_(True).train()
