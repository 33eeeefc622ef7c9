"""Bundled models: the published figures of the CLA paper, and shapes that everyone knows."""

import pytest

from kvfold.layout.hf_config import KNOWN_MODELS
from kvfold.layout.planner import plan

CLA_TABLE = {  # KV bytes per token at 16 bit, owners: arXiv 2405.12981, table 1
    "cla-1b-h128-mha": (163840, 20),
    "cla-1b-h128-gqa4": (40960, 20),
    "cla-1b-h128-gqa2": (20480, 20),
    "cla-1b-h128-mqa": (10240, 20),
    "cla-1b-h64-mqa": (5120, 20),
    "cla-1b-h46-mqa": (3680, 20),
    "cla-1b-h32-mqa": (2560, 20),
    "cla-1b-h512-mqa-cla2": (20480, 10),
    "cla-1b-h256-mqa-cla2": (10240, 10),
    "cla-1b-h128-mqa-cla2": (5120, 10),
    "cla-1b-h90-mqa-cla2": (3600, 10),
    "cla-1b-h64-mqa-cla2": (2560, 10),
    "cla-1b-h256-gqa4-cla2": (40960, 10),
    "cla-1b-h128-gqa4-cla2": (20480, 10),
    "cla-1b-h128-gqa2-cla2": (10240, 10),
    "cla-1b-h128-mqa-cla3": (3584, 7),
    "cla-1b-h128-mqa-cla4": (2560, 5),
    "cla-1b-h128-mqa-cla2-keep-ends": (5632, 11),
    "cla-1b-h128-mqa-cla2-dense-front": (5632, 11),
    "cla-1b-h128-mqa-cla2-dense-back": (5632, 11),
}


@pytest.mark.parametrize(("name", "expected"), CLA_TABLE.items())
def test_the_papers_table(name, expected):
    one = plan(name)
    assert (one.bytes_per_token, len(one.layout.owners)) == expected


def test_the_table_is_whole_and_in_the_papers_order():
    assert [name for name in KNOWN_MODELS if name.startswith("cla-1b")] == list(CLA_TABLE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cla-3b-h128-mqa", 2 * 128 * 32 * 2),
        ("cla-3b-h128-mqa-cla2", 2 * 128 * 16 * 2),
        ("cla-3b-h64-mqa", 2 * 64 * 32 * 2),
        ("cla-3b-h64-mqa-cla2", 2 * 64 * 16 * 2),
        ("cla-3b-h32-mqa", 2 * 32 * 32 * 2),
        ("llama-2-7b", 2 * 32 * 128 * 32 * 2),
        ("llama-2-13b", 2 * 40 * 128 * 40 * 2),
        ("llama-2-70b", 2 * 8 * 128 * 80 * 2),
        ("llama-3.1-8b", 131072),
        ("llama-3.1-70b", 327680),
        ("mistral-7b", 131072),
        ("qwen3-0.6b", 114688),
        ("qwen3-8b", 147456),
        ("smollm2-135m", 23040),
        ("tinyllama-1.1b", 22528),
    ],
)
def test_bytes_per_token(name, expected):
    assert plan(name).bytes_per_token == expected


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_bundled_model_is_planned(name):
    one = plan(name)
    assert one.source == name
    assert one.model_tokens
    assert one.compression(100) == 1
    assert KNOWN_MODELS[name]["num_attention_heads"] % KNOWN_MODELS[name]["num_key_value_heads"] == 0


def test_folding_a_bundled_model_gives_the_papers_row():
    for name in (name for name in CLA_TABLE if "h128" in name):
        attention, _, pattern = name.removeprefix("cla-1b-h128-").partition("-")
        heads = {"mha": 16, "gqa4": 4, "gqa2": 2, "mqa": 1}[attention]
        folded = plan("cla-1b-h128-mha", heads=heads, layers=pattern or "full")
        assert folded.layout == plan(name).layout
        assert folded.bytes_per_token == CLA_TABLE[name][0]
