"""The fast path against the library's own forward: same loss, same gradients, whatever the batch looks like.

Both are in float64; what differs is the float32 that the library keeps inside of norms, rotary angles and the loss, so 1e-6.
"""

from typing import Any

import pytest

from forgekit.train.fast_path import disable_fast_path, enable_fast_path, get_fast_path

EXACT = 1e-6


def compare(small: Any, model: Any, batches: list[dict[str, Any]], asked: dict[str, Any] | None = None, **settings: Any) -> float:  # fmt: skip
    """The difference between the library's forward and the fast path, which must have been used for every batch."""
    disable_fast_path(model)
    right = small.gradients(model, batches, **asked or {})
    path = enable_fast_path(model, **settings)
    got = small.gradients(model, batches, **asked or {})
    assert path and path.batches == len(batches) and not path.fallbacks
    disable_fast_path(model)
    return small.difference(right, got)


@pytest.fixture(scope="module")
def text_model(small: Any) -> Any:
    return small.text_model()


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_give_the_library_s_loss_and_gradients(small: Any, text_model: Any, seed: int) -> None:
    batches = [small.draw_batch(1000 * seed + number) for number in range(seed % 3 + 1)]
    items = {"num_items_in_batch": sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)} if seed % 2 else {}
    assert compare(small, text_model, batches, items, memory=("high", "low")[seed % 2]) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_three_hundred_random_batches(small: Any, text_model: Any, part: int) -> None:
    for seed in range(30 * part, 30 * part + 30):
        assert compare(small, text_model, [small.draw_batch(7_000_000 + seed, longest=96)]) < EXACT, seed


@pytest.mark.parametrize("multiple", [8, 64])
def test_filling_up_to_a_multiple_changes_nothing(small: Any, text_model: Any, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from forgekit.train import row_skip, rows

    monkeypatch.setattr(row_skip, "choose_rows", lambda *arguments: rows.choose_rows(*arguments[:3], multiple))
    for seed in range(2):
        assert compare(small, text_model, [small.draw_batch(50 + seed)]) < EXACT


LAYERS = {"all": r"\d+", "below the sources": "0", "the sources of keys": "[12]", "the layers that share them": "[34]"}


@pytest.mark.parametrize("layers", LAYERS)
def test_adapters_in_each_part_of_the_model(small: Any, layers: str) -> None:
    model = small.add_lora(small.text_model(), LAYERS[layers])
    assert compare(small, model, [small.draw_batch(3), small.draw_batch(4)]) < EXACT


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]}], ids=["dora", "rslora", "head adapted", "head trained"])  # fmt: skip
def test_kinds_of_adapters(small: Any, settings: dict[str, Any]) -> None:
    model = small.add_lora(small.text_model(tie_word_embeddings=False), **settings)
    assert compare(small, model, [small.draw_batch(5)]) < EXACT


def test_a_frozen_head_in_small_chunks(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is computed with the loss; 64 tokens a chunk here, so that a batch takes several."""
    monkeypatch.setattr("forgekit.train.loss.CHUNK_LOGITS", 1)
    model = small.add_lora(small.text_model())
    batch = small.draw_batch(8)
    batch["labels"] = batch["input_ids"].clone()
    batch["attention_mask"] = None
    assert batch["labels"].numel() > 64
    assert compare(small, model, [batch]) < EXACT


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_any_number_of_sharing_layers(small: Any, shared: int) -> None:
    """None: rows leave in the last layer. One: only one kind of attention is shared."""
    model = small.text_model(shared=shared)
    assert compare(small, model, [small.draw_batch(6)]) < EXACT


def test_clipped_coefficients_stay_clipped(small: Any) -> None:
    model = small.text_model(altup_coef_clip=0.05)
    library = small.text_model(altup_coef_clip=0.05)
    batch = small.draw_batch(9)
    enable_fast_path(model)
    right, got = small.gradients(library, [batch]), small.gradients(model, [batch])
    assert small.difference(right, got) < EXACT
    for ours, theirs in zip(model.parameters(), library.parameters(), strict=True):
        assert (ours == theirs).all()  # the library clamps weights in its forward


def test_the_first_batches_do_not_wait_for_the_compiler(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[int] = []  # functions given to the compiler, after each batch
    functions: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: functions.append(function) or function)
    model = small.add_lora(small.text_model())
    batches = [small.draw_batch(12 + seed) for seed in range(3)]
    right = [small.gradients(model, [batch]) for batch in batches]
    path = enable_fast_path(model, compiled=True, memory="high", uncompiled_batches=2)
    for batch, expected in zip(batches, right, strict=True):
        assert small.difference(expected, small.gradients(model, [batch])) < EXACT
        asked.append(len(functions))
    assert path and asked[:2] == [0, 0] and asked[2] > 0
    disable_fast_path(model)


@pytest.mark.slow
def test_compiled_steps_serve_every_length_with_the_same_few_graphs(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Traced as for a GPU and run by torch itself: without the minutes of a code generator, and in float64."""
    import torch

    compile_function, graphs, after_two = torch.compile, [], 0

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager_decomp_partition(graph, inputs)

    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile_function(function, backend=count, fullgraph=True)
    )
    model = small.add_lora(small.text_model())
    for seed, memory in enumerate(["low", "high", "high", "low"]):
        batch = small.draw_batch(20 + seed)
        right = small.gradients(model, [batch])
        path = enable_fast_path(model, compiled=True, uncompiled_batches=0, memory=memory)
        assert small.difference(right, small.gradients(model, [batch])) < EXACT
        assert path and path.batches == 1
        disable_fast_path(model)
        after_two = len(graphs) if seed == 1 else after_two
    # lower layers sparse and dense, the source's keys, upper layers: each kept and computed again; logits: once for all lengths
    assert len(graphs) == after_two


