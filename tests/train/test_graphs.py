"""Batches by recordings: the same losses and gradients, whatever comes in between.

On a CPU nothing can be recorded, so a stand-in runs what was to be recorded once more and puts its results where a replay would; all
around it is the real thing. The tests marked `gpu` record.
"""

from collections.abc import Callable
from typing import Any

import pytest

from forgekit.train.fast_path import disable_fast_path, enable_fast_path
from forgekit.train.graphs import SEEN, Graphs

EXACT = 1e-6


def rerun(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Stand in for `capture`: a replay runs the function again and fills its first result."""
    import torch

    def as_list(result: Any) -> list[Any]:
        return [value for value in (result if isinstance(result, list) else [result]) if value is not None]

    first = function()

    def replay() -> None:
        with torch.enable_grad():
            found = function()
        for old, new in zip(as_list(first), as_list(found), strict=True):
            old.detach().copy_(new.detach())

    return replay, first


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns a function that turns the fast path of a model on, with recordings by the stand-in."""
    import torch

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def enable(model: Any, **settings: Any) -> Any:
        path = enable_fast_path(model, compiled=True, uncompiled_batches=0, memory="high", **settings)
        assert path
        path.graphs = Graphs(path.text, capture=rerun)
        return path

    return enable


def test_a_recorded_batch_gives_the_library_s_loss_and_gradients(small: Any, record: Any) -> None:
    """Two shapes in turn, other words each time: padding on either side, several turns with gaps, rows that teach nothing."""
    model = small.add_lora(small.text_model())
    plans = [small.draw_batch(30), small.draw_batch(35)]
    batches = [change_words(plan, seed) for seed in range(SEEN + 2) for plan in plans]
    right = [small.gradients(model, [batch]) for batch in batches]
    path = record(model)
    for number, (batch, expected) in enumerate(zip(batches, right, strict=True)):
        assert small.difference(expected, small.gradients(model, [batch])) < EXACT, number
    assert len(path.graphs.recordings) == 2 and path.graphs.batches == 2 * 3
    assert path.summarize()["recorded_batches"] == 6 and "; 6 of 8 batches by CUDA graphs" in str(path)


def change_words(batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same batch of other words."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, batch["input_ids"].shape, generator=generator)
    labels = torch.where(batch["labels"] == -100, -100, ids)
    return batch | {"input_ids": ids, "labels": labels}


def plain_batch(length: int, learned: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """Two rows without padding, of which so many last tokens are learned."""
    import torch

    ids = torch.randint(3, 120, (2, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(length) < length - torch.tensor(learned)[:, None], -100, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}


def test_batches_that_differ_a_little_share_a_recording(small: Any, record: Any) -> None:
    model = small.add_lora(small.text_model())
    batches = [plain_batch(40, (9, 9)), plain_batch(38, (9, 9)), plain_batch(41, (4, 15)), plain_batch(39, (20, 1))]
    right = [small.gradients(model, [batch]) for batch in batches]
    path = record(model)
    for batch, expected in zip(batches, right, strict=True):
        assert small.difference(expected, small.gradients(model, [batch])) < EXACT
    assert len(path.graphs.recordings) == 1 and path.graphs.batches == 3


def test_gradients_add_up_over_batches_and_steps_change_weights(small: Any, record: Any) -> None:
    """Accumulation over three batches, an optimiser that changes weights in place, and gradients set to none between."""
    import torch

    curves = []
    for recorded in (False, True):
        model = small.add_lora(small.text_model())
        if recorded:
            path = record(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(4):
            for number in range(3):
                loss = model(**change_words(small.draw_batch(30), 10 * step + number)).loss
                (loss / 3).backward()
                losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        curves.append(losses)
    assert path.graphs.batches == 11
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert len(set(curves[0])) == 12


def test_a_batch_whose_backward_is_to_come_keeps_its_memory(small: Any, record: Any) -> None:
    """Two forwards, then both backwards: the second is computed without its recording."""
    model = small.add_lora(small.text_model())
    batches = [change_words(small.draw_batch(30), seed) for seed in range(2)]
    right = small.gradients(model, batches)
    path = record(model)
    for _ in range(SEEN):
        small.gradients(model, [batches[0]])
    before = path.graphs.batches
    model.zero_grad(set_to_none=True)
    first, second = (model(**batch).loss for batch in batches)
    first.backward()
    second.backward()
    got = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    assert small.difference(right, ([float(first.detach()), float(second.detach())], got)) < EXACT
    assert path.graphs.batches == before + 1
    model(**batches[0])  # nobody asks for its backward, and nobody holds it
    small.gradients(model, [batches[0]])
    assert path.graphs.batches == before + 3


def test_a_backward_that_comes_too_late_is_an_error() -> None:
    """A replay on a GPU tells autograd of no change, so nobody else would notice."""
    import torch

    from forgekit.train.rows import choose_rows

    layer = torch.nn.Linear(4, 4)
    batch = plain_batch(20, (9, 9))
    rows = choose_rows(batch["labels"], None, {"any": None})
    assert rows
    graphs, x = Graphs(layer, capture=rerun), torch.randn(rows.flat.numel(), 4)

    def run() -> Any:
        return graphs.run(lambda x, per_layer, rows: layer(x)[rows.upper.index], x, None, rows)

    for _ in range(SEEN):
        run().sum().backward()
    late = run().sum()
    late.backward(retain_graph=True)
    run().sum().backward()
    with pytest.raises(RuntimeError, match="after the next batch had taken its memory"):
        late.backward()
    assert graphs.batches == 3


@pytest.mark.parametrize("change", ["weights move", "adapter off", "fewer learn", "eval and back"])
def test_a_changed_model_is_recorded_anew(small: Any, record: Any, change: str) -> None:
    import torch

    model = small.add_lora(small.text_model())
    path = record(model)
    batch = small.draw_batch(30)
    for _ in range(SEEN):
        small.gradients(model, [batch])
    assert path.graphs.batches == 1
    weight = path.text.layers[0].mlp.up_proj.lora_B.default.weight
    if change == "weights move":
        with torch.no_grad():
            weight.data = weight.data * 2
    elif change == "fewer learn":
        weight.requires_grad_(False)
    elif change == "adapter off":
        for module in path.text.layers[1].modules():
            if hasattr(module, "enable_adapters"):
                module.enable_adapters(False)
    else:
        model.eval()
        model.train()
    got = small.gradients(model, [batch])
    assert path.graphs.batches == (2 if change == "eval and back" else 1)
    disable_fast_path(model)
    assert small.difference(small.gradients(model, [batch]), got) < EXACT


def test_a_learning_tower_gets_its_gradient_through_a_recording(small: Any, record: Any) -> None:
    """The embeddings themselves learn here, as they do below a tower or where the word table is trained."""
    model = small.text_model()
    batches = [change_words(small.draw_batch(30), seed) for seed in range(SEEN + 1)]
    right = [small.gradients(model, [batch]) for batch in batches]
    path = record(model)
    for batch, expected in zip(batches, right, strict=True):
        assert small.difference(expected, small.gradients(model, [batch])) < EXACT
    assert path.graphs.batches == 2
    assert "model.embed_tokens_per_layer.weight" in right[0][1]


def test_dropout_and_whole_weights_are_not_recorded(small: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = small.draw_batch(30)
    dropped = small.add_lora(small.text_model(), lora_dropout=0.1)
    path = record(dropped)
    for _ in range(SEEN):
        small.gradients(dropped, [batch])
    assert not path.graphs.recordings and "dropout" in path.graphs.why_not
    monkeypatch.setattr("forgekit.train.graphs.LEARNED_BYTES", 1000)
    model = small.add_lora(small.text_model())
    path = record(model)
    for _ in range(SEEN):
        small.gradients(model, [batch])
    assert not path.graphs.recordings and path.graphs.why_not == "more learns than an adapter"


def test_what_cannot_be_recorded_is_said_once_and_computed_without(small: Any, record: Any, capsys: Any) -> None:
    def refuse(function: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = small.add_lora(small.text_model())
    batch = small.draw_batch(30)
    right = small.gradients(model, [batch])
    path = record(model)
    path.graphs.capture = refuse
    for _ in range(SEEN + 2):
        assert small.difference(right, small.gradients(model, [batch])) < EXACT
    printed = capsys.readouterr().out
    assert printed.count("no CUDA graphs, because recording failed: operation not permitted") == 1
    assert path.graphs.batches == 0


def test_a_recording_that_reads_old_places_is_found(small: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: learned places of the batch that was recorded, not of this one."""
    import torch

    model = small.add_lora(small.text_model())
    batches = [plain_batch(40, (9, 9)), plain_batch(40, (4, 14))]
    right = small.gradients(model, [batches[1]])
    path = record(model)
    for _ in range(SEEN):
        small.gradients(model, [batches[0]])
    monkeypatch.setattr(torch, "_foreach_copy_", lambda old, new: None)
    assert small.difference(right, small.gradients(model, [batches[1]])) > 1e-2
    assert path.graphs.batches == 2


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("kernel", ["padded", "flash"])
def test_recordings_on_a_gpu_give_what_compiled_layers_give(small: Any, memory: str, kernel: str) -> None:
    """In bfloat16 with autocast, gradients accumulated over shapes in turn, weights that change; the flash kernel adds in any order."""
    import torch

    curves = {}
    for recorded in (False, True):
        model = small.add_lora(small.text_model(dtype="bfloat16", head_dim=64, hidden_size=64)).cuda()
        path = enable_fast_path(model, compiled=True, recorded=recorded, memory=memory, kernel=kernel)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for step in range(6):
            for length in (40, 300):
                batch = plain_batch(length, (9, 14), seed=step)
                batch = {name: value.cuda() if hasattr(value, "cuda") else value for name, value in batch.items()}
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        curves[recorded] = losses
        assert path and (not recorded or (path.graphs and path.graphs.why_not is None and path.graphs.batches >= 6)), path.graphs  # fmt: skip
        disable_fast_path(model)
    assert curves[True] == pytest.approx(curves[False], rel=2e-3)
