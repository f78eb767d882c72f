"""The hand-over's API description: OpenAPI 3.1 of the chat completions that llama.cpp's server and vLLM's both answer.

What is described is a subset on purpose: what llama.cpp's server documents for /v1/chat/completions and a client of a
fine-tuned Gemma 3n needs (https://github.com/ggml-org/llama.cpp/tree/master/tools/server).
"""

from pathlib import Path
from typing import Any

from ..config import Config
from ..files import write_json
from ..model.shapes import read_config

ERRORS = {
    "400": "the request is no valid JSON, lacks messages, or exceeds the context",
    "401": "the server was started with a key and the request has another or none",
    "503": "the model is still being loaded",
}


def write_api(path: Path, config: Config, name: str) -> None:
    """Write openapi.json for a model that is served under `name`."""
    write_json(path, describe_api(config, name))


def describe_api(config: Config, name: str) -> dict[str, Any]:
    """Return the OpenAPI document: paths, and schemas with the model's name and limits.

    The context is the model's own; rows longer than model.max_length were never trained on, and the text says so.
    """
    text = read_config(config)[0].get_text_config()
    context = text.max_position_embeddings
    trained = min(config.model.max_length, context)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{name}: chat completions",
            "version": "1.0.0",
            "summary": f"A fine-tune of {Path(config.model.id).name}, served by an OpenAI-compatible server.",
            "description": f"Question and answer together have at most {context} tokens; training saw rows of up to {trained}. "
            "Start a server with, for instance: llama-server -m MODEL.gguf --jinja --host 127.0.0.1 --port 8080",
        },
        "servers": [{"url": "http://127.0.0.1:8080", "description": "llama-server on this machine"}],
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": describe_completion()},
            "/v1/models": {"get": describe_get("listModels", "The models that are served.", "Models")},
            "/health": {"get": describe_get("getHealth", "Whether the model is loaded.", "Health")},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "llama-server --api-key"}},
            "schemas": describe_schemas(name, context),
        },
    }


def describe_completion() -> dict[str, Any]:
    """Return the operation that answers a chat, whole or as a stream of server-sent events."""
    return {
        "operationId": "createChatCompletion",
        "summary": "Answers a chat.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": point("Request")}}},
        "responses": {
            "200": {
                "description": "the answer; with stream: true one event a piece, data: {...}, the last one data: [DONE]",
                "content": {
                    "application/json": {"schema": point("Completion")},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            },
            **{code: describe_error(text) for code, text in ERRORS.items()},
        },
    }


def describe_get(operation: str, summary: str, schema: str) -> dict[str, Any]:
    """Return an operation without a body."""
    content = {"application/json": {"schema": point(schema)}}
    return {
        "operationId": operation,
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}, "503": describe_error(ERRORS["503"])},
    }


def describe_error(text: str) -> dict[str, Any]:
    """Return a response that reports an error."""
    return {"description": text, "content": {"application/json": {"schema": point("Error")}}}


def point(schema: str) -> dict[str, str]:
    """Return a reference to a schema of this document."""
    return {"$ref": f"#/components/schemas/{schema}"}


def describe_schemas(name: str, context: int) -> dict[str, Any]:
    """Return what requests and answers look like."""
    return {
        "Message": record(
            {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}}, ["role", "content"]
        ),
        "Request": record(
            {
                "model": {"const": name},
                "messages": {"type": "array", "minItems": 1, "items": point("Message")},
                "max_tokens": number("integer", "longest answer in tokens", 1, context),
                "temperature": number("number", "0: the most probable word each time", 0, 2, 1.0),
                "top_p": number("number", "share of probability that is drawn from", 0, 1, 0.95),
                "top_k": number("integer", "words that are drawn from; 0: all", 0, None, 64),
                "min_p": number("number", "least probability, as a share of the most probable word's", 0, 1),
                "seed": {"type": "integer", "description": "makes the draw repeatable"},
                "stop": {"type": "array", "items": {"type": "string"}, "description": "texts that end the answer"},
                "stream": {"type": "boolean", "default": False},
                "logprobs": {"type": "boolean", "default": False},
                "top_logprobs": number("integer", "alternatives a token, with logprobs", 0, None),
                "response_format": record({"type": {"enum": ["text", "json_object"]}}, ["type"]),
            },
            ["messages"],
        ),
        "Choice": record(
            {
                "index": {"type": "integer"},
                "message": point("Message"),
                "finish_reason": {"enum": ["stop", "length"]},
            },
            ["index", "message", "finish_reason"],
        ),
        "Usage": record({key: {"type": "integer"} for key in ("prompt_tokens", "completion_tokens", "total_tokens")}),
        "Completion": record(
            {
                "id": {"type": "string"},
                "object": {"const": "chat.completion"},
                "created": {"type": "integer", "description": "seconds since 1970"},
                "model": {"type": "string"},
                "choices": {"type": "array", "items": point("Choice")},
                "usage": point("Usage"),
            },
            ["id", "object", "created", "model", "choices"],
        ),
        "Models": record({"object": {"const": "list"}, "data": {"type": "array", "items": point("Model")}}, ["data"]),
        "Model": record({"id": {"type": "string"}, "object": {"const": "model"}}, ["id"]),
        "Health": record({"status": {"type": "string"}}, ["status"]),
        "Error": record({"error": record({key: {"type": ["string", "integer"]} for key in ("message", "type", "code")})}),
    }  # fmt: skip


def record(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """Return the schema of an object."""
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def number(kind: str, text: str, least: float, most: float | None, default: float | None = None) -> dict[str, Any]:
    """Return the schema of a number in a range."""
    limits: dict[str, Any] = {"minimum": least} | ({} if most is None else {"maximum": most})
    return {"type": kind, "description": text, **limits, **({} if default is None else {"default": default})}
