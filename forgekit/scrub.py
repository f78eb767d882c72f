"""Secrets and home folders taken out of text before it is written: by the values this process knows, and by their shape.

    known values    what the environment's token variables hold, and tokens that forgekit fetched itself
    shapes          hf_..., ghp_..., AWS keys, JWTs, keys in URLs, private keys     -> (token removed)
    home folders    this user's -> ~, so that the path still works here; another's -> /home/(user)

detect-secrets, the kept library for such shapes, was tried and left: its last release (1.5.0, May 2024) knows no token of
the Hub, of W&B, nor GitHub's github_pat_, reads single lines, and reports findings without taking them out.
"""

import html
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote, quote_plus

GONE = "(token removed)"
Clean = Callable[[str], str]

# variables whose value is secret, by the last words of their name; HF_TOKEN_PATH or TOKENIZERS_PARALLELISM are none
SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PAT|CREDENTIALS|(?:API|ACCESS|SECRET|PRIVATE|ACCOUNT|KAGGLE)_?KEY(?:_ID)?)$",
    re.IGNORECASE,
)
SHORTEST = 8  # characters; "true" or "1" in such a variable must not vanish from every text
_fetched: set[str] = set()


class Shape(NamedTuple):
    """What a kind of token looks like: one of the hints is in every such text (in lower case), a group named kept stays."""

    hints: tuple[str, ...]
    pattern: re.Pattern[str]


def shape(hints: str, pattern: str) -> Shape:
    """Return a shape from hints in words; most texts hold none of them, and a plain search for those is a hundred times faster."""
    return Shape(tuple(hints.split()), re.compile(pattern))


