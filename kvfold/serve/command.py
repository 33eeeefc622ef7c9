"""`kvfold serve`: from what was typed to a server that answers until it is told to stop."""

import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvfold.engine.engine import Engine
from kvfold.errors import UserError, one_line
from kvfold.models.load import load, load_tokenizer
from kvfold.serve.app import create_app
from kvfold.serve.http import Server
from kvfold.serve.settings import ServerSettings

DEMO_METHODS = ("dms:128", "full", "window:171+4", "h2o:87+88", "tova:175")
"""What `--demo` loads: the gates that come with kvfold, nothing folded, and methods that need no gates."""
DEMO_ADAPTER = "smollm2-135m-dms-4x"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
log = logging.getLogger("kvfold.serve")


def serve(
    model: str | None, *, demo: Path | None = None, host: str = "127.0.0.1", port: int = 8000,
    api_key: Sequence[str] = (), served_model_name: Sequence[str] = (), max_model_len: int | None = None,
    max_num_seqs: int = 256, max_num_batched_tokens: int = 512, chat_template: str | None = None,
    generation_config: str = "auto", dtype: str | None = None, device: str | None = None, kv_memory: str = "2GB",
    method: Sequence[str] = (), adapter: str | None = None,
    say: Callable[[str], None] = print, **limits: Any,
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM. The names are vLLM's.

    `demo`: the file of a small model, served with the gates that come with kvfold, where no `model` is named. `method`: text
    forms that requests may name, the first is the default; none = the model's own. `chat_template`: a file, or the template
    itself. `api_key`: none = the words of the environment's KVFOLD_API_KEY. `generation_config`: `auto` takes sampling
    defaults from the checkpoint, `vllm` takes none, anything else is a folder or file to take them from. `limits`: other
    fields of `ServerSettings`. `say` is told where the server listens. Raises `UserError`, in one line, for whatever can't
    be served.
    """
    if device and "," in device:
        raise UserError(
            "serving takes 1 device, got several: run a server on each device, or a layout that vLLM knows under vLLM"
        )
    if (model is None) == (demo is None):
        raise UserError("serve needs a model or --demo, one of the two: give a folder, a .gguf file or a hub name")
    source = str(model or demo)
    if demo is not None:
        adapter, method = adapter or DEMO_ADAPTER, method or DEMO_METHODS
    keys = tuple(api_key) or tuple(os.environ.get("KVFOLD_API_KEY", "").split())
    settings = ServerSettings(
        model_names=tuple(served_model_name) or (_name(source),), host=host, port=port, api_keys=keys,
        max_model_len=max_model_len, chat_template=_template(chat_template),
        **{name: value for name, value in limits.items() if value is not None},
    )  # fmt: skip
    set_up_log()
    loaded, tokenizer = load(source, adapter=adapter, dtype=dtype, device=device), load_tokenizer(source)
    settings = replace(settings, defaults=generation_defaults(generation_config, loaded, source))
    if not settings.is_local and not settings.api_keys:
        log.warning("%s is open to everybody who reaches it: --api-key lets in only who knows the key", host)
    with Engine(
        loaded, tokenizer, kv_memory, list(method) or None, max_running=max_num_seqs,
        prefill_tokens=max_num_batched_tokens,
    ) as engine:  # fmt: skip
        server = _AnnouncedServer(create_app(engine, settings), say)
        gc.collect()
        gc.freeze()  # what is loaded by now stays: no collection between two steps needs to look at it
        try:
            server.run()
        except KeyboardInterrupt:
            log.info("stopped")


class _AnnouncedServer(Server):
    """Says where it listens, once it does."""

    def __init__(self, app: Any, say: Callable[[str], None]):
        super().__init__(app)
        self._say = say

    async def startup(self, sockets: list | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started:
            settings = self.serving.settings
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            url = f"http://{host}:{self.bound_port}"
            self._say(
                f"{settings.model_names[0]} at {url}/v1 · methods {', '.join(self.serving.methods)} · page {url}/"
            )


def set_up_log() -> None:
    """Log lines go to stderr: when, what, nothing else. Nobody's text is among them unless it was asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("kvfold.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def generation_defaults(choice: str, model: Any, source: str) -> dict[str, Any]:
    """Sampling fields that a checkpoint recommends. Raises `UserError` for a `choice` that can't be read."""
    if choice == "vllm":
        return {}
    if choice == "auto":
        found = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
        # transformers writes what it was loaded with into the model; a folder's own file says what its authors meant.
        own = Path(source) / "generation_config.json"
        found = _read_json(own) if own.is_file() else found
    else:
        path = Path(choice)
        found = _read_json(path / "generation_config.json" if path.is_dir() else path)
    defaults = {name: found[name] for name in _SAMPLING if found.get(name) is not None}
    if found.get("max_new_tokens") is not None:
        defaults["max_tokens"] = found["max_new_tokens"]
    return defaults


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"generation_config {path} must be a JSON file: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"generation_config {path} must hold a JSON object")
    return found


def _template(given: str | None) -> str | None:
    """The template's text: a file's, or what was given itself."""
    if given is None:
        return None
    path = Path(given)
    if "{" not in given:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"chat_template {given}: no such file, and no template ({error})") from None
    return given


def _name(source: str) -> str:
    """What the model is called where nothing else is said: vLLM takes what was typed, a path is too much for that."""
    path = Path(source)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else source
