"""The training line against a loop written out by hand, and mutants that make the two differ."""

import json
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, load_data, load_model, sft_trainer, start_run
from forgekit.data import collate
from forgekit.data.collate import IGNORE

STEPS, WARMUP, RATE, DECAY, CLIP = 5, 2, 2e-3, 0.01, 0.3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_trainer(config: Any, name: str) -> Any:
    """Return a trainer of a fresh model, and let it note the rows of every batch in `trainer.seen`."""
    model, processor = load_model(config)
    run = start_run(config, name)
    trainer = sft_trainer(add_adapter(model, config), processor, load_data(config, processor), config, run)
    collator, trainer.seen = trainer.data_collator, []

    def note(examples: list[dict[str, Any]]) -> Any:
        trainer.seen.append([example["messages"] for example in examples])
        return collator(examples)

    trainer.data_collator = note
    return trainer


def train(config: Any, name: str = "run") -> tuple[list[float], Any]:
    """Train; return the loss that was logged at each step, and the trainer."""
    trainer = make_trainer(config, name)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def train_by_hand(checkpoint: Path, batches: list[list[Any]], accumulation: int, seed: int) -> tuple[list[float], Any]:
    """Train with torch, transformers and PEFT alone on the rows of `batches`; return the loss of each step, and the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import AutoProcessor, Gemma3nForConditionalGeneration, set_seed

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = Gemma3nForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    set_seed(seed)
    targets = rf".*language_model.*\.({'|'.join(TARGETS)})"
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    model.train()
    losses = []
    for step in range(STEPS):
        parts = [encode_by_hand(rows, processor) for rows in batches[step * accumulation : (step + 1) * accumulation]]
        tokens = sum(int((labels != IGNORE).sum()) for _, _, labels in parts)
        total = 0.0
        for ids, mask, labels in parts:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
            (loss / tokens).backward()
            total += float(loss.detach())
        losses.append(total / tokens)
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        share = step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)
        optimizer.param_groups[0]["lr"] = RATE * share
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


def encode_by_hand(rows: list[Any], processor: Any) -> tuple[Any, Any, Any]:
    """Write each row as prompt and answer, tokenise the two apart, learn the second, and pad on the left."""
    import torch

    tokenizer = processor.tokenizer
    pairs = []
    for user, assistant in rows:
        prompt = f"<bos><start_of_turn>user\n{user['content'][0]['text']}<end_of_turn>\n<start_of_turn>model\n"
        answer = f"{assistant['content'][0]['text']}<end_of_turn>"
        pairs.append([tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer, "\n")])
    longest = max(len(a) + len(b) + len(c) for a, b, c in pairs)
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, (prompt, answer, end) in enumerate(pairs):
        start = longest - len(prompt) - len(answer) - len(end)
        ids[row, start:] = torch.tensor(prompt + answer + end)
        mask[row, start:] = 1
        labels[row, start + len(prompt) : longest - len(end)] = torch.tensor(answer)
    return ids, mask, labels


def short_run(make_config: Any, folder: Path, accumulation: int, fast: str = "auto") -> Any:
    """Return a run on answers of one token up to thirty, so that batches hold unequal numbers of learned tokens."""
    answers = ["7", '{"city": "Lima", "items": ["tea", "soap", "rice"]}', "Monday at the latest", "no"]
    rows = [{"prompt": f"Question {number}?", "completion": answers[number % 4]} for number in range(40)]
    path = folder / "unequal.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return make_config(
        {
            "data.path": str(path),
            "train.max_steps": STEPS,
            "train.warmup_steps": WARMUP,
            "train.learning_rate": RATE,
            "train.weight_decay": DECAY,
            "train.fast": fast,
            "train.max_grad_norm": CLIP,  # below the gradients' length, so that clipping takes part
            "train.per_device_train_batch_size": 3,
            "train.gradient_accumulation_steps": accumulation,
        }
    )


def check_against_hand(make_config: Any, folder: Path, accumulation: int, fast: str = "auto") -> None:
    """Compare five losses and the trained adapters.

    The same sums in another order differ by some 1e-7 of a loss in fp32. Adam divides each gradient by its own size, so where
    a gradient is next to nothing its rounding becomes a whole step, and five steps reach 5e-6 of a loss.
    """
    config = short_run(make_config, folder, accumulation, fast)
    ours, trainer = train(config)
    assert len(trainer.seen) >= STEPS * accumulation  # the loader collates one batch ahead
    theirs, model = train_by_hand(Path(config.model.id), trainer.seen, accumulation, config.train.seed)
    assert ours == pytest.approx(theirs, rel=1e-5), "losses differ"
    learned = dict(model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert (parameter - learned[name]).norm() < 0.01 * learned[name].norm(), name
    assert ours[-1] < ours[0] - 0.02
    grads = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(grads) > CLIP


@pytest.mark.parametrize(("accumulation", "fast"), [(1, "on"), (2, "on"), (2, "off")])
def test_five_steps_equal_a_loop_written_by_hand(
    make_config: Any, tmp_path: Path, accumulation: int, fast: str
) -> None:
    check_against_hand(make_config, tmp_path, accumulation, fast)


MASKS = {
    "shifted by one": lambda learned: [False, *learned[:-1]],
    "prompt learned": lambda learned: [True] * len(learned),
}


@pytest.mark.parametrize("mutant", MASKS)
def test_a_wrong_mask_makes_the_losses_differ(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    real = collate.mark_learned
    monkeypatch.setattr(collate, "mark_learned", lambda ids, markers: MASKS[mutant](real(ids, markers)))
    monkeypatch.setattr("forgekit.data.check.check_rows", lambda chats, processor, length: [None] * len(chats))
    with pytest.raises(AssertionError, match="losses differ"):
        check_against_hand(make_config, tmp_path, 1)


def test_a_wrong_template_makes_the_losses_differ(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = collate.render_chats
    right, wrong = "<start_of_turn>user\n", "<start_of_turn>human\n"
    monkeypatch.setattr(collate, "render_chats", lambda *args: [text.replace(right, wrong) for text in real(*args)])
    with pytest.raises(AssertionError, match="losses differ"):
        check_against_hand(make_config, tmp_path, 1)


def test_a_mean_of_means_over_accumulated_batches_turns_the_check_red(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgekit.train.sft.weigh_tokens_alike", lambda trainer: None)
    with pytest.raises(AssertionError, match="losses differ"):
        check_against_hand(make_config, tmp_path, 2, fast="off")


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(make_config: Any) -> None:
    settings = {"train.max_steps": 3, "adapter.lora_dropout": 0.1}
    first, again = train(make_config(settings), "first")[0], train(make_config(settings), "again")[0]
    assert first == again
    assert train(make_config({**settings, "train.seed": 1}), "other")[0] != first


def check_checkpointing(make_config: Any, reentrant: bool) -> None:
    """Compare three steps with and without gradient checkpointing: same losses, same trained adapters."""
    results = {}
    for switch in ("off", "on"):
        config = make_config({"train.max_steps": 3, "train.gradient_checkpointing": switch, "train.fast": "off"})
        trainer = make_trainer(config, f"run-{switch}")
        assert trainer.args.gradient_checkpointing is (switch == "on")
        if switch == "on":
            assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
            if reentrant:
                trainer.args.gradient_checkpointing_kwargs["use_reentrant"] = True
                trainer.model.enable_input_require_grads()
        trainer.train()
        results[switch] = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, value in results["off"].items():
        assert (value - results["on"][name]).abs().max() < 1e-6, name


def test_gradient_checkpointing_changes_nothing(make_config: Any) -> None:
    check_checkpointing(make_config, reentrant=False)


def test_reentrant_checkpointing_turns_that_check_red(make_config: Any) -> None:
    """It cuts the gradient of the keys and values that the upper layers share."""
    with pytest.raises(AssertionError, match="self_attn"):
        check_checkpointing(make_config, reentrant=True)


@pytest.fixture
def overfitting(make_config: Any, tmp_path: Path) -> Any:
    """Returns a function: settings of `train` -> Config of a run whose held-out answers are nothing like the trained ones."""
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": f"Count to {number}.", "completion": "qjzxw QJZXW " * 4} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fast = {"max_steps": 6, "warmup_steps": 0, "learning_rate": 0.05, "lr_scheduler_type": "constant", "eval_steps": 1}
    return lambda **settings: make_config(
        {"data.validation": str(path), **{f"train.{name}": value for name, value in (fast | settings).items()}}
    )


def held_out(trainer: Any) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def check_best_is_loaded(trainer: Any) -> None:
    """Measure the held-out loss of the model in memory: it is the lowest that was scored, and not the last."""
    from forgekit.evaluate.loss import measure_loss

    scores = held_out(trainer)
    best = scores.index(min(scores)) + 1
    assert best < len(scores) and scores[-1] > min(scores) + 0.01
    chats = [example["messages"] for example in trainer.eval_dataset]
    loss, _ = measure_loss(trainer.model, trainer.processing_class, chats, 8)
    assert loss == pytest.approx(min(scores), abs=1e-5), "not the best weights"
    stats = json.loads((Path(trainer.args.output_dir).parent / "metrics" / "training-stats.json").read_text())
    assert stats["best_checkpoint"] == f"checkpoint-{best}"
    assert stats["best_held_out_loss"] == pytest.approx(min(scores))
    assert (Path(trainer.args.output_dir) / f"checkpoint-{best}" / "adapter_model.safetensors").is_file()


def test_best_checkpoint_is_kept_and_loaded_at_the_end(overfitting: Any) -> None:
    trainer = train(overfitting())[1]
    assert len(held_out(trainer)) == 6
    check_best_is_loaded(trainer)


def test_keeping_the_last_weights_turns_that_check_red(overfitting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: None)
    with pytest.raises(AssertionError, match="not the best weights"):
        check_best_is_loaded(train(overfitting())[1])


def test_early_stopping_waits_for_the_patience_and_then_stops(overfitting: Any) -> None:
    trainer = train(overfitting(early_stopping=2, max_steps=30))[1]
    scores = held_out(trainer)
    assert len(scores) == trainer.state.global_step == scores.index(min(scores)) + 1 + 2 < 30


def test_held_out_rows_are_scored_every_eval_steps_and_never_trained_on(make_config: Any) -> None:
    config = make_config({"data.validation": 10, "train.max_steps": 6, "train.eval_steps": 3})
    trainer = train(config)[1]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [3, 6]
    validation = [str(example["messages"]) for example in trainer.eval_dataset]
    trained = {str(messages) for rows in trainer.seen[: 6 * 4] for messages in rows if str(messages) not in validation}
    assert len(validation) == 10 and trained
    assert not {str(example["messages"]) for example in trainer.train_dataset} & set(validation)


def test_without_eval_steps_nothing_is_scored_and_the_last_step_is_kept(make_config: Any) -> None:
    trainer = train(make_config({"train.max_steps": 1}))[1]
    assert not held_out(trainer)
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_name_that_transformers_does_not_know_is_a_sentence(make_config: Any) -> None:
    from forgekit.errors import ConfigError

    with pytest.raises(ConfigError, match="train: transformers refuses a setting: .*adamw_typo"):
        make_trainer(make_config({"train.optim": "adamw_typo"}), "run")
