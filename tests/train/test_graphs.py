"""Batches by recordings: the same losses and gradients, whatever comes in between (on a CPU by the stand-in of tapes.py)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from forgekit.train.fast_path import disable_fast_path, enable_fast_path
from forgekit.train.graphs import SEEN, Graphs, Ticket

from .tapes import change_words, plain_batch, tape

EXACT = 1e-6


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


@pytest.fixture
def flash_on_cpu() -> Iterator[None]:
    """Gives the operators of flash attention a kernel for the CPU, after their contract."""
    import torch

    from .test_fast_path import attend_row_by_row

    def forward(*arguments: Any) -> Any:
        out = attend_row_by_row(*arguments)
        return out, out.new_empty((out.shape[1], out.shape[0]), dtype=torch.float32)

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, *places: Any) -> Any:
        leaves = [value.detach().requires_grad_() for value in (q, k, v)]
        with ThreadPoolExecutor(1) as thread:  # autograd is off in this one
            return thread.submit(
                lambda: torch.autograd.grad(attend_row_by_row(*leaves, *places), leaves, grad)
            ).result()

    library = torch.library.Library("forgekit", "FRAGMENT")
    torch.library.register_kernel("forgekit::flash", "cpu", forward, lib=library)
    torch.library.register_kernel("forgekit::flash_backward", "cpu", backward, lib=library)
    yield
    library._destroy()


def test_a_recording_with_the_bounds_of_flash_attention(small: Any, record: Any, flash_on_cpu: None) -> None:
    """The same length of the line with other rows, filling and learned tokens."""
    model = small.add_lora(small.text_model())
    batches = [
        plain_batch(length, learned) for length, learned in ((40, (9, 9)), (38, (14, 4)), (33, (1, 10)), (40, (2, 13)))
    ]
    right = [small.gradients(model, [batch]) for batch in batches]
    path = record(model, kernel="flash")
    for batch, expected in zip(batches, right, strict=True):
        assert small.difference(expected, small.gradients(model, [batch])) < EXACT
    assert len(path.graphs.recordings) == 1 and path.graphs.batches == 3 and path.graphs.kernel == "flash"


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
