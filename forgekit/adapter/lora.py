"""Low-rank adapters (LoRA) on chosen groups of layers: https://arxiv.org/abs/2106.09685.

The names follow Gemma 3n's modules in transformers. Layers that share keys and values have no k_proj and v_proj of their
own, so a model with 30 layers of which 10 share has 30 q and 20 k.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ConfigError, ModelError
from ..files import write_text
from ..layer_groups import TOWERS, find_tower
from ..model.bases import is_base_of
from ..model.load import choose_unsloth_checkpointing, start_engine
from ..model.shapes import count_weights, read_shapes
from ..run_folder import Run
from .choose import list_saved, write_targets
from .names import write_pattern
from .plan import check_described, check_learner, name_module, plan_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapter(model: "PreTrainedModel", config: Config, run: Run | None = None) -> Any:
    """Make the chosen layers learn exactly as `plan_layers` says, and print how much that is, tower by tower.

    Returns a `peft.PeftModel` around the model; with `load_in: full` the model itself, its language part unfrozen.
    The matrices start from `train.seed`, or from the weights in `adapter.path`. With a run, its folder gets plan.json.

    Raises:
        ConfigError: a choice that cannot learn, or the adapter in `adapter.path` was made with other settings.
        ModelError: other modules learn than the plan says.
    """
    engine = start_engine(config)
    plan = plan_layers(config, model)
    check_described(config, model)
    if run:
        write_text(run.path / "plan.json", plan.to_json() + "\n")
    if config.model.load_in == "full":
        learner = unfreeze_language(model)
    elif engine == "unsloth":
        learner = add_unsloth_adapter(model, config)
    else:
        learner = add_peft_adapter(model, config)
    check_learner(plan, learner)
    if config.adapter.path:
        load_adapter_weights(learner, Path(config.adapter.path), config)
    print_trainable(learner)
    for note in plan.notes:
        print(f"Note: {note}")
    return learner


def describe_lora(model: "PreTrainedModel", config: Config) -> dict[str, Any]:
    """Return the adapter's settings under the names that PEFT and Unsloth share."""
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
    shared = {name: getattr(config.adapter, name) for name in names}
    for name in ("rank_pattern", "alpha_pattern"):
        shared[name] = {write_pattern(key): value for key, value in getattr(config.adapter, name).items()}
    shapes, saved = read_shapes(model), list_saved(config)
    tied = shapes.tied and any(name.endswith("embed_tokens") for name in saved)
    return {
        **shared,
        # PEFT takes an empty list as "no module", which it allows when modules_to_save names some
        "target_modules": write_targets(config, shapes) or [],
        "modules_to_save": saved or None,
        "ensure_weight_tying": tied,
    }


def add_peft_adapter(model: "PreTrainedModel", config: Config) -> Any:
    """Add the adapter with PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(config.train.seed)
    return get_peft_model(model, LoraConfig(**describe_lora(model, config), task_type="CAUSAL_LM"))


def add_unsloth_adapter(model: "PreTrainedModel", config: Config) -> Any:
    """Add the adapter through unsloth.FastModel, which also sets up its gradient checkpointing.

    The modules are named by the same expression as with PEFT, so both engines train the same ones.
    """
    from unsloth import FastModel

    return FastModel.get_peft_model(
        model,
        **describe_lora(model, config),
        random_state=config.train.seed,
        use_gradient_checkpointing=choose_unsloth_checkpointing(config),
    )


def unfreeze_language(model: "PreTrainedModel") -> "PreTrainedModel":
    """Make every weight of the language model learn and freeze the towers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(find_tower(name) == "language")
    return model


def load_adapter_weights(model: Any, folder: Path, config: Config) -> None:
    """Put the weights of a saved adapter into the one just made; names and shapes must agree.

    Raises ConfigError when the folder holds no adapter or was made with another r, alpha or choice of layers.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    for file in (weights, folder / "adapter_config.json"):
        if not file.is_file():
            raise ConfigError(f"adapter.path: {folder} holds no adapter ({file.name} is missing).")
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    now = model.peft_config["default"]
    problems = [
        f"adapter.{name} is {getattr(now, name)}, but the adapter in {folder} was made with {saved.get(name)}. Set it to that."
        for name in ("r", "lora_alpha", "use_rslora", "use_dora")
        if getattr(now, name) != saved.get(name, False)  # older PEFT wrote no use_rslora and use_dora
    ]
    made_for = saved.get("base_model_name_or_path")
    if made_for and not is_base_of(config, made_for):
        problems = [
            f"adapter.path: the adapter in {folder} was trained on {made_for}, and model.id is {config.model.id}: on that base it would "
            f"mean something else. Set model.id: {made_for}."
        ]
    tensors = load_file(weights)
    if not problems and tensors.keys() != get_peft_model_state_dict(model).keys():
        problems = [f"adapter.layers chooses other modules than the adapter in {folder} has ({len(tensors)} tensors)."]
    if problems:
        raise ConfigError(problems)
    set_peft_model_state_dict(model, tensors)


def count_trainable(model: Any) -> dict[str, dict[str, int]]:
    """Count modules and parameters that learn, and all parameters, by tower: language, vision, audio.

    A 4-bit weight counts as the parameters it stands for, two a byte. The vision and audio projections into the language
    model count with their tower.
    """
    counts = {tower: {"modules": 0, "trainable": 0, "total": 0} for tower in TOWERS}
    modules: set[tuple[str, str]] = set()
    for name, parameter in model.named_parameters():
        tower = find_tower(name)
        counts[tower]["total"] += count_weights(parameter) * ("lora_" not in name and "modules_to_save" not in name)
        if parameter.requires_grad:
            counts[tower]["trainable"] += parameter.numel()
            modules.add((tower, name_module(name)))
    for tower, _ in modules:
        counts[tower]["modules"] += 1
    return counts


def print_trainable(model: Any) -> None:
    """Print one line a tower. Raises ModelError when nothing learns."""
    counts = count_trainable(model)
    trainable, total = (sum(count[key] for count in counts.values()) for key in ("trainable", "total"))
    if not trainable:
        raise ModelError("Nothing learns: no parameter of the model requires a gradient. Choose other adapter.layers.")
    for tower, count in counts.items():
        if count["total"]:
            print(
                f"{tower:>8}: {count['modules']:>3} modules learn, {count['trainable']:>13,} of {count['total']:>13,} parameters"
            )
    print(f"   total: {trainable:,} parameters learn, {trainable / total:.2%} of the base model's {total:,}")
