"""forgekit: fine-tune Gemma 3n from notebooks that a person can read, click, test and run headless.

Importing this loads neither torch nor Unsloth; each function brings what it needs when it is called.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the table of contents, in order of flow
    # settings and the run's folder
    from .config import Config as Config
    from .config import load_config as load_config
    from .run_folder import Run as Run
    from .run_folder import start_run as start_run

    # data
    from .model.load import load_processor as load_processor
    from .data.load import load_data as load_data
    from .data.audit import audit_data as audit_data
    from .data.show import show_example as show_example
    from .data.show import show_labels as show_labels

    # model
    from .model.load import load_model as load_model
    from .model.load import start_engine as start_engine
    from .model.slice import slice_checkpoint as slice_checkpoint

    # adapter
    from .panels.layers import LayerPanel as LayerPanel
    from .adapter.plan import plan_layers as plan_layers
    from .adapter.memory import estimate_memory as estimate_memory
    from .adapter.lora import add_adapter as add_adapter
    from .adapter.lora import count_trainable as count_trainable

    # train
    from .train.guard import check_training as check_training
    from .train.sft import sft_trainer as sft_trainer
    from .train.fast_path import enable_fast_path as enable_fast_path
    from .train.fast_path import disable_fast_path as disable_fast_path

    # evaluate
    from .evaluate.scores import Scores as Scores
    from .train.score import evaluate_model as evaluate_model
    from .train.score import score_baseline as score_baseline
    from .train.score import check_regression as check_regression
    from .evaluate.baseline import load_general as load_general
    from .evaluate.comparison import compare_scores as compare_scores
    from .evaluate.gates import check_gates as check_gates
    from .evaluate.precision import measure_precisions as measure_precisions
    from .evaluate.scores import show_answers as show_answers
    from .evaluate.generate import generate_answer as generate_answer
    from .evaluate.generate import generate_answers as generate_answers

    # export
    from .export.model import export_model as export_model
    from .export.verify import verify_export as verify_export
    from .export.adapter import load_export as load_export
    from .export.llama import ask_gguf as ask_gguf

    # runs side by side
    from .sweep.results import read_results as read_results

    # panels
    from .panels.run import RunPanel as RunPanel
    from .panels.compare import ComparePanel as ComparePanel
    from .panels.chat import ChatPanel as ChatPanel

    # what goes wrong
    from .errors import ConfigError as ConfigError
    from .errors import DataError as DataError
    from .errors import ExportError as ExportError
    from .errors import ForgekitError as ForgekitError
    from .errors import ModelError as ModelError
    from .errors import RunError as RunError

# public name -> module, in order of flow; resolved when first used
CONTENTS = {
    # settings and the run's folder
    "load_config": "config",
    "Config": "config",
    "start_run": "run_folder",
    "Run": "run_folder",
    # data
    "load_processor": "model.load",
    "load_data": "data.load",
    "audit_data": "data.audit",
    "show_example": "data.show",
    "show_labels": "data.show",
    # model
    "start_engine": "model.load",
    "load_model": "model.load",
    "slice_checkpoint": "model.slice",
    # adapter
    "LayerPanel": "panels.layers",
    "plan_layers": "adapter.plan",
    "estimate_memory": "adapter.memory",
    "add_adapter": "adapter.lora",
    "count_trainable": "adapter.lora",
    # train
    "check_training": "train.guard",
    "sft_trainer": "train.sft",
    "enable_fast_path": "train.fast_path",
    "disable_fast_path": "train.fast_path",
    # evaluate
    "evaluate_model": "train.score",
    "score_baseline": "train.score",
    "check_regression": "train.score",
    "load_general": "evaluate.baseline",
    "compare_scores": "evaluate.comparison",
    "check_gates": "evaluate.gates",
    "measure_precisions": "evaluate.precision",
    "show_answers": "evaluate.scores",
    "Scores": "evaluate.scores",
    "generate_answer": "evaluate.generate",
    "generate_answers": "evaluate.generate",
    # export
    "export_model": "export.model",
    "verify_export": "export.verify",
    "load_export": "export.adapter",
    "ask_gguf": "export.llama",
    # runs side by side
    "read_results": "sweep.results",
    # panels
    "RunPanel": "panels.run",
    "ComparePanel": "panels.compare",
    "ChatPanel": "panels.chat",
    # what goes wrong
    "ForgekitError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "RunError": "errors",
    "ExportError": "errors",
}
__all__ = [*CONTENTS]


def __getattr__(name: str) -> Any:
    if name not in CONTENTS:
        raise AttributeError(f"module 'forgekit' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{CONTENTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*CONTENTS, "__version__"])
