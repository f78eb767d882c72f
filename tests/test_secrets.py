"""Tokens: where they come from, that they are no settings, and that no byte of a run's folder holds one.

All tokens here are drawn at random in the shape of real ones, so that no file of this project looks like it leaks.
"""

import base64
import html
import json
import random
import string
import sys
import types
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pytest

from forgekit import load_config, start_run, tokens
from forgekit.__main__ import main
from forgekit.errors import ConfigError, ExportError, RunError
from forgekit.export.push import check_push
from forgekit.files import open_whole, write_json, write_text
from forgekit.runs import headless
from forgekit.scrub import GONE, SHAPES, hide_homes, remove_known, remove_tokens, scrub

WORDS = string.ascii_letters + string.digits


def draw(length: int, letters: str = WORDS, seed: int = 0) -> str:
    return "".join(random.Random(f"{seed} {length}").choices(letters, k=length))


def draw_base64(size: int, seed: int = 0) -> str:
    return base64.urlsafe_b64encode(random.Random(seed).randbytes(size)).decode().rstrip("=")


PEM = "\n".join(["-----BEGIN RSA " + "PRIVATE KEY-----", draw(64, WORDS + "+/"), "-----END RSA " + "PRIVATE KEY-----"])
JWT = ".".join(["ey" + "J" + draw_base64(21, 1), "ey" + "J" + draw_base64(60, 2), draw_base64(32, 3)])
SHAPED = {  # known by what they look like
    "Hugging Face": "hf_" + draw(34),
    "Weights & Biases": "wandb_v1_" + draw(77),
    "GitHub": "ghp_" + draw(36),
    "GitHub, fine-grained": "github_pat_" + draw(22) + "_" + draw(59),
    "AWS access key": "AKIA" + draw(16, string.ascii_uppercase + "234567"),
    "JWT": JWT,
    "private key": PEM,
}
IN_VARIABLES = {  # known because a variable of the environment holds them
    "AWS_SECRET_ACCESS_KEY": draw(38, WORDS) + "/+",
    "WANDB_API_KEY": draw(40, "0123456789abcdef"),
    "MY_SERVICE_TOKEN": f's3rv!ce "quoted" <b>&ü/+\'{draw(9)}',
}


# ---- a whole run -----------------------------------------------------------------------------------------------------

CELLS = [
    'recipe: str = "recipe.yaml"\nsettings: dict = {}\nrun_name: str = ""',
    """
import forgekit as fk

config = fk.load_config(recipe, settings)
run = fk.start_run(config, run_name)
""",
    # read from a file, so that only the channel under test carries them
    "import html, json, logging, os, sys, warnings\nfrom pathlib import Path\nfrom urllib.parse import quote\n\n"
    "planted = json.loads(Path(os.environ['PLANTED']).read_text(encoding='utf-8'))",
    "print('by print')\nfor value in planted.values():\n    print(value, file=sys.stdout)\n    print(repr(value), file=sys.stderr)",
    "print('by environment', dict(os.environ))",
    "logging.getLogger('of a library').error('by log %s', planted)\nfor value in planted.values():\n    warnings.warn(value)",
    """
import ipywidgets

ipywidgets.VBox([ipywidgets.Text(value=f"by widget {value}", description=value) for value in planted.values()])
""",
    """
from IPython.display import HTML, Markdown, display

for value in planted.values():
    text = quote(value, safe="")
    display(HTML(f'by address <a href="https://me:{text}@host.example/x?token={text}&n=1">{html.escape(value)}</a>'))
    display(Markdown(f"by address https://host.example/x?n=1&access_token={text}, {quote(value)}"))
""",
    """
run.update(note=planted, notes=[f"by record {value}" for value in planted.values()])
(run.path / "logs").mkdir(exist_ok=True)
(run.path / "logs" / "other.log").write_text(f"by another program {list(planted.values())}", encoding="utf-8")
""",
    "try:\n    raise OSError(' '.join(planted.values()))\nexcept OSError as error:\n    raise ValueError(f'by exception {planted}') from error",
]
CHANNELS = "print environment log widget address exception".split()


