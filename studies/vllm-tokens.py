#!/usr/bin/env python3
"""Whether folded models under vLLM say what they say under kvfold, and how many tokens vLLM's own log finds room for.

  studies/vllm-tokens.py OUT.json PLAIN FOLDED ...

PLAIN and FOLDED are folders, as `kvfold convert MODEL PLAIN --for transformers` and `kvfold convert MODEL FOLDED --layers cla2`
write them. KVFOLD_VLLM_PYTHON names the Python in which vLLM is installed. Greedy, fp32, the same prompts for all.
"""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import kvfold
from kvfold.bench.vllm_peer import VllmPeer
from kvfold.data.whole_file import write_whole_file
from kvfold.record import made

PROMPTS = [
    "The capital of France is", "Once upon a time there was a", "In the year 1815 the war ended and", "def add(a, b):",
    "To bake bread you need flour, water and", "The human heart pumps", "The weather in spring is often",
    "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement, never took up any book but",
]  # fmt: skip
NEW_TOKENS, KV_BYTES = 32, 1 << 28


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", help="the first is what the others' memory is compared with")
    given = parser.parse_args()
    tokenizer = kvfold.load_tokenizer(given.folders[0])
    ids, rows = [tokenizer(text).input_ids for text in PROMPTS], []
    for folder in given.folders:
        rows.append(row := measured(folder, ids))
        row["times_first"] = row["kv_tokens"] / rows[0]["kv_tokens"]
        row["promised"] = rows[0]["owners"] / row["owners"]
        sys.stdout.write(f"{json.dumps(row)}\n")
    result = {
        "kind": "vllm-tokens", "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["studies/vllm-tokens.py", given.out.name, *(folder.name for folder in given.folders)]),
        "made": made(torch.get_num_threads()), "prompts": len(ids), "new_tokens": NEW_TOKENS, "kv_bytes": KV_BYTES, "rows": rows,
    }  # fmt: skip
    write_whole_file(given.out, json.dumps(result, indent=1) + "\n")


def measured(folder: Path, ids: list[list[int]]) -> dict:
    """Both sides of one model."""
    with VllmPeer(
        folder, max_rows=len(ids), max_tokens=128, kv_bytes=KV_BYTES, options={"enforce_eager": True}
    ) as peer:
        theirs, about = peer.run(ids, NEW_TOKENS).new_ids, peer.about
    model = kvfold.load(folder)
    equal = sum(tuple(said) == own(model, text) for text, said in zip(ids, theirs, strict=True))
    return {
        "model": folder.name, "owners": len(model.config.layout.owners), "equal_answers": equal, "kv_tokens": about["kv_tokens"],
        "log": about["log"], "log_says_so": f"{about['kv_tokens']:,} tokens" in about["log"], "vllm": about["version"],
    }  # fmt: skip


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
