"""`sense-engram play` in a process of its own, used through headless Chromium; what leaves the machine, and what the
command refuses.

The process runs under an audit hook that writes down every address that Python connects or sends to and every name it
resolves; the browser's requests are written down by host.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from test_cli import content
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake

from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.hf import save_pretrained
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.fresh_model import train_bpe
from sense_v2.report.play.server import local_only

ROOT = Path(__file__).parents[2]
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
HOSTILE = "def <script>document.title='taken'</script> \"q\" 'r' & <b>b</b> ${1+1} {{7*7}} &lt;"

# sys.addaudithook sees every call in C that patching a module's names would miss.
RECORDED = """
import socket, sys
log = open(sys.argv.pop(1), "a", buffering=1)
NAMES = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
def record(event, arguments):
    if event in NAMES:
        address = arguments[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else arguments[1]
        print(event, address[0] if isinstance(address, tuple) else address, file=log)
sys.addaudithook(record)
socket.getaddrinfo("127.0.0.1", 80)
from sense_v2.cli.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model of three layers, bytes for tokens where its few words don't do."""
    folder = tmp_path_factory.mktemp("play")
    tokenizer = train_bpe(["def main(self):\n    return name\n<script>alert('x')</script> \"quoted\" & more"] * 3)
    torch.manual_seed(1)
    model = tiny_model("llama", vocabulary=tokenizer.get_vocab_size())
    (folder / "table").mkdir()
    attach_engram(model, tiny_config(folder / "table"), tokenizer)
    wake(memory_of(model))
    model.generation_config.eos_token_id = None
    save_pretrained(model, folder / "model", tokenizer=tokenizer)
    return folder / "model"


@dataclass
class Server:
    process: subprocess.Popen
    saved: Path
    before: dict
    """The model's files, by name."""
    address: str = ""

    def printed(self) -> str:
        return (self.saved.parent / "log").read_text()

    def end(self) -> None:
        """Ctrl-C. It ends cleanly, no file of the model has changed, and no address elsewhere was ever asked for."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(timeout=60) == 130, self.printed()
        assert "Traceback" not in self.printed(), self.printed()
        assert content(self.saved) == self.before
        seen = (self.saved.parent / "addresses").read_text().splitlines()
        assert seen[0] == "socket.getaddrinfo 127.0.0.1"
        assert [line for line in seen if line.split()[1] not in ("127.0.0.1", "localhost", "::1")] == []


@pytest.fixture(scope="module")
def server(saved):
    folder = saved.parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("HF_HUB_OFFLINE", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        environment.pop(name, None)
    command = [sys.executable, "-c", RECORDED, str(folder / "addresses"), "play", str(saved), "--port", "0"]
    command += ["--save-to", str(folder / "deltas")]
    before = content(saved)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            # What a shell starts in the background ignores Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        server = Server(process, saved, before)
        try:
            deadline = time.monotonic() + 600
            while not server.address:
                assert process.poll() is None, server.printed()
                assert time.monotonic() < deadline, server.printed()
                found = re.search(r"http://127\.0\.0\.1:\d+", server.printed())
                server.address = found[0] if found else ""
                time.sleep(0.1)
            yield server
            if process.poll() is None:
                server.end()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = shutil.which("chromium")
    if path is None:
        reason = "the page is tested in Chromium, which isn't there: apt-get install chromium (Debian's package)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=path, args=list(CHROMIUM_FLAGS)
        )
        context.set_default_timeout(120_000)
        yield context
        context.close()


@pytest.fixture
def page(browser, server):
    """A new tab with the page open. At the end: no request went elsewhere or was kept from it, nothing failed."""
    tab = browser.new_page()
    hosts, complaints = set(), []
    tab.on("request", lambda request: hosts.add(urlsplit(request.url).netloc or urlsplit(request.url).scheme))
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(server.address)
    tab.wait_for_selector("#text textarea")
    yield tab
    tab.close()
    assert hosts <= {urlsplit(server.address).netloc, "data", "blob"}
    assert complaints == []


def type_text(page, text):
    page.fill("#text textarea", text)


def shows(page, selector, text):
    """Waits until `selector` holds the text."""
    page.locator(selector, has_text=text).first.wait_for()


# As they were typed: what shows white space is taken out again.
TOKENS = (
    "[...document.querySelectorAll('#look .sense > pre > span')]"
    ".map(one => one.lastChild.textContent.replaceAll('↵', '').replaceAll('·', ' '))"
)


def reads(page, text):
    """Waits until the coloured text is `text`; returns its HTML. (Each token has in it what opens on it.)"""
    page.wait_for_function(f"text => {TOKENS}.join('') == text", arg=text)
    return page.inner_html("#look .sense > pre")


def test_what_is_typed_is_seen_as_it_is_typed(page):
    reads(page, page.input_value("#text textarea"))
    page.click("#text textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type("def main")
    reads(page, "def main")
    assert page.evaluate(TOKENS) == ["def", " main"]
    token = page.locator("#look .sense > pre > span").nth(1)
    assert not token.locator(".tip").is_visible()
    token.hover()
    tip = token.locator(".tip")
    assert tip.is_visible()
    for label in ("gate", "token id", "compressed id", "2-gram", "rows, 3-gram", "probability with memory"):
        assert label in tip.inner_text()
    page.click("text=as a table")
    page.locator("#rows tbody tr").nth(1).wait_for()  # drawn when it is opened
    assert page.locator("#rows tbody tr").count() == 2


def test_hostile_text_is_only_text(page):
    type_text(page, HOSTILE)
    reads(page, HOSTILE)
    page.fill("#prompt textarea", HOSTILE)
    page.fill("#fact textarea", "<b>'\"")
    page.fill("#watched textarea", HOSTILE)
    page.click("#teach")
    shows(page, "#lesson", "steps moved")
    shows(page, "#facts", HOSTILE.replace(" ", "·"))
    assert page.locator("#look b b, #facts script, #lesson script, #look script").count() == 0
    assert page.title() != "taken"


def test_no_text_and_a_long_one(page):
    type_text(page, "")
    shows(page, "#look", "Type something above")
    page.click("#generate")
    shows(page, "#comparison .warning", "The prompt has no tokens")
    type_text(page, "main return " * 400)
    shows(page, "#look", "tokens before it were left out")


def test_two_continuations_side_by_side(page):
    type_text(page, HOSTILE)
    page.fill("#new-tokens input[type=number]", "6")
    page.keyboard.press("Tab")
    page.click("#generate")
    page.wait_for_selector("#comparison pre")
    assert page.locator("#comparison figure").count() == 2
    with_memory, without = (page.locator("#comparison figure").nth(number) for number in (0, 1))
    assert with_memory.locator("pre > span").count() == without.locator("pre > span").count() == 6
    assert with_memory.locator(".differs").count() > 0
    token = with_memory.locator("pre > span").first
    tip = token.locator(".tip")
    assert not tip.is_visible()
    token.hover()
    assert tip.is_visible()
    assert re.search(r"with memory\s*[\d.]+ %\s*without memory\s*[\d.]+ %\s*1\.", tip.inner_text())


def test_teaching_undoing_and_saving_in_one_tab_of_two(page, browser, server):
    fact = "class Point:\n    def"
    type_text(page, fact)
    fresh = reads(page, fact)
    page.fill("#prompt textarea", "class Point")
    page.fill("#fact textarea", ":\n    def")
    page.click("#save")
    shows(page, "#lesson", "nothing to save")
    page.click("#teach")
    shows(page, "#lesson", "What else it moved")
    shows(page, "#facts", "class·Point")
    shows(page, "#look pre", "taught here")
    assert reads(page, fact) != fresh

    other = browser.new_page()
    other.goto(server.address)
    type_text(other, fact)
    assert reads(other, fact) == fresh
    other.click("#undo")
    shows(other, "#lesson", "Nothing was taught in this tab")
    other.close()

    page.bring_to_front()
    page.click("#save")
    shows(page, "#lesson", "Saved")
    assert len(read_delta(page.inner_text("#lesson .path")).row_ids_U) > 0
    page.click("#undo")
    shows(page, "#lesson", "is taken back")
    shows(page, "#facts", "Nothing is taught in this tab")
    page.wait_for_function("!document.querySelector('#look').textContent.includes('taught here')")
    assert reads(page, fact) == fresh


def test_it_fits_a_phone_and_follows_the_dark_scheme(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_selector("#look pre")
    page.click("text=as a table")
    page.wait_for_selector("#rows table")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ground = "getComputedStyle(document.querySelector('#look pre')).backgroundColor"
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    page.reload()
    page.wait_for_selector("#look pre")
    assert page.evaluate(ground) == "rgb(20, 24, 29)"


def test_ctrl_c_ends_it_while_a_page_is_open(server, page):
    server.end()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(server.address).port), timeout=5)


# What is refused


def test_a_port_in_use_names_the_way_out(run, saved):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, out, error = run("play", saved, "--port", port)
    assert (status, out) == (1, "")
    assert f"port {port} is in use" in error
    assert f"--port {port + 1}" in error


def test_a_model_without_memory_is_refused(run, tmp_path):
    save_pretrained(tiny_model("llama"), tmp_path / "plain", tokenizer=train_bpe(["a b"]))
    status, out, error = run("play", tmp_path / "plain", "--port", 0)
    assert (status, out) == (1, "")
    assert "has no memory" in error


def test_a_memory_that_looks_ahead_is_refused(run, tmp_path):
    (tmp_path / "table").mkdir()
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path / "table", causal=False), tiny_tokenizer())
    save_pretrained(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    status, out, error = run("play", tmp_path / "model", "--port", 0)
    assert (status, out) == (1, "")
    assert "doesn't write text" in error


def test_a_missing_package_is_named(run, saved, monkeypatch):
    monkeypatch.setattr("sense_v2.cli.commands.serving.find_spec", lambda name: None)
    status, out, error = run("play", saved, "--port", 0)
    assert (status, out) == (1, "")
    assert 'pip install "sense-v2[play]"' in error


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:80"}, 200),
        ({"host": "localhost:80", "origin": "http://localhost:80"}, 200),
        ({"host": "127.0.0.1:80", "origin": "http://127.0.0.1:81"}, 403),
        ({"host": "127.0.0.1:80", "origin": "https://example.org"}, 403),
        ({"host": "127.0.0.1:80", "origin": "null"}, 403),
        ({"host": "example.org:80"}, 403),
        ({"host": "127.0.0.1.example.org"}, 403),
        ({}, 403),
    ],
)
def test_only_pages_of_this_machine_are_answered(headers, status):
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    with pytest.raises(StopIteration):  # how a coroutine ends that waits for nothing
        local_only(app)(scope, None, send).send(None)
    assert sent[0]["status"] == status
    if status == 200:
        policy = dict(sent[0]["headers"])[b"content-security-policy"].decode()
        assert "default-src 'self'" in policy
        assert not re.search(r"https?:|\*", policy)
