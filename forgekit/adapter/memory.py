"""What a training step needs in GPU memory, in bytes by part, from the plan and the settings, without weights.

    weights + adapter + optimiser              always there
    gradients                                  at the end of a step, or always when several batches are added up
    kept        what the forward pass keeps for the backward pass (activations.py)
    working     the layer at work in the backward pass, or the loss: whichever is larger
    reserve     what CUDA and the libraries' kernels take beside the tensors

With forgekit's fast path `kept` and `working` come from fast_memory.py. `benchmarks/memory.py` compares predicted and measured peaks: within 2 % in 20 settings on an H200 with the huggingface engine, with
E2B and E4B, 4 and 16 bit, batch 1 to 8, length 256 to 4096, checkpointing on and off, LoRA r = 16 on text, and rows with padding.
"""

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..hardware import GIB, choose_optimizer, shares_weights
from ..layer_groups import find_tower
from ..model.load import KEEP_16BIT, keeps_table_back
from ..model.shapes import Module, Shapes
from .activations import Step, count_kept, count_loss, count_towers, count_working, read_sizes
from .fast_memory import choose_fast_step, count_fast, count_table, find_parked
from .plan import LayerPlan, find_shapes

if TYPE_CHECKING:
    from ..table import Table

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, an 8-bit scale for 64, a 32-bit scale for 256 of those
INT8 = 1.0
STATES = {  # optimiser -> bytes of state for one float32 weight (transformers' names; bitsandbytes keeps 8 bits and scales)
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_bnb_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 0.0,  # in memory that moves to the host when it is needed on the GPU
    "paged_adamw_32bit": 0.0,
    "adafactor": 0.05,  # one figure a row and a column
    "sgd": 0.0,
}
# Factor on the counted activations, by engine. The lines of transformers are counted as they stand; Unsloth's compiled layers keep
# less than they say: fitted to its three measured peaks in tests/adapter/test_memory.py.
FITTED = {"huggingface": 1.0, "unsloth": 0.73}
# cuBLAS takes 32 MiB for each thread on Hopper GPUs, where it was measured (8 MiB on older ones); the backward pass has a thread
# of its own. `python -m benchmarks.memory --fit` leaves 0.06 GiB unexplained.
WORKSPACE = 2 * 32 * 2**20
FRAGMENTS = 0.07  # of what is not weights: blocks that PyTorch's allocator holds and nothing fits; "held" in benchmarks/README.md
CONTEXT = 0.6 * GIB  # CUDA's own, outside of PyTorch's count


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step, by part. `settings` are those that it was made for."""

    weights_4bit: float
    weights_8bit: float
    weights_16bit: float
    adapter: float
    gradients: float
    optimizer: float
    kept: float
    working: float
    towers: float
    reserve: float
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def peak(self) -> float:
        """Bytes that tensors take at most: what torch.cuda.max_memory_allocated reports."""
        return self.total - self.reserve

    @property
    def total(self) -> float:
        """Bytes that the GPU must have free."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "settings")

    def table(self) -> "Table":
        """Return one row a part that is not empty, in GiB, and the sum."""
        import pandas

        from ..table import Table

        parts = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "settings"]
        rows = [(WORDS[name], f"{value / GIB:.2f}") for name, value in parts if value >= 0.005 * GIB]
        return Table(pandas.DataFrame([*rows, ("together", f"{self.total / GIB:.2f}")], columns=["part", "GiB"]))

    def describe(self) -> str:
        """Return what it was made for, in one line."""
        return ", ".join(f"{name} {value}" for name, value in self.settings)

    def __repr__(self) -> str:
        return f"Memory at the peak of a step ({self.describe()})\n{self.table().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"{self.table()._repr_html_()}<pre>{self.describe()}</pre>"


WORDS = {
    "weights_4bit": "weights in 4 bit",
    "weights_8bit": "weights in 8 bit",
    "weights_16bit": "weights as they are (16 bit on a GPU)",
    "adapter": "what learns, beside the weights",
    "gradients": "gradients",
    "optimizer": "the optimiser's state",
    "kept": "activations kept for the backward pass",
    "working": "the layer or the loss at work",
    "towers": "picture and sound towers at work",
    "reserve": "CUDA, kernels, fragments",
}


