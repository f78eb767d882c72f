"""Compiled layers are compared with uncompiled ones before a batch is trained through them; "compiled" by functions of these tests."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from forgekit.train import proof, row_skip
from forgekit.train.decoder import GATHER
from forgekit.train.fast_path import enable_fast_path
from forgekit.train.graphs import SEEN
from forgekit.train.recompute import Memory

from .tapes import change_words, plain_batch

EXACT = 1e-6
Step = Callable[..., Any]


@pytest.fixture
def compile_as(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that puts another one in the place of torch.compile."""
    import torch

    def put(change: Callable[[Step], Step]) -> None:
        monkeypatch.setattr(torch, "compile", lambda function, **_: functools.wraps(function)(change(function)))

    put(lambda function: function)
    return put


def get_name(function: Step) -> str:
    """A step's name, also that of its form whose backward computes again."""
    return function.__name__.removesuffix("_again")


def enable(model: Any, **settings: Any) -> Any:
    return enable_fast_path(model, compiled=True, uncompiled_batches=0, **{"memory": "high"} | settings)


def learn_in_between(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with a second answer amid each row's prompt, so that attention has gaps."""
    labels = batch["labels"].clone()
    labels[:, 20:25] = batch["input_ids"][:, 20:25]
    return batch | {"labels": labels}


def find_forms(path: Any) -> set[Any]:
    """The forms of layers that were compared, without those of scores."""
    return {form for form in path.proved if isinstance(form, proof.Form)}


def change_result(step: str, change: Callable[[Any], Any], layer: int | None = None) -> Callable[[Step], Step]:
    """A compiler that makes a mistake in the first result of a step."""

    def compile_function(function: Step) -> Step:
        def run(module: Any, *arguments: Any) -> Any:
            results = function(module, *arguments)
            if get_name(function) != step or layer not in (None, module.self_attn.layer_idx):
                return results
            return (change(results[0]), *results[1:])

        return run

    return compile_function


def lose_keys(function: Step) -> Step:
    """A compiler that loses the gradient of the shared keys and values."""

    def run(module: Any, streams: Any, *rest: Any) -> Any:
        keys = (value.detach() + 0 * value for value in rest[2:]) if get_name(function) == "upper_layer" else rest[2:]
        return function(module, streams, *rest[:2], *keys)

    return run


def spoil_gradient(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same result with another gradient."""
    import torch

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return change(gradient)

    return lambda x: Spoil.apply(x)


def spoil_a_row(gradient: Any) -> Any:
    gradient = gradient.clone()
    gradient[0] *= 1000
    return gradient


MISTAKES = {
    "a result": (change_result("upper_layer", lambda x: 1.5 * x), "layer 2, "),
    "a row's gradient in one layer": (
        change_result("upper_layer", spoil_gradient(spoil_a_row), layer=3),
        "layer 3, gradient of ",
    ),
    "a fifth of a gradient": (
        change_result("lower_layer", spoil_gradient(lambda g: 0.8 * g), layer=1),
        "layer 1, gradient of ",
    ),
    "no numbers": (
        change_result("lower_layer", spoil_gradient(lambda g: g * float("nan")), layer=0),
        "layer 0, gradient of ",
    ),
    "the keys' gradient": (lose_keys, ", gradient of input "),
}


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_wrong_form_is_never_trained_through(small: Any, compile_as: Any, capsys: Any, mistake: str, memory: str) -> None:  # fmt: skip
    change, where = MISTAKES[mistake]
    compile_as(change)
    model = small.add_lora(small.text_model())
    batches = [small.draw_batch(seed) for seed in (30, 31)]
    right = [small.gradients(model, [batch]) for batch in batches]
    path = enable(model, memory=memory)
    for batch, expected in zip(batches, right, strict=True):
        assert small.difference(expected, small.gradients(model, [batch])) < EXACT
    said = capsys.readouterr().out
    assert said.count("not compiled any more, because the compiler made a mistake: ") == 1
    assert where in said and "agree" not in said
    found = path.summarize()
    assert found["compiled"] is False and where in found["why_not_compiled"] and found["recorded_batches"] == 0
    if mistake == "no numbers":  # which JSON has no word for
        assert found["compiled_difference"] is None and "is missing, or no number" in said
    else:
        assert found["compiled_difference"] > 1 and "times as far off as is allowed" in said
    assert path.batches == 2


@pytest.mark.parametrize("cast", [False, True])
def test_a_mistake_in_what_has_hardly_begun_to_learn(small: Any, compile_as: Any, cast: bool) -> None:
    """lora_B is zero behind a first step of warming up, and lora_A's gradient with it; that of a fresh adapter is lost here."""
    import torch

    def change(function: Step) -> Step:
        def run(module: Any, *arguments: Any) -> Any:
            if not get_name(function).endswith("_layer"):
                return function(module, *arguments)
            half, own = module.mlp.up_proj.lora_A["default"], module.mlp.up_proj.lora_A["default"].weight
            del half._parameters["weight"]
            half.weight = own.detach() + 0 * own
            try:
                return function(module, *arguments)
            finally:
                del half.weight
                half._parameters["weight"] = own

        return run

    model = small.add_lora(small.text_model(dtype="float32"))
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in filter(lambda name: "lora_B" in name, weights):
            weights[name].zero_()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for mistake in (False, True):
        compile_as(change if mistake else lambda function: function)
        path = enable(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            right = small.gradients(model, [small.draw_batch(30)])
            again = small.gradients(model, [small.draw_batch(30)])  # not compared: casts of weights were not kept
        assert right[0] == again[0] and path.compiled is not mistake
    assert "up_proj.lora_A" in path.why_not_compiled
    assert "up_proj.lora_A.default.weight is missing" not in path.why_not_compiled
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_two_forwards_before_a_backward(small: Any, compile_as: Any) -> None:
    """The second meets a form that has to be compared, while the first one's graph still needs the weights as they are."""
    model = small.add_lora(small.text_model())
    batch = plain_batch(60, (20, 9))
    gaps = learn_in_between(batch)

    def find() -> Any:
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss + model(**gaps).loss
        loss.backward()
        return [float(loss.detach())], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    right = find()
    path = enable(model)
    assert small.difference(right, find()) < EXACT and len(path.proved) == 3


def test_a_comparison_that_memory_does_not_suffice_for_leaves_no_trace(small: Any, compile_as: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Recordings give theirs back then, and the batch runs once more, under the same autocast."""
    import torch

    compute, calls = proof.examine, []

    def run_out(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 10:
            raise torch.OutOfMemoryError("out of memory")
        return compute(*arguments, **settings)

    monkeypatch.setattr(proof, "examine", run_out)
    model, batch = small.add_lora(small.text_model(dtype="float32")), plain_batch(60, (20, 9))
    path, losses = enable(model), []
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(torch.OutOfMemoryError):
            model(**batch)
        losses.append(float(model(**batch).loss.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        losses.append(float(model(**batch).loss.detach()))
    assert losses[0] == losses[1] and path.compiled


def test_a_wrong_form_would_have_been_trained_through(small: Any, compile_as: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Without the comparison the same batch gets wrong gradients at the right loss."""
    from forgekit.train.fast_path import FastPath

    compile_as(MISTAKES["a row's gradient in one layer"][0])
    monkeypatch.setattr(FastPath, "require_proof", lambda self, again: None)
    model, batch = small.add_lora(small.text_model()), small.draw_batch(30)
    right = small.gradients(model, [batch])
    enable(model)
    got = small.gradients(model, [batch])
    assert got[0] == pytest.approx(right[0]) and small.difference(right, got) > 1


@pytest.mark.parametrize("memory", ["high", "low"])
def test_a_right_form_is_compared_once_and_leaves_no_trace(small: Any, compile_as: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:  # fmt: skip
    import torch

    compared: list[str] = []
    measure = proof.measure

    def note(where: str, *values: Any) -> Any:
        compared.append(where)
        return measure(where, *values)

    monkeypatch.setattr(proof, "measure", note)
    model = small.add_lora(small.text_model())
    batches = [change_words(plain_batch(60, (20, 9)), seed) for seed in range(3)]
    right = [small.gradients(model, [batch]) for batch in batches]
    path = enable(model, memory=memory)
    got = [small.gradients(model, [batch]) for batch in batches]
    for expected, found in zip(right, got, strict=True):
        assert small.difference(expected, found) < EXACT
    # the source layer has two steps
    assert compared == [*(f"layer {number}" for number in (0, 1, 2, 2, 3, 4))]
    form = proof.Form(memory == "low", whole=True, suffix=True, single=False, cast=None, learns=(False, False))
    (score,) = path.proved - {form}
    assert form in path.proved and score[:2] == (torch.float64, False) and path.difference == 0.0
    assert capsys.readouterr().out.count("compiled layers agree with uncompiled ones: 0% of what is allowed") == 1


def test_dropout_draws_what_it_would_have_drawn(small: Any, compile_as: Any) -> None:
    """A comparison draws numbers, too, and other ones each time: that much a compiled layer may be off."""
    import torch

    model, batch = small.add_lora(small.text_model(), lora_dropout=0.3), small.draw_batch(30)
    path, losses = enable(model), []
    for _ in range(2):  # the first compares
        torch.manual_seed(1)
        losses.append(float(model(**batch).loss.detach()))
    assert path.compiled and path.difference > 0 and losses[0] == losses[1]


def test_rows_of_another_kind_and_another_precision_are_compared_anew(small: Any, compile_as: Any) -> None:
    import torch

    model = small.add_lora(small.text_model(dtype="float32"))
    path, batch = enable(model), plain_batch(60, (20, 9))
    gaps = learn_in_between(batch)
    small.gradients(model, [batch, gaps])
    with torch.autocast("cpu", torch.bfloat16):
        small.gradients(model, [batch])
    forms = find_forms(path)
    assert {(form.suffix, form.cast) for form in forms} == {(True, None), (False, None), (True, torch.bfloat16)}
    small.gradients(model, [{name: value[:1] if hasattr(value, "shape") else value for name, value in batch.items()}])
    path.text.embed_tokens.weight.requires_grad_()  # as where a tower learns
    small.gradients(model, [batch])
    forms |= find_forms(path)
    assert [(form.single, form.learns[0]) for form in forms].count((True, False)) == 1
    assert [(form.single, form.learns[0]) for form in forms].count((False, True)) == 1 and len(forms) == 5
    with torch.no_grad():  # nothing is learned from it
        model(**gaps | {"use_cache": False})
    assert find_forms(path) == forms


def test_another_rounding_is_no_mistake(small: Any, compile_as: Any) -> None:
    """In half precision a compiler rounds elsewhere: here streams once more, by bfloat16."""
    import torch

    compile_as(change_result("lower_layer", lambda x: x.to(torch.bfloat16).to(x.dtype)))
    model = small.add_lora(small.text_model(dtype="float32"))
    path = enable(model)
    with torch.autocast("cpu", torch.bfloat16):
        small.gradients(model, [plain_batch(60, (20, 9))])
    assert path.compiled and 0 < path.difference <= 1
    path = enable(model)
    small.gradients(model, [plain_batch(60, (20, 9))])  # in float32 it is one
    assert not path.compiled and "layer " in path.why_not_compiled


@pytest.mark.parametrize("statistics", [False, True])
def test_a_wrong_score_is_not_used(small: Any, compile_as: Any, statistics: bool) -> None:
    """The loss of each token and the gradient of logits come from a compiled function of their own."""

    def change(function: Step) -> Step:
        def run(*arguments: Any) -> Any:
            *rest, slope = function(*arguments)
            return (*rest, 0.8 * slope) if function.__name__ == "score_logits" else (*rest, slope)

        return run

    compile_as(change)
    model, batch = small.add_lora(small.text_model()), small.draw_batch(30)
    asked = batch | {"fused_lm_head": True} if statistics else batch
    right = small.gradients(model, [batch])
    path = enable(model)
    assert small.difference(right, small.gradients(model, [asked])) < EXACT
    assert "the head, gradient of logits" in path.why_not_compiled


def test_tokens_that_are_known_well_are_no_mistake() -> None:
    """Of their losses and gradients nothing is left but rounding, and a likeliest word may be one of two."""
    import torch

    from forgekit.train.loss import score_logits

    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8)
    logits[range(8), targets] += 20
    right = score_logits(logits, targets, 30.0, True)
    assert float(right[0].max()) < 1e-5
    found = [value + 2e-6 for value in right]  # an ulp of a logarithm near 25
    found[2] = 1 - right[2]
    assert float(proof.measure_scores(right, tuple(found)).shares.max()) < 0.1
    unknown = score_logits(logits, targets.flip(0), 30.0, True)
    for place, name in ((0, "loss"), (1, "entropy"), (3, "gradient of logits")):
        wrong = list(unknown)
        wrong[place] = wrong[place].clone()
        wrong[place][3] += 0.02 * wrong[place][3].abs().clamp(min=0.1)
        share, where = proof.find_worst([proof.measure_scores(unknown, tuple(wrong))])
        assert share > 1 and where == f"the head, {name}"


def test_a_neuron_at_a_threshold_is_no_mistake(small: Any, compile_as: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rounding in many moves a layer far; a compiler may take just that one, and a lost part is more than that."""

    compute, draws = proof.examine, []

    def jump(call: Any, step: Any, streams: Any, rounding: float = 0.0, draw: int = 0) -> Any:
        results, named = compute(call, step, streams, rounding, draw)
        if rounding:
            draws.append(draw)
            if draw == 5:
                named = {name: value if value is None else 1.002 * value for name, value in named.items()}
        return results, named

    monkeypatch.setattr(proof, "examine", jump)
    model, batch = small.add_lora(small.text_model(dtype="float32")), plain_batch(60, (20, 9))
    compile_as(change_result("lower_layer", spoil_gradient(lambda g: 1.004 * g), layer=0))
    path = enable(model)
    small.gradients(model, [batch])
    assert path.compiled and sorted(set(draws)) == list(range(proof.DRAWS))
    too_much, beyond_doubt = spoil_gradient(lambda g: 1.0095 * g), spoil_gradient(lambda g: 1.5 * g)
    for change, drawn in ((too_much, set(range(proof.DRAWS))), (beyond_doubt, {0})):
        draws.clear()
        compile_as(change_result("lower_layer", change, layer=0))
        path = enable(model)
        small.gradients(model, [batch])
        assert not path.compiled and set(draws) == drawn


def test_weights_that_are_no_numbers_are_not_the_compiler_s_mistake(small: Any, compile_as: Any) -> None:
    import torch

    model = small.add_lora(small.text_model())
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[0, 0] = float("nan")
    path = enable(model)
    assert not torch.isfinite(model(**small.draw_batch(30)).loss) and path.compiled


class Half(Memory):
    """Keeps what two layers need, and computes the rest again: on a GPU memory decides so in the middle of a batch."""

    def run(self, keep: Any, again: Any, key: Any, rows: int) -> Any:
        self.kept += 1
        return keep() if self.kept <= 3 else again()


def test_a_form_that_is_asked_for_in_the_middle_of_a_batch(small: Any, compile_as: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The batch begins anew, is counted once, and the shape is recorded when it comes for the second time, as ever."""
    monkeypatch.setattr(row_skip, "Memory", Half)
    model, batch = small.add_lora(small.text_model()), plain_batch(60, (20, 9))
    right = small.gradients(model, [batch])
    path = record(model)
    for number in range(1, SEEN + 2):
        assert small.difference(right, small.gradients(model, [batch])) < EXACT
        assert (path.batches, path.graphs.came) == (number, number)
        assert path.graphs.batches == max(0, number - SEEN + 1)
    assert {form.again for form in find_forms(path)} == {False, True}


def test_recordings_go_with_a_wrong_form(small: Any, compile_as: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Batches with gaps come later; what was recorded until then is not used behind the mistake either."""
    import torch

    batch = plain_batch(60, (20, 9))
    gaps = learn_in_between(batch)
    model = small.add_lora(small.text_model())
    right = {name: small.gradients(model, [some]) for name, some in (("plain", batch), ("gaps", gaps))}
    path = record(model)

    def change(function: Step) -> Step:
        def run(module: Any, *arguments: Any) -> Any:
            *first, last = function(module, *arguments)
            wrong = path.rows is not None and not path.rows.suffix and get_name(function) == "upper_layer"
            return (*first, 2 * last if wrong else last)

        return functools.wraps(function)(run)

    monkeypatch.setattr(torch, "compile", lambda function, **_: change(function))
    for _ in range(SEEN + 1):
        assert small.difference(right["plain"], small.gradients(model, [batch])) < EXACT
    assert path.graphs.batches == 2
    for name, some in (("gaps", gaps), ("plain", batch), ("gaps", gaps)):
        assert small.difference(right[name], small.gradients(model, [some])) < EXACT
    assert not path.compiled and not path.graphs.recordings and path.graphs.batches == 2


def test_processes_that_share_weights_do_not_stop_to_compare(small: Any, compile_as: Any) -> None:
    """All would have to gather a layer's weights at the same time, and one may meet a new kind of batch alone."""
    model, batch = small.add_lora(small.text_model()), small.draw_batch(30)
    right = small.gradients(model, [batch])
    path = enable(model)
    for layer in path.text.layers:
        vars(layer)[GATHER] = lambda step, *arguments, layer=layer: step(layer, *arguments)
    assert small.difference(right, small.gradients(model, [batch])) < EXACT
    assert not find_forms(path)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["high", "low"])
def test_torch_s_own_compiler_agrees_in_half_precision(small: Any, memory: str) -> None:
    """It fuses what is rounded one by one else, so differences are larger than in float32, and allowed."""
    import torch

    sizes = {"hidden_size": 256, "vocab_size": 5000}  # as wide as it takes for one neuron at a threshold not to decide
    model = small.add_lora(small.text_model(dtype="bfloat16", **sizes))
    path = enable(model, memory=memory)
    with torch.autocast("cpu", torch.bfloat16):
        small.gradients(model, [small.draw_batch(30)])
    assert path.compiled and 0 < path.difference <= 1 and len(path.proved) == 2
