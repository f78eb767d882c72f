"""A recipe's file: where it is looked for, and its YAML read so that what a person wrote is what arrives."""

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .paths import explain_name

RECIPE_LIMIT = 1_000_000  # bytes, and letters of settings given as text; what is larger is data, not a recipe


def find_recipe(recipe: str | Path, folder: Path | None = None) -> Path:
    """Return the recipe's absolute path: as given, from `folder` (default: the current one) or up to two folders above it.

    Raises ConfigError naming the places that were searched.
    """
    here = (folder or Path.cwd()).absolute()
    problem = explain_name(str(recipe))
    if problem:
        raise ConfigError(f"recipe: the name that was given {problem}.")
    recipe = Path(recipe).expanduser()
    places = [folder / recipe for folder in (here, *list(here.parents)[:2])]
    for place in places:
        if place.is_file():
            return place.resolve()
    folder = next(
        (place.parent for place in places if place.parent.is_dir() and any(place.parent.glob("*.yaml"))), None
    )
    known = sorted(file.name for file in folder.glob("*.yaml")) if folder else []
    hint = (
        f" There are: {', '.join(known)}."
        if known
        else " `forgekit init DIR` copies the shipped notebooks and recipes."
    )
    raise ConfigError(f"recipe {str(recipe)!r}: no such file in {here} or the two folders above it.{hint}")


def find_recipes(recipe: str | Path, folder: Path | None = None) -> list[Path]:
    """Return the paths of one recipe or of several, "params/text.yaml + params/gpu/16gb.yaml"; a later one is stronger."""
    names = re.split(r"\s+\+\s+", recipe) if isinstance(recipe, str) else [recipe]
    return [find_recipe(name, folder) for name in names]


YAML_1_1 = ("bool", "float", "int", "timestamp")  # kinds whose spelling in YAML 1.1 surprises people


class RecipeLoader(yaml.SafeLoader):
    """YAML with 1.2's numbers and booleans, nothing twice, no aliases and no tags.

    `2e-4` is a number; 010 (8 in YAML 1.1), 1:30 (90), 2026-01-01 (a date), yes and off stay text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in YAML_1_1]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """Refuse a key that stands twice: YAML would keep the last one silently."""
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            last = [key.start_mark for key, _ in node.value if key.value == twice[0]][-1]
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} stands twice in one section", problem_mark=last)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, which can make a small file huge, and tags, which ask for other types."""
        event = self.peek_event()
        refused = "aliases (*name)" if isinstance(event, yaml.AliasEvent) else None
        if getattr(event, "tag", None):
            refused = f"tags ({event.tag})"
        if refused:
            raise yaml.MarkedYAMLError(problem=f"{refused} are not allowed in a recipe", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|nan|NaN))$"
    ),
    list("-+0123456789."),
)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?(?:0|[1-9][\d_]*)|0x[\da-fA-F]+)$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse recipe YAML. Raises ConfigError with the source and the line."""
    if len(text) > RECIPE_LIMIT:
        raise ConfigError(f"{source}: {len(text):,} letters; a recipe or settings have at most {RECIPE_LIMIT:,}.")
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text.strip() else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}{line}: no valid YAML: {problem}.") from None
    # a control character; a number of 5000 digits; thousands of [[[[
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: no valid YAML: {' '.join(str(error).split())}.") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe's file into its sections. Raises ConfigError when it is no mapping or cannot be read."""
    try:
        if path.stat().st_size > RECIPE_LIMIT:
            raise ConfigError(
                f"recipe {path} has {path.stat().st_size:,} bytes; a recipe has at most {RECIPE_LIMIT:,}. Is it a data file?"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    values = parse_yaml(text, f"recipe {path}")
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {path} is {'empty' if values is None else 'no mapping'}; it holds sections such as `train:` with settings below them."
        )
    return values
