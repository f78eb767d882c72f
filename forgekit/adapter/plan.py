"""The plan: exactly which modules learn, resolved from the settings, counted, saved and checked against the loaded model."""

import functools
import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ConfigError, ModelError
from ..hardware import choose_device
from ..layer_groups import GROUPS, TOWERS, find_layer, find_tower, write_ranges
from ..model.shapes import Shapes, build_shapes, prepare_libraries, read_config, read_shapes
from .choose import PlannedModule, choose_modules

if TYPE_CHECKING:
    from ..table import Table

FORMAT = 1  # of plan.json
TOWER_KINDS = {"vision": ("image", "video"), "audio": ("audio",)}  # parts of a row that reach a tower, decoded first


@dataclass(frozen=True)
class TowerTotal:
    """One tower: modules and parameters that learn, and all parameters of the base model."""

    tower: str
    modules: int
    parameters: int
    total: int


@dataclass(frozen=True)
class LayerPlan:
    """What learns. Made by `plan_layers`; shown by a notebook as a table, saved as plan.json."""

    model: str
    source: str
    modules: tuple[PlannedModule, ...]
    totals: tuple[TowerTotal, ...]
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def in_layers(self) -> dict[int, list[PlannedModule]]:
        """The modules that learn in each decoder layer."""
        found: dict[int, list[PlannedModule]] = {}
        for module in self.modules:
            if (layer := find_layer(module.name)) is not None:
                found.setdefault(layer, []).append(module)
        return found

    @property
    def parameters(self) -> int:
        """Parameters that learn."""
        return sum(module.parameters for module in self.modules)

    @property
    def total(self) -> int:
        """Parameters of the base model."""
        return sum(total.total for total in self.totals)

    @property
    def bytes(self) -> int:
        """Bytes of what learns, in memory."""
        return sum(module.bytes for module in self.modules)

    def table(self) -> "Table":
        """Return one row a group: tower, group, decoder layers, modules, how they learn, rank, parameters, megabytes."""
        import pandas

        from ..table import Table

        rows = [describe_rows(key, modules) for key, modules in group_modules(self.modules).items()]
        columns = ["tower", "group", "layers", "modules", "learns by", "r", "parameters", "MB"]
        return Table(pandas.DataFrame(rows, columns=columns))

    def describe(self) -> str:
        """Return one line a tower, one for all, and the notes."""
        lines = [
            f"{total.tower:>8}: {total.modules:>3} modules learn, {total.parameters:>13,} of {total.total:>13,} parameters"
            for total in self.totals
            if total.total
        ]
        share = self.parameters / self.total
        lines.append(f"   total: {self.parameters:,} parameters learn, {share:.2%} of the base model's {self.total:,}")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        return f"{self.model}, sizes from {self.source}\n{self.table().to_string(index=False)}\n{self.describe()}"

    def _repr_html_(self) -> str:
        return f"{self.table()._repr_html_()}<pre>{self.describe()}</pre>"

    def to_json(self) -> str:
        """Return the plan as JSON text; `from_json` gives an equal plan back."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "LayerPlan":
        """Read a plan from JSON text. Raises ConfigError when it is none."""
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            modules = (PlannedModule(**{**m, "shape": tuple(m["shape"])}) for m in values.pop("modules"))
            totals = (TowerTotal(**total) for total in values.pop("totals"))
            notes = tuple(values.pop("notes"))
            return cls(**values, modules=tuple(modules), totals=tuple(totals), notes=notes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"this is no plan of format {FORMAT}: {type(error).__name__}: {error}.") from None


def group_modules(modules: tuple[PlannedModule, ...]) -> dict[tuple[Any, ...], list[PlannedModule]]:
    """Collect modules by tower, group, how they learn and rank, in the order of the table of groups."""
    names = {name: number for number, name in enumerate(GROUPS)}
    found: dict[tuple[Any, ...], list[PlannedModule]] = {}
    for m in sorted(modules, key=lambda m: (list(TOWERS).index(m.tower), names.get(m.group, len(names)))):
        found.setdefault((m.tower, m.group, m.kind, m.r), []).append(m)
    return found


def describe_rows(key: tuple[Any, ...], modules: list[PlannedModule]) -> tuple[Any, ...]:
    """Return one row of the table."""
    tower, group, kind, r = key
    layers = {layer for m in modules if (layer := find_layer(m.name)) is not None}
    count = sum(m.parameters for m in modules)
    megabytes = round(sum(m.bytes for m in modules) / 1e6, 1)
    return (
        tower,
        group,
        write_ranges(tuple(layers)),
        len(modules),
        kind,
        "" if r is None else r,
        f"{count:,}",
        megabytes,
    )


def plan_layers(config: Config, model: Any = None) -> LayerPlan:
    """Resolve what learns, without weights.

    Args:
        model: a loaded model, a transformers config, `Shapes`, or None: the config of `model.id`, from its folder, the
            Hub or, for the released sizes, from what is known here.

    Raises:
        ConfigError: a choice that cannot learn, one sentence each.
        ModelError: the model's config cannot be read.
    """
    shapes = find_shapes(config, model)
    modules, notes = choose_modules(config, shapes, full_bytes=weight_bytes(config))
    return LayerPlan(shapes.type, shapes.source, modules, count_towers(modules, shapes), notes)


def find_shapes(config: Config, model: Any = None) -> Shapes:
    """Return the shapes of a model, a transformers config or `model.id`."""
    if isinstance(model, Shapes):
        return model
    prepare_libraries(config)
    from transformers import PreTrainedConfig

    if model is None:
        settings, source = read_config(config)
        return build_shapes(settings, source=source)
    return build_shapes(model) if isinstance(model, PreTrainedConfig) else read_shapes(model)


def weight_bytes(config: Config) -> int:
    """Return the bytes of one unquantised weight: 4 in float32, which "auto" means on a CPU, else 2."""
    on_cpu = config.model.load_in in ("16bit", "full") and choose_device(config) == "cpu"
    return 4 if config.model.dtype == "float32" or (config.model.dtype == "auto" and on_cpu) else 2


def count_towers(modules: tuple[PlannedModule, ...], shapes: Shapes) -> tuple[TowerTotal, ...]:
    """Count by tower what learns and what is there."""
    totals = dict.fromkeys(TOWERS, 0)
    for module in shapes.modules:
        totals[find_tower(module.name)] += sum(number for _, number in module.parameters)
    return tuple(
        TowerTotal(tower, len(own), sum(m.parameters for m in own), total)
        for tower, total in totals.items()
        for own in [[m for m in modules if m.tower == tower]]
    )


def name_module(parameter: str) -> str:
    """Return the module that a parameter belongs to, under the name that it has without an adapter."""
    name = re.sub(r"\.modules_to_save\.\w+|\.base_layer", "", parameter.removeprefix("base_model.model."))
    return name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]


def check_described(config: Config, model: Any) -> None:
    """Raise ModelError when a loaded model is not the one its config describes, so that a plan made before loading holds."""
    loaded = plan_layers(config, model)
    described = plan_layers(config, build_shapes(model.config, type(model)))
    if loaded.modules != described.modules:
        names = set(loaded.modules) ^ set(described.modules)
        raise ModelError(
            f"The loaded {loaded.model} differs from what its config describes, in {len(names)} of the modules that would learn, "
            f"for instance {sorted(m.name for m in names)[0]}. Its plan made before loading would be wrong: please report it."
        )


def count_learning(model: Any) -> dict[str, int]:
    """Return module -> parameters that learn in a model, under the names that the modules have without an adapter."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name_module(name)
            found[name] = found.get(name, 0) + parameter.numel()
    return found


