"""What the layer panel holds: which modules learn and with what rank. Plain Python; no widget is needed to use it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from ..adapter.choose import choose_layers, list_saved, match_saved, match_targets, plan_full, plan_lora
from ..adapter.names import pick
from ..adapter.refuse import ADAPTABLE
from ..config import Config
from ..layer_groups import GROUPS, SETS, find_group, find_layer, find_layers_by_kind, resolve_layers
from ..model.shapes import Module, Shapes

State = Literal["all", "part", "none"]


@dataclass(frozen=True)
class Candidate:
    """One module that can learn: by low-rank matrices, or (`whole`) with all its own weights.

    It learns `fixed + r * per_rank` parameters of `size` bytes each. `block` is the number of the layer or block that it
    stands in, `part` its name in there; a module in no block has its last name as `part`.
    """

    name: str
    group: str
    tower: str
    layer: int | None  # of the decoder
    block: int | None
    part: str
    shape: tuple[int, ...]
    per_rank: int
    fixed: int
    size: int
    whole: bool
    own_alpha: float | None  # by adapter.alpha_pattern


@dataclass
class Selection:
    """The candidates of a model, in its order, the chosen ones, and their ranks; `r` holds where `ranks` says nothing."""

    candidates: dict[str, Candidate]
    layer_types: tuple[str, ...]
    shared_layers: int
    chosen: set[str]
    r: int
    lora_alpha: float
    ranks: dict[str, int] = field(default_factory=dict)
    decoder_parts: frozenset[tuple[str, str]] = frozenset()  # (group, part) that a decoder layer gets when switched on

    def __post_init__(self) -> None:
        self.by_layer: dict[int, list[str]] = {number: [] for number in range(len(self.layer_types))}
        for name, candidate in self.candidates.items():
            if candidate.layer is not None:
                self.by_layer[candidate.layer].append(name)
        self.kinds = find_layers_by_kind(list(self.layer_types), self.shared_layers)
        self.remember_parts()

    def copy(self) -> "Selection":
        """Return a selection of the same candidates that changes on its own."""
        fields = (self.candidates, self.layer_types, self.shared_layers, set(self.chosen), self.r, self.lora_alpha)
        return Selection(*fields, dict(self.ranks), self.decoder_parts)

    def restore(self, other: "Selection") -> None:
        """Take over the choice of another selection of the same candidates."""
        self.chosen, self.ranks = set(other.chosen), dict(other.ranks)
        self.r, self.lora_alpha, self.decoder_parts = other.r, other.lora_alpha, other.decoder_parts

    def key(self) -> tuple[object, ...]:
        """Return what makes two selections equal: ranks count only where they are used."""
        adapted = {name: self.rank(name) for name in self.chosen if not self.candidates[name].whole}
        return (frozenset(self.chosen), frozenset(adapted.items()), self.r, self.lora_alpha)

    def rank(self, name: str) -> int:
        """Return the rank that a module has, or would have if it were chosen."""
        return self.ranks.get(name, self.r)

    def parameters(self, name: str) -> int:
        """Return how many parameters a module adds when it learns."""
        candidate = self.candidates[name]
        return candidate.fixed + candidate.per_rank * self.rank(name)

    def state(self, names: Iterable[str]) -> State:
        """Say whether all, some or none of these modules learn."""
        found = {name in self.chosen for name in names}
        return "part" if len(found) > 1 else "all" if found == {True} else "none"

    def choose(self, names: Iterable[str], on: bool) -> None:
        """Let these modules learn, or leave them as they are."""
        self.chosen = self.chosen | set(names) if on else self.chosen - set(names)
        self.remember_parts()

    def replace(self, names: Iterable[str]) -> None:
        """Let exactly these modules learn, all with the common rank."""
        self.chosen, self.ranks = set(names), {}
        self.remember_parts()

    def set_rank(self, names: Iterable[str], r: int) -> None:
        """Give these modules a rank of their own; the common rank is no rank of their own."""
        for name in names:
            if r == self.r:
                self.ranks.pop(name, None)
            else:
                self.ranks[name] = r

    def find(self, wanted: Callable[[Candidate], bool]) -> list[str]:
        """Return the names of the candidates that a function wants."""
        return [name for name, candidate in self.candidates.items() if wanted(candidate)]

    def find_groups(self, names: Iterable[str]) -> list[str]:
        """Return the modules of some groups or sets of groups."""
        groups = {group for name in names for group in SETS.get(name, (name,))}
        return self.find(lambda candidate: candidate.group in groups)

    # -------------------------------------------------------------------------------------------- decoder layers

    def remember_parts(self) -> None:
        """Remember which parts of the decoder's layers learn, so that a layer switched off and on again gets them back."""
        chosen = (self.candidates[name] for name in self.chosen)
        parts = frozenset((c.group, c.part) for c in chosen if c.layer is not None)
        if parts:
            self.decoder_parts = parts
        elif not self.decoder_parts:
            usual = self.find(lambda c: c.layer is not None and c.group in ("attention", "mlp"))
            self.decoder_parts = frozenset((c.group, c.part) for c in map(self.candidates.__getitem__, usual))

    def layer_members(self, layer: int) -> list[str]:
        """Return the modules that a decoder layer gets when it is switched on: the parts that learn in any layer."""
        members = self.by_layer[layer]
        return [n for n in members if (self.candidates[n].group, self.candidates[n].part) in self.decoder_parts]

    def layer_state(self, layer: int) -> State:
        """Say whether a decoder layer learns with all the parts that learn in any layer, with some, or not at all."""
        if not self.chosen.intersection(self.by_layer[layer]):
            return "none"
        return "all" if self.chosen.issuperset(self.layer_members(layer)) else "part"

    def layers(self) -> tuple[int, ...]:
        """Return the decoder layers in which anything learns."""
        return tuple(layer for layer in self.by_layer if self.layer_state(layer) != "none")

    def toggle_layer(self, layer: int) -> None:
        """Switch a decoder layer on, or off when all of it is on."""
        on = self.layer_state(layer) != "all"
        self.choose(self.layer_members(layer) if on else self.by_layer[layer], on)

    def set_layers(self, text: str) -> None:
        """Let the decoder learn in exactly these layers: "0-9,20", "last 8", "full"; "" for none.

        A layer that learns in part stays as it is. Raises ValueError for layers that do not exist.
        """
        wanted = resolve_layers(text, list(self.layer_types), self.shared_layers) if text else ()
        for layer in self.by_layer:
            if layer not in wanted:
                self.choose(self.by_layer[layer], False)
            elif self.layer_state(layer) == "none":
                self.choose(self.layer_members(layer), True)


