"""What the backward keeps under a budget, and that recomputing is torch's own kind whatever stands in its place."""

from typing import Any

import pytest

from forgekit.train.recompute import GIB, Memory, plan_memory, recompute


def test_steps_are_kept_until_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    in_use = [100]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: in_use[0])

    def step(weight: Any) -> Any:
        if not torch.is_grad_enabled() or weight.requires_grad:
            in_use[0] += 50 * 4  # 50 bytes for each of 4 rows
        return weight * 2

    memory = Memory(limit=1000)
    weight = torch.ones(4, requires_grad=True)
    for _ in range(8):
        before = in_use[0]
        memory.run(lambda: step(weight), lambda: recompute(step, weight), "layer", 4)
        if memory.again:
            in_use[0] = before  # a step that is computed again leaves nothing behind
    assert (memory.kept, memory.again) == (4, 4) and in_use[0] <= 1000
    assert memory.seen == {"layer": 50}


def test_settings_become_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def limit(memory: str | float, device: torch.device) -> int | None:
        return plan_memory(memory, device, 4096, compiled=False).limit

    assert [limit(memory, cpu) for memory in ("low", "auto", "high", 8.0)] == [0, None, None, None]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    assert [limit(memory, gpu) for memory in ("low", "high", 8.0)] == [0, None, 8 * GIB]
    assert limit("auto", gpu) == 70 * GIB


def test_layers_are_computed_again_in_pairs_where_that_costs_nothing() -> None:
    import torch

    cpu = torch.device("cpu")
    spans = {(tokens, compiled): plan_memory("low", cpu, tokens, compiled).span for tokens in (4096, 16384) for compiled in (False, True)}  # fmt: skip
    assert spans == {(4096, False): 2, (4096, True): 1, (16384, False): 2, (16384, True): 2}
    assert plan_memory("auto", cpu, 16384, True).span == 1  # a budget is spent layer by layer


def test_a_reentrant_checkpoint_in_torch_s_place_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth puts one there and keeps torch's own under another name; with frozen inputs it would lose the gradient."""
    import torch
    import torch.utils.checkpoint

    genuine = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "_unsloth_pristine_checkpoint", genuine, raising=False)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda step, *args, **_: genuine(step, *args, use_reentrant=True))  # fmt: skip
    weight, frozen = torch.ones(3, requires_grad=True), torch.ones(3)
    recompute(lambda x: (x * weight).exp(), frozen).sum().backward()
    assert weight.grad is not None and (weight.grad > 0).all()
