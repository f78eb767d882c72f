"""PEFT's rules for names: what a key of rank_pattern and a name in a list are about."""

import re
from collections.abc import Mapping
from typing import Any

from ..layer_groups import GROUPS, SETS


def ends_with(name: str, end: str) -> bool:
    """Say whether a module is called `end`, behind any prefix, as PEFT reads a list of names."""
    return name == end or name.endswith(f".{end}")


def write_pattern(key: str) -> str:
    """Return a key of rank_pattern as PEFT reads it: a group's expression, or the user's own."""
    if key in GROUPS or key in SETS:
        return "|".join(GROUPS[group].pattern for group in SETS.get(key, (key,)))
    return key


def meets(key: str, module: str) -> bool:
    """Say whether a key of rank_pattern is about a module, by PEFT's rule (peft.utils.other.get_pattern_key)."""
    return re.match(rf"(.*\.)?({write_pattern(key)})$", module) is not None


def pick(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first key that is about a module."""
    return next((value for key, value in patterns.items() if meets(key, module)), default)
