"""Which row comes when, and with which random numbers: from seed, epoch and row alone."""

import random
from typing import Any

import numpy
import pytest
import torch

from forgekit.data.randomness import kept_random_numbers, own_random_numbers
from forgekit.train.order import Order, SeededRows


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.random()), float(torch.rand(()))


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_order_is_that_of_an_unbroken_training_with_transformers(epoch: int) -> None:
    """accelerate's sampler, which transformers uses, over all epochs."""
    from accelerate.data_loader import SeedableRandomSampler

    stock = SeedableRandomSampler(range(37), data_seed=11)
    for _ in range(epoch):
        list(stock)
    assert Order(37, 11).shuffle(epoch) == list(stock)


def test_the_rows_of_a_step_are_those_that_the_loader_gives() -> None:
    order = Order(10, 3)
    taken = []
    for epoch in range(3):
        order.epoch = epoch
        rows = list(order)
        assert sorted(rows) == list(range(10))
        taken += [rows[start : start + 4] for start in range(0, 10, 4)]
    assert [order.find_rows(step, 4) for step in range(9)] == taken
    assert taken[:3] != taken[3:6]


class Noisy:
    """Rows that hold what was drawn while they were read."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> Any:
        return number, draw()


def test_a_row_draws_the_same_in_any_order_and_another_in_another_epoch() -> None:
    order = Order(5, 7)
    rows = SeededRows(Noisy(), order)
    first = [rows[number] for number in range(5)]
    draw()
    assert [rows[number] for number in (4, 0, 2)] == [first[number] for number in (4, 0, 2)]
    assert len({row[1] for row in first}) == 5
    order.epoch = 1
    assert rows[0] != first[0]
    assert SeededRows(Noisy(), Order(5, 8))[0] != first[0]


@pytest.mark.parametrize("block", [lambda: own_random_numbers(1, 2), kept_random_numbers])
def test_what_is_drawn_inside_leaves_no_trace(block: Any) -> None:
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with block():
        draw()
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_a_training_sees_the_rows_in_that_order_in_every_epoch_and_scores_change_nothing(make_run: Any) -> None:
    settings = {"train.per_device_train_batch_size": 25, "train.max_steps": 5, "data.validation": 10}
    losses = []
    for extra in ({}, {"train.eval_steps": 1}):
        trainer = make_run(settings | extra, f"run-{len(losses)}")
        seen, collator = [], trainer.data_collator

        def note(examples: list[Any], seen: Any = seen, collator: Any = collator) -> Any:
            if len(examples) != 8:  # scored ones
                seen.append([example["messages"][0]["content"][0]["text"] for example in examples])
            return collator(examples)

        trainer.data_collator = note
        trainer.train()
        prompts = [example["messages"][0]["content"][0]["text"] for example in trainer.train_dataset]
        trained = [rows for rows in seen if len(rows) == 25][:5]
        assert trained == [[prompts[row] for row in trainer.order.find_rows(step, 25)] for step in range(5)]
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1], "dropout differs after a score"
