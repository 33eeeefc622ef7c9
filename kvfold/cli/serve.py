"""`kvfold serve`: the server lives in serve/. Names of its options are vLLM's."""

from typing import Annotated

from typer import Argument, Option

from kvfold.cli.console import say
from kvfold.cli.options import Adapter, Device, Dtype, KvMemory, quiet_transformers
from kvfold.errors import need_packages


def serve(
    model: Annotated[str | None, Argument(metavar="MODEL", help="A folder, a .gguf file or a hub name.")] = None,
    demo: Annotated[bool, Option("--demo", help="The small model of the demo, with its gates.")] = False,
    method: Annotated[
        list[str] | None, Option(help="Methods that requests may name; the first is the default.")
    ] = None,
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
) -> None:
    """Answer OpenAI's clients from one compressed cache, with a live page at `/`.

    Example: `kvfold serve my-model --kv-memory 4GB --method full --method h2o:256+256`
    """
    need_packages("fastapi", "uvicorn", "openai", "prometheus_client", "llguidance", extra="serve", what="serving")
    from kvfold.demo import bundled_model
    from kvfold.serve.command import serve as run

    quiet_transformers()
    run(
        model, demo=bundled_model() if demo else None, host=host, port=port, api_key=api_key or (),
        served_model_name=served_model_name or (), max_model_len=max_model_len, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, chat_template=chat_template, generation_config=generation_config,
        dtype=dtype, device=device, kv_memory=kv_memory, method=method or (), adapter=adapter, say=say,
    )  # fmt: skip
