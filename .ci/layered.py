"""Make a virtual environment on top of another: it sees all that is installed there, and what it installs goes before.

Usage: python .ci/layered.py NEW BELOW, run by the Python of BELOW. Nothing of BELOW is copied or changed, so that a
second set of versions costs neither a second torch on disk nor the time to install it.
"""

import sys
import sysconfig
import venv
from pathlib import Path


def make_layered(new: Path, below: Path) -> None:
    """The environment `new`, made afresh, on top of the environment `below`."""
    venv.create(new, clear=True, with_pip=True, symlinks=True)
    packages = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    # A .pth file may hold one line of Python; addsitedir also reads the .pth files of the folder that it adds.
    line = f"import site; site.addsitedir({str(below.resolve() / packages)!r})\n"
    (new / packages / "below.pth").write_text(line, encoding="utf-8")


if __name__ == "__main__":
    make_layered(Path(sys.argv[1]), Path(sys.argv[2]))
