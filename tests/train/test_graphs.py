"""Batches by recordings: the same losses and gradients, whatever comes in between.

On a CPU a stand-in notes the operations (torch's own, below autograd) and runs them again on the same tensors, as a CUDA graph does:
no Python runs again. All around it is the real thing. The tests marked `gpu` record.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

from forgekit.train.fast_path import disable_fast_path, enable_fast_path
from forgekit.train.graphs import SEEN, Graphs, Ticket
from forgekit.train.recording import bound
from forgekit.train.rows import choose_rows, fill_up

EXACT = 1e-6


def tape(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Stand in for `capture`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    operations: list[tuple[Any, Any, Any, Any]] = []

    class Tape(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operation(*args, **(kwargs or {}))
            operations.append((operation, args, kwargs or {}, result))
            return result

    def list_tensors(values: Any) -> list[Any]:
        return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

    with Tape():
        first = function()

    def replay() -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for operation, args, kwargs, result in operations:
                inputs = {value.untyped_storage().data_ptr() for value in list_tensors((args, kwargs))}
                found = operation(*args, **kwargs)
                for old, new in zip(list_tensors(result), list_tensors(found), strict=True):
                    if (
                        old.untyped_storage().data_ptr() not in inputs and old.numel()
                    ):  # else a view, or changed in place
                        old.detach().copy_(new.detach())

    return replay, first


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns a function that turns the fast path of a model on, with recordings by the stand-in."""
    import torch

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def enable(model: Any, **settings: Any) -> Any:
        path = enable_fast_path(model, compiled=True, uncompiled_batches=0, **{"memory": "high"} | settings)
        assert path
        path.graphs = Graphs(path.text, capture=tape)
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
    batches = [plain_batch(40, (9, 9)), plain_batch(38, (9, 9)), plain_batch(41, (4, 15)), plain_batch(39, (13, 1))]
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
    model(**small.draw_batch(30)).loss.backward()
    fixed = {gradient.data_ptr() for gradient in path.graphs.workshop.gradients}
    assert fixed and not fixed & {p.grad.data_ptr() for p in model.parameters() if p.grad is not None}
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert len(set(curves[0])) == 12


def test_a_batch_whose_backward_is_to_come_keeps_its_memory(small: Any, record: Any) -> None:
    """Two forwards, then both backwards: the second is computed without its recording."""
    model = small.add_lora(small.text_model())
    batches = [change_words(small.draw_batch(30), seed) for seed in range(2)]
    right, small_right = small.gradients(model, batches), small.gradients(model, [batches[0]])
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
    longer = plain_batch(100, (9, 9))
    for _ in range(SEEN):  # nor does a shape that comes often enough meanwhile
        loss = model(**batches[0]).loss
        model(**longer).loss.backward()
        model.zero_grad(set_to_none=True)
        loss.backward()
        got = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        assert small.difference(small_right, ([float(loss.detach())], got)) < EXACT
    assert len(path.graphs.recordings) == 1
    before += SEEN
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
    graphs, x = Graphs(layer, capture=tape), torch.randn(rows.flat.numel(), 4)

    def run() -> Any:
        return graphs.run(lambda x, per_layer, rows: layer(x)[rows.upper.index], x, None, rows)

    for _ in range(SEEN):
        run().sum().backward()
    late, again = run().sum(), None
    late.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a recorded batch has one backward"):
        late.backward()
    before = graphs.turn
    again = run().sum()
    graphs.turn = before + 2  # as if another batch had begun
    with pytest.raises(RuntimeError, match="before the next batch begins"):
        again.backward()
    assert graphs.batches == 3


def scale_adapter(layer: Any) -> None:
    layer.mlp.up_proj.scaling["default"] *= 3


def turn_adapters_off(layer: Any) -> None:
    for module in layer.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(False)


def move_a_weight(layer: Any) -> None:
    weight = layer.mlp.up_proj.lora_B.default.weight
    weight.data = weight.data * 2


def let_a_weight_rest(layer: Any) -> None:
    layer.mlp.up_proj.lora_B.default.weight.requires_grad_(False)


