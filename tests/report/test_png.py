import json
import subprocess
import sys

import pytest

import report_samples as samples
from kvfold.report.pictures import png


def test_the_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    out = png.save_quality_png(samples.write_samples(tmp_path / "results"), tmp_path / "docs" / "quality.png")
    assert out.read_bytes().startswith(b"\x89PNG") and [file.name for file in out.parent.iterdir()] == ["quality.png"]


def test_drawing_leaves_pyplot_alone(tmp_path):
    pytest.importorskip("matplotlib")
    samples.write_samples(tmp_path)
    code = (
        "import sys; from pathlib import Path; from kvfold.report.pictures.png import save_quality_png as save;"
        f"save(Path({str(tmp_path)!r}), Path({str(tmp_path / 'q.png')!r})); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_matplotlib_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvfold\[plot\]'"):
        png.save_quality_png(samples.write_samples(tmp_path), tmp_path / "q.png")


def test_nothing_to_draw_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    for result in (samples.plan(), {"kind": "quality", "rows": [{"method": "full"}]}):
        (tmp_path / "x.json").write_text(json.dumps(result))
        with pytest.raises(ValueError, match="kvfold eval"):
            png.save_quality_png(tmp_path, tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()
