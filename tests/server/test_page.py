"""The web page of --ui: its headers, and its behaviour in a browser."""

import base64
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import PROGRAM, Browser
from live_server import SCENE, LiveServer

from mlx_fastvlm.server.settings import Settings

Starter = Callable[..., LiveServer]
STATIC = Path(__file__).parents[2] / "mlx_fastvlm" / "server" / "static"
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs chromium")
KEY = "correct-horse"

FILE = f"""
const bytes = Uint8Array.from(atob("{base64.b64encode(SCENE.read_bytes()).decode()}"),
                              (c) => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], "scene.png", {{ type: "image/png" }}));
"""
DROP = f"{{{FILE} document.dispatchEvent(new DragEvent('drop', {{ dataTransfer: transfer }})); }}"
PASTE = DROP.replace(
    "DragEvent('drop', { dataTransfer:", "ClipboardEvent('paste', { clipboardData:"
)


def test_page_loads_no_external_resources(start: Starter) -> None:
    server = start(Settings(page=True))
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/")):
        reply = server.get(path)
        assert reply.status == 200 and reply.headers["content-type"].startswith(kind)
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert not re.search(rb"https?://", reply.data)
    assert not re.search(r"<script>|<style|\son\w+=", (STATIC / "index.html").read_text())
    assert "innerHTML" not in (STATIC / "page.js").read_text()
    assert server.get("/static/page.js").status == 404


@pytest.fixture
def browser(start: Starter, tmp_path: Path) -> Iterator[Browser]:
    server = start(Settings(page=True, api_key=KEY))
    page = Browser(tmp_path, f"http://localhost:{server.port}/")
    yield page
    page.close()


@needs_browser
def test_page_in_a_browser(browser: Browser) -> None:
    """API key, dropped and pasted image, streamed answer, camera; one test, as startup is slow."""

    def text(name: str) -> str:
        return str(browser.evaluate(f"document.getElementById('{name}').innerText"))

    def click(name: str) -> None:
        browser.evaluate(f"document.getElementById('{name}').click()")

    def ask(question: str, button: str = "ask") -> str:
        browser.evaluate(f"document.getElementById('question').value = '{question}'")
        click(button)
        browser.wait_for("at('times').textContent.startsWith('First token after')")
        return text("answer")

    browser.wait_for("document.readyState === 'complete' && !at('key-form').hidden")
    browser.evaluate("at('key').value = 'wrong'; at('key-form').requestSubmit()")
    browser.wait_for("at('answer').textContent.includes('key is missing or wrong')")
    browser.evaluate(f"at('key').value = '{KEY}'; at('key-form').requestSubmit()")
    browser.wait_for("at('model').textContent === 'demo'")
    assert browser.evaluate("at('key-form').hidden")

    for place in (DROP, PASTE):
        browser.evaluate(place)
        browser.wait_for("!at('image').hidden && at('image').complete")
        assert ask("How many circles are there?") == "There are 2 circles."
        assert re.fullmatch(r"First token after \d+ ms, then [\d.]+ tokens/s", text("times"))
        if shot := os.environ.get("PAGE_SCREENSHOT"):
            browser.screenshot(Path(shot))
        click("remove")
        assert browser.evaluate("at('image').hidden && imageUri === null")

    click("camera")
    browser.wait_for("!at('ask-frame').hidden && at('video').videoWidth > 0")
    assert ask("Describe the image.", "ask-frame")
    click("camera")
    browser.wait_for("at('video').srcObject === null && at('ask-frame').hidden")
    problems = [problem for problem in browser.problems if "401" not in problem]
    assert not problems, problems
