"""Switches and folders that other libraries read from the environment: set once, before those libraries are imported.

Nothing that is set already is changed, so a user's own variables win.
"""

import os
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from .errors import RunError

# variable -> folder below the cache folder; all of these libraries write to the home or the current folder otherwise
FOLDERS = {
    "MPLCONFIGDIR": "matplotlib",
    "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "jupyter/config",
    "JUPYTER_DATA_DIR": "jupyter/data",
    "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
    "JUPYTERLAB_SETTINGS_DIR": "jupyter/lab/settings",
    "JUPYTERLAB_WORKSPACES_DIR": "jupyter/lab/workspaces",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "HF_HOME": "huggingface",
}
SWITCHES = {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # Unsloth otherwise asks the Hub for a file at each load, to count users
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizer warns after each fork otherwise
    # idle OpenMP threads sleep instead of spinning: beside another busy process two spinning threads took 4 times as long
    "OMP_WAIT_POLICY": "PASSIVE",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def is_writable(folder: Path) -> bool:
    """Say whether a file can be made in `folder`; its missing parents are made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cache_folder() -> Path:
    """Return the first writable of $FORGEKIT_CACHE, ~/.cache/forgekit and a folder of this user's in the temporary folder.

    Raises RunError when none of them can be written.
    """
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    base, home = os.environ.get("XDG_CACHE_HOME"), home_folder()
    places = [
        os.environ.get("FORGEKIT_CACHE"),
        os.path.join(base, "forgekit") if base else home and os.path.join(home, ".cache", "forgekit"),
        os.path.join(tempfile.gettempdir(), f"forgekit-{user}"),
    ]
    for place in places:
        if place and is_writable(Path(place)):
            return Path(place)
    tried = ", ".join(str(place) for place in places if place)
    raise RunError(f"No folder for caches can be written (tried {tried}). Set FORGEKIT_CACHE to one that can.")


def home_folder() -> Path | None:
    """Return the user's home, or None: a container's user may have neither HOME nor a line in the list of users."""
    home = os.path.expanduser("~")
    return None if home.startswith("~") else Path(home)


def set_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Turn statistics off, keep Unsloth's compile cache out of the working folder, and move caches when home is read-only.

    `environ` is changed in place. With a writable home Jupyter, IPython, matplotlib and the Hub keep their usual folders.
    """
    for name, value in SWITCHES.items():
        environ.setdefault(name, value)
    cache = cache_folder()
    # one folder a Python, because Unsloth writes compiled modules there
    environ.setdefault(
        "UNSLOTH_COMPILE_LOCATION", str(cache / f"unsloth-{sys.version_info.major}.{sys.version_info.minor}")
    )
    home = home_folder()
    if home is None or not is_writable(home):
        for name, folder in FOLDERS.items():
            environ.setdefault(name, str(cache / folder))