def put_a_new_weight(layer: Any) -> None:
    import torch

    part = layer.mlp.up_proj.lora_B.default
    part.weight = torch.nn.Parameter(part.weight.data)


def put_another_buffer(layer: Any) -> None:
    layer.altup.router_input_scale = layer.altup.router_input_scale * 2


def clip_coefficients(layer: Any) -> None:
    layer.config.altup_coef_clip = 0.05


def put_another_module(layer: Any) -> None:
    import copy

    layer.mlp.act_fn = copy.deepcopy(layer.mlp.act_fn)
    layer.input_layernorm = copy.deepcopy(layer.input_layernorm)
    layer.input_layernorm.weight.data.mul_(1.5)


def watch_a_module(layer: Any) -> None:
    layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 1.5)


CHANGES = (scale_adapter, turn_adapters_off, move_a_weight, let_a_weight_rest, put_a_new_weight, put_another_buffer, clip_coefficients, put_another_module, watch_a_module)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_not_run_as_it_was_recorded(small: Any, record: Any, change: Callable[[Any], None]) -> None:
    model = small.add_lora(small.text_model())
    path = record(model)
    batch = small.draw_batch(30)
    for _ in range(SEEN):
        small.gradients(model, [batch])
    assert path.graphs.batches == 1
    change(path.text.layers[1])
    got = small.gradients(model, [batch])
    assert path.graphs.batches == 1 and not path.graphs.recordings
    small.gradients(model, [batch])
    assert path.graphs.batches == (1 if change is watch_a_module else 2)
    disable_fast_path(model)
    assert small.difference(small.gradients(model, [batch]), got) < EXACT


