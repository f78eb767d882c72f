"""Every setting, one line each: type, default, range, help. The six sections are the six words of forgekit.

Names and values follow transformers, PEFT and TRL, so that numbers carry over. The same lines feed the check of a recipe,
the table in a notebook and the command's help.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .gate_settings import check_gates, check_metrics, check_regression
from .layer_groups import LAYERS_HELP, check_layers, describe_groups
from .paths import check_status_file
from .slice_presets import SLICE_HELP, check_slice
from .tracker_settings import check_trackers

Switch = Annotated[  # YAML 1.1 and Python say true and false where a recipe says on and off
    Literal["auto", "on", "off"], BeforeValidator(lambda value: {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value)
]  # fmt: skip
Memory = Literal["low", "auto", "high"] | Annotated[float, Field(gt=0)]
Format = Literal["adapter", "merged", "gguf:f16", "gguf:bf16", "gguf:q8_0", "gguf:q4_k_m", "gguf:mmproj", "ollama"]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # a list in YAML, unchangeable here


def check_part(value: Any) -> Any:
    """Refuse a number that is neither a number of rows nor a share; 1.0 could be meant as either."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is None or isinstance(value, str) or whole or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError("a number of rows from 1, a share between 0 and 1, or the name of a file or Hub split")


def check_targets(value: Any) -> Any:
    """Return `target_modules` as PEFT takes it, unchangeable: text, a tuple of names, or None."""
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ValueError("a regular expression, a list of module names such as [q_proj, v_proj], or all-linear")


