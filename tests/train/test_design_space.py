"""Every recipe is the model that the paper's table describes: shapes, weights, bytes; none is built with memory."""

from pathlib import Path

import pytest
import torch

from kvfold.layout.planner import plan
from kvfold.train.design_space import DESIGN_SPACE, PretrainSettings, recipe_of, recipes
from kvfold.train.pretrain import config_of

ALL = recipes()
# FACTS of the paper's table 1, typed a second time: owners and bytes of keys and values a token.
TABLE = {
    "h128-mha": (20, 163840), "h128-gqa4": (20, 40960), "h128-gqa2": (20, 20480), "h128-mqa": (20, 10240),
    "h64-mqa": (20, 5120), "h46-mqa": (20, 3680), "h32-mqa": (20, 2560), "h512-mqa-cla2": (10, 20480),
    "h256-mqa-cla2": (10, 10240), "h128-mqa-cla2": (10, 5120), "h90-mqa-cla2": (10, 3600), "h64-mqa-cla2": (10, 2560),
    "h256-gqa4-cla2": (10, 40960), "h128-gqa4-cla2": (10, 20480), "h128-gqa2-cla2": (10, 10240),
    "h128-mqa-cla3": (7, 3584), "h128-mqa-cla4": (5, 2560), "h128-mqa-cla2-keep-ends": (11, 5632),
    "h128-mqa-cla2-dense-front": (11, 5632), "h128-mqa-cla2-dense-back": (11, 5632),
}  # fmt: skip
MINI_OWNERS = {"cla2": 4, "cla3": 3, "cla4": 2, "cla2-keep-ends": 5, "cla2-dense-front": 5, "cla2-dense-back": 5}


def test_the_table_has_every_row():
    assert {row.name: (row.kv_bytes,) for row in DESIGN_SPACE} == {
        name: (bytes_,) for name, (_, bytes_) in TABLE.items()
    }
    assert len(DESIGN_SPACE) == 20 and len({row.perplexity for row in DESIGN_SPACE}) == 20


def weights_of(settings) -> int:
    """Counted matrix by matrix."""
    sizes = [settings.vocabulary * settings.hidden_size] * 2 + [settings.hidden_size]
    owners = set(settings.layout.owners)
    for layer in range(settings.num_layers):
        sizes += [settings.hidden_size] * 2  # norms
        sizes += [settings.hidden_size * settings.num_heads * settings.head_dim] * 2  # q, o
        sizes += [settings.hidden_size * settings.intermediate_size] * 3
        if layer in owners:
            sizes += [settings.hidden_size * settings.num_kv_heads * settings.head_dim] * 2  # k, v
            sizes += [settings.hidden_size] if len(owners) < settings.num_layers else []  # the norm of k and v
    return sum(sizes)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_builds_at_full_size(name):
    from kvfold.models.decoder import FoldForCausalLM

    settings = ALL[name].settings
    config = config_of(settings)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = FoldForCausalLM(config)
    assert sum(one.numel() for one in model.parameters()) == weights_of(settings) == settings.num_parameters
    assert plan(config).bytes_per_token == settings.kv_bytes_per_token
    assert ALL[name].paper_kv_bytes in (None, settings.kv_bytes_per_token)
    owners = set(settings.layout.owners)
    assert all(
        (layer.self_attn.k_proj is None) == (number not in owners) for number, layer in enumerate(model.model.layers)
    )


@pytest.mark.parametrize("name", TABLE)
def test_the_1b_rows_have_the_published_owners_and_bytes(name):
    settings = ALL[f"1b-{name}"].settings
    assert (len(settings.layout.owners), settings.kv_bytes_per_token) == TABLE[name]
    assert ALL[f"1b-{name}"].paper_kv_bytes == TABLE[name][1]
    assert 0.95e9 < settings.num_parameters < 1.25e9


def test_the_recipe_is_the_published_one():
    one = ALL["1b-h128-mqa-cla2"].settings
    assert (one.hidden_size, one.intermediate_size, one.num_layers, one.seq_len) == (2048, 5472, 20, 2048)
    assert (one.beta1, one.beta2, one.weight_decay, one.max_grad_norm, one.init_std) == (0.9, 0.95, 0.1, 1.0, 0.01275)
    assert one.step_tokens == 2048 * 2048 and one.tokens == 30e9 and one.learning_rate == 3e-4
    total, warm = one.total_steps, round(0.05 * one.total_steps)
    assert one.rate_factor(0) == pytest.approx(1 / warm) and one.rate_factor(warm - 1) == one.rate_factor(warm) == 1
    assert one.rate_factor((total + warm) // 2) == pytest.approx(0.55, abs=1e-3)
    assert one.rate_factor(total - 1) == pytest.approx(0.1, abs=1e-4)
    three = ALL["3b-h128-mqa-cla2"].settings
    assert (three.hidden_size, three.num_layers, three.num_heads, three.tokens) == (3072, 32, 24, 100e9)
    assert ALL["tinyllama"].settings.num_parameters == 1_100_048_384  # as its authors' model has


def test_the_miniatures_scale_with_the_paper():
    left_out = {row.name for row in DESIGN_SPACE} - {name.removeprefix("mini-") for name in ALL}
    assert left_out == {"h46-mqa", "h32-mqa", "h90-mqa-cla2"}  # 4.3, 3 and 8.4 channels
    for name in TABLE.keys() - left_out:
        large, small = ALL[f"1b-{name}"].settings, ALL[f"mini-{name}"].settings
        assert small.head_dim * 128 == large.head_dim * 12 and small.num_heads * small.head_dim == 192
        assert small.layers == large.layers and len(small.layout.owners) == MINI_OWNERS.get(small.layers, 8)
        assert small.num_kv_heads == (16 if name == "h128-mha" else large.num_kv_heads)
        shape = (small.num_layers, small.hidden_size, small.intermediate_size, small.vocabulary, small.seq_len)
        assert shape == (8, 192, 512, 4096, 512) and small.tokens == 1_000_000


@pytest.mark.parametrize(
    ("one", "other"),
    [("h64-mqa", "h128-mqa-cla2"), ("h128-gqa8", "h128-mha-cla2"), ("h128-mqa-4-layers", "h128-mqa-cla2"),
     ("h128-mqa-4-layers-wide", "h128-mqa-cla2"), ("h128-gqa2", "h128-gqa4-cla2"), ("h128-mqa", "h128-gqa2-cla2"),
     ("h128-mqa-sandwich", "h128-mqa-cla2-dense-front"), ("h128-mqa-sandwich", "h128-mqa-cla2-dense-back")],
)  # fmt: skip
def test_controls_have_equal_bytes(one, other):
    one, other = ALL[f"mini-{one}"].settings, ALL[f"mini-{other}"].settings
    assert one.kv_bytes_per_token == other.kv_bytes_per_token
    if one.num_layers == other.num_layers or one.intermediate_size > 512:
        assert one.num_parameters == pytest.approx(other.num_parameters, rel=0.002)


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown recipe 'mini-h128-mqa-cl2' \(did you mean 'mini-h128-mqa-cla2'\?\)"):
        recipe_of("mini-h128-mqa-cl2")


def test_the_docs_name_every_key():
    page = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text()
    assert [name for name in PretrainSettings.model_fields if f"`{name}`" not in page] == []
