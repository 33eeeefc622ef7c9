"""Answers that must match: every token that is allowed leads to a match, and what can't be met is refused in one line."""

import json
import re

import pytest
import torch

from byte_tokenizer import EOS, VOCAB_SIZE, byte_tokenizer
from kvfold.engine.sampler import Grammars, matcher_allows, sample
from test_sampler import make_state

TOKENIZER = byte_tokenizer()
SIZE = VOCAB_SIZE + 5
"""Models have more rows than their tokenizer has tokens."""
GRAMMARS = Grammars(TOKENIZER, SIZE, [EOS])
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def complete(kind, text, seed, limit=200):
    """A random answer under a grammar."""
    state = make_state(prompt=[3], seed=seed)
    state.matcher = GRAMMARS.compile(kind, text)
    generator = torch.Generator().manual_seed(seed)
    while not state.matcher.is_stopped():
        found = sample(torch.randn(1, SIZE, generator=generator), [state])[0]
        assert found.error is None
        if found.token == EOS:
            break
        state.request.tokens.append(found.token)
        assert state.request.num_outputs < limit
    return TOKENIZER.decode(state.request.outputs)


@pytest.mark.parametrize("seed", range(4))
def test_answers_match(seed):
    answer = json.loads(complete("json", json.dumps(SCHEMA), seed, limit=400))
    assert answer.keys() == {"name", "age"} and 0 <= answer["age"] <= 99 and len(answer["name"]) <= 5
    assert re.fullmatch(r"[ab]{3}-\d", complete("regex", r"[ab]{3}-\d", seed))
    assert complete("grammar", 'start: "yes" | "no \\"no\\""', seed) in ("yes", 'no "no"')


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("json", '{"type": "string", "minLength": 5, "maxLength": 2}', "minLength"),
        ("json", '{"enum": []}', "Unsatisfiable"),
        ("json", "[1", "expected"),
        ("json", '{"type": "bogus"}', "bogus"),
        ("regex", "(a", "unclosed group"),
        ("grammar", 'strt: "a"', "no start rule"),
    ],
)
def test_what_cannot_be_met_is_refused_in_one_line(kind, text, said):
    with pytest.raises(ValueError, match=f"{kind} can't be used for structured output: .*{said}") as found:
        GRAMMARS.compile(kind, text)
    assert "\n" not in str(found.value)


def test_the_mask_is_what_the_library_means():
    allowed = matcher_allows(GRAMMARS.compile("regex", "[bd]"), SIZE)
    assert allowed.shape == (SIZE,)
    assert TOKENIZER.decode(allowed.nonzero()[:, 0].tolist()) == "bd"
