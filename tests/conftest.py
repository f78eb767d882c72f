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
    parser.addoption("--record", metavar="FILE", type=Path, help="write what was broken, and what happened, to a file")
    parser.addoption("--only-missing", action="store_true", help="leave out what stands in that file already")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests whose tier was not asked for or whose machine this is not."""
    for marker, reason in skip_reasons(config, items).items():
        for item in items:
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    recorded = read_recorded(config.getoption("--record")) if config.getoption("--only-missing") else {}
    for item in items:
        if recorded.get(item.nodeid, {}).get("passed"):
            item.add_marker(pytest.mark.skip(reason="stands in the file of --record"))


# ---- what was broken on purpose, for the README's table (benchmarks/reliability.py) ------------------------------------


@pytest.fixture
def record_case(record_property: Any) -> Any:
    """Returns a function: what is broken, at which point, by which action -> a case, whose "happened" the test sets."""

    def record(what: str, point: str, action: str, times: int = 1) -> dict[str, Any]:
        case = {"what": what, "point": point, "action": action, "times": times, "happened": None}
        record_property("case", case)
        return case

    return record


def read_recorded(path: Path | None) -> dict[str, dict[str, Any]]:
    """Return the cases of a file by their test's name; of two the later one counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
    return {row["test"]: row for row in map(json.loads, lines)}


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record") and getattr(config, "workerinput", None) is None:  # xdist's controller alone
        config.pluginmanager.register(CaseWriter(config.getoption("--record")))


class CaseWriter:
    """Writes a line for each case as its test ends, so that a suite that is broken off can go on (`--only-missing`)."""

    def __init__(self, path: Path):
        self.path = path.absolute()  # a test may stand in another folder as it ends

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Append the cases of a test."""
        for name, case in report.user_properties:
            if name == "case" and report.when == "call":
                row = {"test": report.nodeid, **case, "passed": report.passed, "seconds": round(report.duration, 1)}
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")

    def pytest_sessionfinish(self) -> None:
        """Leave one line for each test, in order."""
        rows = read_recorded(self.path).values()
        lines = [json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["test"])]
        self.path.write_text("".join(lines), encoding="utf-8")


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