def write_forms(value: str) -> set[str]:
    """How a secret could stand in a file: as it is, and as JSON, HTML and URLs write it."""
    shown = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
    return shown | {html.escape(value), quote(value), quote(value, safe="")}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Eleven secrets: seven by shape, three by variable, and a home folder; all of them stand in variables, too."""
    home = tmp_path / "homes" / "someone-of-the-test"
    home.mkdir(parents=True)
    secrets = {**SHAPED, **IN_VARIABLES, "home folder": f"{home}/private/notes.txt"}
    for number, (name, value) in enumerate(secrets.items()):
        monkeypatch.setenv(name if name in IN_VARIABLES else f"PLAIN_{number}", value)
    (tmp_path / "planted.json").write_text(json.dumps(secrets), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("train: {seed: 7}\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted.json"))
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    monkeypatch.chdir(tmp_path)
    return secrets


def execute_leaky_notebook() -> Path:
    """Run the notebook, one cell of which also has a token in its source, and return the run's folder."""
    sources = [*CELLS[:-1], f"written = {SHAPED['GitHub']!r}", CELLS[-1]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in sources])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, "leaky.ipynb")
    assert main(["run", "leaky.ipynb", "--name", "leaky"]) == 1
    return Path("runs/leaky").absolute()


def find_leaks(folder: Path, secrets: dict[str, str]) -> dict[str, list[str]]:
    """Return, for each secret that stands in a byte of the folder, in which files; of a key of several lines the middle one."""
    needles = {name: value.splitlines()[len(value.splitlines()) // 2] for name, value in secrets.items()}
    needles["home folder"] = str(Path(secrets["home folder"]).parents[1])
    leaks: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*")):
        content = file.read_bytes() if file.is_file() else b""
        for name, value in needles.items():
            if any(form.encode() in content for form in write_forms(value)):
                leaks.setdefault(name, []).append(file.name)
    return leaks


def test_no_byte_of_a_run_holds_a_secret(planted: dict[str, str], capfd: pytest.CaptureFixture) -> None:
    folder = execute_leaky_notebook()
    assert find_leaks(folder, planted) == {}
    printed = "".join(capfd.readouterr())  # a cluster keeps what a job prints; home folders may stay there
    assert not any(value in printed for value in (*SHAPED.values(), *IN_VARIABLES.values()))
    assert printed.count(GONE) > 3 * len(planted)
    notebook = (folder / "notebook.ipynb").read_text(encoding="utf-8")
    for channel in CHANNELS:  # each of them did reach the notebook
        assert f"by {channel}" in notebook, channel
    assert notebook.count(GONE) > 10 * len(planted)
    assert "~/private/notes.txt" in notebook
    nbformat.validate(nbformat.reads(notebook, as_version=4))
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert "ValueError: by exception" in record["error"] and GONE in record["error"]
    assert record["note"]["GitHub"] == GONE and record["note"]["home folder"] == "~/private/notes.txt"
    assert "by another program" in (folder / "logs" / "other.log").read_text(encoding="utf-8")
    assert "by widget" in (folder / "notebook.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_without_the_scrubber_every_secret_is_found(
    planted: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from forgekit import files, run_folder

    monkeypatch.setattr(run_folder, "scrub_files", lambda folder: None)
    monkeypatch.setattr(files, "choose_cleaning", lambda path: str)
    leaks = find_leaks(execute_leaky_notebook(), planted)
    assert leaks.keys() == planted.keys()
    assert all("notebook.ipynb" in files for files in leaks.values())


# ---- the scrubber ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "a {} b",
        '"{}"',
        "x={};",
        "https://me:{}@h.example/",
        "({}).",
        "\\n{}\\n",
        "\\u0027{}",
        "?x=%22{}",
        "\x1b[0;32m{}",
    ],
)
@pytest.mark.parametrize("name", SHAPED)
def test_a_shape_is_removed_wherever_it_stands(name: str, around: str) -> None:
    assert remove_tokens(around.format(SHAPED[name])) == around.format(GONE)


OTHERS = {
    "sk-" + draw(48): "OpenAI",
    "glpat-" + draw(20): "GitLab",
    "AIza" + draw(35): "Google",
    "xoxb-" + draw(24): "Slack",
    "npm_" + draw(36): "npm",
    "hf_oauth_" + JWT: "the Hub's browser login",
}


@pytest.mark.parametrize("token", OTHERS, ids=list(OTHERS.values()))
def test_other_services_tokens_are_removed(token: str) -> None:
    assert remove_tokens(f"'{token}'") == f"'{GONE}'"


@pytest.mark.parametrize(
    "text",
    [
        "WANDB_API_KEY={}",
        "wandb.login(key='{}')",
        "wandb: api_key {}",
        "curl -H 'Authorization: Bearer {}'",
        '"Authorization": "Basic {}"',
        "https://host.example/x?n=1&X-Amz-Signature={}&m=2",
        "http://127.0.0.1:8888/lab?token={}",
        "https://someone:{}@host.example/x",
        '{{"api_key": "{}"}}',
        "password = {}",
    ],
)
def test_what_has_no_shape_is_removed_by_its_neighbours_which_stay(text: str) -> None:
    secret = IN_VARIABLES["WANDB_API_KEY"]  # 40 hexadecimal digits
    assert remove_tokens(text.format(secret)) == text.format(GONE)


@pytest.mark.parametrize(
    "text",
    [
        "commit " + draw(40, "0123456789abcdef"),
        "sha256 " + draw(64, "0123456789abcdef"),
        "hf_hub_download hf_device_map ghost_writer task-sk-learn desk-lamp-with-a-very-long-name",
        "max_new_tokens=256, pad_token_id=0, eos_token: <end_of_turn>, token = tokenizer(text)",
        "models--google--gemma-3n-E2B-it/snapshots/" + draw(40, "0123456789abcdef"),
        "https://host.example:8080/a@b/home/someone/index.html?page=12345678901234567890",
        "api_key=None password: {password} loss 0.1234",
        "runs/home/someone /homes /rooted ./home/x data/Users/x",
        base64.b64encode(random.Random(0).randbytes(100_000)).decode(),
    ],
)
def test_what_is_no_secret_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    assert scrub(text) == text


KIND_SAMPLES = {  # a text that only this kind cleans; its secret is the last value of the pair
    **{
        kind: (SHAPED.get(kind, ""), SHAPED.get(kind, ""))
        for kind in ("Hugging Face", "Weights & Biases", "AWS access key", "JWT")
    },
    "GitHub": (SHAPED["GitHub, fine-grained"],) * 2,
    "private key": (PEM, PEM.splitlines()[1]),
    "Weights & Biases, older": ("wandb: {}", IN_VARIABLES["WANDB_API_KEY"]),
    "GitLab": ("glpat-" + draw(20),) * 2,
    "OpenAI, Anthropic": ("sk-" + draw(48),) * 2,
    "Google": ("AIza" + draw(35),) * 2,
    "Slack": ("xoxb-" + draw(24),) * 2,
    "PyPI, npm": ("npm_" + draw(36),) * 2,
    "header": ("Authorization: Bearer {}", IN_VARIABLES["WANDB_API_KEY"]),
    "password in a URL": ("https://jane:{}@host.example/x", draw(12)),
    "key in a URL": ("https://host.example/x?sig={}", draw(12)),
    "named": ("hub_token = {}", draw(24) + "7"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_without_one_kind_its_secret_stays(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, secret = KIND_SAMPLES[kind]
    text = template.format(secret)
    assert secret not in remove_tokens(text)
    monkeypatch.delitem(SHAPES, kind)
    assert secret in remove_tokens(text)


def test_variables_are_secret_by_their_name_and_only_when_their_value_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TOKENIZERS_PARALLELISM": "parallel-value-1",
        "HF_TOKEN_PATH": "/somewhere/token-file-1",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "some-file-name-1",
        "SHORT_TOKEN": "abc1",
        "OTHER_TOKEN": "disabled",
        "PATH_TOKEN": "/run/secrets/value-1",
    }.items():
        monkeypatch.setenv(name, value)
        assert remove_known(f"say {value}") == f"say {value}", name
    monkeypatch.setenv("TEAM_DB_PASSWORD", "correct horse 1")
    assert remove_known("say correct horse 1, correct%20horse%201, correct+horse+1") == f"say {GONE}, {GONE}, {GONE}"


def test_homes_are_shortened_where_paths_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    found = hide_homes(
        "/home/someone/a '/home/someone' /home/someone-x/b file:///home/someone/c \x1b[0;32m/home/someone/d\\n/home/someone/e"
    )
    assert found == "~/a '~' /home/(user)/b file://~/c \x1b[0;32m~/d\\n~/e"
    assert (
        hide_homes("/Users/someone/x (/home/someoneelse) C:\\Users\\someone\\y")
        == "/Users/(user)/x (/home/(user)) C:\\Users\\(user)\\y"
    )
    assert hide_homes("?path=%2Fhome%2Fsomeone%2Fx") == "?path=~%2Fx"
    monkeypatch.setenv("HOME", "/")  # some containers' users
    assert hide_homes("/data/x /") == "/data/x /"


def test_what_programs_read_back_keeps_its_paths_and_loses_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    value = {"path": "/home/someone/rows.jsonl", "token": SHAPED["JWT"]}
    for name, path in {"manifest.json": "/home/someone", "run.json": "~", "status.json": "~"}.items():
        write_json(tmp_path / name, value)
        assert json.loads((tmp_path / name).read_text()) == {"path": f"{path}/rows.jsonl", "token": GONE}
    with open_whole(tmp_path / "train.jsonl", remove_known) as file:  # rows about tokens stay what they were
        file.writelines([f"{SHAPED['AWS access key']}\n"])
    assert (tmp_path / "train.jsonl").read_text() == f"{SHAPED['AWS access key']}\n"
    write_text(tmp_path / "key.pem.txt", f"a\n{PEM}\nb\n")
    assert (tmp_path / "key.pem.txt").read_text() == f"a\n{GONE}\nb\n"


# ---- no settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"data.path": SHAPED["Hugging Face"]},
        {"model.id": f"https://me:{SHAPED['GitHub']}@host.example/m"},
        {"adapter.rank_pattern": {SHAPED["AWS access key"]: 4}},
        {"train.report_to": ["tensorboard", SHAPED["Weights & Biases"]]},
        {"train.hub_token": "abc"},
        {"hf_token": "abc"},
        {"export": {"push": SHAPED["JWT"]}},
        {"export.push": IN_VARIABLES["MY_SERVICE_TOKEN"]},
        {SHAPED["Hugging Face"]: 1},
    ],
)
def test_a_setting_that_looks_like_a_token_is_refused_and_not_repeated(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in IN_VARIABLES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings)
    message = str(caught.value)
    assert "Tokens are no parameters" in message and "Set the environment variable HF_TOKEN" in message
    assert not any(value in message for value in (*SHAPED.values(), *IN_VARIABLES.values()))


def test_settings_with_token_in_their_name_are_no_tokens() -> None:
    config = load_config(None, {"evaluate.max_new_tokens": 9, "adapter.target_modules": "embed_tokens"})
    assert config.evaluate.max_new_tokens == 9


@pytest.mark.parametrize(
    ("arguments", "cell"),
    [
        (["--set", f"data.path={SHAPED['Hugging Face']}"], CELLS[0]),
        (["--name", SHAPED["Hugging Face"]], CELLS[0]),
        (["--recipe", SHAPED["Hugging Face"]], CELLS[0]),
        ([], f"{CELLS[0]}\nhf_token = {SHAPED['Hugging Face']!r}"),
        ([], CELLS[0].replace("{}", repr({"hf_token": "abc"}))),
    ],
    ids=["setting", "run name", "recipe", "notebook's own", "notebook's settings"],
)
def test_a_headless_run_with_a_token_in_its_parameters_does_not_start(
    arguments: list[str], cell: str, planted: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(headless, "execute", lambda *arguments, **options: pytest.fail("the kernel was started"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})])
    nbformat.write(notebook, "toy.ipynb")
    assert main(["run", "toy.ipynb", *arguments]) in (1, 2)
    out, err = capfd.readouterr()
    assert "oken" in err and SHAPED["Hugging Face"] not in out + err
    assert not Path("runs").exists()


