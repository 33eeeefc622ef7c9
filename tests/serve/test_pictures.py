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
    from kvfold.serve.app import DEMO_METHODS

    source = bundled_model()
    engine = Engine(load(source, adapter=ADAPTER), load_tokenizer(source), "500MB", list(DEMO_METHODS))
    with running_server(engine, model_names=("SmolLM2-135M-Instruct",), chat_template=None) as server:
        yield server


@pytest.fixture
def page(demo, tmp_path):
    with open_browser(tmp_path) as found:
        yield found
        assert found.errors() == []


def ask(page, demo, *, tokens: int, beside: str = "") -> None:
    page.open(demo.url)
    page.wait("return about !== null")
    page.run(f"document.querySelector('#tokens').value = {tokens}; document.querySelector('#heat').value = 0")
    page.run(f"document.querySelector('#second').value = '{beside}'; begin()")
    page.type("#text", QUESTION + "\n")


def test_a_picture_of_the_page(page, demo):
    page.size(1360, 900)
    ask(page, demo, tokens=400)
    page.wait("return maps.a && maps.a.tokens > 300", timeout=900)
    page.screenshot(PICTURES / "page.png")


def test_a_picture_of_two_methods_in_the_dark(page, demo):
    page.size(1360, 900)
    page.dark(True)
    ask(page, demo, tokens=400, beside="window:171+4")
    page.wait("return maps.a && maps.a.tokens > 300 && maps.b", timeout=900)
    page.screenshot(PICTURES / "page-two-methods-dark.png")


def test_a_picture_on_a_phone(page, demo):
    page.size(390, 1500)
    ask(page, demo, tokens=220)
    page.wait("return running === null && lines.a.length > 5", timeout=900)
    page.run("window.scrollTo(0, 0)")
    page.screenshot(PICTURES / "page-phone.png")
