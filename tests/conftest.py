"""What every test shares: which tiers run where, and the project's folder.

Default: everything on a CPU, in minutes. `--slow` adds the slow tests, `-m slow` runs them alone; the same for `faults`, the whole
fault suite, of which a selection without that mark runs by default. Tests for a GPU or a browser are skipped, with the reason, where there is none.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from forgekit.environment import set_environment

# No test may depend on the network, be counted as usage or need a home folder that can be written. Set here because
# libraries read these variables while they are imported; kernels and commands that a test starts inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
set_environment()

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well (they take minutes each)")
    parser.addoption("--faults", action="store_true", help="run the whole fault suite as well (up to an hour)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests whose tier was not asked for or whose machine this is not."""
    for marker, reason in skip_reasons(config, items).items():
        for item in items:
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def skip_reasons(config: pytest.Config, items: list[pytest.Item]) -> dict[str, str | None]:
    """Return for each tier why it cannot run here, or None where it can."""
    asked_for_slow = config.getoption("--slow") or "slow" in config.getoption("markexpr")
    asked_for_faults = config.getoption("--faults") or "faults" in config.getoption("markexpr")
    wants_gpu = any(item.get_closest_marker("gpu") for item in items)
    return {
        "slow": None if asked_for_slow else "takes minutes: run it with --slow or -m slow",
        "faults": None if asked_for_faults else "takes up to an hour in all: run it with --faults or -m faults",
        # torch is imported only when a collected test needs the answer: it costs seconds
        "gpu": None if not wants_gpu or has_gpu() else "needs an NVIDIA GPU, and torch sees none",
        "browser": None if any(map(shutil.which, BROWSERS)) else f"needs a browser: none of {', '.join(BROWSERS)} here",
    }


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def project_folder() -> Path:
    """The checkout: the folder that holds pyproject.toml."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def browser_path() -> str:
    """The first browser that is installed; tests marked browser run only where there is one."""
    return next(path for name in BROWSERS if (path := shutil.which(name)))


# ---------------------------------------------------------------------------------------------------------------------
# Fixtures of the other tests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3n checkpoint with all three towers: four narrow text layers, the last two with shared keys and values."""
    from forgekit.data.samples.orders import load_orders
    from forgekit.model.tiny import build_config, build_model, build_processor, build_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint") / "random-gemma3n"
    tokenizer = build_tokenizer(row["message"] for row in load_orders(300))
    config = build_config(tokenizer, hidden_size=32, layers=4, shared_layers=2)
    # each kind of attention once with its own keys and values and once with shared ones; sparse below, dense above
    config.text_config.layer_types = ["sliding_attention", "full_attention"] * 2
    config.text_config.activation_sparsity_pattern = [0.95, 0.95, 0.0, 0.0]
    build_model(config).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def orders_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty rows of prompt and completion: an order sentence and its JSON."""
    from forgekit.data.samples.orders import load_orders

    path = tmp_path_factory.mktemp("data") / "orders.jsonl"
    rows = [{"prompt": row["message"], "completion": json.dumps(row["order"])} for row in load_orders(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_config(tiny_folder: Path, orders_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function: settings -> Config of a short run of the random checkpoint, its folder below tmp_path."""
    from forgekit import load_config

    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    short = {
        "data.path": str(orders_file),
        "model.id": str(tiny_folder),
        "model.engine": "huggingface",
        "model.device": "cpu",
        "model.load_in": "16bit",
        "model.max_length": 256,
        "adapter.r": 8,
        "train.max_steps": 5,
        "train.learning_rate": 2e-3,
        "train.warmup_steps": 2,
        "evaluate.rows": 8,
        "evaluate.max_new_tokens": 8,
    }
    return lambda settings=None: load_config(None, {**short, **(settings or {})})


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """A tokenizer with Gemma's special tokens and chat template, in a second; it does for a processor where rows are text."""
    from forgekit.data.samples.orders import load_orders
    from forgekit.model.tiny import build_tokenizer

    return build_tokenizer((row["message"] for row in load_orders(300)), text_vocabulary=600)
