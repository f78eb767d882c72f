"""Where a sweep's runs go, by name."""

from typing import Any

from ..errors import ConfigError, RunError
from .job import Backend

EXTRAS = {"local": "", "ray": "ray", "slurm": "submitit"}  # the library that each needs


def open_backend(name: str, **options: Any) -> Backend:
    """Open a backend with its own options.

    local: `slots`, `gpus` (forgekit.sweep.local.Local). ray: `address`, `gpus`, `cpus`, `slots` (forgekit.sweep.ray.Ray).
    slurm: `partition`, `minutes`, `cpus`, `slots`, ... (forgekit.sweep.slurm.Slurm).

    Raises:
        ConfigError: there is no such backend.
        RunError: its library is not installed, or it cannot be reached.
    """
    if name not in EXTRAS:
        raise ConfigError(f"backend {name!r}: there are {', '.join(EXTRAS)}.")
    try:
        if name == "ray":
            from .ray import Ray

            return Ray(**options)
        if name == "slurm":
            from .slurm import Slurm

            return Slurm(**options)
    except ModuleNotFoundError as error:
        if error.name != EXTRAS[name]:
            raise
        raise RunError(
            f'backend {name} needs {EXTRAS[name]}. Install it with: pip install "forgekit[{name}]"'
        ) from None
    from .local import Local

    return Local(**options)
