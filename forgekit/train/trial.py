"""Trying something on a model and leaving no trace: fewer layers, no dropout, weights and random numbers put back; loss and gradients."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .fast_path import find_text, unwrap

Gradients = tuple[float, dict[str, Any]]  # a loss, and parameter -> gradient in float32


@contextlib.contextmanager
def changed(modules: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Give an attribute of some objects another value, and put each one's own back."""
    before = [(module, getattr(module, name)) for module in modules]
    try:
        for module, _ in before:
            setattr(module, name, value)
        yield
    finally:
        for module, own in before:
            setattr(module, name, own)


@contextlib.contextmanager
def no_trace(model: Any) -> Iterator[None]:
    """Put back, bit for bit: weights that learn, their gradients, training mode, random state, and dropout, which is off inside.

    Weights are copied to the CPU only when they change (`perturb`).
    """
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    python, cpu = random.getstate(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    try:
        with changed(dropouts, "p", 0.0):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        random.setstate(python)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextlib.contextmanager
def run_uncompiled() -> Iterator[None]:
    """Run compiled modules as they were written: Unsloth's layers would be compiled for a batch that comes once."""
    if not hasattr(torch.compiler, "set_stance"):  # before torch 2.6
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def perturb(parameters: dict[str, Any], size: float, seed: int = 0) -> Iterator[None]:
    """Add seeded noise of a standard deviation `size` to parameters, and put them back.

    They get other numbers to hold inside: a graph whose backward is still to come may need theirs, and must not find them changed.
    """
    before = {name: parameter.data for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.data = parameter.data + noise.to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def choose_layers(text: Any) -> list[int]:
    """Choose a few layers of a Gemma3nTextModel: the first, every source of shared keys, and a sharing layer for each of them."""
    chosen, served = {0}, set()
    for number, layer in enumerate(text.layers):
        attention = layer.self_attn
        source = getattr(attention, "kv_shared_layer_index", None)
        if source is not None and source not in served:
            served.add(source)
            chosen |= {source, number}
    return sorted(chosen) if served else list(range(len(text.layers)))


@contextlib.contextmanager
def few_layers(text: Any, chosen: list[int]) -> Iterator[None]:
    """Let the other layers hand their input on; with those left, a comparison costs seconds and rounding cannot grow."""
    skipped = [layer for number, layer in enumerate(text.layers) if number not in chosen]
    before = {layer: vars(layer).get("forward") for layer in skipped}
    try:
        for layer in skipped:
            layer.forward = hand_on
        yield
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return a layer's input as its output."""
    return hidden_states


@contextlib.contextmanager
def in_float32(base: Any, chosen: list[int]) -> Iterator[None]:
    """Let the chosen layers of the language model, its ends and its head compute in float32, and put their weights back.

    In half precision two right ways to the same gradient may be far apart: Gemma 3n's attention has normed queries and keys and no
    scale, and where it is sharp a rounding changes what a token listens to (65 % on a gradient of random weights of E2B on an H200).
    The per-layer table stays as it is, because its rows alone are read; so do packed weights, unpacked here in float32.
    """
    text = find_text(base)
    outside = [module for name, module in text.named_children() if name not in ("layers", "embed_tokens_per_layer")]
    modules = [*outside, *(text.layers[number] for number in chosen), base.get_output_embeddings()]
    half = (torch.float16, torch.bfloat16)
    weights = {p: p.data for module in modules for p in module.parameters() if p.dtype in half}
    packed = [m for module in modules for m in module.modules() if getattr(m, "compute_dtype", None) in half]
    try:
        for parameter in weights:
            parameter.data = parameter.data.float()
        with changed(packed, "compute_dtype", torch.float32):
            yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data


@contextlib.contextmanager
def without_checkpointing(model: Any) -> Iterator[None]:
    """Keep everything that the backward needs, whatever the model was set to."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    with changed(modules, "gradient_checkpointing", False):
        yield


def find_loss(model: Any, batch: dict[str, Any], use_cache: bool = False) -> Any:
    """Return the loss, in the precision that the trainer computes in."""
    dtype, device = find_dtype(model), batch["input_ids"].device.type
    half = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device, dtype, enabled=True) if half else contextlib.nullcontext():
        return model(**batch, use_cache=use_cache).loss


def find_gradients(model: Any, batch: dict[str, Any], set_up: Callable[[], Callable[[], None]] | None = None) -> Gradients:  # fmt: skip
    """Return the loss and the gradient of each parameter that learns."""
    take_down = set_up() if set_up else None
    model.zero_grad(set_to_none=True)
    loss = find_loss(model, batch)
    loss.backward()
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    if take_down:
        take_down()
    return float(loss.detach()), found


def find_lora_b(model: Any) -> dict[str, Any]:
    """Return the matrices that start at zero."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n}


def find_dtype(model: Any) -> Any:
    """Return the number format that the language model computes in: that of a norm's weight, which is never packed."""
    return find_text(unwrap(model)).norm.weight.dtype
