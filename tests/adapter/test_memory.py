"""The estimate against tensors that autograd really saves, against measured peaks, and the advice that is made of it."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import benchmarks.memory as benchmark
from forgekit import load_config
from forgekit.adapter.activations import Step, count_kept, count_layer
from forgekit.adapter.advice import CARDS, advise_cards, describe_fit, find_largest, rank_changes
from forgekit.adapter.memory import CONTEXT, count_base, estimate_memory
from forgekit.adapter.plan import plan_layers
from forgekit.hardware import GIB
from forgekit.layer_groups import write_group_regex
from forgekit.model.load import KEEP_16BIT
from forgekit.model.shapes import Shapes, build_shapes, make_released_config, read_shapes

PARAMS = Path(__file__).parents[2] / "params"


@pytest.fixture(scope="module")
def released() -> dict[str, Shapes]:
    return {size: build_shapes(make_released_config(size)) for size in ("E2B", "E4B")}


def make(engine: str = "huggingface", load_in: str = "16bit", rows: int = 1, length: int = 1024, **more: Any) -> Any:
    shape = {"train.per_device_train_batch_size": rows, "model.max_length": length}
    others = {name.replace("__", "."): value for name, value in more.items()}
    return load_config(None, {"model.engine": engine, "model.load_in": load_in, "train.fast": "off", **shape, **others})


def estimate(shapes: Shapes, *args: Any, **settings: Any) -> Any:
    config = make(*args, **settings)
    return estimate_memory(plan_layers(config, shapes), config, shapes)


class PowersInFloat32(TorchFunctionMode):
    """What CUDA's autocast does and the CPU's does not: powers of 16-bit tensors are computed in float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        powers = (torch.Tensor.pow, torch.Tensor.__pow__, torch.pow)
        if function in powers and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


class LikePacked(torch.nn.Linear):
    """Returns the precision of its input, as bitsandbytes' Linear4bit does."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values.to(torch.bfloat16)).to(values.dtype)


def build_learner(layers: list[str], packed: bool) -> tuple[Shapes, Any]:
    """Return ten layers, 2 sparse and 5 with shared keys and values, in bfloat16, with an adapter, and their shapes."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    settings = Gemma3nTextConfig(
        hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2, head_dim=32, laurel_rank=8,
        num_hidden_layers=10, num_kv_shared_layers=5, vocab_size=300, vocab_size_per_layer_input=280,
        hidden_size_per_layer_input=16, activation_sparsity_pattern=[0.95] * 2 + [0.0] * 8,
    )  # fmt: skip
    model = Gemma3nForCausalLM(settings).to(torch.bfloat16).requires_grad_(False)
    shapes = read_shapes(model)
    targets = "|".join(write_group_regex(group) for group in layers)
    for name, module in model.named_modules() if packed else ():
        if type(module) is torch.nn.Linear and not any(re.match(pattern, name) for pattern in KEEP_16BIT):
            module.__class__ = LikePacked
    learner = get_peft_model(model, LoraConfig(r=4, target_modules=targets), autocast_adapter_dtype=not packed).train()
    for module in learner.modules() if packed else ():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # PEFT's own 4-bit layer leaves this to autocast
    model.enable_input_require_grads()
    return shapes, learner


@pytest.mark.parametrize(
    ("layers", "length", "gpu", "packed"),
    [
        (["attention", "mlp"], 96, False, False),
        (["attention", "mlp"], 96, True, False),
        (["attention", "mlp"], 96, True, True),
        (["attention"], 96, True, False),
        (["mlp"], 192, True, True),
    ],
)
def test_what_is_kept_is_what_autograd_saves(layers: list[str], length: int, gpu: bool, packed: bool) -> None:
    """In bfloat16 under autocast as Trainer runs it, and as a GPU's autocast and 4-bit layers do it."""
    shapes, learner = build_learner(layers, packed)
    config = make(adapter__layers=layers, adapter__r=4, length=length)
    plan = plan_layers(config, shapes)
    own = {parameter.untyped_storage().data_ptr() for parameter in learner.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(0, 280, (2, length))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
        PowersInFloat32() if gpu else contextlib.nullcontext(),
    ):
        _output = learner.base_model.model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    real = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    streams = 4 if gpu else 2
    step = Step(2, length, 2, streams, streams if packed else 2, 2 if packed else 4, "huggingface", False)
    counted = count_kept(plan, shapes, step)
    assert counted == pytest.approx(real, rel=0.04)
    ends = counted - sum(count_layer(plan, shapes, n, step) for n in range(10))
    assert 0 < ends < 0.15 * counted