def test_every_row_learned_and_one_token_learned(small: Any, text_model: Any) -> None:
    batch = small.draw_batch(10)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, 0] = -100
    first = batch["attention_mask"].argmax(1)
    batch["labels"][range(len(first)), first] = -100
    assert compare(small, text_model, [batch]) < EXACT
    one = {**batch, "labels": batch["labels"].clone().fill_(-100)}
    one["labels"][0, -1] = batch["input_ids"][0, -1]
    one["attention_mask"] = batch["attention_mask"].clone().fill_(1)
    assert compare(small, text_model, [one]) < EXACT


def test_a_batch_that_teaches_nothing_is_the_library_s_nan_or_zero(small: Any, text_model: Any) -> None:
    import math

    batch = small.draw_batch(11)
    batch["labels"] = batch["labels"].clone().fill_(-100)
    enable_fast_path(text_model)
    losses, _ = small.gradients(text_model, [batch])
    assert math.isnan(losses[0])
    losses, gradients = small.gradients(text_model, [batch], num_items_in_batch=5)
    assert losses == [0.0] and all((g == 0).all() for g in gradients.values())
    disable_fast_path(text_model)


def test_a_window_one_too_wide_turns_the_comparison_red(small: Any, text_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from forgekit.train import rows

    real = rows.find_first
    monkeypatch.setattr(rows, "find_first", lambda f, c, t, window: real(f, c, t, window and window + 1))
    assert compare(small, text_model, [small.draw_batch(3)]) > 1e-4


def test_keys_of_the_wrong_layer_turn_the_comparison_red(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.text_model()
    batch = small.draw_batch(3)
    right = small.gradients(model, [batch])
    enable_fast_path(model)
    attention = model.model.layers[4].self_attn
    monkeypatch.setattr(attention, "kv_shared_layer_index", 3 - attention.kv_shared_layer_index)
    assert small.difference(right, small.gradients(model, [batch])) > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_is_as_near_to_float32_as_the_library_s(small: Any, dtype: str) -> None:
    import torch

    model = small.add_lora(small.text_model(dtype="float32"))
    batch = small.draw_batch(12)
    truth = small.gradients(model, [batch])
    with torch.autocast("cpu", getattr(torch, dtype)):
        library = small.gradients(model, [batch])
        enable_fast_path(model)
        ours = small.gradients(model, [batch])
    assert small.difference(truth, ours) < 1.5 * small.difference(truth, library)
    assert ours[0] == pytest.approx(truth[0], rel=1e-2)


def test_bfloat16_weights(small: Any) -> None:
    model = small.add_lora(small.text_model(dtype="float32"))
    batch = small.draw_batch(12)
    truth = small.gradients(model, [batch])
    model.bfloat16()
    library = small.gradients(model, [batch])
    enable_fast_path(model)
    ours = small.gradients(model, [batch])
    assert small.difference(truth, ours) < 1.5 * small.difference(truth, library)


@pytest.mark.slow
def test_a_hundred_steps_give_the_library_s_curve(small: Any) -> None:
    """float32, AdamW; rounding grows with the steps."""
    import torch

    curves = []
    for fast in (False, True):
        model = small.add_lora(small.text_model(dtype="float32"))
        if fast:
            enable_fast_path(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        curve = []
        for step in range(100):
            loss = model(**small.draw_batch(step % 20, longest=32)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert sum(curves[1][80:]) < sum(curves[1][:20])


def test_full_evaluation_and_requests_for_everything_use_the_library(small: Any, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    model = small.text_model()
    batch = small.draw_batch(13)
    enable_fast_path(model)
    path = get_fast_path(model)
    assert path is not None
    asked = {"output_hidden_states": True}, {"labels": None}, {"use_cache": True}
    for request in asked:
        assert model(**{**batch, **request}).logits is not None
    assert path.batches == 0 and sum(path.fallbacks.values()) == 3
    printed = capsys.readouterr().out
    assert "output_hidden_states was asked for" in printed and "no labels were given" in printed
    model(**{**batch, "output_hidden_states": True})
    assert not capsys.readouterr().out  # said once
    assert model.eval()(**batch).logits is not None and path.batches == 0
    disable_fast_path(model)
    assert "forward" not in vars(model) and "forward" not in vars(model.model)


def test_a_label_on_padding_goes_to_the_library(small: Any) -> None:
    model = small.text_model()
    batch = small.draw_batch(14)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][0, :2] = 0
    batch["labels"][0, 1:3] = 5
    path = enable_fast_path(model)
    model(**batch)
    assert path and dict(path.fallbacks) == {"padding was given a label": 1}


def test_other_models_keep_their_forward(capsys: pytest.CaptureFixture[str], small: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    assert enable_fast_path(model) is None
    assert "LlamaForCausalLM is not Gemma 3n" in capsys.readouterr().out
    watched = small.text_model()
    watched.model.layers[1].register_forward_hook(lambda *_: None)
    assert enable_fast_path(watched) is None
    assert "a hook watches Gemma3nTextDecoderLayer of layer 1" in capsys.readouterr().out


def test_what_was_skipped_is_counted(small: Any, text_model: Any) -> None:
    import torch

    labels = torch.full((2, 40), -100)
    labels[:, 30:] = 7
    path = enable_fast_path(text_model)
    text_model(input_ids=torch.full((2, 40), 9), labels=labels)
    assert path is not None
    found = path.summarize()
    assert (found["lower_rows_skipped"], found["upper_rows_skipped"]) == (0.025, 0.75)  # the last token is not needed
    assert 1.5 < found["estimated_gain"] < 4 and "75% of the upper rows" in str(path)
    disable_fast_path(text_model)
