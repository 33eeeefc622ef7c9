"""`kvfold generate`: one text to go on from, or a file of requests on one engine."""

import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from kvfold.cli.console import progress, say, show_json
from kvfold.cli.options import Json, KvMemory, Loading, Model, Time
from kvfold.errors import UserError


def generate(
    model: Model,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="The text to go on from; - reads stdin.")] = "-",
    source: Annotated[
        Path | None, Option("--input", help="Requests as JSON lines, OpenAI's field names: all run at once.")
    ] = None,
    target: Annotated[
        Path | None, Option("--output", help="Their answers, line by line; resumed where it stopped.")
    ] = None,
    kv_memory: KvMemory = "2GB",
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[float, Option(min=0.0, help="0 takes the likeliest token, more is more daring.")] = 0.0,
    seed: Annotated[int, Option(min=0, help="Random seed, where there is a temperature.")] = 0,
    time: Time = None,
    *,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Go on from a text with a folded cache, and say what the cache held.

    Example: `kvfold generate my-model 'Once upon a time' --time tova:256`
    """
    from transformers import TextStreamer, set_seed

    from kvfold.report.numbers import count, size

    if (source is None) != (target is None):
        raise UserError("--input and --output: a file of requests needs a file for its answers: give both")
    if source is not None and target is not None:
        loaded = loading.load(model, time=time)
        defaults = {"max_tokens": max_new_tokens, "temperature": temperature}
        _answer_file(loaded, source, target, kv_memory=kv_memory, defaults=defaults, seed=seed, as_json=as_json)
        return
    text = _piped() if prompt == "-" else prompt
    if not text:
        raise UserError("an empty prompt: give some text to go on from")
    weights, tokenizer = loading.load(model, time=time)
    inputs = tokenizer(text, return_tensors="pt").to(weights.device)
    length, most = inputs["input_ids"].shape[1], weights.config.max_position_embeddings
    if length + max_new_tokens > most:
        raise UserError(
            f"{length} tokens of prompt and {max_new_tokens} new ones: the model was made for {most}: shorten one of the two"
        )
    set_seed(seed)
    chosen = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)
    cache = weights.new_cache(rows=1)
    ids = weights.generate(**inputs, **chosen, max_new_tokens=max_new_tokens, past_key_values=cache, streamer=streamer)
    method, seen, kept = cache.layout.time_text(), int(cache.seen_tokens[0]), cache.kept_tokens[:, 0]
    if as_json:
        written = tokenizer.decode(ids[0], skip_special_tokens=True)
        held = {"allocated_bytes": cache.allocated_bytes, "full_bytes": cache.full_bytes}
        show_json({"text": written, "method": method, "seen_tokens": seen, "kept_tokens": kept.tolist(), **held})
    else:
        held = f"{size(cache.allocated_bytes)} held where a full cache takes {size(cache.full_bytes)}"
        say(
            f"{method}: {count(seen)} tokens seen, {count(round(kept[kept >= 0].float().mean().item()))} kept a head, {held}"
        )


def _answer_file(
    loaded: tuple, source: Path, target: Path, *, kv_memory: str, defaults: dict[str, Any], seed: int, as_json: bool
) -> None:
    """All requests of a file on one engine, with a bar."""
    from kvfold.engine.engine import Engine
    from kvfold.engine.offline import answer_file

    weights, tokenizer = loaded
    if defaults["temperature"]:
        defaults = defaults | {"seed": seed}
    with Engine(weights, tokenizer, kv_memory=kv_memory) as engine, progress() as bar:
        counts = answer_file(
            engine, source, target, defaults=defaults,
            report=lambda facts: bar("answering", facts["done"], facts["total"]),
        )  # fmt: skip
        stats = engine.stats()
    if as_json:
        show_json(counts | {"output": str(target), "stats": stats})
    else:
        say(
            f"{target}: {counts['answered']} answered, {counts['errors']} with an error, {counts['skipped']} were there"
        )


def _piped() -> str:
    """What another program writes to ours."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on stdin: it can't be read as text ({error}): send it as utf-8") from error