def test_every_measured_peak_is_met(released: dict[str, Shapes]) -> None:
    """The project's bound is a tenth; the formula does better, and a change that makes it worse is to be seen."""
    measured = json.loads(benchmark.MEASURED.read_text())
    ratios = {}
    for setting, found in measured.items():
        config, shapes = benchmark.make_config(setting), released[setting[:3].upper()]
        ratios[setting] = estimate_memory(plan_layers(config, shapes), config, shapes).peak / found["allocated"]
    assert len(ratios) >= 12
    assert {setting: ratio for setting, ratio in ratios.items() if abs(ratio - 1) > 0.03} == {}


def test_what_pytorch_held_is_nearly_met(released: dict[str, Shapes]) -> None:
    """In GiB: blocks that fit nothing are a share of the activations; small steps have up to 0.3 GiB more or less."""
    for setting, found in json.loads(benchmark.MEASURED.read_text()).items():
        config, shapes = benchmark.make_config(setting), released[setting[:3].upper()]
        total = estimate_memory(plan_layers(config, shapes), config, shapes).total
        if setting.endswith(":on"):
            assert (total - CONTEXT) / GIB == pytest.approx(found["reserved"] / GIB, rel=0.03), setting
        assert total > found["reserved"], setting


# Peak of torch.cuda.max_memory_allocated, E2B at full size with random weights, bf16, LoRA r = 8 on text, NVIDIA H200,
# torch 2.11, Unsloth 2026.10.9
@pytest.mark.parametrize(("rows", "length", "measured"), [(1, 1024, 10.88), (4, 1024, 11.92), (8, 2048, 17.36)])
def test_measured_peaks_of_unsloth_are_met(
    released: dict[str, Shapes], rows: int, length: int, measured: float
) -> None:
    found = estimate(released["E2B"], "unsloth", rows=rows, length=length, adapter__r=8, train__fast="off").peak / GIB
    assert found == pytest.approx(measured, rel=0.03)


def test_weights_are_those_of_the_parts(released: dict[str, Shapes]) -> None:
    """10.1 GiB for E2B in bf16, measured; 4 bits leave tables, towers and AltUp as they are."""
    shapes = released["E2B"]
    assert sum(count_base(make(), shapes, 2)) / GIB == pytest.approx(10.1, abs=0.02)
    packed, _, plain = count_base(make(load_in="4bit"), shapes, 2)
    sizes = {module.name: sum(number for _, number in module.parameters) for module in shapes.modules}
    tables = sum(number for name, number in sizes.items() if "embed_tokens" in name or "_tower" in name)
    assert plain > 2 * tables
    linear = sum(number for name, number in sizes.items() if ".layers." in name and name.endswith("_proj"))
    assert packed == pytest.approx(linear * 0.516, rel=0.03)
    absent = count_base(make(), shapes, 2, ("embed_tokens_per_layer",))
    assert sum(count_base(make(), shapes, 2)) - sum(absent) == 2 * sizes["model.language_model.embed_tokens_per_layer"]


def test_parts_add_up_and_follow_the_settings(released: dict[str, Shapes]) -> None:
    shapes = released["E2B"]
    base = estimate(shapes)
    assert base.peak + base.reserve == base.total
    table = base.table()
    assert float(table["GiB"].iloc[-1]) == pytest.approx(sum(map(float, table["GiB"].iloc[:-1])), abs=0.04)
    assert estimate(shapes, train__gradient_checkpointing="off").kept > 5 * base.kept
    assert estimate(shapes, rows=4).kept == pytest.approx(4 * base.kept)
    states = {optim: estimate(shapes, train__optim=optim).optimizer for optim in ("adamw_torch", "adamw_8bit", "sgd")}
    assert states["adamw_torch"] == 8 * 20_316_160 and states["sgd"] == 0
    assert states["adamw_torch"] / states["adamw_8bit"] == pytest.approx(4, rel=0.05)
    full = estimate(shapes, load_in="full", export__formats=["merged"])
    assert full.gradients == 2 * 4_435_182_688 and full.adapter == 0
    tables = {}
    for load_in in ("full", "16bit"):  # a table that learns stays on the GPU, whatever the settings say
        extra = {"load_in": load_in, "export__formats": ["merged"], "train__fast": "on", "train__memory": "low"}
        tables[load_in] = [estimate(shapes, **extra, model__offload_ple=switch).peak for switch in ("off", "on")]
    assert tables["full"][0] == tables["full"][1]
    assert tables["16bit"][0] - tables["16bit"][1] == pytest.approx(4.0e9, rel=0.02)
    media = {"images": 1, "clips": 1}
    config = make(adapter__layers=["attention", "vision_tower"])
    learns = estimate_memory(plan_layers(config, shapes), config, shapes, **media).towers
    config = make(adapter__layers=["attention", "vision"])
    assert learns > 10 * estimate_memory(plan_layers(config, shapes), config, shapes, **media).towers > 0


