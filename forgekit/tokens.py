"""Where a token comes from: the environment, Colab's or Kaggle's secrets, the Hub's login, in that order; never a setting."""

import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from .errors import ConfigError
from .scrub import list_known, looks_like_token, remember

HUB = "HF_TOKEN"
# names that only a token would have; max_new_tokens and pad_token_id are others
TOKEN_NAME = re.compile(
    r"(?:^|[._])(?:(?:hub|hf|huggingface|auth|access|api|wandb|github|gh|kaggle|use_auth|secret|aws_session)_?token|token|"
    r"api_?key|wandb_?key|secret_?key|access_?key(?:_id)?|secret_access_key|password|passwd)$",
    re.IGNORECASE,
)
WHERE = (
    f"Tokens are no parameters, because parameters are written to the notebook and to run.json. Set the environment variable {HUB} "
    "(or the service's own, such as WANDB_API_KEY), a secret of that name on Colab or Kaggle, or log in with `hf auth login`."
)


class Token(NamedTuple):
    """A token and where it was found; its text does not show it."""

    value: str
    where: str

    def __repr__(self) -> str:
        return f"Token(from {self.where})"

    def __str__(self) -> str:
        return repr(self)


def find_token(name: str = HUB) -> Token | None:
    """Return a token by the name of its variable, or None: from the environment, then from Colab's or Kaggle's secrets.

    The Hub's token is looked for in its login, `hf auth login`, last.
    """
    value = os.environ.get(name, "").strip()
    if value:
        return Token(remember(value), f"the environment variable {name}")
    for where, ask in (("Colab's secrets", ask_colab), ("Kaggle's secrets", ask_kaggle)):
        value = (ask(name) or "").strip()
        if value:
            return Token(remember(value), where)
    if name == HUB:
        from huggingface_hub import get_token

        value = (get_token() or "").strip()
        if value:
            return Token(remember(value), "the Hub's login")
    return None


def ask_colab(name: str) -> str | None:
    """Return a secret of Colab, or None; only its notebook's own kernel may ask, others would wait for an answer."""
    if "google.colab" not in sys.modules or "IPython" not in sys.modules:
        return None
    if getattr(sys.modules["IPython"].get_ipython(), "kernel", None) is None:
        return None
    from google.colab import userdata

    try:
        return userdata.get(name)
    except Exception as error:  # noqa: BLE001  # no such secret, no permission, no answer: Colab has a class for each
        note_refusal("Colab", name, error)
        return None


def ask_kaggle(name: str) -> str | None:
    """Return a secret of Kaggle, or None; it answers where it has put a token for its own service."""
    if not os.environ.get("KAGGLE_USER_SECRETS_TOKEN"):
        return None
    try:
        from kaggle_secrets import UserSecretsClient

        return UserSecretsClient().get_secret(name)
    except Exception as error:  # noqa: BLE001  # as above; its classes are documented nowhere
        note_refusal("Kaggle", name, error)
        return None


def note_refusal(service: str, name: str, error: Exception) -> None:
    """Say why a service gave no secret, unless it has none of that name; its words may hold anything, so only its class."""
    kind = type(error).__name__
    if "NotFound" not in kind and not isinstance(error, ImportError):
        print(f"{service} gave no secret {name} ({kind}); going on without it.")


def offer_token(environ: MutableMapping[str, str] = os.environ) -> None:
    """Put a token of Colab's or Kaggle's secrets where the Hub's libraries look first, unless there is one."""
    if environ.get(HUB):
        remember(environ[HUB])
        return
    value = ask_colab(HUB) or ask_kaggle(HUB)
    if value:
        environ[HUB] = remember(value.strip())


# ---- settings and parameters -----------------------------------------------------------------------------------------


def find_planted(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and the reason for each value that is, or looks like, a token."""
    known = list_known()
    for key, value in values.items():
        name = f"{prefix}{key}"
        if looks_like_token(name):
            yield "a name", "it looks like a token"
        elif isinstance(value, str) and value and TOKEN_NAME.search(name):
            yield name, "its name is that of a token"
        elif any(is_token(text, known) for text in list_texts(value)):
            yield name, "its value looks like a token"


def is_token(text: str, known: frozenset[str]) -> bool:
    """Say whether a text holds a token by its shape or is the value of a token variable."""
    return looks_like_token(text) or text.strip() in known or any(len(v) >= 16 and v in text for v in known)


def list_texts(value: Any) -> Iterator[str]:
    """Yield every text in a value, deeply, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from list_texts(key)
            yield from list_texts(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from list_texts(item)


def describe_planted(values: Mapping[Any, Any], origin: str) -> dict[str, str]:
    """Return a sentence for each name that holds a token; the token itself is not in it."""
    return {name: f"{name} (from {origin}): {reason}. {WHERE}" for name, reason in find_planted(values)}


def refuse_tokens(values: Mapping[Any, Any], origin: str) -> None:
    """Raise ConfigError, without showing it, when a parameter holds a token."""
    problems = describe_planted(values, origin)
    if problems:
        raise ConfigError(list(problems.values()))
