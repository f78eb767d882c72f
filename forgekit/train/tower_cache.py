"""What a frozen tower makes of a picture or a clip is the same in each epoch: it is kept, and found again by content.

    tower(pixel_values or input_features)      replaced on the instance while a trainer trains
      ├─ fingerprint of each item's numbers ─ found ─ its features from the machine's memory
      └─ the others together through the tower, as before; features kept as long as there is room

A clip is given to the tower with its batch's padding, so it is found only where that is as long as before.
The numbers that reach the tower come behind the processor, so they stand for file and processor both; weights cannot change,
because the tower is frozen and the store lives as long as one training. The projector behind the tower is not cached and may learn.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import Config
from ..hardware import GIB
from ..run_folder import Run
from .park import TOWERS
from .speed import count_rows, find_media

# Of the machine's memory, for each tower, over all processes; features of a picture take 1 MB in 16 bit.
LIMIT = 4 * GIB
TIMED = 3  # batches that are timed, waiting for the GPU; then it is known whether looking up is cheaper than computing
SUMS = 2  # sums of a fingerprint
Key = tuple[tuple[int, ...], str, tuple[int, ...]]


@dataclass
class TowerCache:
    """The features of one frozen tower."""

    tower: Any
    limit: int = LIMIT
    store: dict[Key, dict[str, torch.Tensor]] = field(default_factory=dict)
    bytes: int = 0
    factors: torch.Tensor | None = None  # of the fingerprints
    found: int = 0
    computed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"hash": 0.0, "tower": 0.0})
    timed: int = 0
    items: int | None = None  # of the whole data set, or its rows at least
    full: bool = False  # whether something found no room
    off: str | None = None  # why it was given up
    kind: Any = None  # class of the tower's output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the tower returns."""
        library = type(self.tower).forward
        named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        inputs = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        if self.off or not inputs:
            return library(self.tower, *args, **kwargs)
        started = self.start_clock()
        keys = self.make_keys(list(inputs.values()))
        self.stop_clock("hash", started)
        missing = [place for place, key in enumerate(keys) if key not in self.store]
        fresh: dict[Key, dict[str, torch.Tensor]] = {}
        if missing:
            started = self.start_clock()
            part = {name: value[missing] for name, value in inputs.items()}
            rest = [part.get(str(place), value) for place, value in enumerate(args)]
            result = library(self.tower, *rest, **{name: part.get(name, value) for name, value in kwargs.items()})
            self.stop_clock("tower", started)
            fields = read_fields(result, len(missing))
            if fields is None:
                self.off = f"{type(result).__name__} holds more than features"
                return library(self.tower, *args, **kwargs)
            self.kind = type(result)
            fresh = {keys[place]: {n: t[i] for n, t in fields.items()} for i, place in enumerate(missing)}
            self.keep(fresh)
        self.found, self.computed = self.found + len(keys) - len(missing), self.computed + len(missing)
        device = next(iter(inputs.values())).device
        items = [fresh.get(key) or self.store[key] for key in keys]
        self.judge()
        together = {n: torch.stack([item[n].to(device, non_blocking=True) for item in items]) for n in items[0]}
        return self.kind(**together)

    def make_keys(self, inputs: list[torch.Tensor]) -> list[Key]:
        """Return a key for each item: a fingerprint of its numbers, their types, and their shapes.

        Fingerprints are sums of the numbers' bits times random factors, modulo 2^64, computed where the numbers are: a few numbers
        come to the CPU instead of all. For factors drawn uniformly two items that differ have the same one at a chance of 2^-66 at most:
        for both sums the product of their difference, of 32 bits, with its factor is zero in all 64.
        """
        bits = [as_integers(value) for value in inputs]
        factors = self.get_factors(max(value.shape[1] for value in bits), bits[0].device)
        sums = [(row.long() * factor[: len(row)]).sum() for value in bits for row in value for factor in factors]
        found = torch.stack(sums).view(len(bits), len(inputs[0]), SUMS).transpose(0, 1).flatten(1).tolist()
        shapes = tuple(size for value in inputs for size in value.shape[1:])
        types = " ".join(str(value.dtype) for value in inputs)
        return [(tuple(numbers), types, shapes) for numbers in found]

    def get_factors(self, numbers: int, device: torch.device) -> torch.Tensor:
        """Return the factors of fingerprints, int64 of [SUMS, numbers or more]; those for longer items are drawn as they come."""
        if self.factors is None:
            self.factors = torch.empty(SUMS, 0, dtype=torch.int64, device=device)
        lacking = numbers - self.factors.shape[1]
        if lacking > 0:
            generator = torch.Generator(device)
            generator.seed()  # by the system, so that training's random numbers stay as they are
            low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
            more = torch.randint(low, high, (SUMS, lacking), generator=generator, device=device)
            self.factors = torch.cat([self.factors, more], 1)
        return self.factors

    def keep(self, fresh: dict[Key, dict[str, torch.Tensor]]) -> None:
        """Keep features while there is room. Nothing is thrown out: in an epoch each item comes once, the oldest first again."""
        for key, fields in fresh.items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in fields.values())
            if self.bytes + size <= self.limit:
                self.store[key] = {name: tensor.detach().cpu() for name, tensor in fields.items()}
                self.bytes += size
            else:
                self.full = True

    def start_clock(self) -> float:
        """Return the time, when what the GPU was given before is done."""
        if self.timed < TIMED and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def stop_clock(self, name: str, started: float) -> None:
        """Count the time since."""
        if self.timed < TIMED:
            self.seconds[name] += self.start_clock() - started

    def judge(self) -> None:
        """Give up when looking up costs more than half of what it saves: known in the first batches, and when the store is full."""
        self.timed += 1
        saved = self.seconds["tower"] * self.expect()
        if self.timed >= TIMED and self.seconds["hash"] > saved / 2:
            self.off = f"looking up takes {self.seconds['hash'] / max(saved, 1e-9):.1f} times what it saves"
            self.store.clear()

    def expect(self) -> float:
        """Return the share of items that will be found: all as long as there is room, then as much of the data as is kept."""
        return min(1.0, len(self.store) / self.items) if self.full and self.items else 1.0

    def summarize(self) -> dict[str, Any]:
        """Return for run.json what was found and computed, the bytes kept, and why it was given up."""
        return {"found": self.found, "computed": self.computed, "bytes": self.bytes, "off": self.off}

    def __str__(self) -> str:
        if self.off:
            return f"not cached, because {self.off}"
        return f"{self.found} of {self.found + self.computed} features found again, {self.bytes / GIB:.2f} GiB kept"


