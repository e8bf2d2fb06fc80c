"""A real JupyterLab of its own, driven in Chromium: nothing of the user's settings, nothing from outside."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from helpers import chromium

ROOT = Path(__file__).parents[2]
NAME = "a.ipynb"  # of the notebook, in its folder
_READY = """() => { const w = window.jupyterapp?.shell.currentWidget;
  return w?.sessionContext?.isReady && w.sessionContext.session?.kernel?.status === 'idle' }"""


class Notebook:
    """An open notebook: `page` is Playwright's."""

    def __init__(self, page, path):
        self.page, self.path = page, path

    def run(self, cell):
        """Run a cell to its end."""
        js = """(i) => { const nb = jupyterapp.shell.currentWidget.content; nb.activeCellIndex = i; nb.deselectAll();
          return jupyterapp.commands.execute('notebook:run-cell'); }"""
        self.page.evaluate(js, cell)

    def output(self, cell):
        """What stands under a cell."""
        return self.page.locator(f".jp-Notebook .jp-Cell >> nth={cell}").locator(".jp-OutputArea").first.inner_text()

    def do(self, command, **how):
        """Run a command of JupyterLab's."""
        self.page.evaluate("([c, a]) => jupyterapp.commands.execute(c, a)", [command, how])

    @property
    def complaints(self):
        """What the console had to say, each thing once."""
        return list(dict.fromkeys(self.page.complaints))

    def ready(self):
        """Wait for the notebook and its kernel: after `page.reload()` too."""
        _wait_for_kernel(self.page)

    def stands_in(self, cell, text):
        """Wait until what stands in for the panel under a cell, once there is no kernel, says this."""
        self.page.wait_for_function(
            "([i, text]) => [...document.querySelectorAll('.jp-Notebook .jp-Cell')[i]"
            ".querySelectorAll('[class^=saewb-snapshot]')].some(still => still.textContent.includes(text))",
            arg=[cell, text],
        )

    def save(self):
        """Save, and read what was saved."""
        self.do("docmanager:save")
        return json.loads(self.path.read_text())


def go_on(notebook):
    """Let the cell end that waits with `WAIT`."""
    notebook.path.with_name("go_on").touch()


@contextmanager
def opened(browser, work, cells):
    """A notebook of these cells in `work`, not yet run."""
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = work / NAME
    nbformat.write(book, path)
    with _server(work) as base, _opened(browser, path, *base) as page:
        yield Notebook(page, path)


# For a cell: the kernel is busy until the test calls `go_on`.
WAIT = "import pathlib, time\nwhile not pathlib.Path('go_on').exists():\n    time.sleep(0.05)"


def without_a_kernel(browser, work, pictures=None):
    """What a reader sees of the notebook saved in `work` once its kernel is gone: of each cell, the text under it.

    By where it is read: "here", in a JupyterLab started anew, which trusts what it signed; "elsewhere", in that of
    somebody else, which does not; "html", what nbconvert makes of it. None of them may ask anything of a network.

    Args:
        pictures: a folder, and the start of the files' names: (folder, "runs") gives folder/runs_reopened_here.png.
    """
    result = {}
    for where, home in (("here", ".jupyter"), ("elsewhere", ".another")):
        with _server(work, home) as base, _opened(browser, work / NAME, *base) as page:
            page.wait_for_function("() => !document.body.innerText.includes('Loading widget')")
            result[where] = _read(page, ".jp-Notebook .jp-Cell", ".jp-OutputArea", where, pictures)
    with _nbconverted(browser, work / NAME) as page:
        result["html"] = _read(page, ".cell", ".output_wrapper", "html", pictures)
    return result


@contextmanager
def _opened(browser, path, base, token):
    page = browser.new_page(viewport={"width": 1300, "height": 1700})
    page.set_default_timeout(120_000)
    chromium.listen(page, home=(base,))
    page.complaints.clear()
    page.goto(f"{base}/doc/tree/{path.name}?token={token}&reset")
    _wait_for_kernel(page)
    yield page
    page.close()


def _wait_for_kernel(page):
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
    page.wait_for_function(_READY)  # a notebook is there before its kernel
    page.evaluate(
        "() => { const nb = jupyterapp.shell.currentWidget.content;"
        " nb.notebookConfig = { ...nb.notebookConfig, windowingMode: 'none' } }"
    )


@contextmanager
def _nbconverted(browser, path):
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(template_name="basic").from_filename(str(path))
    page = browser.new_page(viewport={"width": 1300, "height": 1700})
    chromium.listen(page)
    page.set_content(f"<!doctype html><meta charset=utf-8><body>{body}</body>")
    yield page
    page.close()


def _read(page, cell, output, where, pictures):
    texts = []
    for i in range(page.locator(cell).count()):
        under = page.locator(f"{cell} >> nth={i}").locator(output)
        texts.append("\n".join(under.all_inner_texts()))
    if pictures is not None:
        page.screenshot(path=f"{pictures[0]}/{pictures[1]}_reopened_{where}.png")
    assert page.asked == [], (where, page.asked)
    return texts


@contextmanager
def _server(work, home=".jupyter"):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, token = work / home, secrets.token_hex(16)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}))
    names = {"JUPYTER_CONFIG_DIR": "cfg", "JUPYTER_RUNTIME_DIR": "rt", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipy"}
    names |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "ws"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "widgets")])
    env = {**os.environ, **{k: str(home / v) for k, v in names.items()}, "PYTHONPATH": paths}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}"]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with open(work / "lab.log", "w") as log:
        lab = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log, cwd=work
        )
    try:
        base = f"http://127.0.0.1:{port}"
        _wait(lab, f"{base}/api?token={token}", work / "lab.log")
        yield base, token
    finally:
        lab.terminate()
        lab.wait(180)


def _wait(lab, url, log, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert lab.poll() is None, log.read_text()[-3000:]
        try:
            return urllib.request.urlopen(url, timeout=1).read()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start in {seconds} s: {log.read_text()[-3000:]}")
