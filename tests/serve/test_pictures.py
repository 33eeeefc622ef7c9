"""The pictures of the live page in the docs, made with the bundled model and looked at by whoever changes the page."""

from pathlib import Path

import pytest

from browser import HAS_CHROMIUM, open_browser
from serving_kit import running_server

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
QUESTION = "Write a story about a lighthouse keeper who finds a letter in a bottle. Give names to everybody in it."

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_CHROMIUM, reason="chromium and chromedriver are not installed"),
]


@pytest.fixture(scope="module")
def demo():
    from kvfold.demo import ADAPTER, bundled_model
    from kvfold.engine.engine import Engine
    from kvfold.models.load import load, load_tokenizer
    from kvfold.serve.command import DEMO_METHODS

    source = bundled_model()
    engine = Engine(load(source, adapter=ADAPTER), load_tokenizer(source), "500MB", list(DEMO_METHODS))
    with running_server(engine, model_names=("SmolLM2-135M-Instruct",), chat_template=None) as server:
        yield server


def test_pictures(demo, tmp_path):
    with open_browser(tmp_path) as page:
        page.size(1360, 900)
        page.open(demo.url)
        page.wait("return about !== null")
        page.run("document.querySelector('#tokens').value = 400; document.querySelector('#heat').value = 0")
        page.type("#text", QUESTION + "\n")
        page.wait("return maps.a && maps.a.tokens > 300", timeout=300)
        page.screenshot(PICTURES / "page.png")
        page.wait("return running === null", timeout=300)

        page.dark(True)
        page.run("document.querySelector('#second').value = 'window:171+4'; begin()")
        page.type("#text", QUESTION + "\n")
        page.wait("return maps.a && maps.a.tokens > 300 && maps.b", timeout=300)
        page.screenshot(PICTURES / "page-two-methods-dark.png")
        page.wait("return running === null", timeout=300)

        page.dark(False)
        page.size(390, 1500)
        page.run("document.querySelector('#second').value = ''; begin()")
        page.type("#text", QUESTION + "\n")
        page.wait("return running === null && lines.a.length > 5", timeout=300)
        page.run("window.scrollTo(0, 0)")
        page.screenshot(PICTURES / "page-phone.png")
        assert page.errors() == []
