"""What every test shares: which tiers run where, and the project's folder.

Default: everything on a CPU, in minutes. `--slow` adds the slow tests, `-m slow` runs them alone. Tests for a GPU or a
browser are skipped, with the reason, where there is none.
"""

import os
import shutil
from pathlib import Path

import pytest

from forgekit.environment import set_environment

# No test may depend on the network, be counted as usage or need a home folder that can be written. Set here because
# libraries read these variables while they are imported; kernels and commands that a test starts inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
set_environment()

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well (they take minutes each)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests whose tier was not asked for or whose machine this is not."""
    for marker, reason in skip_reasons(config, items).items():
        for item in items:
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def skip_reasons(config: pytest.Config, items: list[pytest.Item]) -> dict[str, str | None]:
    """Return for each tier why it cannot run here, or None where it can."""
    asked_for_slow = config.getoption("--slow") or "slow" in config.getoption("markexpr")
    wants_gpu = any(item.get_closest_marker("gpu") for item in items)
    return {
        "slow": None if asked_for_slow else "takes minutes: run it with --slow or -m slow",
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


# ---------------------------------------------------------------------------------------------------------------------
# Fixtures of the other tests
# ---------------------------------------------------------------------------------------------------------------------
