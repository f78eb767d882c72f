"""Recipes and settings: what wins, where a value came from, YAML's traps, and every problem in one message."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from forgekit.config import NAMES, SECTIONS, Config, flatten, load_config, suggest
from forgekit.errors import ConfigError
from forgekit.panels.write import write_recipe as write_panels_recipe
from forgekit.recipe import RECIPE_LIMIT, find_recipe, parse_yaml


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test stands in a folder of its own and is no `forgekit run`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    return tmp_path


def write_recipe(text: str | bytes, path: str = "recipe.yaml") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def problems_of(settings: Any, recipe: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, settings)
    return caught.value.problems


# ---- values and where they come from ---------------------------------------------------------------------------------


def test_defaults_are_the_values_people_know() -> None:
    config = load_config()
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.lora_dropout) == (16, 16, 0)
    assert (config.train.learning_rate, config.train.warmup_steps, config.train.seed) == (2e-4, 5, 3407)
    assert (config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps) == (2, 4)
    assert (config.train.weight_decay, config.train.lr_scheduler_type, config.train.logging_steps) == (
        0.01,
        "linear",
        1,
    )
    assert (config.model.load_in, config.model.max_length, config.model.engine) == ("4bit", 2048, "auto")


def test_the_sections_are_the_six_words_and_each_setting_has_help() -> None:
    assert list(SECTIONS) == "data model adapter train evaluate export".split()
    assert list(SECTIONS) == list(Config.model_fields)
    assert [
        f"{s}.{n}" for s, section in SECTIONS.items() for n, f in section.model_fields.items() if not f.description
    ] == []


def test_shipped_recipes_are_valid_and_begin_with_what_they_teach(project_folder: Path) -> None:
    recipes = sorted((project_folder / "params").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert load_config(recipe).recipe == recipe.resolve()
        assert re.match(r"# \w.{40,}", recipe.read_text(encoding="utf-8")), recipe


def test_the_stronger_layer_wins_and_each_value_knows_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe("train: {seed: 1, max_steps: 10, learning_rate: 1e-4}", "params/text.yaml")
    config = load_config(recipe, {"train.seed": 2, "train.max_steps": 20}).change({"train.seed": 3}, "panel")
    values = config.train.seed, config.train.max_steps, config.train.learning_rate, config.train.warmup_steps
    assert values == (3, 20, 1e-4, 5)
    names = "train.seed", "train.max_steps", "train.learning_rate", "train.warmup_steps"
    assert [config.origin(name) for name in names] == ["panel", "notebook", "text.yaml", "default"]
    monkeypatch.setenv("FORGEKIT_RUN", "night")
    assert load_config(recipe, {"train.seed": 2}).origin("train.seed") == "--set"


def test_none_inherits_and_leaves_the_origin() -> None:
    recipe = write_recipe("train:\n  max_steps: 10\n  seed:\ndata:\n")
    config = load_config(recipe, {"train.max_steps": None, "adapter": None})
    assert (config.train.max_steps, config.origin("train.max_steps")) == (10, "recipe.yaml")
    assert (config.train.seed, config.origin("train.seed")) == (3407, "default")


def test_the_word_none_empties_what_a_weaker_layer_fills(tmp_path: Path) -> None:
    recipe = write_recipe("train: {eval_steps: 10, save_minutes: none}\ndata: {path: sample:orders}\n")
    config = load_config(recipe, '{"train.eval_steps": "None", "data.path": "none", "evaluate.rows": "none"}')
    names = ["train.eval_steps", "train.save_minutes", "data.path", "evaluate.rows"]

    def values(config: Any) -> list[Any]:
        return [config.train.eval_steps, config.train.save_minutes, config.data.path, config.evaluate.rows]

    assert values(config) == [None] * 4 and values(load_config()) == [None, 5, None, 100]
    assert [config.origin(name) for name in names] == ["notebook", "recipe.yaml", "notebook", "notebook"]
    assert values(config.change({"train.seed": 1})) == [None] * 4
    written = tmp_path / "written.yaml"
    written.write_text(write_panels_recipe(config), encoding="utf-8")
    assert values(load_config(written)) == [None] * 4
    with pytest.raises(ConfigError, match="train.seed is .none.*whole number"):
        load_config(None, {"train.seed": "none"})


@pytest.mark.parametrize(
    "settings",
    [
        {"train.max_steps": 7, "adapter.layers": ["mlp"]},
        {"train": {"max_steps": 7}, "adapter": {"layers": ["mlp"]}},
        '{"train.max_steps": 7, "adapter.layers": ["mlp"]}',  # as `papermill -p settings` hands it over
        "{'train.max_steps': 7, 'adapter.layers': ['mlp']}",
        "train:\n  max_steps: 7\nadapter:\n  layers: [mlp]",
    ],
)
def test_settings_may_be_dotted_nested_or_text(settings: Any) -> None:
    config = load_config(None, settings)
    assert (config.train.max_steps, config.adapter.layers) == (7, ("mlp",))


@pytest.mark.parametrize("settings", [None, {}, "", "{}"])
def test_no_settings_change_nothing(settings: Any) -> None:
    assert load_config(None, settings).model_dump() == Config().model_dump()


def test_change_returns_a_new_config_and_keeps_the_old_one() -> None:
    recipe = write_recipe("train: {seed: 1}")
    before = load_config(recipe, {"adapter.r": 8})
    after = before.change({"adapter.r": 32}, "panel").change({"train.max_steps": 5})
    assert (before.adapter.r, before.origin("adapter.r"), before.train.max_steps) == (8, "notebook", None)
    assert (after.adapter.r, after.origin("adapter.r"), after.train.seed, after.recipe) == (
        32,
        "panel",
        1,
        recipe.resolve(),
    )
    assert after.origin("train.seed") == "recipe.yaml"


def test_change_checks_the_whole_again() -> None:
    config = load_config(None, {"train.eval_steps": 10, "data.validation": 20})
    with pytest.raises(ConfigError, match=r"^train.save_steps \(15\) must be a multiple of train.eval_steps \(10\)"):
        config.change({"train.save_steps": 15})


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        load_config().train.seed = 5
    with pytest.raises(ValidationError):
        load_config().train = None  # type: ignore[assignment]


def test_a_section_made_by_hand_refuses_unknown_names_too() -> None:
    with pytest.raises(ValidationError, match="sede"):
        SECTIONS["train"](sede=1)  # type: ignore[call-arg]


def test_the_table_shows_what_differs_with_origin_and_meaning() -> None:
    table = load_config(write_recipe("train: {seed: 1}"), {"adapter.r": 8}).table()
    assert table["value"].to_dict() == {"adapter.r": 8, "train.seed": 1}
    assert table["from"].to_dict() == {"adapter.r": "notebook", "train.seed": "recipe.yaml"}
    assert table["meaning"]["train.seed"].startswith("seed of the adapter")
    assert list(load_config().table(changed=False).index) == NAMES


# ---- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),  # YAML 1.1 reads text here
        ("1E5", 1e5),
        ("-3", -3),
        ("0", 0),
        ("1_000", 1000),
        ("0x10", 16),
        (".5", 0.5),
        ("5.", 5.0),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        # text where YAML 1.1 sees something else
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("2026-13-45", "2026-13-45"),
        ("1e5f03", "1e5f03"),
        ("'7'", "7"),
    ],
)
def test_yaml_values_arrive_as_written(text: str, value: Any) -> None:
    read = parse_yaml(f"a: {text}", "recipe")["a"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "value"), [("on", "on"), ("off", "off"), ("true", "on"), ("false", "off"), ("auto", "auto")]
)
def test_a_switch_takes_on_and_off_in_every_spelling(text: str, value: str) -> None:
    recipe = write_recipe(f"train: {{gradient_checkpointing: {text}}}")
    assert load_config(recipe).train.gradient_checkpointing == value


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  seed: 1\n  seed: 2\n", "line 3: no valid YAML: 'seed' stands twice in one section."),
        ("train:\n  seed: 1\ntrain:\n  max_steps: 2\n", "line 3: no valid YAML: 'train' stands twice in one section."),
        ("train.seed: 1\ntrain:\n  seed: 2\n", "train.seed stands twice in one set of settings. Keep one of the two."),
        (BOMB, "line 2: no valid YAML: aliases (*name) are not allowed in a recipe."),
        ("train:\n  seed: !!python/name:os.system\n", "are not allowed in a recipe."),
        (
            "train:\n  seed: !!timestamp x\n",
            "line 2: no valid YAML: tags (tag:yaml.org,2002:timestamp) are not allowed",
        ),
        ("train:\n\tseed: 1\n", "line 2: no valid YAML: while scanning for the next token, found character '\\t'"),
        ("train: {seed: 1\nmodel: {}\n", "line 2: no valid YAML: while parsing a flow mapping"),
        ("[" * 20_000, "no valid YAML: maximum recursion depth exceeded"),
        ("train: {seed: " + "9" * 5000 + "}", "no valid YAML: Exceeds the limit"),
        ("train: \x07", "no valid YAML: unacceptable character"),
        ("? [a, b]\n: 1\n", "found unhashable key"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("- train\n", "is no mapping; it holds sections such as `train:`"),
        ("just text", "is no mapping"),
        ("", "is empty; it holds sections"),
        ("# only a comment\n", "is empty"),
    ],
)
def test_a_broken_recipe_is_named_with_its_line(text: str, message: str) -> None:
    [problem] = problems_of(None, write_recipe(text, "params/mine.yaml"))
    assert message in problem
    assert "mine.yaml" in problem or "twice in one set" in problem
    assert "\n" not in problem


def test_a_recipe_that_is_no_utf8_is_refused_with_the_remedy() -> None:
    [problem] = problems_of(None, write_recipe("# größer\n".encode("latin-1")))
    assert re.fullmatch(r"recipe .*recipe\.yaml is not UTF-8 text \(byte 4\)\. Save it as UTF-8\.", problem)


def test_a_huge_recipe_is_refused_before_it_is_parsed() -> None:
    [problem] = problems_of(None, write_recipe("#" * (RECIPE_LIMIT + 1)))
    assert "has 1,000,001 bytes; a recipe has at most 1,000,000. Is it a data file?" in problem


# ---- finding the recipe ----------------------------------------------------------------------------------------------


def test_a_recipe_is_found_from_the_current_folder_and_two_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe("{train: {}}", "params/text.yaml").resolve()
    for folder in (".", "notebooks", "notebooks/deep"):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        assert find_recipe("params/text.yaml") == recipe
    (tmp_path / "notebooks/deep/deeper").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks/deep/deeper")
    with pytest.raises(ConfigError, match="no such file in"):
        find_recipe("params/text.yaml")


def test_a_missing_recipe_says_where_it_looked_and_what_there_is(tmp_path: Path) -> None:
    write_recipe("", "params/text.yaml")
    write_recipe("", "params/text_quick.yaml")
    [problem] = problems_of(None, Path("params/txt.yaml"))
    assert problem == (
        f"recipe 'params/txt.yaml': no such file in {tmp_path} or the two folders above it. There are: text.yaml, text_quick.yaml."
    )
    [problem] = problems_of(None, Path("elsewhere/txt.yaml"))
    assert problem.endswith("`forgekit init DIR` copies the shipped notebooks and recipes.")
    [problem] = problems_of(None, Path("params"))  # a folder
    assert "recipe 'params': no such file" in problem


@pytest.mark.parametrize("recipe", [5, 1.5, {"train": {}}, True])
def test_a_recipe_that_is_no_name_is_refused(recipe: Any) -> None:
    assert problems_of(None, recipe)[0].startswith(f"recipe is {recipe!r}: it must be the name of a YAML file")


# ---- problems --------------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once_each_with_its_origin() -> None:
    recipe = write_recipe("train: {sede: 1, learning_rate: fast}\nmodel: {max_length: -1}\n")
    problems = problems_of({"adaptor.r": 8, "adapter.lora_dropout": 1.5, "train.eval_steps": 5}, recipe)
    assert [problem.split(":")[0].split(" is ")[0] for problem in problems] == [
        "adapter.lora_dropout",
        "adaptor.r",
        "model.max_length",
        "train.learning_rate",
        "train.sede",
    ]
    text = "\n".join(problems)
    assert "train.sede: no such setting (from recipe.yaml). Did you mean train.seed?" in text
    assert "adaptor.r: no such setting (from notebook). Did you mean adapter.r?" in text
    with pytest.raises(ConfigError, match=r"^5 problems in the settings:\n"):
        load_config(recipe, {"adaptor.r": 8, "adapter.lora_dropout": 1.5, "train.eval_steps": 5})


def test_conflicts_are_reported_beside_unknown_names() -> None:
    problems = problems_of({"adaptor.r": 8, "train.early_stopping": 3, "adapter.layers": ["attenton"]})
    assert [problem.split(":")[0].split()[0] for problem in problems] == [
        "adapter.layers",
        "adaptor.r",
        "train.early_stopping",
    ]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("adaptor.r", "adapter.r"),
        ("train.learning_rat", "train.learning_rate"),
        ("max_steps", "train.max_steps"),
        ("model.max_steps", "train.max_steps"),
        ("lora_alpha", "adapter.lora_alpha"),
        ("train.batch_size", "train.per_device_train_batch_size"),
        ("train.gradient_accumulation", "train.gradient_accumulation_steps"),
        ("adapter.alpha", "adapter.lora_alpha"),
        ("adapter.flavour", None),
        ("zebra", None),
    ],
)
def test_the_nearest_name_is_suggested_and_none_where_none_is_near(name: str, nearest: str | None) -> None:
    assert suggest(name, NAMES) == (f" Did you mean {nearest}?" if nearest else "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 5}, "train is 5 (from notebook): it is a section and holds settings, for instance train.method."),
        ({"adaptor": {}}, "adaptor: no such setting (from notebook)."),
        ({"adaptor": None}, "adaptor: no such setting (from notebook)."),
        ({"train.learning_rate": {}}, "train.learning_rate is {} (from notebook): it should be a number."),
        ({"train": {"seed": {"a": 1}}}, "train.seed.a: no such setting (from notebook)."),
        ({"": 1}, "(no name): no such setting (from notebook)."),
        ({1: 2}, "1: no such setting (from notebook)."),
        ({"train": {"seed": 1}, "train.seed": 2}, "train.seed stands twice in one set of settings."),
        ("- train.seed", "settings is ['train.seed']: it must be a mapping"),
        (5, "settings is 5: it must be a mapping such as {'train.max_steps': 60}."),
        ("{train.seed: 1", "settings: no valid YAML: while parsing a flow mapping"),
    ],
)
def test_settings_of_the_wrong_shape_are_refused(settings: Any, message: str) -> None:
    [problem] = problems_of(settings)
    assert message in problem


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train.seed": "x"}, "it should be a whole number."),
        ({"train.seed": 1.5}, "it should be a whole number."),
        ({"train.seed": True}, "it should be a whole number."),
        ({"train.learning_rate": "fast"}, "it should be a number."),
        ({"adapter.use_dora": "yes"}, "it should be true or false."),
        ({"adapter.use_dora": 1}, "it should be true or false."),
        ({"model.revision": 1234567}, "it should be text (in quotes when it looks like a number)."),
        ({"adapter.layers": "mlp"}, "it should be a list, for instance [a, b]."),
        (
            {"export.formats": ["gguf"]},
            "it should be 'adapter', 'merged', 'gguf:f16', 'gguf:bf16', 'gguf:q8_0', 'gguf:q4_k_m', 'gguf:mmproj' or 'ollama'.",
        ),
        ({"model.load_in": 4}, "it should be '4bit', '8bit', '16bit' or 'full'."),
        ({"model.dtype": "bf16"}, "it should be 'auto', 'bfloat16', 'float16' or 'float32'."),
        ({"train.learning_rate": float("nan")}, "it should be a finite number."),
        ({"train.learning_rate": float("inf")}, "it should be a finite number."),
        ({"train.learning_rate": 0}, "it should be greater than 0."),
        ({"adapter.lora_dropout": 1}, "it should be less than 1."),
        ({"adapter.r": 0}, "it should be greater than or equal to 1."),
        ({"train.max_steps": -2}, "it should be greater than or equal to -1."),
        ({"train.seed": 2**32}, "it should be less than 4294967296."),
        ({"model.max_length": -1}, "it should be greater than 0. Meaning: longest row in tokens"),
        ({"model.max_length": 0}, "it should be greater than 0."),
        ({"model.max_length": "auto"}, "it should be a whole number."),
        ({"data.max_bad": 2}, "it should be less than or equal to 1."),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(settings: dict[str, Any], expected: str) -> None:
    [problem] = problems_of(settings)
    [name] = settings
    assert problem.startswith(f"{name} is ")
    assert "(from notebook)" in problem
    assert expected in problem
    assert "Meaning: " in problem


@pytest.mark.parametrize("value", [0, -5, 1.0, 1.5, -0.1, True, [], float("nan")])
@pytest.mark.parametrize("name", ["data.train", "data.validation", "data.test"])
def test_a_part_of_the_data_is_a_count_a_share_or_a_name(name: str, value: Any) -> None:
    [problem] = problems_of({name: value})
    assert (
        "it should be a number of rows from 1, a share between 0 and 1, or the name of a file or Hub split." in problem
    )


@pytest.mark.parametrize("value", [1, 400, 0.1, "val.jsonl", "test"])
def test_right_parts_of_the_data_are_taken(value: Any) -> None:
    assert load_config(None, {"data.test": value}).data.test == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"adapter.layers": ["attenton"]},
            "'attenton' is no group of layers. Did you mean attention? There are: attention, mlp",
        ),
        ({"adapter.layers": []}, "adapter.layers is empty, so nothing would learn."),
        ({"train.early_stopping": 2}, "train.early_stopping needs scores during training: set train.eval_steps too."),
        ({"train.eval_steps": 5}, "train.eval_steps needs rows to score: set data.validation"),
        (
            {"adapter.path": "lora", "model.load_in": "full"},
            "adapter.path continues an adapter, and model.load_in: full has none.",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in problems_of(settings))


def test_flatten_and_the_dump_of_a_config_agree() -> None:
    flat = flatten(load_config().model_dump())
    assert list(flat) == NAMES
    assert load_config(None, flat).model_dump() == load_config().model_dump()


def test_nothing_to_learn_and_nothing_to_keep_are_refused() -> None:
    problems = problems_of({"train.max_steps": 0, "export.formats": []})
    assert [problem.split(" ")[0] for problem in problems] == ["export.formats", "train.max_steps"]
    assert load_config(None, {"train.max_steps": -1}).train.max_steps == -1


def test_the_word_none_is_no_file_of_the_current_folder() -> None:
    from forgekit.runs.parameters import find_here

    write_recipe("x", "none")
    emptied = {"train.status_file": "none", "data.path": "None", "adapter.path": "none"}
    assert find_here(emptied) == emptied
    assert find_here({"model.id": "none"})["model.id"].endswith("/none"), "which has to have a value"


def test_what_a_conflict_advises_helps() -> None:
    recipe = write_recipe("adapter: {layers: [], layers_to_transform: '0-3', target_modules: '.*q_proj'}")
    advice = "layers_to_transform: none"
    assert any(advice in problem for problem in problems_of(None, recipe))
    assert load_config(recipe, {"adapter.layers_to_transform": "none"}).adapter.layers_to_transform is None
