"""Random JSON schemas on a random model: every answer parses and is what its schema says."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest


def draw_schema(rng, depth=0):
    kinds = ["string", "integer", "boolean", "enum", "const", "null", "number"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "anyOf"])
    if kind == "object":
        names = rng.sample(["a", "b c", "ä", "d_e", "f"], rng.randint(1, 3))
        return {
            "type": "object", "properties": {name: draw_schema(rng, depth + 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))), "additionalProperties": False,
        }  # fmt: skip
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": "array",
            "items": draw_schema(rng, depth + 2),
            "minItems": least,
            "maxItems": least + rng.randint(0, 2),
        }
    if kind == "anyOf":
        return {"anyOf": [draw_schema(rng, depth + 2) for _ in range(2)]}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 8)}
    if kind in ("integer", "number"):
        least = rng.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 500)}
    if kind == "enum":
        return {"enum": rng.sample(["red", 7, None, True, "blue green", [1]], rng.randint(1, 4))}
    return {"const": rng.choice(["x", 3, False])} if kind == "const" else {"type": kind}


def fits(value, schema) -> bool:
    """Whether a value is what such a schema says."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return any(value == one and type(value) is type(one) for one in options)
    kind = schema["type"]
    if kind == "object":
        named = schema["properties"]
        return (
            isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(named)
            and all(fits(one, named[name]) for name, one in value.items())
        )  # fmt: skip
    if kind == "array":
        sized = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return sized and all(fits(one, schema["items"]) for one in value)
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return value is None if kind == "null" else isinstance(value, bool)


def ask(server, number):
    rng = random.Random(number)
    # A random model would put in blanks for ever.
    schema = draw_schema(rng) | {"x-guidance": {"whitespace_flexible": False}}
    body = {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 450, "seed": number,
        "response_format": {"type": "json_schema", "json_schema": {"name": "drawn", "schema": schema}},
        "kvfold": {"time": rng.choice(["full", "dms:8", "h2o:16+16"])},
    }  # fmt: skip
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, (schema, response.text)
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop", (schema, choice)
    assert fits(json.loads(choice["message"]["content"]), schema), (schema, choice)


@pytest.mark.parametrize("numbers", [range(24), pytest.param(range(24, 124), marks=pytest.mark.slow)])
def test_every_answer_is_what_its_schema_says(server, numbers):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: ask(server, number), numbers))
