"""Is training right on the stack that is loaded here? Checked on the run's own rows before the first step.

Gemma 3n's last layers reuse keys and values of layers before them. Public stacks have got that wrong while the loss looked right:
transformers up to 5.5 shares them only through a cache, which training has not; a reentrant gradient checkpoint cuts their
gradient. So the guard compares results and never version numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.collate import IGNORE, Collator, Markers, get_tokenizer
from ..errors import ModelError
from ..hardware import choose_device
from ..layer_groups import TOWERS
from ..model.load import start_engine

if TYPE_CHECKING:
    from datasets import Dataset

    from .trial import Gradients

ROWS = 2  # of the data, the shortest among the first
LOOKED_AT = 64
# Relative differences that rounding explains. float32 keeps 24 bits; 1e-6 was seen on five layers, and AltUp divides. bfloat16
# keeps 8 (a rounding of 0.4 %) and float16 11, and some hundred roundings lie on the way through five layers. The defects that are
# looked for change gradients by 18 % in the median and 68 % at worst (a reentrant checkpoint), or the loss by several times.
LOSS_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
GRADIENT_TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.15}
NOISE = 0.02  # on lora_B, which starts at zero and would leave lora_A without a gradient


@dataclass(frozen=True)
class Check:
    """One line of the report; `remedy` says what to do when it failed."""

    name: str
    passed: bool
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = "ok " if self.passed else "BAD"
        return f"{mark} {self.name}: {self.found}" + ("" if self.passed else f"\n    -> {self.remedy}")


@dataclass
class Report:
    """What the guard found."""

    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if not check.passed]

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def check_training(model: Any, processor: Any, dataset: "Dataset", config: Config) -> Report:
    """Prove on a short batch of the run's rows that this stack trains this model rightly; leave no trace.

    Args:
        model: from `add_adapter`.
        dataset: training rows, `data["train"]`.

    Prints the report and returns it. Raises ModelError when a check failed, unless `train.guard` says warn.
    """
    report = examine_training(model, processor, dataset, config)
    print(report)
    if not report.passed and choose_guard(config) == "stop":
        raise ModelError(
            f"Training is not right on this stack: {', '.join(report.failed)}.\n{report}\n"
            "train.guard: warn trains nevertheless."
        )
    return report


def choose_guard(config: Config) -> str:
    """Resolve `train.guard: auto`."""
    if config.train.guard != "auto":
        return config.train.guard
    return "stop" if choose_device(config) == "cpu" else "warn"


def examine_training(model: Any, processor: Any, dataset: "Dataset", config: Config) -> Report:
    """Make the checks of `check_training` and say nothing."""
    start_engine(config)
    from .fast_path import disable_fast_path
    from .trial import no_trace, run_uncompiled

    disable_fast_path(model)
    report = Report()
    batch = make_batch(model, processor, dataset)
    report.checks += check_rows(batch, processor)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = "The adapter is frozen: make it with add_adapter, which leaves it free."
        report.checks.append(Check("a gradient for each parameter", False, "nothing is set to learn", remedy))
    if report.passed:
        with no_trace(model), run_uncompiled():
            report.checks += compare_paths(model, batch, config)
            report.checks += check_learning(model, batch, config)
    return report


def make_batch(model: Any, processor: Any, dataset: "Dataset") -> dict[str, Any]:
    """Collate the shortest of the first rows, one of each mixture of media, and put them on the model's device."""
    examples = [dataset[number] for number in range(min(LOOKED_AT, len(dataset)))]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for example in examples:
        groups.setdefault(list_media(example), []).append(example)
    chosen = [example for group in groups.values() for example in sorted(group, key=count_letters)[:ROWS]]
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in Collator(processor)(chosen).items()}


def list_media(example: dict[str, Any]) -> tuple[str, ...]:
    """Return the kinds of parts in an example."""
    return tuple(sorted({part["type"] for turn in example["messages"] for part in turn["content"]}))


