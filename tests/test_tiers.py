"""The tiers of conftest.py: what runs by default, what is skipped, and that the reason is told."""

import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_plain(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.faults
def test_faults(): pass

@pytest.mark.gpu
def test_gpu(): pass
"""


@pytest.fixture
def small_suite(pytester: pytest.Pytester, project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Four tests, one a tier, under this project's own conftest.py, on a machine where torch sees no GPU."""
    monkeypatch.syspath_prepend(project_folder)
    blind_torch = type(sys)("torch")
    blind_torch.cuda = type(sys)("torch.cuda")  # type: ignore[attr-defined]
    blind_torch.cuda.is_available = lambda: False
    monkeypatch.setitem(sys.modules, "torch", blind_torch)
    pytester.makeini(
        "[pytest]\nmarkers =\n    slow\n    faults\n    gpu\n    browser\naddopts = -ra --strict-markers\n"
    )
    pytester.makeconftest((project_folder / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(TESTS)
    return pytester


def test_slow_and_gpu_tests_are_skipped_with_a_reason(small_suite: pytest.Pytester) -> None:
    result = small_suite.runpytest_inprocess()
    result.assert_outcomes(passed=1, skipped=3)
    reasons = ("run it with --slow or -m slow", "run it with --faults or -m faults", "torch sees none")
    for reason in reasons:
        result.stdout.fnmatch_lines([f"*SKIPPED*{reason}*"])


@pytest.mark.parametrize(
    ("arguments", "passed"), [(["--slow"], 2), (["-m", "slow"], 1), (["--faults"], 2), (["-m", "faults"], 1)]
)
def test_slow_and_fault_tests_run_when_asked_for(
    small_suite: pytest.Pytester, arguments: list[str], passed: int
) -> None:
    result = small_suite.runpytest_inprocess(*arguments)
    assert result.parseoutcomes()["passed"] == passed


def test_gpu_tests_run_where_there_is_a_gpu(small_suite: pytest.Pytester) -> None:
    sys.modules["torch"].cuda.is_available = lambda: True
    small_suite.runpytest_inprocess().assert_outcomes(passed=2, skipped=2)
