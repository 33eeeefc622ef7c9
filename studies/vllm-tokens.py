#!/usr/bin/env python3
"""Whether folded models under vLLM say what they say under kvfold, how many tokens vLLM's own log finds room for, and whether
several devices (tensor parallel) say what one says, or why vLLM refuses as many.

  studies/vllm-tokens.py OUT.json PLAIN FOLDED ... [--devices 2 --devices 3]

PLAIN and FOLDED are folders, as `kvfold convert MODEL PLAIN --for transformers` and `kvfold convert MODEL FOLDED --layers cla2`
write them. Devices are tried on the first and the last of the folders, and on a random model with two KV heads, which this
script makes, since SmolLM2 has three. KVFOLD_VLLM_PYTHON names the Python in which vLLM is installed. Greedy, fp32, the same
prompts for all.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch

import kvfold
from kvfold.bench.vllm_peer import VllmPeer
from kvfold.errors import UserError
from kvfold.record import made, with_record, write_whole_file

PROMPTS = [
    "The capital of France is", "Once upon a time there was a", "In the year 1815 the war ended and", "def add(a, b):",
    "To bake bread you need flour, water and", "The human heart pumps", "The weather in spring is often",
    "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement, never took up any book but",
]  # fmt: skip
NEW_TOKENS, KV_BYTES = 32, 1 << 28
Answers = tuple[tuple[int, ...], ...]
"""New token ids of each prompt."""


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", help="the first is what the others' memory is compared with")
    parser.add_argument("--devices", type=int, action="append", default=[], help="of tensor parallel; several")
    given = parser.parse_args()
    tokenizer = kvfold.load_tokenizer(given.folders[0])
    ids, rows, alone = [tokenizer(text).input_ids for text in PROMPTS], [], {}
    for folder in given.folders:
        alone[folder], row = measured(folder, ids)
        rows.append(row)
        row["times_first"] = row["kv_tokens"] / rows[0]["kv_tokens"]
        row["promised"] = rows[0]["owners"] / row["owners"]
        sys.stdout.write(f"{json.dumps(row)}\n")
    parallel = in_parallel({name: alone[name] for name in (given.folders[0], given.folders[-1])}, ids, given.devices)
    record = made(torch.get_num_threads(), "float32")
    result = {
        "kind": "vllm-tokens", "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(
            ["studies/vllm-tokens.py", given.out.name, *(folder.name for folder in given.folders)]
            + [word for devices in given.devices for word in ("--devices", str(devices))]
        ),
        "made": record, "prompts": len(ids), "new_tokens": NEW_TOKENS, "kv_bytes": KV_BYTES, "rows": with_record(rows, record),
        "tensor_parallel": with_record(parallel, record),
    }  # fmt: skip
    write_whole_file(given.out, json.dumps(result, indent=1) + "\n")


def in_parallel(alone: dict[Path, Answers], ids: list[list[int]], devices: list[int]) -> list[dict]:
    """Models, with what one device says, on several."""
    if not devices:
        return []
    with tempfile.TemporaryDirectory() as folder:
        drawn = random_model(Path(folder) / "random-two-kv-heads", next(iter(alone)))
        with vllm(drawn, len(ids)) as peer:
            alone = alone | {drawn: peer.run(ids, NEW_TOKENS).new_ids}
        rows = []
        for model, size in product(alone, devices):
            rows.append(beside(alone[model], model, ids, size))
            sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    return rows


def measured(folder: Path, ids: list[list[int]]) -> tuple[Answers, dict]:
    """vLLM's tokens of one model, and both sides beside each other."""
    began = time.monotonic()
    with vllm(folder, len(ids)) as peer:
        theirs, about = peer.run(ids, NEW_TOKENS).new_ids, peer.about
    model = kvfold.load(folder)
    equal = sum(tuple(said) == own(model, text) for text, said in zip(ids, theirs, strict=True))
    return theirs, {
        "model": folder.name, "owners": len(model.config.layout.owners), "equal_answers": equal, "kv_tokens": about["kv_tokens"],
        "log": about["log"], "log_says_so": f"{about['kv_tokens']:,} tokens" in about["log"], "vllm": about["version"],
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def vllm(folder: Path, rows: int, devices: int = 1) -> VllmPeer:
    """vLLM on one model."""
    options = {"enforce_eager": True, "tensor_parallel_size": devices}
    return VllmPeer(folder, max_rows=rows, max_tokens=128, kv_bytes=KV_BYTES, options=options)


def beside(alone: Answers, folder: Path, ids: list[list[int]], devices: int) -> dict:
    """Several devices beside one, or in which words as many are refused."""
    row, began = {"model": folder.name, "devices": devices}, time.monotonic()
    try:
        with vllm(folder, len(ids), devices) as peer:
            several = peer.run(ids, NEW_TOKENS).new_ids
    except UserError as error:
        return row | {"refused": str(error)}
    equal = sum(one == other for one, other in zip(alone, several, strict=True))
    return row | {"equal_answers": equal, "seconds": time.monotonic() - began}


def random_model(folder: Path, like: Path) -> Path:
    """A small model of four query heads and two KV heads, CLA2, with the tokenizer of another."""
    tokenizer = kvfold.load_tokenizer(like)
    torch.manual_seed(0)
    config = kvfold.FoldConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    config.layout = kvfold.KVLayout.parse("cla2", config.layout)
    kvfold.FoldForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own(model: kvfold.FoldForCausalLM, text: list[int]) -> tuple[int, ...]:
    """kvfold's own greedy tokens."""
    row = torch.tensor([text])
    output = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=NEW_TOKENS,
    )
    return tuple(output[0, len(text) :].tolist())


if __name__ == "__main__":
    main()
