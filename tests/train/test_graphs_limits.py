"""When batches are not recorded, or not any more: a changed model, a wrong recording, missing memory, too many shapes."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from forgekit.train.attention import PIECES, bound, row_starts
from forgekit.train.fast_path import disable_fast_path
from forgekit.train.graphs import SEEN
from forgekit.train.recording import describe_shape
from forgekit.train.rows import choose_rows, fill_up

from .tapes import plain_batch, tape

EXACT = 1e-6


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


def refuse(function: Callable[[], Any], pool: Any) -> Any:
    """What cannot be recorded."""
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def stand_still(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """A recording that never runs again."""
    return lambda: None, function()


def read_old_inputs(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """A recording that gives what it gave when it was made."""
    _, result = tape(function, pool)
    values = [value for value in (result if isinstance(result, list) else [result]) if value is not None]
    kept = [value.clone() for value in values]

    def replay() -> None:
        for old, new in zip(values, kept, strict=True):
            old.detach().copy_(new)

    return replay, result


@pytest.mark.parametrize(
    ("broken", "start", "end"),
    [
        (refuse, "recording failed: operation not permitted", "when stream is capturing"),
        (stand_still, "a recording is", "off what it recorded"),
        (read_old_inputs, "a recording is", "off what it recorded"),
    ],
)
def test_a_wrong_or_refused_recording_is_said_once_and_computed_without(
    small: Any, record: Any, broken: Any, start: str, end: str, capsys: Any
) -> None:
    model = small.add_lora(small.text_model())
    batch = small.draw_batch(30)
    right = small.gradients(model, [batch])
    path = record(model)
    path.graphs.capture = broken
    for _ in range(SEEN + 2):
        assert small.difference(right, small.gradients(model, [batch])) < EXACT
    assert end in path.graphs.why_not and path.graphs.batches == 0
    assert capsys.readouterr().out.count(f"no CUDA graphs, because {start}") == 1


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


def test_a_shape_is_recorded_where_it_comes_often_enough_to_pay(
    small: Any, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twelve batches, where three more must be expected: one shape comes each second time, the others once or at the end."""
    monkeypatch.setattr("forgekit.train.graphs.REPAID", 3)
    model = small.add_lora(small.text_model())
    recorded: list[int] = []
    path = record(model, left=lambda: 12 - len(recorded))
    often, late = plain_batch(40, (9, 9)), plain_batch(300, (9, 9))
    others = [plain_batch(length, (9, 9)) for length in (100, 150, 200)]
    order = [often, others[0], often, others[1], often, others[2], often, late, often, late, often, late]
    for batch in order:
        small.gradients(model, [batch])
        recorded.append(path.graphs.batches)
    assert recorded == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and len(path.graphs.recordings) == 1


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
    bounded = bound(rows, "padded")
    assert (bounded.lower.longest, bounded.upper.longest) == (64, 16)


@pytest.mark.parametrize(("least", "most", "batches", "bound_on_shapes"), [(980, 1050, 200, 3), (64, 1024, 2000, 32)])
def test_batches_have_few_shapes(least: int, most: int, batches: int, bound_on_shapes: int) -> None:
    """Four rows, a quarter of each learned; with the longest row and the filling in a shape there were 14 and 139."""
    import torch

    draw, shapes = random.Random(0), set()
    for _ in range(batches):
        lengths = [draw.randint(least, most) for _ in range(4)]
        labels = torch.full((4, 1088), -100)
        mask = torch.zeros_like(labels)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
            labels[row, length - length // 4 : length] = 5
        rows = choose_rows(labels, mask, {"any": None}, 64, 8192)
        assert rows
        bounded = bound(rows, "flash")
        x = torch.empty(rows.flat.numel(), 1)
        shapes.add(describe_shape(x, None, bounded))
        for stage in ("lower", "upper"):
            line, limit = getattr(rows, stage), getattr(bounded, stage).longest
            starts = row_starts(line, rows).tolist()
            lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
            assert limit >= max(lengths) and sum(lengths) == line.index.numel() and min(lengths) >= 0
        queries, keys = (row_starts(line, rows).diff()[-PIECES:] for line in (rows.upper, rows.lower))
        assert (queries <= keys).all() and keys.sum() == rows.filling
    print(f"{batches} batches of {least} to {most} tokens a row: {len(shapes)} shapes")
    assert len(shapes) <= bound_on_shapes