def test_a_score_in_between_changes_nothing(small: Any, record: Any) -> None:
    model = small.add_lora(small.text_model())
    path = record(model)
    batch = small.draw_batch(30)
    for _ in range(SEEN):
        small.gradients(model, [batch])
    model.eval()
    model(**batch)
    model.train()
    small.gradients(model, [batch])
    assert path.graphs.batches == 2


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("mutant", [False, True])
def test_weights_are_cast_anew_in_each_batch(small: Any, record: Any, monkeypatch: pytest.MonkeyPatch, memory: str, mutant: bool) -> None:  # fmt: skip
    """Under autocast, which keeps the casts of a forward: a recording that read kept ones would train on old weights."""
    import weakref

    import torch

    if mutant:
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    model = small.add_lora(small.text_model(dtype="float32"))
    path = record(model, memory=memory)
    batch = plain_batch(60, (20, 9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def run() -> tuple[list[float], dict[str, Any]]:
        with torch.autocast("cpu", torch.bfloat16):
            return small.gradients(model, [batch])

    for _ in range(SEEN + 2):
        run()
        optimizer.step()
    if mutant:  # the comparison of a new recording already finds it
        assert "off what it recorded" in path.graphs.why_not and not path.graphs.batches
        return
    before = path.graphs.batches
    recorded = run()
    assert path.graphs.batches == before + 1
    ticket = Ticket()
    path.graphs.ticket = weakref.ref(ticket)
    assert small.difference(run(), recorded) < 1e-5
    assert path.graphs.batches == before + 1


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
    import torch

    batch = small.draw_batch(30)
    dropped = small.add_lora(small.text_model(), lora_dropout=0.1)
    path = record(dropped)
    for _ in range(SEEN):
        small.gradients(dropped, [batch])
    assert not path.graphs.recordings and "dropout" in path.graphs.unfit
    for module in dropped.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for _ in range(SEEN):
        small.gradients(dropped, [batch])
    assert path.graphs.unfit is None and path.graphs.batches == 1
    monkeypatch.setattr("forgekit.train.graphs.LEARNED_BYTES", 1000)
    model = small.add_lora(small.text_model())
    path = record(model)
    for _ in range(SEEN):
        small.gradients(model, [batch])
    assert not path.graphs.recordings and path.graphs.unfit == "more learns than an adapter"


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


def stand_still(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """A recording that never runs again."""
    return lambda: None, function()


def read_old_inputs(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """A recording that gives what it gave when it was made."""
    import torch

    replay, result = tape(function, pool)
    values = [value for value in (result if isinstance(result, list) else [result]) if value is not None]
    kept = [value.clone() for value in values]
    return lambda: [old.detach().copy_(new) for old, new in zip(values, kept, strict=True)] and None, result if torch else None  # fmt: skip


@pytest.mark.parametrize("broken", [stand_still, read_old_inputs])
def test_a_wrong_recording_is_found_before_it_is_used(small: Any, record: Any, broken: Any, capsys: Any) -> None:
    model = small.add_lora(small.text_model())
    batch = small.draw_batch(30)
    right = small.gradients(model, [batch])
    path = record(model)
    path.graphs.capture = broken
    for _ in range(SEEN + 1):
        assert small.difference(right, small.gradients(model, [batch])) < EXACT
    assert "off what it recorded" in path.graphs.why_not and path.graphs.batches == 0
    assert capsys.readouterr().out.count("no CUDA graphs, because a recording is") == 1


def test_recordings_give_their_memory_to_a_batch_that_needs_it(small: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A longer batch that comes without a recording, and a score."""
    import torch

    from forgekit.train import row_skip

    run_decoder = row_skip.run_decoder
    model = small.add_lora(small.text_model())
    long, short = plain_batch(100, (9, 9)), small.draw_batch(30)
    right = small.gradients(model, [long])
    path = record(model)
    for _ in range(SEEN):
        small.gradients(model, [short])

    def run_out(text: Any, x: Any, *rest: Any) -> Any:
        if path.graphs.recordings and len(x) > 192:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_decoder(text, x, *rest)

    monkeypatch.setattr(row_skip, "run_decoder", run_out)
    assert small.difference(right, small.gradients(model, [long])) < EXACT
    assert path.graphs.why_not == "a batch without a recording needs their memory" and not path.graphs.recordings
    monkeypatch.setattr(row_skip, "run_decoder", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):  # nobody holds anything any more
        small.gradients(model, [long])


def test_few_shapes_are_recorded_and_no_long_batch(small: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgekit.train.graphs.SHAPES", 1)
    model = small.add_lora(small.text_model())
    path = record(model)
    path.graphs.longest = 200
    for length in (40, 70, 110):
        for _ in range(SEEN):
            small.gradients(model, [plain_batch(length, (9, 9))])
    assert len(path.graphs.recordings) == 1 and path.graphs.batches == 1
    assert max(key[0][0] for key in path.graphs.seen) <= 200


def test_lines_have_few_sizes_and_no_longer_ones_than_are_recorded() -> None:
    draw = random.Random(0)
    sizes, most = set(), 0.0
    for _ in range(2000):
        tokens = draw.randint(64, 8192)
        learned = draw.randint(1, tokens)
        kept, size = fill_up(tokens, learned, 64, 8)
        assert kept >= learned and size - tokens >= kept - learned
        sizes.add(size)
        most = max(most, size / max(tokens, 512))
    assert len(sizes) < 60 and most < 1.26
    labels = plain_batch(1024, (266, 266))["labels"].repeat(4, 1)  # eight rows, 8256 tokens once filled up
    rows = choose_rows(labels, None, {"any": None}, 64, 8192)
    assert rows and rows.flat.numel() == 8256 and rows.filling == 8256 - rows.tokens


def test_filling_does_not_make_masks_of_short_rows_longer() -> None:
    import torch

    labels = torch.full((100, 42), -100)
    labels[:, 10:14] = labels[:, 30:37] = 5  # two turns
    rows = choose_rows(labels, None, {"any": None}, 64, 8192)
    assert rows and rows.filling > 64
    bounded = bound(rows)
    assert (bounded.lower.longest, bounded.upper.longest) == (64, 16)
    assert bounded.filling >= rows.filling and bounded.filling.bit_count() == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("memory", "kernel"), [("high", "padded"), ("low", "flash"), ("auto", "flash")])
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
        if recorded:
            assert path and path.graphs and path.graphs.why_not is None and path.graphs.batches >= 6
            print(f"{memory}, {kernel}: recordings differ by {path.graphs.difference:.1e} at most")
        disable_fast_path(model)
    assert curves[True] == pytest.approx(curves[False], rel=2e-3)
