"""The batched sampler against a slow one and against transformers' own processors; nobody's draw depends on the others."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from kvfold.engine.request import Request, SamplingParams
from kvfold.engine.sampler import SamplingState, adjusted, sample, truncated, uniform
from slow_sampler import slow_sample, slow_scores

V = 50
EOS = 2
NEAR = 1e-4
"""Choices as close as this are redrawn: fp32 may round them either way."""


def make_state(prompt=(3, 4), outputs=(), *, seed=0, bad_words=(), **params) -> SamplingState:
    request = Request(
        id="one", tokens=[*prompt, *outputs], prompt_tokens=len(prompt), params=SamplingParams(**params), method="full",
        max_tokens=64, seed=seed,
    )  # fmt: skip
    return SamplingState(request=request, eos_ids=(EOS,), bad_words=tuple(bad_words))


tokens = st.integers(0, V - 1)
params_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, -1, 1, 5, 49, 200]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "logit_bias": st.lists(st.tuples(tokens, st.floats(-5, 5)), max_size=3).map(tuple),
        "allowed_token_ids": st.one_of(st.none(), st.lists(tokens, min_size=10, max_size=30).map(tuple)),
        "min_tokens": st.sampled_from([0, 4]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(tokens, max_size=2).map(tuple),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)
states_strategy = st.lists(
    st.tuples(
        params_strategy, st.lists(tokens, min_size=1, max_size=5), st.lists(tokens, max_size=8), st.integers(0, 999),
        st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=2),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


def build(drawn):
    return [
        make_state(prompt, outputs, seed=seed, bad_words=bad, **params) for params, prompt, outputs, seed, bad in drawn
    ]


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(drawn=states_strategy, seed=st.integers(0, 99))
def test_batched_equals_slow_and_company_changes_nothing(drawn, seed):
    logits = torch.randn(len(drawn), V, generator=torch.Generator().manual_seed(seed)) * 3
    scores = adjusted(logits, build(drawn))
    found = sample(logits, build(drawn))
    alone = [sample(logits[row : row + 1], [state])[0] for row, state in enumerate(build(drawn))]
    assert found == alone
    for row, state in enumerate(build(drawn)):
        torch.testing.assert_close(scores[row].tolist(), slow_scores(logits[row], state), atol=1e-5, rtol=1e-5)
        token, margin = slow_sample(logits[row], state)
        if margin < NEAR:
            event("redrawn: a near tie")
            continue
        assert found[row].token == token and found[row].error is None
        most = state.request.params.logprobs
        if most is None:
            assert found[row].logprob is None
        else:
            expected = torch.log_softmax(logits[row].double(), dim=0)
            assert found[row].logprob.logprob == pytest.approx(float(expected[token]), abs=1e-5)
            assert [one for one, _ in found[row].logprob.top] == expected.topk(most).indices.tolist()


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        ({"repetition_penalty": 1.3}, lambda: theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"logit_bias": ((7, 2.5), (9, -4.0))}, lambda: theirs.SequenceBiasLogitsProcessor([[[7], 2.5], [[9], -4.0]])),
        ({"min_tokens": 5}, lambda: theirs.MinNewTokensLengthLogitsProcessor(4, 5, EOS)),
        ({"min_tokens": 3}, lambda: theirs.MinNewTokensLengthLogitsProcessor(4, 3, EOS)),
        (
            {"allowed_token_ids": (5, 6, 7)},
            lambda: theirs.SuppressTokensLogitsProcessor([x for x in range(V) if x not in (5, 6, 7)]),
        ),
        ({"bad_words": True}, lambda: theirs.NoBadWordsLogitsProcessor([[8], [12, 13], [40, 41, 5]], EOS)),
    ],
)
def test_adjusted_equals_transformers(params, processor):
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    prompt, outputs = [10, 11, 10, 3], [40, 12, 12]
    bad = [(8,), (12, 13), (40, 41, 5)] if params.pop("bad_words", False) else ()
    state = make_state(prompt, outputs, bad_words=bad, **params)
    expected = processor()(torch.tensor([prompt + outputs]), logits.clone())
    torch.testing.assert_close(adjusted(logits, [state]), expected)


@pytest.mark.parametrize("k", [0, 1, 7, V])
@pytest.mark.parametrize("p", [1.0, 0.8, 0.1])
@pytest.mark.parametrize("m", [0.0, 0.1])
def test_truncated_equals_transformers(k, p, m):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(2)) * 2
    expected = logits.clone()
    for wanted, processor in (
        (k, lambda: theirs.TopKLogitsWarper(k)),
        (p < 1, lambda: theirs.TopPLogitsWarper(p)),
        (m, lambda: theirs.MinPLogitsWarper(m)),
    ):
        expected = processor()(None, expected) if wanted else expected
    assert torch.equal(truncated(logits, [k] * 3, [p] * 3, [m] * 3), expected)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    drawn = Counter(one.token for one in sample(logits, [make_state(seed=seed) for seed in range(4000)]))
    for token, chance in enumerate(torch.softmax(logits[0], dim=0).tolist()):
        assert drawn[token] / 4000 == pytest.approx(chance, abs=0.03)


def test_a_draw_depends_on_seed_and_index_alone():
    assert (
        uniform(7, 3) == uniform(7, 3)
        and len({uniform(seed, index) for seed in range(30) for index in range(30)}) == 900
    )
    assert 0.45 < sum(uniform(1, index) for index in range(2000)) / 2000 < 0.55


def test_nothing_left_is_an_error_of_that_request_alone():
    states = [make_state(allowed_token_ids=(5,), bad_words=[(5,)]), make_state(temperature=0.0)]
    logits = torch.randn(2, V)
    bad, fine = sample(logits, states)
    assert bad.error.startswith("no token is left") and fine.error is None and fine.token == int(logits[1].argmax())


def test_nan_is_an_error_of_that_request_alone():
    logits = torch.randn(2, V)
    logits[0, 3] = torch.nan
    bad, fine = sample(logits, [make_state(temperature=0.0), make_state(temperature=0.0)])
    assert "NaN" in bad.error and fine.error is None
