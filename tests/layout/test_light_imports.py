"""The deciding rooms import no torch, no transformers, no hub client: a plan starts in a blink."""

import subprocess
import sys

CODE = """
import sys
import kvfold.layout.hf_config, kvfold.layout.planner
import kvfold.methods.registry
kvfold.layout.planner.plan("llama-2-7b", time="h2o:64+64", bits="int8", layers="cla2", heads=8).max_rows(80 * 10**9, 4096)
print(*sorted({"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)))
"""


def test_nothing_heavy_is_imported():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
