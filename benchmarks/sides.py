"""The stacks that benchmarks/fast_path.py compares, each as a function that loads it and one that takes a training step.

All train the same adapter (LoRA r = 8 on the language model) on the same batches with the same AdamW, in bf16 autocast.
"""

import contextlib
import time
from collections.abc import Callable
from math import inf
from typing import Any

import torch

TARGETS = r".*language_model.*\.(?:q|k|v|o|gate|up|down)_proj"
Step = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def load_side(side: str, checkpoint: str, load_in: str, media: set[str]) -> tuple[Any, Step]:
    """Load one stack; return its model and the function that computes a loss.

    Args:
        side: unsloth | trl | trl-keep | forgekit-MEMORY[-compiled][-graphs][-KERNEL][-park], as in forgekit-low-compiled-park, or
            the same with unsloth+ before it: the model that Unsloth loaded, with forgekit's fast path on it.
        load_in: 16bit or 4bit.
        media: kinds of media in the batches, "image" and "audio"; other towers are parked with `park`.
    """
    if side == "unsloth":
        return load_unsloth(checkpoint, load_in)
    if side.startswith("unsloth+"):
        return load_forgekit(load_unsloth(checkpoint, load_in)[0], side.split("-")[1:], media)
    model = add_lora(load_library(checkpoint, load_in))
    if side.startswith("trl"):
        return load_trl(model, keep=side == "trl-keep")
    return load_forgekit(model, side.split("-")[1:], media)


def load_unsloth(checkpoint: str, load_in: str) -> tuple[Any, Step]:
    """Unsloth with its own checkpointing and loss."""
    import unsloth  # noqa: F401
    from unsloth import FastModel

    four = load_in == "4bit"
    model, _ = FastModel.from_pretrained(
        checkpoint, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=four, load_in_16bit=not four,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    model = FastModel.get_peft_model(
        model, r=8, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS, use_gradient_checkpointing="unsloth",
        random_state=0,
    )  # fmt: skip
    return model.train(), lambda batch: model(**batch).loss


def load_library(checkpoint: str, load_in: str, device: str = "cuda") -> Any:
    """transformers' model."""
    from transformers import BitsAndBytesConfig, Gemma3nForConditionalGeneration

    from forgekit.model.load import KEEP_16BIT

    settings = {}
    if load_in == "4bit":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=KEEP_16BIT,
        )  # fmt: skip
    return Gemma3nForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map={"": device}, **settings
    )


PARKED = contextlib.ExitStack()  # left when the process ends; a context that nobody holds is left at once


def add_lora(model: Any) -> Any:
    """The adapter through PEFT."""
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")).train()


def load_trl(model: Any, keep: bool) -> tuple[Any, Step]:
    """transformers with TRL's chunked loss, its best; with non-reentrant checkpointing unless `keep`."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model())
    if not keep:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    return model, lambda batch: model(**batch, use_cache=False, fused_lm_head=True).loss


def load_forgekit(model: Any, words: list[str], media: set[str]) -> tuple[Any, Step]:
    """forgekit's fast path on transformers + PEFT."""
    from forgekit.train.fast_path import enable_fast_path
    from forgekit.train.park import compact, park_table, park_towers

    memory, *options = words
    kernel = next((word for word in options if word in ("flash", "padded")), "auto")
    compiled, recorded = "compiled" in options, "graphs" in options
    path = enable_fast_path(model, memory=memory, compiled=compiled, recorded=recorded, kernel=kernel)
    if path is None:
        raise RuntimeError("the fast path does not apply")
    print(f"    attention by {path.kernel}", flush=True)
    if "park" in options:
        PARKED.enter_context(park_towers(path.base, media))
        PARKED.enter_context(park_table(path.text))
        compact(path.base)
        print(f"    {torch.cuda.memory_allocated() / 2**30:.2f} GiB of weights on the GPU", flush=True)
    return model, lambda batch: model(**batch, use_cache=False).loss


class Clock:
    """Takes training steps with one model and one optimiser, and times each.

    A step is forward, backward and optimiser, waited for; batches are taken in turn.
    """

    def __init__(self, model: Any, loss_of: Step):
        """Start with a fresh AdamW."""
        self.loss_of = loss_of
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        self.loss = float("nan")

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Take a step; return its seconds."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.loss_of(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self.loss = float(loss.detach())
        return seconds

    def warm_up(self, batches: list[dict[str, torch.Tensor]], steps: int) -> list[float]:
        """Take the steps in which a side compiles and records; return the seconds of each."""
        return [self.step(batches[number % len(batches)]) for number in range(steps)]

    def measure(
        self, batches: list[dict[str, torch.Tensor]], steps: int, warm: list[float], longest: float = inf
    ) -> dict[str, Any]:
        """Return ms a step (median), seconds of the first step, and peak GiB after the warm-up; no step begins after `longest` seconds.

        CUDA graphs keep memory that torch does not count as allocated, so beside it stands what the process had reserved.
        """
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        while len(seconds) < steps and sum(seconds) < longest:
            seconds.append(self.step(batches[len(seconds) % len(batches)]))
        timed = sorted(seconds)
        every = [*warm, *seconds]
        return {
            "ms": round(1000 * timed[len(timed) // 2], 2),
            "ms_min": round(1000 * timed[0], 2),
            "ms_max": round(1000 * timed[-1], 2),
            "first_step_s": round(warm[0], 2),
            "steps": len(every),
            "all_steps_s": round(sum(every), 2),
            "slow_steps_s": round(
                sum(s for s in every if s > 5 * timed[len(timed) // 2]), 2
            ),  # compiling and recording
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
            "loss": round(self.loss, 4),
        }
