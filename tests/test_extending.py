"""A method of a third party: the package of docs/extending.md, installed beside kvfold and used by a model."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
FILES = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))

MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import kvfold
import kvfold.models

torch.manual_seed(0)
theirs = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
))
theirs.save_pretrained("tiny")
tokens = torch.randint(97, (2, 60))


models = {time: kvfold.load("tiny", time=time) for time in ("full", "strided:8", "strided:64")}


def logits(time, cuts):
    cache = models[time].new_cache(rows=2)
    with torch.no_grad():
        parts = [models[time](part, past_key_values=cache).logits for part in tokens.split(cuts, dim=1)]
    return torch.cat(parts, dim=1), cache


whole, cache = logits("strided:8", 60)
assert (cache.kept_tokens == 8 + 7).all(), cache.kept_tokens
assert cache.allocated_bytes == kvfold.plan(models["strided:8"]).bytes([60, 60])
for cuts in (1, 7, 32):
    torch.testing.assert_close(logits("strided:8", cuts)[0], whole, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(logits("strided:64", 1)[0], logits("full", 60)[0], rtol=1e-4, atol=1e-4)
assert not torch.allclose(whole, logits("full", 60)[0], rtol=1e-3, atol=1e-3)
"""


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages, with the one of the page in it."""
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    about = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (tmp_path / "site" / "kvfold_strided.py").write_text(FILES["kvfold_strided.py"])
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n".join(groups))
    return tmp_path / "site"


def test_a_method_of_another_package_is_planned_and_run(site, tmp_path, monkeypatch):
    """In a process of its own, as installed packages are looked up there."""
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    code = FILES["use.py"] + MODEL
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_the_method_is_short():
    """The page promises one small class."""
    lines = [line for line in FILES["kvfold_strided.py"].splitlines() if line.strip()]
    assert len(lines) < 45
