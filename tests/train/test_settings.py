"""What a retrofit may be asked for, and what recipes say."""

import re
from pathlib import Path

import pytest

from kvfold.train.design_space import checked_values, parse_assignments, read_recipe, recipe_names
from kvfold.train.settings import RetrofitSettings

GIVEN = {"data": ("x.txt",), "time": "dms:16"}


def make(**given):
    return RetrofitSettings(**(GIVEN | {"seq_len": 256} | given))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_retrofit(name):
    settings = RetrofitSettings(**read_recipe(name, RetrofitSettings), data=("x",))
    assert settings.compresses and settings.stages.total > 20
    if settings.trains_gates:
        assert settings.stages.compression_at(settings.stages.total - 1) == settings.compression


def test_the_recipes_that_there_are():
    assert recipe_names() == [
        "llama-2-7b-dmc", "qwen3-8b-dms-adapter", "smollm2-dmc-gpu", "smollm2-dmc-lora-cpu", "smollm2-dms-cpu", "smollm2-dms-gpu",
        "smollm2-fold-cpu",
    ]  # fmt: skip


def test_the_papers_own_stages():
    stages = RetrofitSettings(**read_recipe("llama-2-7b-dmc", RetrofitSettings), data=("x",)).stages
    assert (stages.zero_out_steps, stages.ramp_steps, stages.tail_steps) == (250, 18_000, 2_000)


def test_tokens_scale_the_stages():
    stages = make(
        time="dmc",
        trains="full",
        global_batch_size=2,
        zero_out_steps=10,
        ramp_steps=60,
        tail_steps=30,
        tokens=512 * 50 + 7,
    ).stages
    assert (stages.zero_out_steps, stages.ramp_steps, stages.tail_steps) == (5, 30, 15)


def test_a_warm_start_spends_the_ramp_at_the_target():
    stages = make(warm_start=True, ramp_steps=20, tail_steps=5).stages
    assert (stages.ramp_steps, stages.tail_steps) == (0, 25)


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({}, "reverse"),
        ({"time": "dmc", "trains": "full"}, "none"),
        ({"time": None, "trains": "full"}, "none"),
        ({"time": None, "trains": "full", "teacher": "original"}, "reverse"),
        ({"kl": "forward"}, "forward"),
    ],
)
def test_the_loss_that_goes_with_a_method(given, loss):
    assert make(**given).distils == loss


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"compression": 0.9}, "compression 0.9: it is times smaller, 1 or more"),
        ({"compression": float("nan")}, "compression nan: it is times smaller, 1 or more"),
        ({"compression": 64}, "it can't be reached: "),
        ({"time": "dms:64", "compression": 4}, "use a delay of 62 or less, or longer sequences"),
        ({"tokens": 500}, "tokens 500: one step takes 4 sequences of 256, 1,024 in all"),
        ({"learning_rate": 0.0}, "learning_rate 0: it is a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"global_batch_size": 4, "micro_batch_size": 3}, "use a divisor of it"),
        ({"rank": 0}, "rank 0: it is 1 or more"),
        ({"save_steps": 0}, "save_steps 0"),
        ({"time": "h2o:4+4"}, "it learns nothing"),
        ({"time": "dmc"}, "it has no gates beside a frozen model"),
        ({"time": None}, "it has no gates beside a frozen model"),
        ({"control": True}, "a frozen model is its own control"),
        ({"warm_start": True, "reads": "next"}, "DMS adapters that read their own decision"),
        ({"zero_out_steps": 5}, "an adapter frees no channel"),
        ({"find_channel": True}, "find_channel True: an adapter frees no channel"),
        ({"source": "channel"}, "source 'channel' with an adapter"),
        ({"time": "dmc", "trains": "lora", "source": "adapter"}, "it reads a freed channel"),
        ({"time": "dmc", "trains": "lora", "find_channel": True, "channel": 3}, "give one of the two"),
        ({"gate_scale": 0.0}, "gate_scale 0: it is a number above 0"),
        ({"ratio_weight": -1.0}, "ratio_weight -1: it is a number above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm -1: it is a number above 0: use e.g. 1"),
        ({"beta2": 2.0}, "beta2 2: it is from 0 to below 1"),
        ({"final_learning_rate": 1.5}, "final_learning_rate 1.5: it is a share"),
        ({"warmup_steps": -3}, "warmup_steps -3: it is 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay nan: it is 0 or more"),
        ({"ramp_steps": 0, "tail_steps": 0}, "give it more tokens"),
        ({"time": "dns:4"}, "did you mean 'dms'?"),
    ],
)
def test_what_does_not_go_together(given, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        make(**given).stages  # noqa: B018
    assert "\n" not in str(refused.value)


def test_an_unknown_key_names_the_nearest(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("time: dms:16\nlearning_rates: 1e-4\n")
    with pytest.raises(
        ValueError, match=r"unknown key 'learning_rates' \(did you mean 'learning_rate'\?\): use one of beta1, "
    ):
        read_recipe(str(path), RetrofitSettings)
    with pytest.raises(ValueError, match="unknown key 'zzz': use one of "):
        parse_assignments(["zzz=1"], RetrofitSettings)
    with pytest.raises(ValueError, match="unknown recipe 'smollm2-dmc-gpus' .did you mean 'smollm2-dmc-gpu'"):
        read_recipe("smollm2-dmc-gpus", RetrofitSettings)


@pytest.mark.parametrize(
    ("content", "said"),
    [("- a\n- b\n", "it holds no keys"), ("a: [", "not YAML"), ("rank: many\n", "rank 'many': it is a whole number"),
     ("trains: all\n", "trains 'all': it is adapter or lora or full"), ("warm_start: 3\n", "it is true or false")],
)  # fmt: skip
def test_recipes_that_cannot_be_read(tmp_path, content, said):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_recipe(str(path), RetrofitSettings)
    with pytest.raises(ValueError, match="there is no such file"):
        read_recipe(str(tmp_path / "none.yaml"), RetrofitSettings)


def test_values_become_what_their_fields_are():
    found = parse_assignments(
        ["learning_rate=3e-5", "compression=4", "ramp_steps=1e3", "data=[a, b]", "teacher=null", "control=yes"],
        RetrofitSettings,
    )
    assert found == {
        "learning_rate": 3e-5, "compression": 4.0, "ramp_steps": 1000, "data": ("a", "b"), "teacher": None, "control": True,
    }  # fmt: skip
    assert type(found["compression"]) is float and checked_values({"data": "a"}, RetrofitSettings, where="") == {
        "data": ("a",)
    }
    for text in ("learning_rate", "=3", "rank=2.5", "rank=true", "max_grad_norm=true"):
        with pytest.raises(ValueError, match="--set"):
            parse_assignments([text], RetrofitSettings)


def test_a_key_is_read_by_the_name_that_it_had():
    old = {"sequence_tokens": 256, "batch_sequences": 8, "sequences_at_once": 2, "clip": 0.5, "shard": False}
    new = {"seq_len": 256, "global_batch_size": 8, "micro_batch_size": 2, "max_grad_norm": 0.5, "fsdp": False}
    assert checked_values(old, RetrofitSettings, where="") == new
    assert RetrofitSettings(**(GIVEN | old)) == make(**new)


def test_every_setting_is_explained_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert [name for name in RetrofitSettings.model_fields if f"`{name}`" not in page] == []
    assert [name for name in recipe_names() if f"`{name}`" not in page] == []
