"""A packed model is the model: same tokens, same weights on disk, same training; what packing costs is said."""

import copy

import pytest
import torch

from kvfold.models import blocks
from kvfold.models.blocks import pack, packed_bytes, unpack
from kvfold.models.load import load
from kvfold.ops.linear import PackableLinear
from model_driver import GREEDY, MASK, TEXTS, fold

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="this torch has no MKL: nothing is packed"
)
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "granite"]


@pytest.fixture
def model(pair):
    return copy.deepcopy(pair("llama", hidden_size=128, intermediate_size=256)[0])


def packed_layers(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, PackableLinear) and layer.packed}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_and_tokens(pair, family):
    ours, theirs = pair(family, hidden_size=128, intermediate_size=256)
    ours = copy.deepcopy(ours)
    assert pack(ours) > 0 and packed_layers(ours)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(TEXTS, attention_mask=MASK).logits[:, -1], theirs(TEXTS, attention_mask=MASK).logits[:, -1],
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip
    options = {"attention_mask": MASK, "max_new_tokens": 12, **GREEDY}
    assert torch.equal(ours.generate(TEXTS, **options), theirs.generate(TEXTS, **options))


def test_readers_without_keys(pair):
    ours = copy.deepcopy(pair("llama", hidden_size=128, intermediate_size=256)[0])
    plain = fold(ours, "window:6+2").generate(TEXTS, attention_mask=MASK, max_new_tokens=8, **GREEDY)
    pack(ours)
    assert torch.equal(ours.generate(TEXTS, attention_mask=MASK, max_new_tokens=8, **GREEDY), plain)


def test_generate_packs_where_it_helps(model):
    assert pack(model, rows=193) == 0 and not packed_layers(model), "so many rows gain nothing"
    model.generate(TEXTS, max_new_tokens=2, **GREEDY)
    assert packed_layers(model)


def test_bytes(model):
    assert packed_bytes(model) == 0
    taken = pack(model)
    weights = sum(
        layer.weight.nbytes for layer in model.modules() if isinstance(layer, PackableLinear) and layer.packed
    )
    assert taken == packed_bytes(model) == pytest.approx(weights, rel=0.15)  # panels are filled up
    assert pack(model) == taken
    unpack(model)
    assert packed_bytes(model) == 0


def test_too_large_a_model_stays_as_it_is(model, monkeypatch):
    monkeypatch.setattr(blocks, "_machine_bytes", lambda: 4096)
    with pytest.warns(UserWarning, match="over a quarter of this machine's memory"):
        assert pack(model) == 0
    assert pack(model, force=True) > 0


def test_saving_and_tied_embeddings(model, tmp_path):
    names = set(model.state_dict())
    pack(model)
    assert set(model.state_dict()) == names
    assert sum(one.numel() for one in model.parameters()) == model.num_parameters()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_tied_head_follows_the_embedding(pair):
    model = copy.deepcopy(pair("llama", hidden_size=128, intermediate_size=256, tie_word_embeddings=True)[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pack(model)
    with torch.no_grad():
        before = model(TEXTS).logits
        model.model.embed_tokens.weight.mul_(1.5)
        after = model(TEXTS).logits
        unpack(model)
        torch.testing.assert_close(after, model(TEXTS).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, after)


def test_training_between_generations(model):
    pack(model)
    plain = copy.deepcopy(model)
    for one in (model, plain):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for _ in range(2):
            one.train()
            one(TEXTS, labels=TEXTS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            one.eval()
            with torch.no_grad():
                logits = one(TEXTS).logits
    with torch.no_grad():
        torch.testing.assert_close(model(TEXTS).logits, logits, atol=1e-4, rtol=1e-4)
    assert packed_layers(model) and not packed_layers(plain)


def test_low_rank_additions(model):
    peft = pytest.importorskip("peft")
    pack(model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        with_addition = adapted(TEXTS).logits
        unpack(adapted)
        torch.testing.assert_close(with_addition, adapted(TEXTS).logits, atol=1e-4, rtol=1e-4)
        pack(adapted)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(TEXTS).logits, with_addition, atol=1e-3, rtol=1e-3)
        adapted.unmerge_adapter()
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(TEXTS).logits, with_addition, atol=1e-3, rtol=1e-3)


def test_another_dtype(model):
    pack(model)
    model.to(torch.float64)
    with torch.no_grad():
        assert model(TEXTS).logits.dtype == torch.float64
