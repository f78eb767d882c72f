"""What train.report_to may say: trackers that forgekit runs beside a training, or one of the user's."""

import difflib
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from .errors import ConfigError

TRACKERS = ("tensorboard", "trackio")  # names of their packages and of the extras that install them


def check_trackers(value: Any) -> Any:
    """Return the names of trackers as a tuple. One name or a list; one of the user's is written module:function."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    wrong = [name for name in names if name not in TRACKERS and not re.fullmatch(r"[\w.]+:\w+", str(name))]
    if wrong or len(set(names)) < len(names):
        near = [difflib.get_close_matches(str(name), TRACKERS, 1) for name in wrong]
        hint = f" (nearest to {wrong[0]!r}: {near[0][0]})" if near and near[0] else ""
        raise ValueError(f"a list of {', '.join(TRACKERS)}, each once, or module:function of your own{hint}")
    return names


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError when a tracker's package is missing."""
    missing = [name for name in names if name in TRACKERS and importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(missing)
        raise ConfigError(
            f"train.report_to: {' and '.join(missing)} is not installed. Install it with `pip install forgekit[{extras}]`, or leave it out."
        )
