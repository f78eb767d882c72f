"""A backend by name; a missing library is named with the line that installs it."""

import sys

import pytest

from forgekit.errors import ConfigError, RunError
from forgekit.sweep.backends import open_backend
from forgekit.sweep.ray import count_room


@pytest.mark.parametrize(("name", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RunError, match=rf'needs {library}\. Install it with: pip install "forgekit\[{name}\]"'):
        open_backend(name)


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"backend 'lsf': there are local, ray, slurm\."):
        open_backend("lsf")


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "room"),
    [
        ({"CPU": 8, "GPU": 4}, 1, 1, 4),
        ({"CPU": 8, "GPU": 4}, 4, 1, 2),
        ({"CPU": 8, "GPU": 4}, 1, 3, 1),
        ({"CPU": 8}, 2, 0, 4),
        ({"CPU": 8}, 1, 1, 0),
        ({}, 1, 0, 0),
    ],
)
def test_runs_fit_on_a_node_by_what_is_scarce(node: dict[str, float], cpus: int, gpus: int, room: int) -> None:
    assert count_room(node, cpus, gpus) == room
