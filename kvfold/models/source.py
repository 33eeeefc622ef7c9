"""What a model's source is, and whether it is whole: looked up before anything large is read."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from kvfold.models.config import FoldConfig
from kvfold.models.families import family_named

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A folder, a hub name, or one GGUF file in a folder."""

    name: str
    """Folder or hub name."""
    file: dict[str, str]
    """transformers' option for the GGUF file in it; empty for others."""

    def __str__(self) -> str:
        return str(Path(self.name, *self.file.values())) if self.file else self.name


def find_source(source: str | Path) -> Source:
    """What `source` names, checked. Raises `ValueError` where there is nothing that could be loaded."""
    path = Path(source).expanduser()
    if path.is_dir():
        _check_folder(path)
        return Source(name=str(path), file={})
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: a single file is read as GGUF only: give the model's folder")
        return Source(name=str(path.parent), file={"gguf_file": path.name})
    if path.suffix == ".gguf" or isinstance(source, Path) or path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", ".."):
        if len(path.parts) != 1 or path.suffix == ".gguf":
            raise ValueError(f"{source}: there is no such file or folder: correct the path")
    _check_family(str(source), _hub_config(str(source)))
    return Source(name=str(source), file={})
