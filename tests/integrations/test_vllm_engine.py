"""Folded models under vLLM itself: the same greedy tokens and log-probabilities as kvfold's own, and the memory that the
layout promises. Skipped where vLLM isn't installed: `make test-integrations` runs it in an environment that has it.
"""

import os
from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: `make test-integrations`", allow_module_level=True)

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kvfold.convert.conversion import Conversion, converted_model, new_config
from kvfold.integrations import vllm as plugin
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.families import fold_config, fold_weights

# An engine takes seconds to start, and minutes on a machine that is busy.
pytestmark = pytest.mark.timeout(900)

TINY = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
HALF_SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}

CASES = {
    "llama, plain": ("llama", {}, {}),
    "llama, CLA2": ("llama", {}, {"layers": "cla2"}),
    "llama, one owner, MQA": ("llama", {"num_key_value_heads": 1}, {"layers": "0_0_0_0"}),
    "llama, owners not in order": ("llama", {}, {"layers": "0_1_0_1"}),
    "llama, biases, tied, llama3 rope": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        {"layers": "cla2"},
    ),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR}, {"layers": "cla2"}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN}, {"layers": "cla2"}),
    "llama, a window along time": ("llama", {}, {"layers": "cla2", "time": "window:7+0"}),
    "mistral, window shorter than the text": ("mistral", {"sliding_window": 6}, {"layers": "cla2-keep-ends"}),
    "qwen2, half of the layers slide": ("qwen2", HALF_SLIDING, {"layers": "cla2"}),
    "qwen2, sliding layers apart": ("qwen2", HALF_SLIDING, {"layers": "0_0_2s_2s", "time": "window:9+0"}),
    "qwen3": ("qwen3", {"attention_bias": True}, {"layers": "cla2-dense-front"}),
    "smollm3, layers without rope": ("smollm3", {"no_rope_layer_interval": 2}, {"layers": "0_1_0_1"}),
    "hunyuan, key norms of its own in each layer": ("hunyuan_v1_dense", {}, {"layers": "cla2"}),
}
"""A family, its settings, and the conversion."""

TEXTS = [[5, 6, 7], list(range(3, 40)), [90 - i for i in range(70)], [11]]
NEW_TOKENS, KV_BYTES = 24, 1 << 22


