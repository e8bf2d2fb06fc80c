"""Widgets in Chromium without Jupyter: their own ESM, over a model whose every step goes to the Python object."""

import base64
import json
import os
import re
import shutil
from contextlib import contextmanager

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_MODEL = """
async ({ esm, css, state, bins }) => {
  document.head.appendChild(Object.assign(document.createElement("style"), { textContent: css }));
  const raw = (s) => { const b = atob(s), a = new Uint8Array(b.length);
    for (let i = 0; i < b.length; i++) a[i] = b.charCodeAt(i); return new DataView(a.buffer); };
  for (const k of bins) state[k] = raw(state[k]);
  const heard = {}, dirty = {}, fire = (e, ...a) => (heard[e] || []).slice().forEach((f) => f(...a));
  const apply = (r) => {
    const changed = Object.entries(r.state).filter(([k, v]) => JSON.stringify(state[k]) !== JSON.stringify(v));
    for (const [k, v] of changed) state[k] = v;
    for (const [k] of changed) fire("change:" + k);
    for (const m of r.msgs) fire("msg:custom", m.content, m.buffers.map(raw)); };
  const model = { get: (k) => state[k],
    set: (k, v) => { if (JSON.stringify(state[k]) === JSON.stringify(v)) return;
      state[k] = v; dirty[k] = v; fire("change:" + k); },
    save_changes: async () => { const d = { ...dirty }; for (const k in dirty) delete dirty[k];
      apply(await pySync(d)); },
    send: async (c) => apply(await pySend(c)), on: (e, f) => (heard[e] ||= []).push(f),
    off: (e, f) => { heard[e] = (heard[e] || []).filter((g) => g !== f); } };
  window.__apply = apply;
  window.__heard = () => Object.values(heard).flat().length;
  const m = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
  const d = typeof m.default === "function" ? await m.default() : m.default;
  const el = document.body.appendChild(document.createElement("div"));
  await d.initialize?.({ model });
  window.__stop = await d.render({ model, el });
}"""


def need_chromium():
    """Skip where there is no browser, unless this is CI: there it must be."""
    if "CI" in os.environ:
        assert PROGRAM, "CI has no Chromium: apt-get install -y --no-install-recommends chromium fonts-dejavu-core"
        import playwright  # noqa: F401

        return
    pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium fonts-dejavu-core")


@contextmanager
def launched():
    """A Chromium that reaches nothing but this machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        options = [*FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        opened = play.chromium.launch(executable_path=PROGRAM, args=options)
        yield opened
        opened.close()


# What JupyterLab says of its own plugins on a machine that has much to do.
_SLOW = re.compile(r"(is taking too long|took [\d.]+ ?ms) to activate\.$")


def listen(page, home=()):
    """Note on `page.complaints` what it complains of, on `page.asked` what it asks of a network beyond `home`."""
    page.complaints, page.asked = [], []

    def console(message):
        if message.type in ("error", "warning") and not _SLOW.search(message.text):
            page.complaints.append(message.text)

    page.on("console", console)
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    leave = lambda d: d.type == "beforeunload"  # JupyterLab asks where a notebook has changed  # noqa: E731
    page.on("dialog", lambda d: d.accept() if leave(d) else (page.complaints.append("a dialog"), d.dismiss()))
    inside = ("data:", "blob:", "about:", *home)
    page.on("request", lambda r: page.asked.append(r.url) if not r.url.startswith(inside) else None)


def mount(page, widget):
    """Render a widget; gives what to call after changing traits from Python.

    Exceptions of callbacks are noted on `page.raised`, as a kernel would write them to its log.
    """
    out, changed, page.raised = [], {}, []
    page.calls = []  # every message of the front end
    keys = [k for k in widget.keys if not k.startswith("_") and k not in ("layout", "tooltip", "tabbable")]

    def send_state(key=None):
        changed.update(dict.fromkeys([key] if isinstance(key, str) else keys if key is None else key))

    def send(content, buffers=None):
        out.append({"content": content, "buffers": [base64.b64encode(bytes(b)).decode() for b in buffers or []]})

    widget.send, widget.send_state = send, send_state

    def state(names):
        return json.loads(json.dumps({k: v for k, v in widget.get_state().items() if k in set(names)}, default=_plain))

    def flush():
        r = {"state": state(changed), "msgs": list(out)}
        changed.clear()
        out.clear()
        return r

    def asked(content):
        page.calls.append(content)
        try:
            widget._handle_custom_msg(content, [])
        except Exception as error:
            page.raised.append(error)
        return flush()

    def synced(values):
        page.calls.append(values)
        try:
            widget.set_state(values)
        except Exception as error:
            page.raised.append(error)
        return flush()

    page.expose_function("pySend", asked)
    page.expose_function("pySync", synced)
    text = state(keys)
    bins = [k for k in keys if isinstance(getattr(widget, k), bytes)]
    page.evaluate(_MODEL, {"esm": str(widget._esm), "css": str(widget._css), "state": text, "bins": bins})
    return lambda: page.evaluate("r => __apply(r)", flush())


def _plain(value):
    return base64.b64encode(bytes(value)).decode()
