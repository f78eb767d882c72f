"""The API description is a valid OpenAPI document, and real requests and answers fit its schemas."""

import copy
from pathlib import Path
from typing import Any

import pytest

from forgekit.export.api import describe_api, write_api
from forgekit.files import read_json

REQUEST = {
    "model": "orders",
    "messages": [{"role": "user", "content": "Turn this order into JSON: three boxes of tea."}],
    "max_tokens": 64,
    "temperature": 0,
    "stop": ["<end_of_turn>"],
}
ANSWER = {  # as llama.cpp's server writes it
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1764000000,
    "model": "orders",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "{}"}}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23},
    "timings": {"predicted_ms": 12.5},
}


@pytest.fixture
def document(make_config: Any) -> dict[str, Any]:
    return describe_api(make_config(), "orders")


def check(document: dict[str, Any], schema: str, value: Any) -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator({"$ref": f"#/components/schemas/{schema}", **document}).validate(value)


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator, validate

    validate(document, cls=OpenAPIV31SpecValidator)


def test_a_broken_document_is_not(document: dict[str, Any]) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    for spoil in (
        lambda d: d.pop("info"),
        lambda d: d["paths"]["/health"]["get"].update(responses=[]),
        lambda d: d["paths"].update(health={}),
    ):
        broken = copy.deepcopy(document)
        spoil(broken)
        assert list(OpenAPIV31SpecValidator(broken).iter_errors())


def find_references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*map(find_references, value.values()))
    return set().union(*map(find_references, value)) if isinstance(value, list) else set()


def test_every_schema_is_used_and_every_reference_leads_to_one(document: dict[str, Any]) -> None:
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert find_references(document) == schemas


def test_requests_and_answers_fit(document: dict[str, Any]) -> None:
    check(document, "Request", REQUEST)
    check(document, "Completion", ANSWER)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "another"},
        {"messages": []},
        {"max_tokens": 0},
        {"max_tokens": 10**7},
        {"temperature": 3},
        {"messages": [{"role": "tool", "content": "x"}]},
    ],
)
def test_wrong_requests_do_not(document: dict[str, Any], wrong: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    with pytest.raises(ValidationError):
        check(document, "Request", REQUEST | wrong)


def test_it_names_the_model_and_its_limits(make_config: Any, tiny_folder: Path, tmp_path: Path) -> None:
    context = read_json(tiny_folder / "config.json")["text_config"]["max_position_embeddings"]
    write_api(tmp_path / "openapi.json", make_config({"model.max_length": 100}), "orders")
    saved = read_json(tmp_path / "openapi.json")
    request = saved["components"]["schemas"]["Request"]["properties"]
    assert request["model"] == {"const": "orders"} and request["max_tokens"]["maximum"] == context
    assert f"at most {context} tokens; training saw rows of up to 100" in saved["info"]["description"]
    assert str(tiny_folder) not in (tmp_path / "openapi.json").read_text(encoding="utf-8")
