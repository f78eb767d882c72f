"""A second model on the GPU only where both fit; else the trained one waits in the machine's memory."""

from types import SimpleNamespace
from typing import Any

import pytest

from forgekit.export import verify_merged as module
from forgekit.hardware import GIB


class Parked:
    """A stand-in for a model on a GPU: remembers where it was sent."""

    def __init__(self) -> None:
        self.device = SimpleNamespace(type="cuda")
        self.moves: list[Any] = []

    def to(self, device: Any) -> None:
        self.moves.append(device)


@pytest.mark.parametrize(("free", "moved"), [(20 * GIB, False), (11 * GIB, True)])
def test_the_trained_model_makes_room_only_where_the_gpu_is_too_small(
    free: int, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model = Parked()
    with pytest.raises(KeyError), module.make_room(model, 10 * GIB):
        assert model.moves == (["cpu"] if moved else [])
        raise KeyError  # comes back also then
    assert model.moves == (["cpu", model.device] if moved else [])
