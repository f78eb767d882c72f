"""Settings that do not go together, each found with a sentence, and the nearest name to a misspelt one."""

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .layer_groups import CHOICES
from .paths import explain_name

if TYPE_CHECKING:
    from .config import Config


# settings that may name a file or a folder; some of them a Hub id, a share or a number too
SHARING = ("auto", "adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")  # torch's own (train/sharded.py)
FILES = ("data.path", "data.train", "data.validation", "data.test", "model.id", "adapter.path")


def find_impossible_names(config: "Config") -> list[str]:
    """Return a sentence for every setting that names a file and no file can have that name."""
    problems = []
    for name in FILES:
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        problem = explain_name(value) if isinstance(value, str) else None
        if problem:
            problems.append(f"{name} {problem}. Give the name of a file, a folder or a repository of the Hub.")
    return problems


def find_conflicts(config: "Config") -> list[str]:
    """Return a sentence for every setting that does not go with another one."""
    problems = find_adapter_conflicts(config) + find_evaluate_conflicts(config) + find_impossible_names(config)
    if config.train.early_stopping and not config.train.eval_steps:
        problems.append("train.early_stopping needs scores during training: set train.eval_steps too.")
    if config.train.eval_steps and config.data.validation is None:
        problems.append(
            "train.eval_steps needs rows to score: set data.validation (a file, a number of rows, or a share)."
        )
    if config.train.eval_steps and config.train.save_steps and config.train.save_steps % config.train.eval_steps:
        problems.append(
            f"train.save_steps ({config.train.save_steps}) must be a multiple of train.eval_steps ({config.train.eval_steps}), "
            "so that the best checkpoint is one that was scored."
        )
    if config.train.max_steps == 0:
        problems.append(
            "train.max_steps is 0, so nothing would be learned. Set a number of steps, or -1 for num_train_epochs."
        )
    if config.train.gpus > 1 and config.model.engine == "unsloth":
        problems.append(
            f"train.gpus is {config.train.gpus}, and Unsloth trains in one process on one GPU. Set model.engine: huggingface (or auto), "
            "or train.gpus: 1."
        )
    if config.train.gpus > 1 and config.model.load_in == "full" and config.train.optim not in SHARING:
        problems.append(
            f"train.optim: {config.train.optim} is not known to optimise parts of weights, which the processes of train.gpus keep with "
            f"model.load_in: full. Take one of {', '.join(SHARING)}."
        )
    if config.adapter.path and config.model.load_in == "full":
        problems.append(
            "adapter.path continues an adapter, and model.load_in: full has none. Set load_in to 16bit or 4bit."
        )
    if not config.export.formats:
        problems.append(
            "export.formats is empty, so nothing of the training would be kept. Name adapter, merged or both."
        )
    if "adapter" in config.export.formats and config.model.load_in == "full":
        problems.append(
            "export.formats asks for adapter, and model.load_in: full trains the weights themselves, without one. "
            "Set export.formats: [merged]."
        )
    return problems


def find_evaluate_conflicts(config: "Config") -> list[str]:
    """Return a sentence for every metric or gate that lacks what it needs."""
    evaluate, problems = config.evaluate, []
    if "regex" in evaluate.metric and evaluate.pattern is None:
        problems.append("evaluate.metric: regex needs evaluate.pattern, for instance '#### (-?[0-9.,]+)'.")
    if evaluate.pattern is not None:
        try:
            re.compile(evaluate.pattern)
        except re.error as error:
            problems.append(f"evaluate.pattern: {evaluate.pattern!r} is no regular expression ({error}).")
    if "no-regression" in evaluate.gates and not evaluate.regression:
        problems.append(
            "evaluate.gates asks for no-regression, which needs evaluate.regression: {path: general.jsonl, drop: 0.02}."
        )
    return problems


def find_adapter_conflicts(config: "Config") -> list[str]:
    """Return a sentence for every choice of layers that is unknown, empty or made twice."""
    adapter = config.adapter
    groups = [("layers", name) for name in adapter.layers]
    groups += [(name, key) for name in ("rank_pattern", "alpha_pattern") for key in getattr(adapter, name)]
    problems = [
        f"adapter.{name}: {group!r} is no group of layers.{suggest(group, CHOICES)} There are: {', '.join(CHOICES)}."
        for name, group in groups
        if group not in CHOICES and (name == "layers" or re.fullmatch(r"\w+", group))  # else a regular expression
    ]
    problems += [
        f"train.learning_rate_pattern: {group!r} is no group of layers.{suggest(group, CHOICES)} There are: {', '.join(CHOICES)}."
        for group in config.train.learning_rate_pattern
        if group not in CHOICES
    ]
    expressions = [("target_modules", adapter.target_modules)] if isinstance(adapter.target_modules, str) else []
    expressions += [item for item in groups if item[0] != "layers"]
    for name, expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            problems.append(f"adapter.{name}: {expression!r} is no regular expression ({error}).")
    if not adapter.layers and not adapter.target_modules and not adapter.modules_to_save:
        problems.append(f"adapter.layers is empty, so nothing would learn. Name at least one of: {', '.join(CHOICES)}.")
    if adapter.target_modules:
        problems += [
            f"adapter.target_modules is set and adapter.{name} too ({getattr(adapter, name)}, from {config.origin(f'adapter.{name}')}): "
            f"one of the two has to choose. Leave target_modules out, or set adapter.{name}: {empty}."
            for name, empty in (("layers", "[]"), ("layers_to_transform", "none"))
            if getattr(adapter, name) and config.origin(f"adapter.{name}") != "default"
            if name == "layers" or isinstance(adapter.target_modules, str)  # a list of names goes with layers
        ]
    return problems


def suggest(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean ...?" with the nearest known name, or nothing.

    The last part of a dotted name decides: max_steps -> train.max_steps, train.batch_size -> train.per_device_train_batch_size.
    """
    section, _, last = name.rpartition(".")
    here = [k for k in known if section and k.startswith(f"{section}.")]
    lasts = {k.rpartition(".")[2]: k for k in [*known, *here]}  # the same section wins
    own = {k.rpartition(".")[2]: k for k in here}
    nearest = (
        [k for k in lasts if k == last]
        or [k for names in (own, lasts) for k in names if len(last) > 3 and last in k]
        or difflib.get_close_matches(last, own, 1, 0.6)
        or difflib.get_close_matches(last, lasts, 1, 0.75)
    )
    return f" Did you mean {lasts[nearest[0]]}?" if nearest else ""