def test_a_runs_name_is_no_token(runs: Path) -> None:
    with pytest.raises(RunError, match="looks like a token"):
        start_run(load_config(), SHAPED["Hugging Face"])
    assert not runs.exists()


# ---- where they come from --------------------------------------------------------------------------------------------


class Colab:
    """A stand-in for google.colab.userdata and for a notebook's kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, secrets: dict[str, str]):
        package = types.ModuleType("google.colab")
        package.userdata = self  # type: ignore[attr-defined]
        self.secrets = secrets
        shell = types.SimpleNamespace(kernel=object())
        monkeypatch.setitem(sys.modules, "google.colab", package)
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))

    def get(self, name: str) -> str:
        if name not in self.secrets:
            raise type("SecretNotFoundError", (Exception,), {})(name)
        if self.secrets[name] == "refused":
            raise type("NotebookAccessError", (Exception,), {})(f"access to {name}")
        return self.secrets[name]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs."""
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    return tmp_path / "runs"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token anywhere."""
    import huggingface_hub

    for name in ("HF_TOKEN", "WANDB_API_KEY", "KAGGLE_USER_SECRETS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr("forgekit.scrub._fetched", set())


def test_environment_then_secrets_then_login(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import huggingface_hub

    assert tokens.find_token() is None
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_of-the-login")
    assert tokens.find_token() == ("hf_of-the-login", "the Hub's login")
    assert tokens.find_token("WANDB_API_KEY") is None  # the login is the Hub's alone
    kaggle = types.ModuleType("kaggle_secrets")
    answers = types.SimpleNamespace(get_secret=lambda name: f"{name} of kaggle")
    kaggle.UserSecretsClient = lambda: answers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle)
    assert tokens.find_token().where == "the Hub's login"  # Kaggle's client is asked on Kaggle alone
    monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", "of Kaggle's own service")
    assert tokens.find_token() == ("HF_TOKEN of kaggle", "Kaggle's secrets")
    colab = Colab(monkeypatch, {"HF_TOKEN": "refused"})
    assert tokens.find_token() == ("HF_TOKEN of kaggle", "Kaggle's secrets")
    assert capsys.readouterr().out == "Colab gave no secret HF_TOKEN (NotebookAccessError); going on without it.\n"
    colab.secrets = {"HF_TOKEN": "hf_of-colab"}
    assert tokens.find_token() == ("hf_of-colab", "Colab's secrets")
    monkeypatch.setenv("HF_TOKEN", " hf_of-the-environment\n")
    found = tokens.find_token()
    assert found == ("hf_of-the-environment", "the environment variable HF_TOKEN")
    assert str(found) == repr(found) == "Token(from the environment variable HF_TOKEN)"
    monkeypatch.delenv("HF_TOKEN")
    # once found, it is removed from whatever is written, whatever it looks like
    assert remove_known("hf_of-colab hf_of-the-environment hf_of-the-login") == f"{GONE} {GONE} {GONE}"


def test_secrets_are_offered_to_the_libraries_that_know_no_kaggle(
    nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"HF_TOKEN": "hf_mine-already"}
    Colab(monkeypatch, {"HF_TOKEN": "hf_of-colab"})
    tokens.offer_token(environ)
    assert environ == {"HF_TOKEN": "hf_mine-already"}
    environ.clear()
    tokens.offer_token(environ)
    assert environ == {"HF_TOKEN": "hf_of-colab"}
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    environ.clear()
    tokens.offer_token(environ)  # a process beside the notebook's kernel would wait for an answer
    assert environ == {}


def test_an_upload_finds_its_token_in_the_same_order(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    config = load_config(None, {"export.push": "me/orders"})
    with pytest.raises(ExportError, match="there is no token"):
        check_push(config)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_of-the-login")
    check_push(config)