def from_family(family: str, settings: dict, conversion: dict) -> FoldForCausalLM:
    """Ours, with the random weights of a model of transformers, every norm and bias included."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(TINY | settings)), dtype=torch.float32)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    ours = FoldForCausalLM(fold_config(theirs.config))
    ours.load_state_dict(fold_weights(ours.config, dict(theirs.state_dict())))
    ours.tie_weights()
    wanted = Conversion(init="drop", **conversion)
    return converted_model(ours, new_config(ours.config, wanted), wanted)


def from_scratch(**settings) -> FoldForCausalLM:
    """A model whose owners norm the input of k and v apart, as those are that `kvfold train` makes."""
    torch.manual_seed(0)
    config = FoldConfig(
        **(TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "kv_norm": True} | settings)
    )
    config.layout = config.layout.parse("cla2", config.layout)
    ours = FoldForCausalLM(config)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return ours.eval()


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """`engine(model)`: vLLM's offline engine on the model's folder, one after the other in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for name, value in (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_CPU_OMP_THREADS_BIND", "0")):
        monkeypatch.setenv(name, value)
    made = []

    def make(model: FoldForCausalLM, **settings):
        from vllm import LLM

        model.save_pretrained(tmp_path / "model")
        made.append(
            LLM(
                model=str(tmp_path / "model"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=96,
                enable_prefix_caching=False, kv_cache_memory_bytes=KV_BYTES, block_size=32, **settings,
            )
        )  # fmt: skip
        return made[-1]

    yield make
    made.clear()
    cleanup_dist_env_and_memory()


def told(llm, texts) -> list[tuple[list[int], list[float]]]:
    """vLLM's greedy tokens of each text, and their log-probabilities."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=1)
    outputs = [
        output.outputs[0] for output in llm.generate([{"prompt_token_ids": t} for t in texts], wanted, use_tqdm=False)
    ]
    return [
        (list(o.token_ids), [step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)])
        for o in outputs
    ]


@torch.no_grad()
def own(model: FoldForCausalLM, text: list[int]) -> tuple[list[int], list[float]]:
    """kvfold's own greedy tokens of a text, each from a pass over the whole text, and their log-probabilities."""
    ids, found = list(text), []
    for _ in range(NEW_TOKENS):
        logs = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        ids.append(int(logs.argmax()))
        found.append(float(logs.max()))
    return ids[len(text) :], found


def assert_same(model: FoldForCausalLM, llm) -> None:
    for text, (tokens, logs) in zip(TEXTS, told(llm, TEXTS), strict=True):
        expected, expected_logs = own(model, text)
        assert tokens == expected
        assert logs == pytest.approx(expected_logs, abs=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_folded_model_says_what_kvfolds_own_says(case, engine):
    model = from_family(*CASES[case])
    assert_same(model, engine(model))


@pytest.mark.parametrize(
    "settings", [{}, {"qkv_bias": True, "qk_norm": "head", "attention_scale": 0.3, "logit_scale": 0.5}]
)
def test_owners_that_norm_the_input_of_k_and_v(settings, engine):
    model = from_scratch(**settings)
    assert_same(model, engine(model))


@pytest.mark.parametrize(("layers", "owners"), [("full", 4), ("cla2", 2), ("0_0_0_3", 2), ("0_0_0_0", 1)])
def test_memory_holds_the_tokens_that_the_layout_promises(layers, owners, engine):
    llm = engine(from_family("llama", {}, {"layers": layers}))
    token_bytes = owners * 2 * TINY["num_key_value_heads"] * TINY["head_dim"] * 4
    held = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    # One block is vLLM's own.
    assert KV_BYTES / token_bytes - 32 <= held <= KV_BYTES / token_bytes


def test_fp8_holds_four_times_the_tokens(engine):
    llm = engine(from_family("llama", {}, {"layers": "cla2"}), kv_cache_dtype="auto")
    model = from_family("llama", {}, {"layers": "cla2"})
    model.config.layout = model.config.layout.with_bits("fp8")
    eighth = engine(model)
    held = [one.llm_engine.vllm_config.cache_config.kv_cache_size_tokens for one in (llm, eighth)]
    assert 3.8 < held[1] / held[0] < 4.2
    assert all(len(tokens) == NEW_TOKENS for tokens, _ in told(eighth, TEXTS))


@pytest.mark.parametrize("time", ["dms:8", "h2o:4+4", "window:8+2"])
def test_what_vllm_cannot_say_is_refused_at_load(time, engine):
    model = from_family("llama", {}, {})
    model.config.layout = model.config.layout.with_time(time)
    with pytest.raises(ValueError, match=rf"time '{time.replace('+', '.')}' in layer 0: .*use `kvfold serve`"):
        engine(model)


def test_a_newer_layout_format_is_refused_at_load(engine, monkeypatch):
    model = from_family("llama", {}, {})
    data = model.config.to_dict()

    def newer(self):
        return data | {"layout": data["layout"] | {"format": 99}}

    monkeypatch.setattr(FoldConfig, "to_dict", newer)
    with pytest.raises(ValueError, match="layout format 99: this kvfold reads format 1: update kvfold"):
        engine(model)


def test_an_untested_vllm_is_warned_of(engine, monkeypatch):
    monkeypatch.setattr(plugin, "TESTED", ("0.1", "0.2"))
    with pytest.warns(UserWarning, match=r"tested with 0\.1 up to, not including, 0\.2"):
        engine(from_family("llama", {}, {}))


os.environ.setdefault("HF_HUB_OFFLINE", "1")
