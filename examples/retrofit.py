"""Train DMS gates beside a frozen model for a few steps, and load the adapter.

  python examples/retrofit.py MODEL TEXT OUT

TEXT is a text file, OUT the adapter's folder; a run that was stopped resumes. Twenty steps only show how it is done: the adapter
that ships was trained on 1,048,576 tokens. Needs `pip install 'kvfold[train]'`. `kvfold retrofit` does the same.
"""

import sys
from pathlib import Path

import kvfold
from kvfold.record import cpu_name, git_commit
from kvfold.train.retrofit import Retrofit
from kvfold.train.run_folder import RunFolder
from kvfold.train.settings import RetrofitSettings


def main() -> None:
    """Half the cache at 128 tokens, tokens evicted 8 after their gate said so."""
    source, text, out = sys.argv[1:]
    settings = RetrofitSettings(
        time="dms:8", compression=2.0, data=(text,), seq_len=128, global_batch_size=2, ramp_steps=15, tail_steps=5,
        learning_rate=1e-3, warm_start=True,
    )  # fmt: skip
    command = " ".join(sys.argv)
    about = {"command": command, "version": kvfold.__version__, "git_commit": git_commit(), "hardware": cpu_name()}
    facts = Retrofit(
        model=kvfold.load(source), tokenizer=kvfold.load_tokenizer(source), source=source, name=Path(source).name,
        settings=settings, folder=RunFolder(out=Path(out)), about=about,  # for its card
    ).run()  # fmt: skip
    before, after = facts["before"]["perplexity"], facts["after"]["perplexity"]
    print(f"perplexity {before:.2f} -> {after:.2f}, compression {facts['after']['compression']:.2f}")
    model = kvfold.load(source, adapter=out)
    print(f"{out} loads with {model.config.layout.time_text()}")


if __name__ == "__main__":
    main()
