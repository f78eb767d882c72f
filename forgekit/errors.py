"""What can go wrong, as one small tree, so that a caller can catch a kind and a reader knows where a message comes from.

    ForgekitError
    ├── ConfigError    a recipe, a setting or a notebook parameter
    ├── DataError      rows that cannot be read or learned from
    ├── ModelError     weights, libraries or hardware that cannot do what was asked
    ├── RunError       a run's folder: its permissions or disk
    │   ├── RunNameError   its name: no folder name, taken, or in use
    │   └── FreshProcessError   memory ran out; the supervisor starts the notebook anew, with a smaller batch
    └── ExportError    an export that could not be written or is not the trained model

Every message says what happened, with the values, and then what to do.
"""

from collections.abc import Sequence

from .scrub import remove_tokens


class ForgekitError(Exception):
    """Base of everything forgekit raises on purpose."""


class ConfigError(ForgekitError):
    """A recipe, a setting or a parameter is wrong; `problems` holds one sentence each."""

    def __init__(self, problems: str | Sequence[str]):
        # a message repeats what was given, which may be a token in the wrong place
        self.problems = [remove_tokens(text) for text in ([problems] if isinstance(problems, str) else problems)]
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the settings:\n"
        super().__init__(head + "\n".join(self.problems))


class DataError(ForgekitError):
    """Rows cannot be read, or nothing could be learned from them."""


class ModelError(ForgekitError):
    """Weights, a library or the hardware cannot do what the settings ask for."""


class RunError(ForgekitError):
    """A run's folder cannot be made, locked or written."""


class RunNameError(RunError):
    """A run's name is no folder name, is taken, or its run is in use; another name helps."""


class FreshProcessError(RunError):
    """Memory ran out in training; what goes on is a fresh process, with fewer rows at once."""


class ExportError(ForgekitError):
    """An export could not be written, or does not equal the trained model."""
