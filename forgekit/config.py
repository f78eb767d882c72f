"""A recipe (YAML) and later settings become one checked, frozen Config that remembers where each value came from.

default < recipe < recipe on top (params/gpu) < notebook < --set < panel      the stronger one wins; None inherits, `none` empties
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from pydantic import PrivateAttr, ValidationError
from pydantic.fields import FieldInfo

from .conflicts import find_conflicts, suggest
from .errors import ConfigError
from .recipe import find_recipes, parse_yaml, read_recipe
from .settings import Adapter, Data, Evaluate, Export, Model, Section, Train
from .tokens import describe_planted

if TYPE_CHECKING:
    import pandas

Settings = Mapping[str, Any] | str | None


class Config(Section):
    """All settings of a run, in the six sections. Make one with `load_config`; change one with `change`."""

    data: Data = Data()
    model: Model = Model()
    adapter: Adapter = Adapter()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _recipes: tuple[Path, ...] = PrivateAttr(default=())

    @property
    def recipe(self) -> Path | None:
        """The recipe's file, the first where there are several, or None when there was none."""
        return self._recipes[0] if self._recipes else None

    @property
    def recipes(self) -> str:
        """All recipes as `load_config` takes them: paths joined by " + ", or "" when there was none."""
        return " + ".join(map(str, self._recipes))

    def origin(self, name: str) -> str:
        """Say where the value of a dotted name came from: "default", the recipe's file name, "notebook", "--set", ..."""
        return self._origins.get(name, "default")

    def list_values(self) -> dict[str, Any]:
        """Return all values by dotted name as a recipe would give them: `none` where one is empty."""
        return {name: EMPTY if value is None else value for name, value in flatten(self.model_dump()).items()}

    def change(self, settings: Settings, origin: str = "notebook", without: Collection[str] = ()) -> Self:
        """Return a new Config with some dotted names changed and those in `without` back at their defaults, checked as a whole."""
        layers = [(self.origin(name), {name: value}) for name, value in self.list_values().items()]
        layers = [layer for layer in layers if layer[0] != "default" and not layer[1].keys() & set(without)]
        return type(self)._build([*layers, (origin, read_settings(settings))], self._recipes)

    def table(self, changed: bool = True) -> "pandas.DataFrame":
        """Return the settings as a table (setting, value, origin, help); `changed` keeps those that differ from the defaults."""
        import pandas

        from .table import Table

        fields = {f"{s}.{n}": f for s, section in SECTIONS.items() for n, f in section.model_fields.items()}
        rows = [
            (name, value, self.origin(name), fields[name].description)
            for name, value in flatten(self.model_dump()).items()
            if not changed or self.origin(name) != "default"
        ]
        return Table(pandas.DataFrame(rows, columns=["setting", "value", "from", "meaning"]).set_index("setting"))

    @classmethod
    def _build(cls, layers: Iterable[tuple[str, dict[str, Any]]], recipes: tuple[Path, ...]) -> Self:
        """Merge layers of dotted names, weakest first, and check them all; every problem is reported at once."""
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        problems: list[str] = []
        for origin, layer in layers:
            planted = describe_planted(layer, origin)
            problems += planted.values()
            for name, value in layer.items():
                if name in planted:
                    continue
                if name in SECTIONS:
                    problems.append(
                        f"{name} is {value!r} (from {origin}): it is a section and holds settings, for instance {first_name(name)}."
                    )
                elif name not in NAMES:
                    problems.append(f"{name or '(no name)'}: no such setting (from {origin}).{suggest(name, NAMES)}")
                elif value is not None:
                    values[name] = None if is_empty(name, value) else value
                    origins[name] = origin
        try:
            config = cls.model_validate(nest(values))
            config._origins, config._recipes = origins, recipes
            problems += find_conflicts(config)
        except ValidationError as error:
            problems += [explain(problem, values, origins) for problem in error.errors()]
        if problems:
            raise ConfigError(sorted(set(problems)))
        return config


SECTIONS: dict[str, type[Section]] = {
    "data": Data,
    "model": Model,
    "adapter": Adapter,
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
}
NAMES = [f"{section}.{name}" for section, fields in SECTIONS.items() for name in fields.model_fields]


def find_field(name: str) -> FieldInfo:
    """Return the field of a dotted name."""
    section, _, field = name.partition(".")
    return SECTIONS[section].model_fields[field]


