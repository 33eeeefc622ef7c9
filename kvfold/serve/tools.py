"""Functions that a model may call: what a request offers, what it forces, and the grammar of forced calls.

A forced call is made under a grammar, the same for every model: a JSON list of `{"name", "arguments"}`, or the arguments
alone where one function is named. A call that the model makes of its own will comes in its own format (`calls.py`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.serve.errors import ApiError, unsupported

_NO_BLANKS = {"x-guidance": {"whitespace_flexible": False}}
"""Nobody reads the JSON of a call: no line breaks, of which a model could write without end."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolChoice:
    """The tools of one request."""

    tools: tuple[Mapping[str, Any], ...] = ()
    """As chat templates take them; none where nothing may be called."""
    mode: str = "none"
    """`none`, `auto`, `required`, or `named`."""
    name: str | None = None
    """The function that must be called."""
    parallel: bool = True
    """Whether several calls may come in one answer."""

    @property
    def names(self) -> frozenset[str]:
        """Functions that may be called."""
        return frozenset(tool["function"]["name"] for tool in self.tools)

    @property
    def forced(self) -> bool:
        """Whether a call must be made."""
        return self.mode in ("required", "named")

    def schema(self) -> str | None:
        """JSON schema of the whole answer where a call is forced."""
        parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.tools}
        if self.mode == "named":
            return json.dumps({"type": "object"} | dict(parameters[self.name]) | _NO_BLANKS)
        if self.mode != "required":
            return None
        definitions: dict[str, Any] = {}
        calls = []
        for name, arguments in parameters.items():
            arguments = {"type": "object"} | dict(arguments)
            for key in ("$defs", "definitions"):  # references in them are from the root
                definitions.setdefault(key, {}).update(arguments.pop(key, {}) or {})
            calls.append({
                "type": "object", "additionalProperties": False, "required": ["name", "arguments"],
                "properties": {"name": {"const": name}, "arguments": arguments},
            })  # fmt: skip
        schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        schema |= {key: found for key, found in definitions.items() if found} | _NO_BLANKS
        return json.dumps(schema if self.parallel else schema | {"maxItems": 1})


def tool_choice(tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool | None) -> ToolChoice:
    """What a request's fields say, checked. Raises `ApiError`."""
    offered = [_tool(place, tool) for place, tool in enumerate(tools or ())]
    names = [tool["function"]["name"] for tool in offered]
    if len(set(names)) != len(names):
        raise ApiError(400, "tools must have names of their own, got one twice", param="tools")
    mode, name = _mode(choice, bool(offered))
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools") if isinstance(choice.get("allowed_tools"), Mapping) else choice
        mode = "required" if allowed.get("mode") == "required" else "auto"
        wanted = {_named(one) for one in allowed.get("tools") or () if isinstance(one, Mapping)}
        offered = [tool for tool in offered if tool["function"]["name"] in wanted]
    if mode in ("required", "named") and not offered:
        raise ApiError(400, "tool_choice must be none or auto where no tools are given", param="tool_choice")
    if mode == "named" and name not in names:
        raise ApiError(400, f"tool_choice must name one of the tools, got {json.dumps(name)[:60]}", param="tool_choice")
    if mode == "none" or not offered:
        return ToolChoice()
    return ToolChoice(tools=tuple(offered), mode=mode, name=name, parallel=parallel is not False)


def _mode(choice: Any, has_tools: bool) -> tuple[str, str | None]:
    if choice is None:
        return ("auto" if has_tools else "none"), None
    if choice in ("none", "auto", "required"):
        return choice, None
    if isinstance(choice, Mapping):
        kind = choice.get("type", "function")
        if kind == "function" and isinstance(_named(choice), str):
            return "named", _named(choice)
        if kind == "allowed_tools":
            return "auto", None
        raise unsupported(f"tool_choice of type {json.dumps(kind)[:40]}", "use none, auto, required or a function")
    raise ApiError(400, "tool_choice must be none, auto, required or a function", param="tool_choice")


def _named(one: Mapping[str, Any]) -> str | None:
    """The name in chat completions' form or in that of responses."""
    function = one.get("function")
    return function.get("name") if isinstance(function, Mapping) else one.get("name")


def _tool(place: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type", "function") != "function":
        raise unsupported(f"tools[{place}] of type {json.dumps(tool.get('type'))[:40]}", "offer functions")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        # Responses have the function's fields beside the type.
        function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if key in tool}
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ApiError(
            400, f"tools[{place}].function.name must be 1 to 128 letters, digits, '_', '.' or '-'", param="tools"
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ApiError(400, f"tools[{place}].function.parameters must be a JSON schema, an object", param="tools")
    if not isinstance(function.get("description") or "", str):
        raise ApiError(400, f"tools[{place}].function.description must be a text", param="tools")
    return {"type": "function", "function": dict(function)}