# what may stand before a token: no letter or digit but those that end JSON's \\n or \\u0027, a URL's %22 or a colour's code
START = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u00[0-9a-fA-F]{2})|(?<=%[0-9A-Fa-f]{2})|(?<=\dm))"
# lengths are minima below those in use in 2026
SHAPES = {
    "Hugging Face": shape("hf_", START + r"hf_(?:[A-Za-z0-9]{20,}|(?:oauth|jwt)_[\w.-]{20,})"),
    "Weights & Biases": shape("wandb_v", START + r"wandb_v\d+_\w{20,}"),
    # the older kind is 40 hexadecimal digits like a commit, so only its neighbourhood tells
    "Weights & Biases, older": shape(
        "wandb", r"(?P<kept>(?i:wandb)[^\n0-9a-f]{1,12}(?:[^\n]{0,30}[^\n\w])?)\b[0-9a-f]{40}\b"
    ),
    "GitHub": shape("gh github_pat_", START + r"(?:gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{40,})"),
    "GitLab": shape("glpat-", START + r"glpat-[\w-]{20,}"),
    "AWS access key": shape("a3t akia asia abia acca", START + r"(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b"),
    "JWT": shape("eyj", START + r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"),
    "OpenAI, Anthropic": shape("sk-", START + r"sk-[\w-]{20,}"),
    "Google": shape("aiza gocspx- ya29.", START + r"(?:AIza[\w-]{35}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,})"),
    "Slack": shape("xox", START + r"xox[abeoprs]-[\w-]{10,}"),
    "PyPI, npm": shape("pypi-age npm_", START + r"(?:pypi-AgE[\w-]{50,}|npm_[A-Za-z0-9]{36})"),
    # over several lines, also as a notebook's JSON splits them or a URL writes them; no bracket, so that the JSON stays whole
    "private key": shape(
        "-----begin",
        r"-----BEGIN[A-Z0-9 +%]{1,40}KEY-----[A-Za-z0-9+/=\s\",\\:.%-]{1,10000}?-----END[A-Z0-9 +%]{1,40}KEY-----",
    ),
    "header": shape(
        "authorization",
        r"(?P<kept>(?i:authorization)[\\\"']*\s?[:=]\s?[\\\"']*(?i:bearer|basic|token)\s+)[\w.~+/=-]{8,}",
    ),
    "password in a URL": shape("@", r"(?P<kept>://[^\s/:@\"'<>]*:)[^\s/@\"'<>]{3,}(?=@)"),
    "key in a URL": shape(
        "token= key= secret= password= signature= sig= credential=",
        r"(?P<kept>[?&;](?i:access_token|auth_token|api_?key|token|key|secret|password|signature|sig|x-amz-(?:signature|credential|security-token))=)"
        r"[^\s&#\"'<>\\]{8,}",
    ),
    "named": shape(
        "api_key apikey access_token auth_token hub_token hf_token secret_key secret_access_key password passwd",
        r"(?P<kept>(?i:api_?key|access_?token|auth_?token|hub_?token|hf_?token|secret_?(?:access_?)?key|password|passwd)[\\\"']*\s{0,3}[:=]\s{0,3}[\\\"']*)"
        r"(?=[\w+/=.-]*\d)[\w+/=.-]{16,}",
    ),
}


def remember(value: str) -> str:
    """Note a token that was fetched, so that it is removed from whatever is written from now on; return it."""
    if len(value) >= SHORTEST:
        _fetched.add(value)
    return value


def list_known(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return the secret values that this process knows: those of token variables, and what was fetched."""
    found = {value.strip() for name, value in environ.items() if SECRET_NAME.search(name)}
    found = {value for value in found if len(value) >= SHORTEST and not is_plain(value)}
    return frozenset(found | _fetched)


def is_plain(value: str) -> bool:
    """Say whether the value of a token variable is none: a path, or one word of letters such as "disabled"."""
    return value.isalpha() and len(value) < 16 or value.startswith(("/", "~", "./"))


@lru_cache(maxsize=8)
def write_forms(values: frozenset[str]) -> list[str]:
    """Return the values, and how URLs, HTML, JSON and Python's repr write them, longest first: one may begin like another."""
    forms: set[str] = set()
    for value in values:
        lines = [line for line in value.splitlines() if len(line) >= SHORTEST]  # a notebook keeps lines apart
        for text in (value, *lines):
            written = (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1])
            forms |= {text, *written, html.escape(text), quote(text, safe=""), quote(text), quote_plus(text)}
            forms |= {json.dumps(form)[1:-1] for form in (*written, html.escape(text))}  # such a text inside JSON
    return sorted(forms, key=len, reverse=True)


def remove_known(text: str) -> str:
    """Remove the secret values that this process knows, and nothing that merely looks like one: for rows of data."""
    for form in write_forms(list_known()):
        text = text.replace(form, GONE)
    return text


def list_shapes(text: str) -> Iterator[re.Pattern[str]]:
    """Yield the expressions whose hint is in a text."""
    lower = text.lower()
    for hints, pattern in SHAPES.values():
        if any(hint in lower for hint in hints):
            yield pattern


def looks_like_token(text: str) -> bool:
    """Say whether something in a text has the shape of a token."""
    return any(pattern.search(text) for pattern in list_shapes(text))


def keep_before(found: re.Match[str]) -> str:
    """Return what stays of a shape: what shows that it is a token, and a note in the token's place."""
    return (found.groupdict().get("kept") or "") + GONE


def remove_tokens(text: str) -> str:
    """Remove the known values and everything that has the shape of a token."""
    text = remove_known(text)
    for pattern in list_shapes(text):
        text = pattern.sub(keep_before, text)
    return text


def scrub(text: str) -> str:
    """Remove tokens, and the home folders that absolute paths begin with."""
    return hide_homes(remove_tokens(text))


def hide_homes(text: str) -> str:
    """Write this user's home as ~ and another's as /home/(user)."""
    home = os.path.expanduser("~").rstrip("/\\")
    for pattern in (own_home(home), *(pattern for hint, pattern in OTHER_HOMES.items() if hint in text)):
        text = pattern.sub(hide_home, text)
    return text


def hide_home(found: re.Match[str]) -> str:
    """Return what stands in the place of a home folder; unchanged where it is in the middle of a longer path or an address."""
    root = found.groupdict().get("root")
    if not BEFORE.search(found.string, max(0, found.start() - 12), found.start()):
        return found[0]
    return "~" if root is None else f"{root}(user)"


# what may stand before a path; JSON's \n and a colour's code end in a letter
BEFORE = re.compile(r"(?:^|[^\w.~]|\\[nrt]|\[[\d;]{1,8}m)$")
USER = r"(?!\(user\))[^\s/\\\"'<>|:;,)(\]}]+"
OTHER_HOMES = {
    "/home/": re.compile(rf"(?P<root>/home/){USER}"),
    "/Users/": re.compile(rf"(?P<root>/Users/){USER}"),
    "\\Users\\": re.compile(rf"(?P<root>[A-Za-z]:\\{{1,4}}Users\\{{1,4}}){USER}"),
}


@lru_cache(maxsize=8)
def own_home(home: str) -> re.Pattern[str]:
    """Return an expression for a home folder, also as a URL writes it and as JSON writes Windows' names."""
    if len(home) < 3 or home.startswith("~"):  # a container's user may have / or none
        return re.compile(r"(?!)")
    forms = {re.escape(form) for form in (home, home.replace("\\", "\\\\"), quote(home), quote(home, safe=""))}
    return re.compile(f"(?:{'|'.join(sorted(forms))})(?![\\w-]|\\.\\w)")


# ---- files -----------------------------------------------------------------------------------------------------------

# what is read by people and handed on; programs read the paths of other files back
HANDED_ON = (".ipynb", ".html", ".md", ".log", ".txt")
HANDED_ON_NAMES = ("run.json", "status.json")


def choose_cleaning(path: Path) -> Clean:
    """Return what is done with a file's text: tokens leave every file, home folders those that are handed on."""
    return scrub if path.suffix in HANDED_ON or path.name in HANDED_ON_NAMES else remove_tokens


class CleanFile:
    """An open text file whose text is cleaned on its way; a token cut in two by two writes is not seen."""

    def __init__(self, file: IO[str], clean: Clean):
        self.file, self.clean = file, clean

    def write(self, text: str) -> int:
        """Write cleaned text."""
        return self.file.write(self.clean(text))

    def writelines(self, lines: Any) -> None:
        """Write cleaned lines."""
        self.file.writelines(map(self.clean, lines))

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()