def count_letters(example: dict[str, Any]) -> int:
    """Return the length of an example's texts."""
    return sum(len(part.get("text") or "") for turn in example["messages"] for part in turn["content"])


def check_rows(batch: dict[str, Any], processor: Any) -> Iterator[Check]:
    """Every row teaches something and begins once."""
    learned = (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()
    remedy = "A row whose answer is masked teaches nothing: look at it with show_labels."
    yield Check("learned tokens", min(learned) > 0, f"{min(learned)} to {max(learned)} a row", remedy)
    begins = (batch["input_ids"] == Markers.find(get_tokenizer(processor)).bos).sum(1).tolist()
    remedy = "The chat template writes <bos>: tokenise with add_special_tokens=False, and keep <bos> out of the text."
    yield Check("one <bos> a row", set(begins) == {1}, f"{min(begins)} to {max(begins)} a row", remedy)


def compare_paths(model: Any, batch: dict[str, Any], config: Config) -> Iterator[Check]:
    """Cache against none, checkpointing against none, fast path against the library's forward, on a few layers."""
    import torch

    from .fast_path import find_text, unwrap
    from .trial import (
        choose_layers,
        few_layers,
        find_dtype,
        find_gradients,
        find_lora_b,
        find_loss,
        perturb,
        without_checkpointing,
    )

    base = unwrap(model)
    if not hasattr(base.config.get_text_config(), "num_kv_shared_layers"):
        return  # no keys are shared, so none of this can go wrong
    text = find_text(base)
    chosen = choose_layers(text)
    dtype = str(find_dtype(model)).removeprefix("torch.")
    loss_bound, bound = LOSS_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]
    with few_layers(text, chosen), perturb(find_lora_b(model), NOISE):
        model.eval()
        with torch.no_grad():
            cached, plain = (float(find_loss(model, batch, use_cache=use)) for use in (True, False))
        yield Check(
            "loss without a cache",
            close(plain, cached, loss_bound),
            f"{plain:.6f}, with a cache {cached:.6f}",
            "Without a cache the sharing layers do not get their keys and values: transformers before 5.6 does that, or an engine that lost "
            "its patch (unsloth_zoo). Update transformers, or set model.engine: huggingface.",
        )
        model.train()
        with without_checkpointing(model):
            right = find_gradients(model, batch)
        checkpointed = find_gradients(model, batch, set_up=lambda: enable_checkpointing(model, config))
        yield compare(
            "gradients with checkpointing", right, checkpointed, bound,
            "A reentrant checkpoint cuts the gradient of the shared keys and values: use the non-reentrant kind (gradient_checkpointing_kwargs="
            "{'use_reentrant': False}); under Unsloth update unsloth_zoo, or set train.gradient_checkpointing: off.",
        )  # fmt: skip
        if config.train.fast != "off":
            yield from compare_fast_path(model, batch, chosen, config)


def compare_fast_path(model: Any, batch: dict[str, Any], chosen: list[int], config: Config) -> Iterator[Check]:
    """The fast path's gradients against the library's, both in float32; its kernel is proven where it is chosen (attention.py).

    8-bit layers round their inputs whatever the precision around them.
    """
    from .fast_path import disable_fast_path, enable_fast_path, find_text, unwrap
    from .trial import find_dtype, find_gradients, in_float32, without_checkpointing

    base = unwrap(model)
    with in_float32(base, chosen), without_checkpointing(model):
        dtype = "float16" if config.model.load_in == "8bit" else str(find_dtype(model)).removeprefix("torch.")
        bound = GRADIENT_TOLERANCE[dtype]
        right = find_gradients(model, batch)
        path = enable_fast_path(model, memory="low")
        if path:
            path.layers = [find_text(base).layers[number] for number in chosen]
            fast = find_gradients(model, batch)
            disable_fast_path(model)
            yield compare("gradients of the fast path", right, fast, bound, "Set train.fast: off, and please report this.")  # fmt: skip


