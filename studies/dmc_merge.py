"""What DMC's merge itself costs a model that knows nothing of it: tokens drawn at random are merged, nothing is trained.

    python studies/dmc_merge.py MODEL OUT.jsonl --text TRAIN ... [--windows 4] [--share 0.02] [--share 0.15]

Arms: `published` merges any token but the first into the entry before it, all of one importance, as untrained gates have it;
`first-alone` forbids the second token to merge, so that the first keeps its entry to itself; `bias` gives an entry's
logit the log of the number of tokens in it, too; `values` averages values alone and keeps the key of the newest token. A line
for each text, window, share and arm, with the divergence from the model as it is.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import kvfold
from kvfold.data import read_text_file, text_windows
from kvfold.eval.reading import score
from kvfold.layout.kvlayout import KVLayout
from kvfold.ops.attention import attention_with_weights
from kvfold.ops.gating import STAY_NEVER, from_next, pooled
from kvfold.ops.rotation import Rotation, rotate, rotate_queries
from kvfold.record import made

ARMS = ("published", "first-alone", "first-alone,bias", "first-alone,values")
_WINDOW = 12


class RandomMergeView:
    """A KV view in which a share of the tokens merges, drawn anew for each layer and head."""

    def __init__(self, layout: KVLayout, arm: str, share: float, seed: int, *, scale: float, softcap: float | None):
        assert len(layout.owners) == layout.num_layers, "no layer may share"
        self._arm, self._share, self._options = set(arm.split(",")), share, {"scale": scale, "softcap": softcap}
        self._source = torch.Generator().manual_seed(seed)

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, rotation: Rotation | None, gates: None = None
    ) -> Tensor:
        """See `KVView`."""
        tokens = k_BTKD.shape[1]
        merges = torch.rand(k_BTKD.shape[:3], generator=self._source) < self._share
        merges[:, : 2 if "first-alone" in self._arm else 1] = False
        alpha = merges.float()
        weight = torch.ones_like(alpha)
        v = pooled(v_BTKD, weight, alpha, _WINDOW)
        k = k_BTKD if "values" in self._arm else pooled(k_BTKD, weight, alpha, _WINDOW)
        bias = from_next(alpha * STAY_NEVER, None, 0.0)
        count = torch.ones_like(alpha)
        if "bias" in self._arm:
            for index in range(1, tokens):
                count[:, index] += alpha[:, index] * count[:, index - 1]
            bias = bias + count.clamp(max=_WINDOW).log()
        own = torch.eye(tokens, dtype=torch.bool)[None, None]
        closed = from_next(alpha, None, 0.0).transpose(1, 2)[:, :, None] > 0
        seen = (torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None] & ~closed) | own
        q, k = rotate_queries(rotation, q_BTHD), rotate(rotation, k)
        if "bias" in self._arm:  # one more channel carries it
            scale = self._options["scale"]
            q = torch.cat((q, q.new_ones(*q.shape[:-1], 1)), dim=-1)
            k = torch.cat((k, (count.clamp(max=_WINDOW).log() / scale)[..., None]), dim=-1)
        return attention_with_weights(q, k, v, mask=seen, **self._options)[0]


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--share", type=float, action="append", required=True)
    parser.add_argument("--name", default="SmolLM2-135M-Instruct.Q4_1", help="what the model is called in the lines")
    args = parser.parse_args()
    model, tokenizer = kvfold.load(args.model).eval(), kvfold.load_tokenizer(args.model)
    about = {
        "model": args.name, **made(torch.get_num_threads(), str(model.dtype)), "transformers": version("transformers"),
    }  # fmt: skip
    decoder, done = model.model, set()
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
        done = {(row["text"], row["window"], row["context"], row["share"], row["arm"]) for row in rows}
    for path in args.text:
        windows = text_windows(read_text_file(path), tokenizer, windows=args.windows, context_tokens=args.context)
        for number, ids in enumerate(windows.ids_WT):
            with torch.no_grad():
                full = decoder(ids[None], use_cache=False).last_hidden_state[0, :-1]
            for share in args.share:
                for arm in ARMS:
                    if (windows.name, number, args.context, share, arm) in done:
                        continue
                    began = time.process_time()
                    view = RandomMergeView(model.config.layout, arm, share, number, **decoder.attention_options)
                    with torch.no_grad():
                        hidden, rotations = decoder.opened(ids[None])
                        for layer, rotation in zip(decoder.layers, rotations, strict=True):
                            hidden = layer(hidden, view, rotation, None)
                        scores = score(model, decoder.norm(hidden)[0, :-1], ids[1:], (model, full))
                    row = {
                        "text": windows.name, "window": number, "context": args.context, "share": share, "arm": arm,
                        "kl": float(scores.kl.mean()), "loss": float(scores.loss.mean()),
                        "cpu_seconds": time.process_time() - began, **about,
                    }  # fmt: skip
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
