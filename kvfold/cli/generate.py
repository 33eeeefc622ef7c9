"""What answers: `kvfold generate`, one text to go on from, or a file of requests on one engine; and `kvfold serve`, whose server
lives in serve/. Names of its options are vLLM's.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from kvfold.cli.options import (
    Adapter,
    Device,
    Dtype,
    Json,
    KvMemory,
    Loading,
    Model,
    Time,
    model_name,
    progress,
    quiet_transformers,
    say,
    tell,
)
from kvfold.errors import UserError, need_packages


def generate(
    model: Model,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="The text to go on from; - reads stdin.")] = "-",
    source: Annotated[Path | None, Option("--input", help="Requests as JSON lines, OpenAI's fields: all run at once.")] = None,
    target: Annotated[Path | None, Option("--output", help="Their answers, line by line; resumed where it stopped.")] = None,
    kv_memory: KvMemory = "2GB",
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[float, Option(min=0.0, help="0 takes the likeliest token, more is more daring.")] = 0.0,
    seed: Annotated[int, Option(min=0, help="Random seed, where there is a temperature.")] = 0,
    time: Time = None,
    *,
    loading: Loading,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Go on from a text with a folded cache, and say what the cache held.

    Example: `kvfold generate my-model 'Once upon a time' --time tova:256`
    """
    from transformers import TextStreamer, set_seed

    from kvfold.report.results import count, size

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
    facts = {
        "text": tokenizer.decode(ids[0], skip_special_tokens=True), "method": method, "seen_tokens": seen,
        "kept_tokens": kept.tolist(), "allocated_bytes": cache.allocated_bytes, "full_bytes": cache.full_bytes,
    }  # fmt: skip
    told = f"{method}: {count(seen)} tokens seen, {count(round(kept[kept >= 0].float().mean().item()))} kept a head, "
    tell(facts, as_json, f"{told}{size(cache.allocated_bytes)} held where a full cache takes {size(cache.full_bytes)}")


def _answer_file(
    loaded: tuple, source: Path, target: Path, *, kv_memory: str, defaults: dict[str, Any], seed: int, as_json: bool
) -> None:
    """All requests of a file on one engine, with a bar."""
    from kvfold.engine.answers import answer_file
    from kvfold.engine.engine import Engine

    weights, tokenizer = loaded
    if defaults["temperature"]:
        defaults = defaults | {"seed": seed}
    with Engine(weights, tokenizer, kv_memory=kv_memory) as engine, progress() as bar:
        counts = answer_file(engine, source, target, defaults=defaults, report=partial(bar, "answering"))
        stats = engine.stats()
    told = "{answered} answered, {errors} with an error, {skipped} were there".format_map(counts)
    tell(counts | {"output": str(target), "stats": stats}, as_json, f"{target}: {told}")


def _piped() -> str:
    """What another program writes to ours."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on stdin: it can't be read as text ({error}): send it as utf-8") from error


def serve(
    model: Annotated[str | None, Argument(metavar="MODEL", help="A folder, a .gguf file or a hub name.")] = None,
    demo: Annotated[bool, Option("--demo", help="The small model of the demo, with its gates.")] = False,
    method: Annotated[list[str] | None, Option(help="Methods that requests may name; the first is the default.")] = None,
    kv_memory: KvMemory = "2GB",
    host: Annotated[str, Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, Option(help="Who knows one of these may ask.")] = None,
    served_model_name: Annotated[list[str] | None, Option(help="What clients call the model.")] = None,
    max_model_len: Annotated[int | None, Option(help="Tokens of prompt and answer, at most.")] = None,
    max_num_seqs: Annotated[int, Option(help="Requests that run at once, at most.")] = 256,
    max_num_batched_tokens: Annotated[int, Option(help="Tokens of a prefill step.")] = 512,
    chat_template: Annotated[str | None, Option(help="A file, or the template itself.")] = None,
    generation_config: Annotated[str, Option(help="auto | vllm | a folder.")] = "auto",
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:  # fmt: skip
    """Answer OpenAI's clients from one compressed cache, with a live page at `/`.

    Example: `kvfold serve my-model --kv-memory 4GB --method full --method h2o:256+256`
    """
    need_packages("fastapi", "uvicorn", "openai", "prometheus_client", "llguidance", extra="serve", what="serving")
    from kvfold.demo import bundled_model
    from kvfold.serve.app import serve as run

    quiet_transformers()
    small = bundled_model() if demo else None
    run(
        model, demo=small, host=host, port=port, api_key=api_key or (), max_model_len=max_model_len,
        served_model_name=served_model_name or [model_name(str(model or small))], max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, chat_template=chat_template, generation_config=generation_config,
        dtype=dtype, device=device, kv_memory=kv_memory, method=method or (), adapter=adapter, say=say,
    )  # fmt: skip
