"""Loading: a folder, a hub name or a GGUF file becomes a kvfold model. Saving: a reader finds a model's folder whole or not at
all.

Weights are read by transformers, as safetensors or GGUF only: nothing is ever unpickled, and no code of a checkpoint runs.
What a source is, and what may be wrong with it, is looked up in source.py before anything large is read.
"""

import os
import shutil
import struct
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kvfold.errors import UserError, is_out_of_memory, one_line, raised_in_kvfold
from kvfold.models.adapters import CHANNEL, apply_adapter, channel_gates, read_adapter
from kvfold.models.blocks import pack
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.families import fold_config, fold_weights, official_weights
from kvfold.models.gates import gate_table
from kvfold.models.source import Source, check_source, find_source, reading_options, widened

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers and the file formats raise at a file that is not what it should be."""


def load(
    source: str | Path, *, time: str | None = None, bits: str | None = None, adapter: str | None = None,
    gates: str | None = None, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
) -> FoldForCausalLM:  # fmt: skip
    """A model in eval mode, from a folder (kvfold's or any known family's), a hub name or a .gguf file.

    `time` and `bits` override what the checkpoint says, `time` also what the adapter says, a folder that `kvfold retrofit`
    wrote. `gates="channel"` makes the published freed channel the model's own gates. dtype None = the checkpoint's, and fp32
    on a CPU (device None); there a copy of the weights in a form that decodes faster is kept beside them
    (`kvfold.models.blocks`).
    Raises `UserError`, in one line, for whatever can't be loaded.
    """
    if adapter is not None:
        read_adapter(adapter)  # before anything large is read
    if gates is not None and (gates != CHANNEL or adapter is not None):
        raise UserError(f"gates '{gates}': a model is loaded with 'channel', or with an adapter: give one of the two")
    place = _wanted_device(device)
    dtype = _wanted_dtype(dtype, place)
    found = find_source(source)
    with quiet():
        theirs, config = _read_configs(found)
        layout = config.layout.folded(time, bits)
        if gates is not None:
            if config.gates is not None:
                raise UserError("gates 'channel': the checkpoint has gates of its own: leave gates out")
            config.gates = channel_gates(layout).to_json()
        if adapter is None:
            config.layout = layout
            gate_table(config.gate_config, layout, freed_owners=config.freed_owners)
        if theirs is config:
            with _reading_weights(found):
                model, report = FoldForCausalLM.from_pretrained(found.name, config=config, dtype=dtype, **_LOADING)
        else:
            model, report = _read_foreign(found, theirs, config, dtype)
    _check_report(found, report, strict=theirs is config)
    model = model.to(place)
    if adapter is not None:
        apply_adapter(model, adapter, time=time)
        model.config.layout = model.config.layout.folded(None, bits)
    model.eval()
    if place.type == "cpu":
        pack(model)
    return model


def load_config(source: str | Path) -> FoldConfig:
    """The config of a model before anything large is read, with the checkpoint's own dtype. Raises `UserError` likewise."""
    found = find_source(source)
    with quiet():
        return _read_configs(found)[1]


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model. Raises `UserError` where there is none."""
    found = find_source(source)
    with quiet(), _reading(f"{found}: no tokenizer can be read there", "put its files beside it"):
        return AutoTokenizer.from_pretrained(found.name, trust_remote_code=False, **found.options)


def _read_configs(found: Source) -> tuple[PreTrainedConfig, FoldConfig]:
    """The config as it stands there, and as ours."""
    check_source(found)
    with _reading(f"{found}: its config can't be understood", "correct it or fetch it again"):
        theirs = AutoConfig.from_pretrained(found.name, trust_remote_code=False, **found.options)
    return theirs, theirs if isinstance(theirs, FoldConfig) else fold_config(theirs)


def _read_foreign(
    found: Source, theirs: PreTrainedConfig, config: FoldConfig, dtype: torch.dtype | str
) -> tuple[FoldForCausalLM, dict]:
    """Let transformers read the family's own model, and take its tensors over."""
    options = _LOADING | found.options | reading_options(theirs)
    if found.gguf is not None:
        options["use_safetensors"] = None
    with _reading_weights(found), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # meant: to widen what is stored
        model, report = AutoModelForCausalLM.from_pretrained(found.name, config=theirs, dtype=dtype, **options)
    with torch.device("meta"):
        ours = FoldForCausalLM(config)
    ours.generation_config, config.dtype = model.generation_config, model.dtype
    weights = widened(theirs, model.state_dict(), model.dtype)
    if config.gates is not None:
        with _reading_weights(found):
            weights |= official_weights(found.name, found.options, sorted(report["unexpected_keys"]))
    # The tensors live on in `weights` alone, so that fused ones are freed as they are cut apart.
    del model
    lacking, unread = ours.load_state_dict(fold_weights(config, weights), strict=False, assign=True)
    # The family's own class, which knows nothing of sharing, gave readers keys and values: they are not ours to miss.
    missing = set(report["missing_keys"]) - set(unread)
    report["missing_keys"] = [*missing, *(name for name in lacking if name != "lm_head.weight")]
    ours.tie_weights()
    return ours, report


