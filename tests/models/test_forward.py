"""One forward call: modes, masks, caches, what comes back. The references are transformers or the same model called otherwise."""

import warnings

import pytest
import torch
from transformers import DynamicCache

from kvfold.cache.hf import FoldCache
from kvfold.models.families import FAMILIES


@pytest.fixture
def model(pair):
    return pair("llama")[0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_calls_through_a_cache_equal_one_dense_call(model_type, pair, ids):
    windows = {"sliding_window": 5} if FAMILIES[model_type].windowed != "never" else {}
    model = pair(model_type, **windows)[0]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        cache = model.new_cache(rows=2)
        pieces, start = [], 0
        for stop in (7, 9, 10, 11, 13):
            call = {"attention_mask": mask[:, :stop], "past_key_values": cache}
            pieces.append(model(ids[:, start:stop], **call).logits)
            start = stop
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    assert cache.seen_tokens.tolist() == [13, 9]


def test_a_cache_comes_back_only_where_it_can_be_used(model, ids):
    with torch.no_grad():
        first = model(ids[:, :8])
        assert isinstance(first.past_key_values, FoldCache) and first.past_key_values.seen_tokens.tolist() == [8, 8]
        assert model(ids, use_cache=False).past_key_values is None
        assert model.train()(ids).past_key_values is None
    assert model.eval()(ids).past_key_values is None
    second = model(ids[:, 8:], past_key_values=first.past_key_values)
    assert not second.logits.requires_grad
    torch.testing.assert_close(second.logits, model(ids).logits[:, 8:].detach(), atol=1e-5, rtol=1e-5)


def test_logits_to_keep(model, ids):
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])


def test_hidden_states_and_tuples_as_transformers_gives_them(pair, ids):
    ours, theirs = pair("llama")
    with torch.no_grad():
        mine, reference = (each(ids, output_hidden_states=True, use_cache=False) for each in (ours, theirs))
        for state, expected in zip(mine.hidden_states, reference.hidden_states, strict=True):
            torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours(ids, return_dict=False, use_cache=False)[0], mine.logits)
        assert torch.equal(ours.model(ids, use_cache=False).last_hidden_state, mine.hidden_states[-1])


def test_embeddings_may_be_given_instead_of_ids(pair, ids):
    ours, _ = pair("granite", embedding_multiplier=3.0)
    with torch.no_grad():
        embedded = ours.get_input_embeddings()(ids)
        assert torch.equal(ours(inputs_embeds=embedded).logits, ours(ids).logits)


def test_the_loss_follows_the_number_of_items_in_a_batch(pair, ids):
    ours, theirs = pair("llama")
    losses = [each(ids, labels=ids, num_items_in_batch=100, use_cache=False).loss for each in (ours, theirs)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(losses[0] * 100, ours(ids, labels=ids).loss * 24)


def test_a_mask_of_ones_is_no_mask(model, ids):
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@pytest.mark.parametrize(("training", "rule"), [(True, "off in training"), (False, "reads its own tokens whole")])
def test_methods_that_drop_between_calls_say_once_that_they_do_nothing(model, ids, training, rule):
    model.config.layout = model.config.layout.with_time("tova:4")
    model.train(training)
    with pytest.warns(UserWarning, match=rule):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)


def test_longrope_refuses_a_stored_text_that_grows_past_its_border(pair, ids):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model, _ = pair("phi3", rope_parameters=rope, original_max_position_embeddings=8)
    with torch.no_grad():
        cache = model(ids[:, :6]).past_key_values
        model(ids[:, 6:8], past_key_values=cache)
        with pytest.raises(ValueError, match="begun in an earlier call: beyond 8 tokens"):
            model(ids[:, 8:9], past_key_values=cache)
        assert cache.seen_tokens.tolist() == [8, 8]
        cache = model(ids[:, :9]).past_key_values
        rest = model(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 9:], atol=1e-4, rtol=1e-4)


def test_bad_calls_are_told_in_one_line(model, ids):
    cases = {
        "past_key_values is a DynamicCache": {"input_ids": ids, "past_key_values": DynamicCache(config=model.config)},
        "a call takes one of the two": {"input_ids": ids, "inputs_embeds": torch.zeros(2, 13, 64)},
        "attention weights are not kept": {"input_ids": ids, "output_attentions": True},
        "with 1 token or more": {"input_ids": ids[:, :0]},
        "attention_mask of shape (2, 5) for 2 rows of 13 tokens": {
            "input_ids": ids,
            "attention_mask": torch.ones(2, 5),
        },
        "attention_mask of shape (1, 13) for 2 rows": {"input_ids": ids, "attention_mask": torch.ones(1, 13)},
        "attention_mask of shape (2, 1, 13, 13)": {"input_ids": ids, "attention_mask": torch.ones(2, 1, 13, 13)},
    }
    for line, call in cases.items():
        with pytest.raises(ValueError) as caught, torch.no_grad():
            model(**call)
        assert line in str(caught.value) and "\n" not in str(caught.value)
    with torch.no_grad():
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match="the cache holds 2 rows, the call brings 1"):
            model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="no gradient passes through a cache"):
        model.train()(ids, past_key_values=cache)


def test_a_layout_with_other_owners_is_refused_once_the_model_is_built(model, ids):
    model.config.layout = type(model.config.layout).parse("cla2", model.config.layout)
    with pytest.raises(ValueError, match=r"the layout was changed to owners \(0, 2\)"):
        model(ids)


def test_inference_mode_first_and_training_after(model, ids):
    with torch.inference_mode():
        model(ids)
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
