"""lm-evaluation-harness's own command line, with `--model kvfold` among its models.

    python -m kvfold.eval.lm_eval --model kvfold --model_args pretrained=FOLDER,time=h2o:12%+13% --tasks NAMES

lm-eval 0.4 looks for models in its own table alone; this puts one line into that table and hands over.
"""

import sys

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.models import MODEL_MAPPING


def register() -> None:
    """Make `kvfold` known to lm-eval's registry, for its command line and for `lm_eval.simple_evaluate` alike."""
    assert MODEL_MAPPING, "lm-eval registers its own models when its models room is imported"
    if "kvfold" not in model_registry:
        model_registry.register("kvfold", target="kvfold.eval.harness:FoldLM")


def main() -> None:
    """lm-eval's command; bad input ends in one line on stderr and exit code 2, as for every command of kvfold's."""
    register()
    try:
        cli_evaluate()
    except ValueError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
