#!/usr/bin/env python3
"""What prefixes of compressed state save: many questions about one text, and the second turn of a chat, with reuse and without.

  studies/engine_prefix.py MODEL OUT.json [--adapter NAME] --time TEXT [--time TEXT ...] [--tokens 2000 --questions 32 --cold 8]

The questions go to one engine at once. Work is the number of prompt tokens that went through the model, over the text's own
length. Of --cold questions, evenly spaced, the answer is compared with that of an engine that has never seen the text; so is the
second turn of a chat, whose first answer the engine has kept. Answers are greedy, 12 tokens each.
"""

import argparse
import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import kvfold
from kvfold.engine.engine import Engine
from kvfold.record import cpu_name, git_commit, made, with_record, write_whole_file

SAMPLE = Path(kvfold.__file__).parent / "assets" / "sample" / "persuasion.txt"
THINGS = (
    "the baronet", "his daughter", "the hall", "the lawyer", "the family", "the book", "the county", "the marriage",
)  # fmt: skip
ASKED = ("Who is", "What is said of", "When do we hear of", "Why does it speak of")
NEW_TOKENS = 12


def main() -> None:
    """Ask, compare, write."""
    wanted = _arguments()
    model, tokenizer = kvfold.load(wanted.model, adapter=wanted.adapter), kvfold.load_tokenizer(wanted.model)
    text = tokenizer(SAMPLE.read_text(encoding="utf-8")[: 12 * wanted.tokens])["input_ids"][: wanted.tokens]
    asked = [tokenizer(f" {begin} {thing}?")["input_ids"] for thing in THINGS for begin in ASKED][: wanted.questions]
    rows = []
    for time in wanted.time:
        rows += [questions_row(model, tokenizer, time, text, asked, wanted.cold), chat_row(model, tokenizer, time)]
        print(json.dumps(rows[-2:]), flush=True)
    result = {
        "kind": "prefix", "created": datetime.now(UTC).isoformat(timespec="seconds"), "git_commit": git_commit(),
        "command": shlex.join(["studies/engine_prefix.py", *sys.argv[1:]]), "adapter": wanted.adapter,
        "rows": with_record(rows, made(torch.get_num_threads(), str(model.dtype))),
        "environment": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
    }  # fmt: skip
    write_whole_file(wanted.out, json.dumps(result, indent=1) + "\n")


def questions_row(model, tokenizer, time: str, text: list[int], asked: list[list[int]], cold: int) -> dict:
    """All questions at once, and some of them again, each in a new engine."""
    requests = [request(time, prompt=text + one) for one in asked]
    with Engine(model, tokenizer, "600MB", [time]) as engine:
        answers, stats = engine.generate(requests), engine.stats()
    chosen = range(0, len(asked), max(1, len(asked) // cold))
    equal = [answers[place].token_ids == alone(model, tokenizer, time, requests[place]).token_ids for place in chosen]
    return {
        "what": "questions", "time": time, "text_tokens": len(text), "questions": len(asked),
        "question_tokens": sum(map(len, asked)), "prompt_tokens_read": stats["prompt_tokens"],
        "work": stats["prompt_tokens"] / len(text), "compared": len(equal), "equal": sum(equal),
        "errors": sum(one.error is not None for one in answers),
    }  # fmt: skip


def chat_row(model, tokenizer, time: str) -> dict:
    """Two turns of a chat; the second goes on from what the first one left."""
    story = SAMPLE.read_text(encoding="utf-8")[2000:5000]
    first = [{"role": "user", "content": f"Here is the beginning of a novel.\n\n{story}\n\nWho is it about?"}]
    with Engine(model, tokenizer, "300MB", [time]) as engine:
        answer = engine.generate([request(time, messages=first, max_tokens=48)])[0]
        before = engine.stats()["prompt_tokens"]
        second = [
            *first,
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": "Where do they live?"},
        ]
        again = request(time, messages=second)
        warm = engine.generate([again])[0]
        read = engine.stats()["prompt_tokens"] - before
    cold = alone(model, tokenizer, time, again)
    return {
        "what": "second turn", "time": time, "prompt_tokens": warm.usage.prompt_tokens, "prompt_tokens_read": read,
        "cached_tokens": warm.usage.cached_tokens, "compared": 1, "equal": int(warm.token_ids == cold.token_ids),
    }  # fmt: skip


def request(time: str, **more: object) -> dict:
    """Greedy, of one length."""
    return {"time": time, "temperature": 0, "max_tokens": NEW_TOKENS, **more}


def alone(model, tokenizer, time: str, asked: dict):
    """The answer of an engine that has seen nothing."""
    with Engine(model, tokenizer, "300MB", [time]) as engine:
        return engine.generate([asked])[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter")
    parser.add_argument("--time", action="append", required=True)
    for name, number in (("tokens", 2000), ("questions", 32), ("cold", 8)):
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args()


if __name__ == "__main__":
    main()