def estimate_memory(
    plan: LayerPlan,
    config: Config,
    model: Any = None,
    images: int = 0,
    clips: int = 0,
    engine: str | None = None,
    absent: tuple[str, ...] = (),
    learned: float = 1.0,
) -> MemoryEstimate:
    """Estimate the peak of a training step on a GPU with batches of rows as long as `model.max_length`.

    Args:
        plan: from `plan_layers(config, model)`.
        model: as for `plan_layers`.
        images, clips: in a row.
        engine: "unsloth" or "huggingface"; default: `model.engine`, where auto means unsloth as on a GPU.
        absent: parts of names of modules whose weights are not on the GPU, for instance "vision_tower".
        learned: share of the tokens that are learned, for the fast path, which computes no others in its upper layers.
    """
    shapes = find_shapes(config, model)
    engine = engine or ("huggingface" if config.model.engine == "huggingface" else "unsloth")
    unit = 4 if config.model.dtype == "float32" else 2
    weights = count_base(config, shapes, unit, absent)
    # TRL turns the matrices of a quantised model to the weights' own precision; elsewhere PEFT keeps them in float32
    quantised = config.model.load_in in ("4bit", "8bit")
    own = unit if quantised and engine == "huggingface" else 4
    lora = sum(m.parameters for m in plan.modules if m.kind == "LoRA")
    full = sum(m.parameters for m in plan.modules if m.kind != "LoRA")
    copies = 0 if config.model.load_in == "full" else full * unit
    gradients = float(lora * own + full * unit)
    state = STATES.get(choose_optimizer(config, "cuda"), STATES["adamw_torch"])
    optimizer = state * (lora * own / 4 + full * unit / 4) if state > 2.5 else state * (lora + full)
    # the weights are counted whole: they are while they are loaded, and the largest while at work
    if shares_weights(config):
        gradients, optimizer = gradients / config.train.gpus, optimizer / config.train.gpus
    step = make_step(config, shapes, engine, own)
    fast = choose_fast_step(config, engine)
    if fast:
        kept, working = count_fast(shapes, step, fast, learned)
        kept_back = keeps_table_back(config) and engine == "huggingface"  # Unsloth loads it onto the GPU
        loading = sum(weights) - (count_table(shapes) * unit if kept_back else 0)
        learning = {part for m in plan.modules if m.kind != "LoRA" for part in m.name.split(".")}
        parked = [name for name in find_parked(config, fast, images, clips) if name not in learning]
        weights = count_base(config, shapes, unit, (*absent, *parked))
    else:
        fitted, loading = FITTED[engine], 0.0
        kept = count_kept(plan, shapes, step) * fitted
        working = max(count_working(plan, shapes, step), count_loss(plan, shapes, step)) * fitted
    working += WORKSPACE
    if quantised:  # the matrix at work is unpacked
        working += unit * read_sizes(shapes).hidden * max(read_sizes(shapes).feed_forward)
    towers = count_towers(plan, step.rows * images, step.rows * clips, unit)
    if config.train.gradient_accumulation_steps == 1:  # then they come while the activations go
        gradients = max(0.0, gradients - kept - working)
    peak = sum(weights) + lora * own + copies + gradients + optimizer + kept + working + towers
    settings = (
        ("engine", engine),
        ("load_in", config.model.load_in),
        ("batch", step.rows),
        ("length", step.length),
        ("fast path", fast.memory if fast else "off"),
        *(() if fast else (("checkpointing", "on" if step.checkpointing else "off"),)),
        ("optim", choose_optimizer(config, "cuda")),
    )
    # what waits in the machine's memory while it trains is on the GPU before and after
    reserve = max(CONTEXT + FRAGMENTS * (peak - sum(weights)), CONTEXT + loading - peak)
    return MemoryEstimate(
        *weights, lora * own + copies, gradients, optimizer, kept, working, towers, reserve, settings=settings
    )


def make_step(config: Config, shapes: Shapes, engine: str, matrices: int) -> Step:
    """Return the shape of a training step on a GPU; `matrices` are the bytes of one number of LoRA's."""
    unit = 4 if config.model.dtype == "float32" else 2
    streams = 4 if read_sizes(shapes).streams > 1 else unit
    return Step(
        rows=config.train.per_device_train_batch_size,
        length=config.model.max_length,
        unit=unit,
        streams=streams,
        outputs=streams if config.model.load_in in ("4bit", "8bit") else unit,
        matrices=matrices,
        engine=engine,
        checkpointing=config.train.gradient_checkpointing != "off",
    )


def count_base(config: Config, shapes: Shapes, unit: int, absent: tuple[str, ...] = ()) -> tuple[float, float, float]:
    """Return the bytes of the base weights: in 4 bit, in 8 bit, and as they are."""
    keep = re.compile("|".join(f"(?:{pattern})" for pattern in KEEP_16BIT))
    packed: float = 0
    plain: float = 0
    for module in shapes.modules:
        count = 0 if any(part in module.name for part in absent) else sum(number for _, number in module.parameters)
        if is_quantised(module, keep):
            packed += count
        else:
            plain += count
    if config.model.load_in == "4bit":
        return packed * NF4, 0.0, plain * unit
    if config.model.load_in == "8bit":
        return 0.0, packed * INT8, plain * unit
    return 0.0, 0.0, (packed + plain) * unit


def is_quantised(module: Module, keep: Any) -> bool:
    """Say whether 4-bit and 8-bit loading packs a module: Linear ones outside of KEEP_16BIT."""
    return module.kind == "linear" and find_tower(module.name) == "language" and not keep.match(module.name)