def as_integers(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of each item's numbers, [items, numbers]; two integers for a number of 8 bytes."""
    kind = {1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32)
    return values.detach().contiguous().view(kind).flatten(1)


def read_fields(result: Any, items: int) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a tower's output by name, or None when it holds anything that is not one row an item."""
    if not hasattr(result, "items"):
        return None
    fields = {name: value for name, value in result.items() if value is not None}
    right = all(isinstance(value, torch.Tensor) and value.shape[:1] == (items,) for value in fields.values())
    return fields if fields and right else None


def find_random(tower: Any) -> str | None:
    """Return the name of a module that draws random numbers in training, after which features differ from epoch to epoch."""
    for name, module in tower.named_modules():
        chance = {"Dropout": "p", "DropPath": "drop_prob"}.get(type(module).__name__)
        if chance and getattr(module, chance):
            return str(name)
    return None


@contextlib.contextmanager
def cache_towers(
    base: Any, used: set[str], limit: int = LIMIT, items: int | None = None
) -> Iterator[dict[str, TowerCache]]:
    """Cache the frozen towers of the media that are used; yield the caches by the tower's name.

    Args:
        base: a Gemma3nForConditionalGeneration.
        used: kinds of media in the data, of "image" and "audio".
        limit: bytes of the machine's memory for each tower.
        items: in the whole data set, or its rows at least.
    """
    caches = {}
    for kind in sorted(used & TOWERS.keys()):
        tower = getattr(getattr(base, "model", None), TOWERS[kind], None)
        if tower is None or any(p.requires_grad for p in tower.parameters()) or "forward" in vars(tower):
            continue
        random = find_random(tower)
        if random:
            print(f"{TOWERS[kind]}: not cached, because {random} draws random numbers")
            continue
        caches[TOWERS[kind]] = tower.forward = TowerCache(tower, limit, items=items)
    try:
        yield caches
    finally:
        for name in caches:
            del getattr(base.model, name).forward


def cache_while_training(trainer: Any, config: Config, run: Run) -> None:
    """Let `trainer.train` cache frozen towers when `train.cache_towers` says so; what was found goes to run.json.

    auto: when rows come more than once; a cache whose lookups cost more than they save gives itself up in the first batches.
    """
    from .fast_path import unwrap

    train, switch = trainer.train, config.train.cache_towers
    again = count_rows(trainer) > len(trainer.train_dataset)
    if switch == "off" or (switch == "auto" and not again):
        return

    @functools.wraps(train)
    def train_with_cache(*args: Any, **kwargs: Any) -> Any:
        processes, rows = trainer.args.world_size, trainer.train_dataset
        with cache_towers(unwrap(trainer.model), find_media(rows), LIMIT // processes, len(rows)) as caches:
            try:
                return train(*args, **kwargs)
            finally:
                for name, cache in caches.items():
                    print(f"{name}: {cache}")
                with contextlib.suppress(OSError):  # as in speed.py
                    if caches:
                        run.update(tower_caches={name: cache.summarize() for name, cache in caches.items()})

    trainer.train = train_with_cache
