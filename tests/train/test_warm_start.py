"""Gates fitted without back-propagation, judged by transformers' own attention weights and by plain least squares."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizer import VOCAB_SIZE
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.families import fold_config, fold_weights
from kvfold.train import calibrate as module
from kvfold.train.calibrate import attention_to_come, calibrate, largest_attention, read_gates, shift_gates, warm_start
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import make_student
from tiny_model import tiny_model

DELAY, TOKENS = 5, 40


def settings(**given) -> RetrofitSettings:
    common = {
        "time": f"dms:{DELAY}",
        "compression": 3.0,
        "seq_len": TOKENS,
        "data": ("none",),
        "warm_start": True,
    }
    return RetrofitSettings(**(common | given))


@pytest.fixture
def ids():
    return torch.randint(0, 200, (12, TOKENS), generator=torch.Generator().manual_seed(3))


def brute_force(weights_BHTT, heads):
    """Of each key, the largest weight from a query more than DELAY later: one number at a time."""
    batch, _, tokens, _ = weights_BHTT.shape
    group, found = weights_BHTT.shape[1] // heads, torch.zeros(batch, heads, tokens)
    for b in range(batch):
        for h in range(weights_BHTT.shape[1]):
            for k in range(tokens):
                later = weights_BHTT[b, h, k + DELAY + 1 :, k]
                if len(later):
                    found[b, h // group, k] = max(found[b, h // group, k], later.max())
    return found


@pytest.mark.parametrize("at_once", [7, 128])
def test_the_attention_to_come_is_transformers_own(monkeypatch, ids, at_once):
    monkeypatch.setattr(module, "_QUERIES_AT_ONCE", at_once)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=2, attn_implementation="eager", **shape)
    ).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
        said = theirs(ids[:2], output_attentions=True, output_hidden_states=True)
    config = fold_config(theirs.config)
    ours = FoldForCausalLM(config)
    ours.load_state_dict(fold_weights(config, {name: one.clone() for name, one in theirs.state_dict().items()}))
    make_student(ours, settings())
    with torch.no_grad():
        found = attention_to_come(ours.eval(), ids[:2])
    assert [owner for owner, _, _ in found] == [0, 1]
    for owner, x, y in found:
        counted = y.shape[0] // 2
        expected = brute_force(said.attentions[owner], heads=2)[:, :, :counted].transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(y.exp(), expected, atol=1e-5, rtol=1e-4)
        hidden = said.hidden_states[owner][:, :counted].flatten(0, 1)
        torch.testing.assert_close(
            x, hidden * hidden.pow(2).mean(-1, keepdim=True).add(config.rms_norm_eps).rsqrt(), atol=1e-4, rtol=1e-4
        )


def test_readers_count_with_their_owner(ids):
    """A layer that is read by another one: the larger of what both layers' queries give."""
    layout = KVLayout.parse("cla2", KVLayout.plain(2, 2, 8))
    shared = tiny_model(layout=layout)
    make_student(shared, settings())
    with torch.no_grad():
        ((owner, _, y),) = attention_to_come(shared.eval(), ids[:1])
    assert owner == 0
    seen = []

    def watch(q, k, **options):
        seen.append(largest_attention(q, k, **options))
        return seen[-1]

    original, module.largest_attention = module.largest_attention, watch
    try:
        with torch.no_grad():
            attention_to_come(shared, ids[:1])
    finally:
        module.largest_attention = original
    assert len(seen) == 2
    both = torch.maximum(*seen)[0, :, : y.shape[0]].T
    torch.testing.assert_close(y.exp(), both.clamp(min=1e-9), atol=1e-6, rtol=1e-4)
    assert not torch.equal(seen[0], seen[1])


def test_the_fit_is_ridge_regression_on_all_tokens(ids):
    model = tiny_model()
    make_student(model, settings())
    with torch.no_grad():
        parts = [attention_to_come(model.eval(), block[None])[0] for block in ids]
    x = torch.cat([part[1] for part in parts]).double()
    y = torch.cat([part[2] for part in parts]).double()
    fit = module.Moments()
    for _, some_x, some_y in parts:
        fit.add(some_x, some_y)
    solved = fit.solve()
    # The same as least squares on centred data with rows for the ridge.
    centred, mean = x - x.mean(dim=0), y.mean(dim=0)
    stretch = (module._RIDGE * len(x)) ** 0.5
    rows = torch.cat([centred, stretch * torch.eye(x.shape[1], dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([y - mean, torch.zeros(x.shape[1], 2, dtype=torch.float64)])).solution
    torch.testing.assert_close(solved.weight_KC.T, expected, atol=1e-6, rtol=1e-4)
    predicted = x @ solved.weight_KC.T + solved.bias_K
    torch.testing.assert_close(solved.variance, predicted.var(dim=0, unbiased=False), atol=1e-8, rtol=1e-5)
    error = ((predicted - y) ** 2).mean(dim=0) / y.var(dim=0, unbiased=False)
    torch.testing.assert_close(solved.explained, 1 - error, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("per", ["head", "layer"])
def test_fitted_gates_let_go_what_is_least_looked_at(ids, per):
    model = tiny_model()
    make_student(model, settings(per=per))
    found = warm_start(model, ids, settings(per=per))
    assert found["compression"] == pytest.approx(3, rel=0.02) and found["tokens"] == ids.numel()
    assert 0 < found["explained_variance"] <= 1
    with torch.no_grad():
        outputs = model(ids, use_cache=False, output_decisions=True)
        parts = attention_to_come(model, ids)
    for owner, _, y in parts:
        flags = outputs.decisions[owner].transpose(1, 2)[:, : y.shape[0] // len(ids)].flatten(0, 1) > 0.5
        if flags.any() and not flags.all():
            assert y[flags].mean() < y[~flags].mean()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"reads": "next", "warm_start": False},
        {"source": "channel", "trains": "full", "warm_start": False},
        {"time": "dmc:3", "compression": 2.0, "trains": "full", "warm_start": False},
    ],
    ids=["own", "next", "channel", "dmc"],
)
def test_calibration_reaches_the_compression_on_the_text_it_reads(ids, given):
    model, wanted = tiny_model(), settings(**given)
    make_student(model, wanted)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("fold_proj.weight"):
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.02)
    found = calibrate(model, ids, wanted)
    assert found["after"] == pytest.approx(wanted.compression, rel=0.02)
    assert read_gates(model, ids)[0] == pytest.approx(found["after"])
    assert found["before"] != found["after"] and found["shift"] != 0


def test_logits_are_read_as_they_are(ids):
    """Logits come back from flattened probabilities; a shift adds to each of them."""
    model, wanted = tiny_model(), settings()
    make_student(model, wanted)
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        layer.fold_proj.weight.normal_(std=0.02)
        _, before = read_gates(model, ids[:1])
        shift_gates(model, 1.5)
        hidden = model.model.embed_tokens(ids[:1])
        logits = 100 * layer.fold_proj(layer.fold_norm(hidden)) - 5
        _, after = read_gates(model, ids[:1])
    governing = TOKENS - 1 - DELAY
    expected = logits[0, :governing].T.flatten()
    torch.testing.assert_close(after[: len(expected)], expected, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(before[: len(expected)] + 1.5, expected, atol=1e-2, rtol=1e-3)