def check_learner(plan: LayerPlan, model: Any) -> None:
    """Raise ModelError unless exactly the planned modules learn in a model, with the planned numbers of parameters."""
    planned: dict[str, int] = {}
    for module in plan.modules:
        planned[module.name] = planned.get(module.name, 0) + module.parameters
    found = count_learning(model)
    different = [name for name in {**planned, **found} if planned.get(name) != found.get(name)]
    if different:
        shown = "; ".join(
            f"{name}: planned {planned.get(name, 0):,}, learns {found.get(name, 0):,}" for name in different[:3]
        )
        raise ModelError(
            f"What learns is not what was planned, in {len(different)} modules ({shown}). This is a defect of forgekit or of a "
            "library's version: please report it with your recipe, and do not train on."
        )


def check_plan(plan: LayerPlan, model: Any, config: Config) -> None:
    """Raise ConfigError naming the modules of a saved plan that a model (or its config) lacks or has in another shape."""
    shapes = {module.name: module for module in find_shapes(config, model).modules}
    gone = [m.name for m in plan.modules if m.name not in shapes]
    changed = [
        m.name for m in plan.modules if m.name in shapes and m.kind == "LoRA" and shapes[m.name].shape != m.shape
    ]
    problems = []
    if gone:
        problems.append(f"{len(gone)} modules of the plan are not in this model: {shorten(gone)}.")
    if changed:
        problems.append(f"{len(changed)} modules of the plan have another shape in this model: {shorten(changed)}.")
    if problems:
        raise ConfigError(problems)


def shorten(names: list[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_plan(path: Path | str) -> LayerPlan:
    """Read a plan.json. Raises ConfigError naming the file."""
    try:
        return LayerPlan.from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"plan {path} cannot be read: {error.strerror}.") from None
    except ConfigError as error:
        raise ConfigError(f"plan {path}: {error}") from None


def check_plan_against_data(plan: LayerPlan, kinds: Collection[str]) -> None:
    """Raise ConfigError for a tower that would learn while no row holds a part of its kind.

    Args:
        kinds: of the parts in the training rows: "text", "image", "audio", "video".
    """
    problems = [
        f"adapter.layers: {total.modules} modules of the {total.tower} tower would learn, but the training rows hold no "
        f"{' or '.join(TOWER_KINDS[total.tower])} (they hold: {', '.join(sorted(kinds)) or 'nothing'}). Leave "
        f"{', '.join(sorted({m.group for m in plan.modules if m.tower == total.tower}))} out, or add such rows."
        for total in plan.totals
        if total.modules and total.tower in TOWER_KINDS and not set(kinds) & set(TOWER_KINDS[total.tower])
    ]
    if problems:
        raise ConfigError(problems)
