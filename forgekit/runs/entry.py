"""What papermill finds under the name `forgekit`. It imports every engine while it is imported itself, so this one waits."""

from typing import Any


class ForgekitEngine:
    """papermill's engine `forgekit`; see `forgekit.runs.engine`, which is imported when a notebook is executed."""

    @staticmethod
    def execute_notebook(*arguments: Any, **options: Any) -> Any:
        """Execute a notebook as `forgekit.runs.engine.ForgekitEngine` does."""
        from .engine import ForgekitEngine

        return ForgekitEngine.execute_notebook(*arguments, **options)

    @staticmethod
    def nb_kernel_name(*arguments: Any) -> str:
        """Return the kernel that a notebook names, as every engine of papermill does."""
        from .engine import ForgekitEngine

        return ForgekitEngine.nb_kernel_name(*arguments)

    @staticmethod
    def nb_language(*arguments: Any) -> str:
        """Return the language that a notebook names, as every engine of papermill does."""
        from .engine import ForgekitEngine

        return ForgekitEngine.nb_language(*arguments)
