"""An adapter at another compression, without training: its gates are shifted until held-out text is compressed as asked. And
what its gates keep of text, per KV head, measured anew.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.methods.gates import GateConfig
from kvfold.models.adapters import ABOUT, WEIGHTS, AdapterAbout, adapter_folder, read_adapter
from kvfold.models.checkpoint_files import whole_folder
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.calibrate import calibrate, gate_biases
from kvfold.train.kept_ratios import measure_kept_ratios
from kvfold.train.settings import RetrofitSettings


def shifted_settings(time: str, *, compression: float, sequence_tokens: int) -> RetrofitSettings:
    """What calibration goes by. Raises `UserError` for a compression that the method can't reach at this length."""
    return RetrofitSettings(time=time, compression=compression, sequence_tokens=sequence_tokens, trains="full")


def method_of(folder: Path) -> str:
    """The method of an adapter. Raises `UserError` for a folder that is none, and for an adapter without gates."""
    about, _ = read_adapter(folder)
    if about.gates is None or about.time is None:
        raise UserError(f"adapter {folder}: it has no gates to shift: give one that compresses")
    return about.time


def recalibrate(
    model: FoldForCausalLM, folder: Path, out: Path, blocks_NT: Tensor, settings: RetrofitSettings | None, *,
    report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write the adapter in `folder` to `out`, shifted so that the blocks are compressed as the settings say (None = as they are),
    with its kept ratios on the blocks. `model` has the adapter on, and has the shift afterwards. Gives the shift in logits, and
    where something was shifted the compression before and after.
    """
    facts: dict[str, Any] = {"shift": 0.0, "sequences": blocks_NT.shape[0]}
    if settings is not None:
        facts = calibrate(model, blocks_NT, settings, report=report)
    about, weights = read_adapter(folder)
    gates = GateConfig.from_json(about.gates)
    if settings is None:
        pass
    elif gates.source == "adapter":
        # As calibration did to the model, which may be in another dtype.
        for name in gate_biases(model.config.layout):
            weights[name][:: gates.form.outputs] += facts["shift"] / gates.scale
    else:
        about = replace(about, gates=about.gates | {"offset": gates.offset - facts["shift"]})
    model.config.kept_ratios = measure_kept_ratios(model, blocks_NT, report=report)
    about = replace(about, kept_ratios=model.config.kept_ratios)
    _write(about, weights, out, _card(out, folder, blocks_NT.shape[1], settings, facts))
    return facts


def _write(about: AdapterAbout, weights: dict[str, Tensor], out: Path, card: str) -> None:
    with whole_folder(out) as folder:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / ABOUT).write_text(about.to_text(), encoding="utf-8")


def _card(out: Path, folder: Path, tokens: int, settings: RetrofitSettings | None, facts: dict[str, Any]) -> str:
    old = adapter_folder(folder) / "README.md"
    if settings is None:
        # The same gates: their card holds.
        return old.read_text(encoding="utf-8") if old.is_file() else f"# {out.name}\n"
    lines = [
        f"# {out.name}",
        "",
        f"The adapter `{folder.name}` at another compression, written by `kvfold calibrate`: its gates were shifted by "
        f"{facts['shift']:+.3f}, nothing was trained. Over {facts['sequences']} sequences of {tokens:,} tokens "
        f"the compression was {facts['before']:.2f} before and is {facts['after']:.2f} now, window included; "
        f"{settings.compression:g} was asked for.",
        "",
    ]
    if old.is_file():
        lines += ["What follows is the card of that adapter; its figures are at its own compression.", ""]
        lines.append(old.read_text(encoding="utf-8"))
    return "\n".join(lines)
