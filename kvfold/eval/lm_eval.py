"""lm-evaluation-harness's own command line, with `--model kvfold` among its models.

    python -m kvfold.eval.lm_eval --model kvfold --model_args pretrained=FOLDER,time=h2o:12%+13% --tasks NAMES

lm-eval 0.4 looks for models in its own table alone; this puts one line into that table and hands over.
"""

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.models import MODEL_MAPPING


def register() -> None:
    """Make `kvfold` known to lm-eval's registry, for its command line and for `lm_eval.simple_evaluate` alike."""
    assert MODEL_MAPPING, "lm-eval registers its own models when its models room is imported"
    model_registry.register("kvfold", target="kvfold.eval.harness:FoldLM")


if __name__ == "__main__":
    register()
    cli_evaluate()
