"""Text as it comes: whole characters only, and no part of a stop string."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import EOS, byte_tokenizer
from kvfold.engine.answers import StopFinder, TextStream

BYTES = byte_tokenizer()


def ids_of(text):
    return BYTES(text, add_special_tokens=False)["input_ids"]


def stream(text, stops=(), **options):
    out = TextStream(BYTES, ids_of("the prompt"), stop=stops, **options)
    pieces = []
    for token in ids_of(text):
        pieces.append(out.add(token))
        if out.stopped:
            break
    return out, [*pieces, out.flush()]


@settings(deadline=None, max_examples=80)
@given(
    text=st.text(alphabet="abü€", max_size=40),
    stops=st.lists(st.text(alphabet="abü", min_size=1, max_size=5), max_size=3),
)
def test_equals_a_search_in_the_whole_text(text, stops):
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    first = min(ends, default=None)
    begins = [first - len(stop) for stop in stops if first is not None and text[:first].endswith(stop)]
    expected = text if first is None else text[: min(begins)]
    out, pieces = stream(text, stops)
    assert "".join(pieces) == expected and out.stopped == (first is not None)
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown), "what was shown is never taken back"
    _, pieces = stream(text, stops, include_stop=True)
    assert "".join(pieces) == (text if first is None else text[:first])


def test_text_without_a_stop_is_not_held_back():
    _, pieces = stream("abcabd", ["abx"])
    assert pieces == ["", "", "abc", "", "", "abd", ""]


def test_a_long_stop_string_is_not_slow():
    stop = "a" * 10_000 + "b"
    began = time.perf_counter()
    finder = StopFinder([stop])
    for _ in range(3_000):
        assert finder.feed("aaaaaaaaaa") is None
    assert finder.pending == 10_000 and finder.feed("b") == (1, 10_001)
    assert time.perf_counter() - began < 2


def test_half_a_character_is_shown_when_nothing_follows():
    out = TextStream(BYTES, [], stop=["€x"])
    assert [out.add(token) for token in ids_of("ä€")[:-1]] == ["", "ä", "", ""]
    assert out.flush() == "�"


def test_special_tokens_are_left_out_or_shown():
    assert TextStream(BYTES, []).add(EOS) == ""
    assert TextStream(BYTES, [], skip_special_tokens=False).add(EOS) == "</s>"


def test_a_leading_space_is_kept_behind_a_prompt():
    backend = Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert TextStream(tokenizer, [0]).add(1) == " world"


@pytest.mark.parametrize("may_stop", [True, False])
def test_before_min_tokens_no_stop_string_ends(may_stop):
    out = TextStream(BYTES, [], stop=["b"])
    text = [out.add(token, may_stop=may_stop) for token in ids_of("ab")]
    assert out.stopped == may_stop and "".join(text) == ("a" if may_stop else "ab")