@pytest.mark.parametrize(("recipe", "size", "card"), [("16gb", "E2B", "T4 15 GB"), ("16gb", "E4B", "T4 15 GB"), ("24gb", "E2B", "L4 24 GB"), ("24gb", "E4B", "L4 24 GB")])  # fmt: skip
def test_recipes_for_a_gpu_fit_it(released: dict[str, Shapes], recipe: str, size: str, card: str) -> None:
    config = load_config(f"{PARAMS / 'text.yaml'} + {PARAMS / 'gpu' / recipe}.yaml")
    assert config.origin("model.max_length") == f"{recipe}.yaml" and config.origin("data.path") == "text.yaml"
    shapes = released[size]
    assert estimate_memory(plan_layers(config, shapes), config, shapes).total < CARDS[card] * GIB
    assert describe_fit(config, CARDS[card] * GIB, shapes).endswith(": fits")


def test_eight_gigabytes_are_enough_for_e2b(released: dict[str, Shapes]) -> None:
    """With the table on the GPU they are not: the weights alone take 7.6 GiB."""
    config = load_config(f"{PARAMS / 'text.yaml'} + {PARAMS / 'gpu' / '8gb.yaml'}")
    memory = 7.6 * GIB
    assert describe_fit(config, memory, released["E2B"]).endswith(": fits")
    with_table = config.change({"model.offload_ple": "auto"}, "trial")
    assert "too much" in describe_fit(with_table, memory, released["E2B"])


def test_what_to_change_is_ranked_by_the_saving_that_it_has(released: dict[str, Shapes]) -> None:
    config = make(rows=8, length=4096, train__gradient_checkpointing="off", train__optim="adamw_torch")
    shapes = released["E4B"]
    before = estimate_memory(plan_layers(config, shapes), config, shapes).total
    changes = rank_changes(config, shapes)
    assert [change.saving for change in changes] == sorted((change.saving for change in changes), reverse=True)
    names = [dict(change.settings) for change in changes]
    assert {"train.gradient_checkpointing": "on"} in names
    # 4-bit layers' float32 outputs, all kept without checkpointing, are more than the weights save
    assert {"model.load_in": "4bit"} not in names
    checkpointed = rank_changes(config.change({"train.gradient_checkpointing": "on"}), shapes)
    assert {"model.load_in": "4bit"} in [dict(change.settings) for change in checkpointed]
    for change in changes:
        changed = config.change(dict(change.settings))
        after = estimate_memory(plan_layers(changed, shapes), changed, shapes).total
        assert before - after == pytest.approx(change.saving) and change.saving > 0
    text = describe_fit(config, 24 * GIB, shapes)
    assert "GiB too much. What saves most:" in text and str(changes[0]) in text


def test_the_largest_batch_and_length_fit_and_the_next_do_not(released: dict[str, Shapes]) -> None:
    config, shapes, memory = make(load_in="4bit", rows=2, length=2048), released["E4B"], 23.6 * GIB
    largest = find_largest(config, memory, shapes)
    for name, value in (("rows", largest["batch"]), ("length", largest["length"])):
        shape = {"rows": 2, "length": 2048}
        assert estimate(shapes, load_in="4bit", **{**shape, name: value}).total <= memory
        assert estimate(shapes, load_in="4bit", **{**shape, name: 2 * value}).total > memory
    assert find_largest(config, 4 * GIB, shapes) == {"batch": 0, "length": 0}
    table = advise_cards(config, shapes)
    assert list(table["card"]) == list(CARDS)
    assert table.set_index("card").loc["RTX 3090 24 GB", "largest batch at this length"] == largest["batch"]