# settings that are mappings themselves, such as adapter.rank_pattern
MAPPINGS = [name for name in NAMES if isinstance(find_field(name).default, dict)]
EMPTY = "none"  # empties a setting that a weaker layer fills; None itself inherits


def is_empty(name: str, value: Any) -> bool:
    """Say whether a value is the word that empties this setting; where a setting has to have a value the word is one."""
    field = find_field(name)
    may_be = field.default is None or type(None) in get_args(field.annotation)
    return may_be and isinstance(value, str) and value.lower() == EMPTY


def load_config(recipe: str | Path | None = None, settings: Settings = None, origin: str | None = None) -> Config:
    """Read a recipe, put `settings` (dotted names, or their JSON / YAML text) on top, and check everything at once.

    Args:
        recipe: a YAML file; looked for in the current folder and up to two folders above it. Several are joined by " + ":
            "params/text.yaml + params/gpu/16gb.yaml"; a later one is stronger. None: defaults alone.
        settings: for instance {"train.max_steps": 60}; a nested mapping does too. The word none empties a setting that the recipe
            fills: {"train.eval_steps": "none"}.
        origin: what the settings are called in tables; "--set" under `forgekit run`, else "notebook".

    Raises:
        ConfigError: with one sentence for every problem found, before any weights are read.
    """
    check_parameters()
    if recipe is not None and not isinstance(recipe, str | Path):
        raise ConfigError(
            f"recipe is {recipe!r}: it must be the name of a YAML file, for instance params/text_quick.yaml."
        )
    paths = find_recipes(recipe) if recipe else []
    layers = [(path.name, flatten(read_recipe(path))) for path in paths]
    origin = origin or ("--set" if os.environ.get("FORGEKIT_RUN") else "notebook")
    return Config._build([*layers, (origin, read_settings(settings))], tuple(paths))


def read_settings(settings: Settings) -> dict[str, Any]:
    """Return settings as dotted names; text is taken as JSON or YAML, as `papermill -p settings '{...}'` hands it over."""
    if isinstance(settings, str):
        settings = parse_yaml(settings, "settings")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"settings is {settings!r}: it must be a mapping such as {{'train.max_steps': 60}}.")
    return flatten(settings or {})


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into dotted names: {"train": {"seed": 1}} -> {"train.seed": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in MAPPINGS and (value or name in SECTIONS):
            inner = flatten(value, f"{name}.")
        else:
            inner = {} if value is None and name in SECTIONS else {name: value}
        twice = sorted(flat.keys() & inner.keys())
        if twice:
            raise ConfigError(f"{twice[0]} stands twice in one set of settings. Keep one of the two.")
        flat |= inner
    return flat


def nest(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Turn dotted names into sections: {"train.seed": 1} -> {"train": {"seed": 1}}."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    return sections


def first_name(section: str) -> str:
    """Return one dotted name of a section, as an example."""
    return next(name for name in NAMES if name.startswith(f"{section}."))


PLAIN_WORDS = {  # pydantic's -> ours
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text (in quotes when it looks like a number)",
    "a valid boolean": "true or false",
    "a valid tuple": "a list, for instance [a, b]",
}


def explain(problem: Any, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Turn one of pydantic's findings into a sentence with the name, value, origin, range and help."""
    name = ".".join(str(part) for part in problem["loc"][:2])
    help = find_field(name).description if "." in name else ""
    value = values.get(name, problem["input"])
    text = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    text = PLAIN_WORDS.get(text, text)
    return f"{name} is {json.dumps(value, default=str)} (from {origins.get(name, 'default')}): it should be {text}. Meaning: {help}."


PARAMETERS = ("recipe", "settings", "run_name")


def check_parameters() -> None:
    """Refuse parameters that papermill injected and no cell reads; papermill itself only warns about them.

    papermill puts a cell that starts with "# Parameters" after the notebook's own; outside IPython there is nothing to check.
    """
    import ast
    import sys

    if "IPython" not in sys.modules:
        return
    shell = sys.modules["IPython"].get_ipython()
    cells = shell.user_ns.get("In", []) if shell else []
    for cell in cells:
        if cell.startswith("# Parameters\n"):
            targets = [t for node in ast.parse(cell).body if isinstance(node, ast.Assign) for t in node.targets]
            unknown = [t.id for t in targets if isinstance(t, ast.Name) and t.id not in PARAMETERS]
            if unknown:
                raise ConfigError(
                    [f"{name}: the notebook has no such parameter.{suggest(name, PARAMETERS)}" for name in unknown]
                )
