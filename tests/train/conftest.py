"""Small Gemma 3n models and random batches, for comparing a forward with the library's own."""

import gc
import json
import random
from collections.abc import Callable
from typing import Any

import pytest


def small_text_model(shared: int = 2, dtype: str = "float64", seed: int = 0, **changes: Any) -> Any:
    """A random Gemma3nForCausalLM of five layers; the last two use the keys of the third and second, one a kind of attention."""
    import torch
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 131, "vocab_size_per_layer_input": 131, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 5, "num_kv_shared_layers": shared, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "activation_sparsity_pattern": [0.9, 0.0, 0.9, 0.0, 0.0],
    }  # fmt: skip
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**settings | changes)).to(getattr(torch, dtype)).train()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, 0.1)
        else:  # norms and AltUp's output scale start at ones and zeros, where a mistake would not show
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def add_lora(model: Any, layers: str = r"\d+", **settings: Any) -> Any:
    """The model with an adapter whose output is not zero, on these layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    target = rf".*layers\.(?:{layers})\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": target} | settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero, lora_A would have no gradient
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model.train()


def draw_batch(seed: int, longest: int = 64) -> dict[str, Any]:
    """A batch of 1 to 5 rows of 1 to `longest` tokens: padded left or right, several turns with gaps, rows without a label."""
    import torch

    generator = random.Random(seed)
    lengths = [generator.randint(1, longest) for _ in range(generator.randint(1, 5))]
    columns = max(lengths) + generator.choice([0, 0, 3])
    ids = torch.zeros(len(lengths), columns, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    left = generator.random() < 0.5
    for row, length in enumerate(lengths):
        start = columns - length if left else 0
        ids[row, start : start + length] = torch.tensor([generator.randint(3, 120) for _ in range(length)])
        mask[row, start : start + length] = 1
        if row and generator.random() < 0.2:
            continue  # teaches nothing
        for _ in range(generator.randint(1, 3)):
            first = generator.randint(min(1, length - 1), length - 1)
            turn = slice(start + first, start + min(length, first + generator.randint(1, longest // 3)))
            labels[row, turn] = ids[row, turn]
        labels[row, start] = -100  # nothing comes before a row's first token
    if not (labels != -100).any():
        return draw_batch(seed + 100_000, longest)
    return {"input_ids": ids, "attention_mask": mask if generator.random() < 0.9 or len(set(lengths)) > 1 else None, "labels": labels, "use_cache": False}  # fmt: skip


def find_gradients(model: Any, batches: list[dict[str, Any]], **asked: Any) -> tuple[list[float], dict[str, Any]]:
    """The loss of each batch, and the gradient of every trainable parameter of their sum."""
    import torch

    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        torch.manual_seed(0)
        loss = model(**batch, **asked).loss
        loss.backward()
        losses.append(float(loss.detach()))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return losses, {name: gradient.double() for name, gradient in gradients.items()}


def find_difference(right: tuple[list[float], dict[str, Any]], got: tuple[list[float], dict[str, Any]]) -> float:
    """The largest relative difference of losses and gradients.

    A gradient that is next to nothing beside the others (a key's, where one key is seen) is measured against a floor of 1e-4 of
    the largest.
    """
    assert right[1].keys() == got[1].keys()
    floor = 1e-4 * max(float(gradient.norm()) for gradient in right[1].values())
    losses = [abs(a - b) / abs(a) for a, b in zip(right[0], got[0], strict=True)]
    assert floor > 0
    return max(losses + [float((got[1][n] - g).norm() / max(float(g.norm()), floor)) for n, g in right[1].items()])


@pytest.fixture(scope="session")
def small() -> Any:
    """The functions above, as one namespace."""
    import types

    return types.SimpleNamespace(
        text_model=small_text_model, add_lora=add_lora, draw_batch=draw_batch, gradients=find_gradients, difference=find_difference
    )  # fmt: skip


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Any) -> Any:
    """A text-only checkpoint of `small_text_model` in float32, with its tokenizer: it loads and trains in a second."""
    folder = tmp_path_factory.mktemp("text") / "random-text"
    words = len(small_tokenizer)
    special = {f"{name}_token_id": getattr(small_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": words, "vocab_size_per_layer_input": words}
    model = small_text_model(dtype="float32", **sizes, **special)
    model.save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    gc.collect()
    gc.freeze()  # transformers collects garbage before each training, a second's work on the memory of these libraries
    return folder


@pytest.fixture
def make_run(make_config: Any, text_folder: Any, tmp_path: Any) -> Any:
    """Returns a function: settings, name -> the trainer of a short run of it on short rows, with its `run` and `config`.

    A name that was used before is gone on with, as under `forgekit run`.
    """
    from forgekit import add_adapter, load_data, load_model, sft_trainer, start_run

    lines = [{"prompt": f"Question {number}?", "completion": f"{number} it is"} for number in range(60)]
    rows = tmp_path / "short.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def make(settings: Any = None, name: str = "run", to_example: Any = None) -> Any:
        short = {
            "data.path": str(rows),
            "model.id": str(text_folder),
            "model.max_length": 512,
            "train.save_steps": 2,
            "train.gradient_accumulation_steps": 1,
        }
        config = make_config(short | {"train.max_steps": 4, "adapter.lora_dropout": 0.1} | (settings or {}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FORGEKIT_RUN", name)
            run = start_run(config, name)
        model, processor = load_model(config)
        trainer = sft_trainer(
            add_adapter(model, config), processor, load_data(config, processor, to_example), config, run
        )
        trainer.run, trainer.config = run, config
        runs.append(run)
        return trainer

    runs: list[Any] = []
    yield make
    for run in runs:
        if run._lock:
            run.finish("stopped")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns a function that turns the fast path of a model on, with recordings by the stand-in of tapes.py."""
    import torch

    from forgekit.train.fast_path import enable_fast_path
    from forgekit.train.graphs import Graphs

    from .tapes import tape

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def enable(model: Any, **settings: Any) -> Any:
        path = enable_fast_path(model, compiled=True, uncompiled_batches=0, **{"memory": "high"} | settings)
        assert path
        path.graphs = Graphs(path.text, left=settings.get("left"), kernel=path.kernel, capture=tape)
        return path

    return enable
