"""The methods along time as data: text forms, numbers kept, refusals."""

from dataclasses import FrozenInstanceError
from importlib.metadata import EntryPoint
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import UserError
from kvfold.methods import registry
from kvfold.methods.base import Budget, Method
from kvfold.methods.dmc import DMC
from kvfold.methods.dms import DMS
from kvfold.methods.registry import METHODS, parse_time
from kvfold.methods.scored import H2O, TOVA
from kvfold.methods.window import Full, Window

budgets = st.builds(Budget, fixed=st.integers(1, 10_000)) | st.builds(Budget, percent=st.integers(1, 100))
time_specs = st.one_of(
    st.just(Full()),
    st.builds(Window, recent=budgets, sinks=st.integers(0, 64)),
    st.builds(H2O, recent=budgets, heavy=budgets),
    st.builds(TOVA, tokens=budgets),
    st.builds(DMC, window=st.none() | st.integers(1, 64), alone=st.integers(0, 4)),
    st.builds(DMS, delay=st.integers(1, 1024)),
)


@given(time_specs)
def test_format_and_parse_are_inverse(spec):
    assert parse_time(spec.format()) == spec
    assert hash(parse_time(spec.format())) == hash(spec)


@given(time_specs, st.integers(0, 5000))
def test_kept_tokens_grow_by_at_most_the_tokens_seen_and_never_exceed_them(spec, seen):
    kept, more = spec.max_kept(seen), spec.max_kept(seen + 1)
    assert 0 <= kept <= seen
    assert kept <= more


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_itself(name):
    spec_class = METHODS[name]
    assert spec_class.name == name
    assert spec_class.title and "arXiv" in spec_class.source
    assert spec_class.chunk_invariant == (name not in ("h2o", "tova"))
    assert (spec_class.gate_form is not None) == (name in ("dmc", "dms", "fold"))
    assert spec_class.lossy == (name != "full")
    assert "Source: arXiv" in spec_class.__doc__ and "Differs:" in spec_class.__doc__


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        (" window : 64 + 4 ", Window(recent=Budget(fixed=64), sinks=4)),
        ("window:25%+4", Window(recent=Budget(percent=25), sinks=4)),
        ("h2o:12%+13%", H2O(recent=Budget(percent=12), heavy=Budget(percent=13))),
        ("tova:128", TOVA(tokens=Budget(fixed=128))),
        ("dmc", DMC(window=12)),
        ("dmc:inf", DMC(window=None)),
        ("dmc:12+1", DMC(window=12, alone=1)),
        ("dms", DMS(delay=256)),
        ("dms:1", DMS(delay=1)),
    ],
)
def test_text_forms(text, spec):
    assert parse_time(text) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown time method ''"),
        ("widow:64+4", "did you mean 'window'"),
        ("H20:64+64", "did you mean 'h2o'"),
        ("full:3", "takes no settings"),
        ("full:", "nothing follows the colon"),
        ("window:64", "joined by '+'"),
        ("window:64+25%", "first tokens are a whole number"),
        ("window:64+-1", "first tokens are a whole number"),
        ("h2o:64+", "joined by '+'"),
        ("h2o:0+64", "budget 0"),
        ("h2o:64+0%", "budget 0%"),
        ("tova", "one budget"),
        ("tova:101%", "1% to 100%"),
        ("tova:²", "whole tokens"),
        ("dmc:0", "dmc window 0"),
        ("dmc:x", "'dmc:12' or 'dmc:inf'"),
        ("dmc:12+", "'dmc:12+1'"),
        ("dms:1.5", "whole number of tokens"),
    ],
)
def test_refusals_are_one_line(text, says):
    with pytest.raises(ValueError) as refusal:
        parse_time(text)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_share_is_rounded_up_in_integers():
    share = Budget(percent=25)
    assert [share.tokens(seen) for seen in (0, 1, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]
    assert all(Budget(percent=7).tokens(seen) == max(1, ceil(7 * seen / 100)) for seen in range(1, 300))
    assert Budget(percent=7).tokens(100) == 7 != ceil(0.07 * 100)


@pytest.mark.parametrize("settings", [{}, {"fixed": 1, "percent": 1}, {"fixed": 0}, {"percent": 101}, {"fixed": -3}])
def test_a_budget_is_one_of_two(settings):
    with pytest.raises(ValueError, match="budget"):
        Budget(**settings)


def test_kept_tokens_of_a_fixed_budget():
    assert [parse_time("window:8+4").max_kept(seen) for seen in (0, 3, 12, 13)] == [0, 3, 12, 12]
    assert [parse_time("h2o:3+5").max_kept(seen) for seen in (7, 8, 9)] == [7, 8, 8]
    assert parse_time("dms:16").max_kept(100) == 100


def test_a_share_window_never_asks_for_a_dropped_token():
    spec, held = parse_time("window:25%+2"), []
    for token in range(300):
        held.append(token)
        reach = spec.recent.tokens(token + 1)
        held = [one for one in held if one < spec.sinks or token - one < reach]
        assert len(held) == spec.max_kept(token + 1)
        assert set(range(max(0, token - reach + 1), token + 1)) <= set(held)


def test_state_bytes():
    assert parse_time("window:4+4").stream_state_bytes(64) == 0
    assert parse_time("dmc:12").stream_state_bytes(64) == 12 * (64 + 64 + 1) * 4
    assert parse_time("dmc:inf").stream_state_bytes(64) == (64 + 64 + 1) * 4
    assert parse_time("dms:256").stream_state_bytes(64) == 257 * 4


def test_specs_are_frozen_and_take_keywords_only():
    with pytest.raises(FrozenInstanceError):
        DMS().delay = 3
    with pytest.raises(TypeError):
        DMS(3)


class EveryOther(Method):
    """A third party's method: every other token goes."""

    name, title, source, chunk_invariant, lossy = "every-other", "every other", "arXiv 0", True, True

    @classmethod
    def parse(cls, args):
        if args:
            raise ValueError("every-other takes nothing")
        return cls()

    def format(self):
        return self.name

    def max_kept(self, seen):
        return (seen + 1) // 2


def test_a_third_party_brings_a_method(monkeypatch):
    entry = EntryPoint(name="every-other", value=f"{__name__}:EveryOther", group="kvfold.methods")

    def installed(**params):
        return [one for one in [entry] if all(getattr(one, key) == value for key, value in params.items())]

    monkeypatch.setattr(registry, "entry_points", installed)
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))
    with pytest.raises(ValueError, match="did you mean 'every-other'"):
        parse_time("every_other")
    assert parse_time("every-other").max_kept(9) == 5
    with pytest.raises(UserError, match="every-other takes nothing"):
        parse_time("every-other:3")
    assert "every-other" not in METHODS
