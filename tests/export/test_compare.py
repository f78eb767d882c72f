"""The distance of two models is that of the formulas, and a model that says nothing is infinitely far."""

import pytest

from forgekit.export.compare import measure_distance


def test_distance_is_that_of_the_formula() -> None:
    import torch

    a, b = torch.randn(5, 7), torch.randn(5, 7)
    distance = measure_distance([a], [b])
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert distance.divergence == pytest.approx(float((p * (p / q).log()).sum() / 5), rel=1e-5)
    assert distance.largest == pytest.approx(float((a - b).abs().max()))


def test_a_tie_is_no_disagreement_and_anything_wider_is() -> None:
    import torch

    first = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.8, 0.0], [1.0, 0.0, 0.0]])
    second = torch.tensor([[0.9, 1.0, 0.0], [0.8, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert measure_distance([first], [second]).agreement == pytest.approx(2 / 3)


def test_a_missing_number_or_another_size_is_infinitely_far() -> None:
    import torch

    a = torch.zeros(2, 3)
    for other in ([], [torch.zeros(2, 4)], [torch.full((2, 3), float("nan"))]):
        distance = measure_distance([a], other)
        assert distance.largest == distance.divergence == float("inf") and distance.agreement == 0
