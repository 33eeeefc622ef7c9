"""Limits on what an answer may be asked to match: compiling takes time that grows with the square of a schema's size."""

import json
from collections.abc import Mapping
from typing import Any

from kvfold.serve.errors import ApiError

MAX_CHARACTERS = 128 << 10
"""Of a schema, a regex, a grammar or a list of choices."""
MAX_PROPERTIES = 1000
"""Of all objects of a schema together; a thousand compile in a quarter of a second."""
MAX_PATTERN_CHARACTERS = 16 << 10
"""Of a regex or a grammar."""


def check_structured(asked: Mapping[str, Any]) -> None:
    """Raise `ApiError` where an engine's request asks for an answer that takes too long to prepare."""
    outputs, form = asked.get("structured_outputs"), asked.get("response_format")
    if isinstance(outputs, Mapping):
        for kind, value in outputs.items():
            field = f"structured_outputs.{kind}"
            if kind in ("regex", "grammar") and isinstance(value, str) and len(value) > MAX_PATTERN_CHARACTERS:
                raise ApiError(
                    400, f"{field} must have at most {MAX_PATTERN_CHARACTERS} characters, got {len(value)}",
                    param="structured_outputs",
                )  # fmt: skip
            _check(field, value, "structured_outputs")
    if isinstance(form, Mapping):
        _check("response_format", form, "response_format")


def _check(field: str, value: Any, param: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_CHARACTERS:
        raise ApiError(400, f"{field} must have at most {MAX_CHARACTERS} characters, got {len(text)}", param=param)
    # A name is followed by a colon: at most so many properties, without reading the schema.
    if text.count(":") > MAX_PROPERTIES:
        try:
            number = _num_properties(json.loads(text))
        except ValueError:
            return  # no JSON: the engine says so
        if number > MAX_PROPERTIES:
            raise ApiError(400, f"{field} must have at most {MAX_PROPERTIES} properties, got {number}", param=param)


def _num_properties(schema: Any) -> int:
    number, level = 0, [schema]
    while level:
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                for key in ("properties", "patternProperties", "$defs", "definitions"):
                    number += len(one[key]) if isinstance(one.get(key), dict) else 0
                deeper += one.values()
            elif isinstance(one, list):
                deeper += one
        level = deeper
    return number