Part = Annotated[int | float | str | None, BeforeValidator(check_part)]


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Return a pydantic field with its help text."""
    return Field(default, description=help, **limits)


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know and values of another type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


class Data(Section):
    """Which rows are learned from, and which are held out."""

    path: str | None = setting(
        None, "a file (jsonl, json, csv, parquet), a Hub id, or a built-in task such as sample:orders"
    )
    streaming: bool = setting(
        False, "read only the first rows of a Hub data set, as many as data.train (and test, validation) ask for"
    )
    save_splits: bool = setting(False, "write the rows of each split to data/splits in the run's folder, as JSON lines")
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "question_answer",
        "transcript",
        "caption",
        "template",
    ] = setting("auto", "the shape of a row; ignored when the notebook's to_example is given")
    template: str | None = setting(
        None,
        "how a row becomes turns, as text with {columns}: 'user: {problem}' and 'assistant: {solution}' on lines of their own, "
        "a text that holds {response}, or one of r1_distill, reasoning",
    )
    train: Part = setting(
        None, "rows to learn from: a file or Hub split, or at most this many rows; empty: all that are not held out"
    )
    validation: Part = setting(
        None, "rows scored during training: a file or Hub split, a number of rows, or a share below 1 of the data"
    )
    test: Part = setting(
        None, "rows scored before and after: a file or Hub split, a number of rows, or a share below 1 of the data"
    )
    instruction: str = setting(
        "", "what the user asks beside each picture or clip, where the rows hold no question of their own"
    )
    frames: int = setting(
        4, "pictures taken from a film, evenly spaced; each costs 256 tokens with the released checkpoints", ge=1, le=64
    )
    long_clips: Literal["refuse", "split"] = setting(
        "refuse",
        "clips longer than the model hears (30 s with the released checkpoints): refuse sets their rows aside; split makes "
        "several parts of each, in the same turn, each 188 tokens",
    )
    max_bad: float = setting(0.01, "share of bad rows above which a run stops before weights are read", ge=0, le=1)


class Model(Section):
    """Which weights, in which precision, on which engine."""

    id: str = setting(
        "unsloth/gemma-3n-E2B-it", "a Hub id, a checkpoint's folder, or tiny (the built-in practice model)"
    )
    revision: str | None = setting(None, "a commit or tag of the Hub repository, to pin the weights")
    engine: Literal["auto", "unsloth", "huggingface"] = setting(
        "auto", "auto: unsloth on a GPU, huggingface (transformers + PEFT) without one"
    )
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto: the first GPU, else the CPU")
    load_in: Literal["4bit", "8bit", "16bit", "full"] = setting(
        "4bit",
        "4bit (NF4, double quantised) and 8bit save memory; 16bit is exact; full trains every language weight without an adapter",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "auto: bfloat16 on Ampere GPUs and newer, float16 on older ones through Unsloth, float32 on a CPU"
    )
    slice: Annotated[dict[str, Any], BeforeValidator(check_slice)] = setting({}, SLICE_HELP)
    offload_ple: Switch = setting(
        "auto",
        "keep the per-layer embedding table (4.0 GB in E2B, 4.7 GB in E4B) in the machine's memory; on: from loading on (Unsloth: while it trains); auto: while it trains with train.memory low",
    )
    max_length: int = setting(
        2048,
        "longest row in tokens (media included); a fixed, positive number: longer rows are refused, never cut",
        gt=0,
        le=131072,
    )


class Adapter(Section):
    """What learns: the low-rank matrices beside the chosen layers."""

    layers: Names = setting(("attention", "mlp"), describe_groups())
    layers_to_transform: Annotated[str | None, BeforeValidator(check_layers)] = setting(None, LAYERS_HELP)
    target_modules: Annotated[Any, BeforeValidator(check_targets)] = setting(
        None,
        "for experts, instead of layers: a regular expression of whole module names, a list of names, or all-linear",
    )
    r: int = setting(16, "rank of the added matrices: 8, 16, 32, 64; more learns more and costs memory", ge=1, le=1024)
    lora_alpha: float = setting(16, "scale of the adapter: its output is multiplied by lora_alpha / r", gt=0)
    lora_dropout: float = setting(0.0, "share of the adapter's inputs dropped while training", ge=0, lt=1)
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = setting(
        {}, "another r for some: {group, or regular expression of module names: rank}"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = setting(
        {}, "another lora_alpha for some, in the same way"
    )
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r), steadier at high rank")
    use_dora: bool = setting(False, "learn a magnitude beside the direction: slower, sometimes better at low rank")
    bias: Literal["none", "all", "lora_only"] = setting(
        "none", "biases that learn: none, all of the model's, or those of the adapted modules"
    )
    modules_to_save: Names = setting(
        (),
        "ends of names of modules that learn with all their weights beside the adapter, for instance altup.prediction_coefs",
    )
    path: str | None = setting(
        None, "folder of an adapter to go on from; r, lora_alpha and layers must be the ones it was made with"
    )


class Train(Section):
    """How the adapter learns."""

    method: Literal["sft"] = setting("sft", "supervised fine-tuning on the assistant's turns")
    seed: int = setting(3407, "seed of the adapter, the order of rows and dropout", ge=0, lt=2**32)
    per_device_train_batch_size: int = setting(2, "rows in one forward pass", ge=1)
    gradient_accumulation_steps: int = setting(4, "forward passes added up before one optimiser step", ge=1)
    gpus: int = setting(
        1,
        "processes that train together, each with a GPU of its own (on a CPU they share its cores) and a copy of the model, or with "
        "load_in: full a part of its weights; they share the rows of a step, whose number and order stay",
        ge=1,
        le=64,
    )
    learning_rate: float = setting(2e-4, "peak step size; lower it when the loss does not fall", gt=0, le=1)
    learning_rate_pattern: dict[str, Annotated[float, Field(gt=0)]] = setting(
        {}, "a factor on learning_rate for some groups, for instance {vision: 0.1}"
    )
    warmup_steps: float = setting(5, "steps until the peak; below 1 it is a share of all steps", ge=0)
    max_steps: int | None = setting(
        None, "stop after so many optimiser steps, whatever num_train_epochs says; -1: no such limit", ge=-1
    )
    num_train_epochs: float = setting(1, "passes over the training rows", gt=0)
    optim: str = setting(
        "auto",
        "auto: adamw_8bit where bitsandbytes has a GPU (adamw_torch_fused with load_in: full on several), else adamw_torch; or any name "
        "transformers knows",
    )
    weight_decay: float = setting(0.01, "pull of weights towards zero", ge=0, lt=1)
    lr_scheduler_type: str = setting(
        "linear", "course of the learning rate after warm-up: linear, cosine, constant, ..."
    )
    max_grad_norm: float = setting(1.0, "longest gradient; longer ones are scaled down", gt=0)
    logging_steps: int = setting(1, "steps between two lines of the log", ge=1)
    eval_steps: int | None = setting(
        None, "steps between two scores on the validation rows; empty: none during training", ge=1
    )
    save_steps: int | None = setting(
        None, "steps between two checkpoints; empty: with each score when eval_steps is set", ge=1
    )
    save_minutes: float | None = setting(
        5.0, "save a checkpoint too when the last one is so many minutes old; empty: never by the clock", gt=0
    )
    resume: str = setting(
        "auto",
        "auto: go on from the newest whole checkpoint in the run's folder, if there is one; never: from the first step, older "
        "checkpoints are kept aside; or a checkpoint's folder",
    )
    allow_drift: Annotated[tuple[Literal["dataset", "config", "base", "versions"], ...], Field(strict=False)] = setting(
        (), "resume although these have changed since the checkpoint: dataset, config, base, versions"
    )
    early_stopping: int | None = setting(
        None, "stop when so many scores in a row did not improve (needs eval_steps)", ge=1
    )
    gradient_checkpointing: Switch = setting(
        "auto", "compute activations again instead of keeping them: saves memory, costs time; auto: on with a GPU"
    )
    fast: Switch = setting(
        "auto",
        "compute no row that teaches nothing (exact: same loss, same gradients); auto: wherever the model allows it (no float16)",
    )
    compile: Switch = setting(
        "auto",
        "fuse the fast path's layers with torch.compile, about a minute; auto: on a GPU when the run is long enough",
    )
    cuda_graphs: Literal["auto", "off"] = setting(
        "auto", "start compiled batches of a shape that comes often by two launches instead of thousands"
    )
    memory: Memory = setting(
        "auto",
        "what the fast path keeps for its backward: low (nothing: least memory), high (all: fastest), auto (what fits), or so many GiB in use",
    )
    cache_towers: Switch = setting(
        "auto",
        "keep what frozen towers make of pictures and sound for the next epochs; auto: when rows come again and looking them up pays",
    )
    guard: Literal["stop", "warn"] = setting(
        "stop", "what a failed check of the training stack does before the first step"
    )
    report_to: Annotated[tuple[str, ...], BeforeValidator(check_trackers)] = setting(
        (),
        "trackers that follow the training from processes of their own: tensorboard, trackio, or module:function of your own; "
        "logs/metrics.jsonl is always written",
    )
    status_file: Annotated[str | None, BeforeValidator(check_status_file)] = setting(
        None, "a second place for status.json, for other programs that poll"
    )


class Evaluate(Section):
    """How the model is scored, before and after."""

    metric: Annotated[tuple[str, ...], BeforeValidator(check_metrics)] = setting(
        ("exact_match",),
        "how answers are scored, one name or several, the first decides: exact_match, normalized_match, token_f1, contains, "
        "regex, json_equal, cer, wer, bleu, chrf, rouge_l, choice, loss, perplexity, or module:function of your own",
    )
    pattern: str | None = setting(
        None,
        "for regex: what counts in an answer; its last find (or the group's, where there is one) must be the reference's",
    )
    choices: Names = setting((), "for choice: the answers to choose from, where rows bring no choices of their own")
    rows: int | None = setting(100, "held-out rows that are answered; empty: all", ge=1)
    max_new_tokens: int = setting(256, "longest answer in tokens", ge=1)
    per_device_eval_batch_size: int = setting(8, "rows answered or scored together", ge=1)
    regression: Annotated[dict[str, Any], BeforeValidator(check_regression)] = setting(
        {},
        "a second, general set on which the score may not drop by more than `drop`: {path: general.jsonl, drop: 0.02}",
    )
    gates: Annotated[dict[str, dict[str, float]], BeforeValidator(check_gates)] = setting(
        {},
        "what a run has to show: baseline-established, model-performance, no-regression, quantization-verified; a list, or "
        "with limits, for instance {model-performance: {margin: 0.2}}",
    )
    gates_action: Literal["warn", "stop"] = setting(
        "warn", "what a gate that fails does to `forgekit run`: warn, or stop (exit code 3, state gates_failed)"
    )


class Export(Section):
    """What is written at the end."""

    formats: Annotated[tuple[Format, ...], Field(strict=False)] = setting(
        ("adapter",),
        "adapter: the added matrices alone; merged: a whole model in 16 bit; gguf:q8_0 (or f16, bf16, q4_k_m): one file of the text model "
        "for llama.cpp; gguf:mmproj: its picture tower, of the released sizes only; ollama: a Modelfile for it",
    )
    replace: bool = setting(False, "replace an export that stands in the run's folder, once the new one is verified")
    push: str | None = setting(
        None,
        "repository of the Hub that verified exports are uploaded to, private when it is new, for instance me/orders; the token comes "
        "from the environment variable HF_TOKEN, Colab's or Kaggle's secrets or the Hub's login. Empty: nothing leaves this machine",
    )
