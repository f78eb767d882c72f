"""A backend by name; a missing library is named with the line that installs it."""

import sys

import pytest

from forgekit.errors import ConfigError, RunError
from forgekit.sweep.backends import open_backend


@pytest.mark.parametrize(("name", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RunError, match=rf'needs {library}\. Install it with: pip install "forgekit\[{name}\]"'):
        open_backend(name)


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"backend 'lsf': there are local, ray, slurm\."):
        open_backend("lsf")
