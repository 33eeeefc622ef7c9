"""The README's figures are those of the result files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_is_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "fill_readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run python docs/fill_readme.py: {done.stderr}"