@contextmanager
def _reading(what: str, remedy: str) -> Iterator[None]:
    """One line for what is wrong with a file that is read inside. Too little memory, and a slip of ours, are no file's fault."""
    try:
        yield
    except _UNREADABLE as error:
        if is_out_of_memory(error) or (isinstance(error, LookupError) and raised_in_kvfold(error)):
            raise
        if isinstance(error, UserError):  # which has a remedy of its own, such as a newer kvfold
            raise UserError(f"{what}: {error}") from error
        raise UserError(f"{what} ({one_line(error)}): {remedy}") from error


def _reading_weights(found: Source) -> AbstractContextManager[None]:
    return _reading(f"{found}: the weights can't be read", "fetch the checkpoint again")


_LOADING = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
"""Differences come back in a report, so that one line can tell them."""


def _check_report(found: Source, report: dict, *, strict: bool) -> None:
    """Refuse a checkpoint that doesn't fill the model. `strict`: nor may anything be left over."""
    kinds = {
        "lacks": sorted(report["missing_keys"]),
        "has in another shape": sorted(key[0] for key in report["mismatched_keys"]),
        "has beyond the model": sorted(report["unexpected_keys"]) if strict else [],
    }
    for what, names in kinds.items():
        if names:
            raise UserError(
                f"{found}: the checkpoint {what} {len(names)} weights, the first is {names[0]}: "
                "weights and config.json must be of one model: fetch or convert it again"
            )


def _wanted_device(device: str | torch.device | None) -> torch.device:
    try:
        wanted = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise UserError(f"device '{device}': torch knows no such device: use e.g. 'cpu' or 'cuda'") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{device}': torch sees no GPU on this machine: use 'cpu'")
    return wanted


def _wanted_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """ "auto" is transformers' word for the checkpoint's own."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = _DTYPES.get(dtype, dtype)
    if dtype not in _DTYPES.values():
        raise UserError(f"dtype '{dtype}': weights are held as {', '.join(_DTYPES)}: use one of them")
    return dtype


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its log lines and progress bars, which would mix with ours; put back afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.model",
    "*.tiktoken",
)  # fmt: skip
"""What tokenizers are made of, as patterns of file names."""


def check_folder(out: Path) -> None:
    """Refuse a place where no new folder can be, before any work is done."""
    if out.parts[:1] == ("~",):
        raise UserError(f"{out}: no home folder is known: write the whole path")
    if out.is_file() or any(parent.is_file() for parent in out.parents):
        raise UserError(f"{out}: a file is in the way: name a folder that is not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: the folder is not empty: name a new one, or empty it")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and is removed when it doesn't."""
    check_folder(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(model: PreTrainedModel, out: Path, found: Source) -> None:
    """Save a model with the tokenizer of its source, where that has one."""
    with whole_folder(out) as folder, quiet():
        model.save_pretrained(folder)
        copy_tokenizer(found, folder)


def copy_tokenizer(found: Source, folder: Path) -> None:
    """The tokenizer's files as they lie in a local folder; from a hub or a GGUF file, as transformers writes them."""
    source = Path(found.name)
    if source.is_dir() and found.gguf is None:
        names = {path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}
        for path in sorted(names):
            shutil.copyfile(path, folder / path.name)
        return
    with suppress(ValueError):  # a model without a tokenizer is none the worse for it
        load_tokenizer(str(found)).save_pretrained(folder)