def enable_checkpointing(model: Any, config: Config) -> Callable[[], None]:
    """Turn checkpointing on as the trainer will, unless the model came with its own kind; return what turns it off again."""
    from .sft import CHECKPOINTING, use_checkpointing

    if getattr(model, "is_gradient_checkpointing", False) or not use_checkpointing(config):
        return lambda: None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(CHECKPOINTING))
    return lambda: model.gradient_checkpointing_disable()


def compare(name: str, right: "Gradients", got: "Gradients", bound: float, remedy: str) -> Check:
    """Compare losses and gradients; the worst parameter is named."""
    names = sorted(right[1].keys() | got[1].keys())
    # a gradient that is next to nothing beside the others is all rounding
    floor = 1e-3 * max((float(g.norm()) for g in right[1].values()), default=1.0)
    worst, where = abs(got[0] - right[0]) / max(abs(right[0]), 1e-12), "the loss"
    for parameter in names:
        if parameter not in right[1] or parameter not in got[1]:
            worst, where = 1.0, f"{parameter} (gradient on one side only)"
            break
        difference = float((got[1][parameter] - right[1][parameter]).norm())
        difference /= max(float(right[1][parameter].norm()), floor, 1e-30)
        if not difference <= worst:
            worst, where = difference, parameter
    return Check(name, worst <= bound, f"differ by {worst:.1e} at most ({where}), {bound:g} is allowed", remedy)


def check_learning(model: Any, batch: dict[str, Any], config: Config) -> Iterator[Check]:
    """Every parameter that is to learn gets a finite gradient, and a step along it changes what the model says."""
    import torch

    from .trial import find_gradients, find_lora_b, perturb, without_checkpointing

    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adapters = {n: p for n, p in learning.items() if "lora_" in n}
    model.train()
    with perturb(find_lora_b(model), NOISE), without_checkpointing(model):
        loss, gradients = find_gradients(model, batch)
        finite = torch.isfinite(torch.tensor(loss)) and all(bool(torch.isfinite(g).all()) for g in gradients.values())
        remedy = "NaN or infinity before the first step: set model.dtype: bfloat16 or float32; a <pad> embedding of zeros does it too."
        yield Check("finite values", bool(finite), f"loss {loss:.4f}", remedy)
        without = sorted(set(learning) - {n for n, g in gradients.items() if bool((g != 0).any())})
        remedy = "No row here reaches them, or they are cut off: leave their group out of adapter.layers." + name_towers(without)  # fmt: skip
        found = f"{len(learning) - len(without)} of {len(learning)} get one" + (f"; not {', '.join(without[:3])}" if without else "")  # fmt: skip
        yield Check("a gradient for each parameter", bool(learning) and not without, found, remedy)
    if adapters:
        yield check_step(model, batch, adapters, gradients)


def check_step(model: Any, batch: dict[str, Any], adapters: dict[str, Any], gradients: dict[str, Any]) -> Check:
    """Take one step of plain descent from the adapter's own start, and compare with the base model."""
    import torch

    from .trial import find_loss, perturb, without_checkpointing

    with perturb(adapters, 0.0), without_checkpointing(model), torch.no_grad():
        norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        for name, parameter in adapters.items():
            if name in gradients:
                parameter.sub_((0.5 * gradients[name] / max(norm, 1e-12)).to(parameter.dtype))
        after = float(find_loss(model, batch))
        with model.disable_adapter():
            base = float(find_loss(model, batch))
    remedy = "The adapter has no effect: was it frozen, merged or switched off? Make it with add_adapter."
    return Check("a step changes the answer", after != base, f"loss {after:.6f}, base model {base:.6f}", remedy)


def name_towers(names: list[str]) -> str:
    """Return a hint for towers that no row of the batch feeds."""
    missed = [tower for tower, parts in TOWERS.items() if any(part in name for name in names for part in parts)]
    return f" No row of the batch holds what {' and '.join(missed)} needs." if missed else ""


def close(value: float, reference: float, bound: float) -> bool:
    """Say whether two losses agree; NaN never does."""
    return abs(value - reference) <= bound * max(abs(reference), 1e-12)
