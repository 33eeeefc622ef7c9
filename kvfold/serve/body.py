"""From the bytes of a request to checked fields. What is malformed is refused before anything else looks at it, and so is an
answer's form whose grammar takes too long to compile: the time grows with the square of a schema's size.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from kvfold.serve.errors import ApiError

MAX_DEPTH = 64
"""Levels of lists and objects in a body."""
LONG_BYTES = 1 << 16
"""Bodies from this size on are parsed on a thread of their own: other clients' streams go on meanwhile."""
MAX_INTEGER = 2**64
"""No field needs a larger whole number."""

Fields = TypeVar("Fields", bound=BaseModel)


async def read(request: Request, kind: type[Fields], timeout_s: float) -> Fields:
    """The body as fields. Raises `ApiError` for one that is no JSON, too deep, too slow to arrive, or of the wrong form."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another origin can send text or forms to a server on this machine, but no JSON, without being let in first.
    if media != "application/json" and not media.endswith("+json"):
        raise ApiError(415, f"content-type must be application/json, got {media[:80] or 'none'}")
    try:
        async with asyncio.timeout(timeout_s):
            body = await request.body()
    except TimeoutError:
        raise ApiError(
            408, f"the body must arrive within {timeout_s:g} seconds", headers={"Connection": "close"}
        ) from None
    if len(body) > LONG_BYTES:
        return await asyncio.to_thread(fields_of, body, kind)
    return fields_of(body, kind)


def fields_of(body: bytes, kind: type[Fields]) -> Fields:
    """Checked fields from JSON."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body must be valid JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_kind(data)}")
    _check(data)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(
            str(part) for part in first["loc"] if not str(part).startswith(("list[", "str", "constrained"))
        )
        if first["type"] == "missing":
            raise ApiError(400, f"{place} is missing", param=place) from None
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise ApiError(400, f"{place}: {message}", param=place.partition(".")[0]) from None


def _check(data: dict[str, Any]) -> None:
    """Refuse what would only fail further in: deep nesting, numbers that no field needs."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for one in level:
            values = one.values() if isinstance(one, dict) else one
            kinds = set(map(type, values))  # a list of a million ids is looked at without a loop of Python's
            if int in kinds:
                numbers = [value for value in values if type(value) is int]
                if not -MAX_INTEGER < min(numbers) <= max(numbers) < MAX_INTEGER:
                    raise ApiError(400, "numbers must be smaller than 2^64 in magnitude, got a larger one")
            if float in kinds and any(type(value) is float and math.isinf(value) for value in values):
                raise ApiError(400, "numbers must fit into double precision, got a larger one")
            if dict in kinds or list in kinds:
                deeper += [value for value in values if isinstance(value, dict | list)]
        if not deeper:
            return
        level = deeper
    raise ApiError(400, f"the body must be nested at most {MAX_DEPTH} deep")


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(type(value), "a number")


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
            _check_form(field, value, "structured_outputs")
    if isinstance(form, Mapping):
        _check_form("response_format", form, "response_format")


def _check_form(field: str, value: Any, param: str) -> None:
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
