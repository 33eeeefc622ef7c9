"""The live page in a real browser: it chats, draws what is kept, and no script complains."""

import pytest

from browser import HAS_CHROMIUM, open_browser
from serving_kit import running_server

pytestmark = pytest.mark.skipif(not HAS_CHROMIUM, reason="chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def wait_for_answers(page, number):
    page.wait(
        "const costs = [...document.querySelectorAll('.cost')];"
        f"return costs.length === {number} && costs.every((one) => one.textContent.includes('kept'))"
    )


def test_chat_two_methods_side_by_side(page, server, tmp_path):
    page.size(1280, 860)
    page.open(server.url)
    page.wait("return document.querySelectorAll('#first option').length === 3")
    page.run("document.querySelector('#second').value = 'dms:8'; document.querySelector('#tokens').value = 60")
    page.type("#text", "Tell me a long story about caches\n")  # Enter sends
    wait_for_answers(page, 2)
    assert page.run("return document.querySelectorAll('.turn.user').length") == 1
    assert page.run("return messages.length") == 2 and page.run("return lines.a.length && lines.b.length")
    full, dms = page.run(
        "return [lines.a.at(-1), lines.b.at(-1)].map(([seen, held]) => held / seen)"
    )  # answers differ in length
    assert dms < full and "uncompressed" in page.run("return document.querySelector('#chart-text').textContent")
    assert page.run("return document.querySelectorAll('#chart polyline').length") == 2
    page.screenshot(tmp_path / "wide.png")
    assert page.errors() == []


def test_news_of_an_answer_that_is_over_moves_no_line(page, server):
    page.open(server.url)
    page.wait("return about !== null")
    ends = page.run(
        "running = {ids: {a: 'one', b: 'two'}, ended: new Set(['b'])}; point('b', 40, 900);"
        "const tell = (a, b) => show({running: 0, waiting: 0, requests: ["
        "  {id: 'one', method: 'full', seen_tokens: 30, kept: a ? [[30]] : [], kv_bytes: a},"
        "  {id: 'two', method: 'dms', seen_tokens: 36, kept: b ? [[9]] : [], kv_bytes: b}]});"
        "tell(700, 800); tell(0, 0); running = null; return [lines.a, lines.b]"
    )
    assert ends == [[[30, 700]], [[40, 900]]]


@pytest.mark.slow
def test_what_heads_keep_is_drawn_while_it_comes(page, server):
    page.open(server.url)
    page.wait("return about !== null")
    page.run("document.querySelector('#first').value = 'dms:8'; document.querySelector('#tokens').value = 400")
    page.run("document.querySelector('#heat').value = 1")
    for _ in range(10):  # a random model may end at once
        page.type("#text", "again\n")
        page.wait("return running === null")
        if page.run("return document.querySelector('#maps canvas') !== null"):
            break
    assert "of" in page.run("return document.querySelector('#maps p').textContent")
    colours = page.run(
        "const c = document.querySelector('#maps canvas');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;"
        "for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return [n, c.height]"
    )
    assert colours[0] > 10 and colours[1] == 4  # two layers of two heads
    assert page.errors() == []


def test_stop_key_and_new_chat(page, server):
    page.open(server.url)
    page.wait("return about !== null")
    page.run("document.querySelector('#tokens').value = 480; document.querySelector('#heat').value = 1")
    # From inside the page: asked from here, a short answer could be over before the key arrives.
    page.run(
        "const timer = setInterval(() => { if (running === null) return; clearInterval(timer); window.pressed = 1;"
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'})) }, 1)"
    )
    page.type("#text", "on and on\n")
    page.wait("return window.pressed === 1 && running === null")
    page.run("document.querySelector('#new').click()")
    assert page.run("return [messages.length, document.querySelectorAll('.turn').length]") == [0, 0]
    assert page.run("return document.activeElement.id") == "text"
    assert page.errors() == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_in_light_and_dark(page, server, tmp_path, dark):
    page.size(390, 844)
    page.dark(dark)
    page.open(server.url)
    page.wait("return about !== null")
    page.type("#text", "short\n")
    wait_for_answers(page, 1)
    widths = page.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]
    page.screenshot(tmp_path / "phone.png")
    assert page.errors() == []


def test_everything_is_reached_by_keyboard_and_named(page, server):
    page.open(server.url)
    page.wait("return about !== null")
    unnamed = page.run(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter((one) => "
        "!(one.textContent.trim() || one.ariaLabel || one.labels?.length)).map((one) => one.outerHTML)"
    )
    assert (
        unnamed == [] and page.run("return document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0
    )


def test_a_wrong_key_is_told(page):
    with running_server(api_keys=("right",)) as server:
        page.open(server.url)
        page.wait("return document.querySelector('#state').textContent.includes('API key')")
        page.errors()  # the browser notes each 401
        page.run("sessionStorage.setItem('kvfold-key', 'right'); tryStart()")
        page.wait("return about !== null")
        page.run("sessionStorage.clear()")
        page.run("watcher.abort(); watcher = null")
        assert page.errors() == []
