"""Random numbers of one's own: what is drawn inside a block depends on the block's seeds alone, and leaves no trace outside."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def own_random_numbers(*seeds: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's random numbers on the CPU inside, and put their states back."""
    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    own = numpy.random.SeedSequence(seeds).generate_state(1, numpy.uint64).item()
    try:
        random.seed(own)
        numpy.random.seed(own % 2**32)
        torch.default_generator.manual_seed(own)
        yield
    finally:
        put_back(*before)


@contextlib.contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Put the states of all random numbers back, the GPU's too: scoring draws some, and training must not notice."""
    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        put_back(*before)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def put_back(python: Any, numbers: Any, cpu: Any) -> None:
    """Set the three states."""
    import numpy
    import torch

    random.setstate(python)
    numpy.random.set_state(numbers)
    torch.set_rng_state(cpu)