def make_selection(config: Config, shapes: Shapes, full_bytes: int) -> Selection:
    """Return the selection that a config makes, and everything else that could be chosen.

    Modules in `adapter.modules_to_save` learn whatever is chosen here, so they are no candidates. A choice that the plan
    would refuse is taken as far as it matches something. With `model.load_in: full` there is nothing to choose.
    """
    layers, _ = choose_layers(config, shapes)
    matched = {module.name for module in match_targets(config, shapes, layers)[0]}
    locked = {planned.name for planned in find_locked(config, shapes)}
    ranks = (set_one_rank(config, 1), set_one_rank(config, 2))
    candidates = {
        module.name: describe_candidate(ranks, module, full_bytes)
        for module in shapes.modules
        if config.model.load_in != "full" and module.name not in locked and can_learn(module, matched)
    }
    whole = {end for end in list_saved(config) if end not in config.adapter.modules_to_save}
    chosen = {n for n, c in candidates.items() if n in matched or (c.whole and GROUPS[c.group].whole in whole)}
    adapter = config.adapter
    own = {name: pick(adapter.rank_pattern, name, adapter.r) for name in candidates if adapter.rank_pattern}
    own = {name: r for name, r in own.items() if r != adapter.r}
    fields = (candidates, shapes.layer_types, shapes.shared_layers, chosen, adapter.r, adapter.lora_alpha, own)
    return Selection(*fields)


def find_locked(config: Config, shapes: Shapes) -> list[Module]:
    """Return the modules that learn by `adapter.modules_to_save` alone, without a group that names them."""
    plain = config.model_copy(update={"adapter": config.adapter.model_copy(update={"layers": ()})})
    names = {planned.name for planned in match_saved(plain, shapes, 0)[0]}
    return [module for module in shapes.modules if module.name in names]


def can_learn(module: Module, matched: set[str]) -> bool:
    """Say whether a module is offered: one of a group, or one that the recipe chose, that an adapter can go beside."""
    known = find_group(module.name) is not None or module.name in matched
    return known and module.kind in ADAPTABLE and module.groups == 1


def describe_candidate(ranks: tuple[Config, Config], module: Module, full_bytes: int) -> Candidate:
    """Return what is known of a module before anybody chooses it, from the plan's own counts at rank 1 and 2."""
    group = find_group(module.name) or "other"
    whole = group in GROUPS and bool(GROUPS[group].whole)
    one, two = (plan_full(module, full_bytes) if whole else plan_lora(config, module) for config in ranks)
    per_rank = two.parameters - one.parameters
    sizes = (per_rank, one.parameters - per_rank, one.bytes // one.parameters)
    alpha = pick(ranks[0].adapter.alpha_pattern, module.name, None)
    where = (find_layer(module.name), *split_block(module.name))
    return Candidate(module.name, group, one.tower, *where, module.shape, *sizes, whole, alpha)


def set_one_rank(config: Config, r: int) -> Config:
    """Return a config with the same rank everywhere, for counting."""
    return config.model_copy(update={"adapter": config.adapter.model_copy(update={"r": r, "rank_pattern": {}})})


def split_block(name: str) -> tuple[int | None, str]:
    """Split off the block that a module stands in: "a.layers.3.mlp.up_proj" -> (3, "mlp.up_proj"), "a.b.c" -> (None, "b.c")."""
    found = re.fullmatch(r".*\.(\d+)\.(.+?)", name)
    return (int(found.group(1)), found.group(2)) if found else (None, ".".join(name.split(".")[-2:]))
