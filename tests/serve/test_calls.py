"""An answer's text read letter by letter, in pieces, or whole: the same reasoning, content and calls."""

import json
import random

import pytest

from kvfold.serve.calls import AnswerReader
from kvfold.serve.prompts import tool_choice

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "say")]
ADD = '{"name": "add", "arguments": {"a": [1, {"b": "}]\\" <tool_call> "}], "c": null}}'
ARGUMENTS = {"a": [1, {"b": '}]" <tool_call> '}], "c": None}


def read(text, *, cuts=None, choice="auto", tools=TOOLS, **options):
    reader = AnswerReader(choice=tool_choice(tools, choice if tools else None, True), **options)
    parts, start = [], 0
    for cut in [*(cuts or []), len(text)]:
        parts += reader.feed(text[start:cut])
        start = cut
    parts += reader.finish()
    calls = []
    for part in parts:
        if part.kind == "call":
            assert part.id.startswith("call_") and part.index == len(calls)
            calls.append([part.text, ""])
        elif part.kind == "arguments":
            assert part.index == len(calls) - 1
            calls[-1][1] += part.text
    texts = ["".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content")]
    assert reader.num_calls == len(calls)
    return (*texts, [(name, json.loads(arguments)) for name, arguments in calls])


CASES = {
    "plain": ("Hello <there> {x}", {}, ("", "Hello <there> {x}", [])),
    "blank first": ("\n\n Hello", {}, ("", "\n\n Hello", [])),
    "one call": (f"<tool_call>\n{ADD}\n</tool_call>", {}, ("", "", [("add", ARGUMENTS)])),
    "text and two calls": (
        f'Let me see.\n<tool_call>{ADD}</tool_call>\n<tool_call>{{"name": "say", "arguments": {{}}}}</tool_call>', {},
        ("", "Let me see.", [("add", ARGUMENTS), ("say", {})]),
    ),
    "an unknown one": ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', {}, ("", "", [("other", {})])),
    "no call after all": ("<tool_call>nonsense</tool_call> bye", {}, ("", "<tool_call>nonsense</tool_call> bye", [])),
    "arguments before the name": (
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', {}, ("", "", [("add", {"a": 1})])
    ),
    "arguments as a text": (
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', {}, ("", "", [("add", {"a": 1})])
    ),
    "bare": ('{"name": "say", "parameters": {"x": "y"}}', {}, ("", "", [("say", {"x": "y"})])),
    "bare list": (f'[{ADD}, {{"name": "say", "arguments": {{}}}}]', {}, ("", "", [("add", ARGUMENTS), ("say", {})])),
    "JSON that is none": ('{"name": "Bob", "age": 7}', {}, ("", '{"name": "Bob", "age": 7}', [])),
    "a list that is none": ("[1, 2, 3] are numbers", {}, ("", "[1, 2, 3] are numbers", [])),
    "no tools, no calls": (f"<tool_call>{ADD}</tool_call>", {"tools": None}, ("", f"<tool_call>{ADD}</tool_call>", [])),
    "reasoning": ("<think>\nhm < hm</think>\n\nYes", {"reasons": True}, ("\nhm < hm", "Yes", [])),
    "reasoning left out": ("Yes <think>", {"reasons": True}, ("", "Yes <think>", [])),
    "reasoning begun in the prompt": ("hm</think>Yes", {"reasons": True, "in_reasoning": True}, ("hm", "Yes", [])),
    "reasoning cut off": ("hm</thi", {"reasons": True, "in_reasoning": True}, ("hm</thi", "", [])),
    "reasoning and a call": (
        f"<think>hm</think>\n<tool_call>{ADD}</tool_call>", {"reasons": True}, ("hm", "", [("add", ARGUMENTS)])
    ),
    "required": (f"[{ADD}]", {"choice": "required"}, ("", "", [("add", ARGUMENTS)])),
    "named": (
        ' {"x": 1}', {"choice": {"type": "function", "function": {"name": "say"}}}, ("", "", [("say", {"x": 1})])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_however_the_text_is_cut(name):
    text, options, expected = CASES[name]
    rng = random.Random(0)
    assert read(text, **options) == expected
    assert read(text, cuts=range(1, len(text)), **options) == expected
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(1, 6))))
        assert read(text, cuts=cuts, **options) == expected


def test_arguments_come_before_the_call_is_whole():
    reader = AnswerReader(choice=tool_choice(TOOLS, "auto", True))
    parts = reader.feed('<tool_call>{"name": "add", "arguments": {"a": 1')
    assert [(part.kind, part.text) for part in parts] == [("call", "add"), ("arguments", '{"a": 1')]


def test_a_schema_for_each_way_of_forcing():
    schema = json.loads(tool_choice(TOOLS, "required", False).schema())
    assert schema["maxItems"] == 1 and [one["properties"]["name"]["const"] for one in schema["items"]["anyOf"]] == [
        "add",
        "say",
    ]
    shared = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"$defs": {"x": {}}, "properties": {"a": {"$ref": "#/$defs/x"}}}},
        }
    ]
    assert "x" in json.loads(tool_choice(shared, "required", True).schema())["$defs"]
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "say"}}]},
    }
    assert tool_choice(TOOLS, allowed, None).names == {"say"} and tool_choice(TOOLS, allowed, None).forced
    assert tool_choice(TOOLS, "none", None).tools == ()
