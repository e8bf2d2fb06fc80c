"""`saewb doctor`: what is missing or does not fit is found, with the line that mends it."""

import importlib.metadata
import json
import shutil
import sys
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
from huggingface_hub import constants

import saewb
from saewb import cli, diagnostics


def finding(name, **how):
    (result,) = [f for f in saewb.doctor(**how).findings if f.name == name]
    return result


@pytest.fixture
def versions(monkeypatch):
    """Set what is installed: {name: version, or None}."""
    real = importlib.metadata.version
    changed = {}

    def version(name):
        if name in changed and changed[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return changed


def test_all_is_well_here_but_for_what_is_absent():
    result = saewb.doctor()
    wrong = [f for f in result.findings if f.state == "wrong" and f.name not in ("hub cache", "saewb cache", "kernel")]
    assert [f for f in wrong if not f.name.endswith("in the page")] == []
    assert repr(result).splitlines()[0].startswith("ok saewb")
    assert result._repr_html_().count("<tr>") == len(result.findings)


def test_memory_that_caches_hold_counts_as_unused(monkeypatch):
    monkeypatch.setattr(saewb.training.memory, "available", lambda device: 3 * 2**30)
    assert ", 3.0 of " in finding("CPU").detail
    monkeypatch.setattr(saewb.training.memory, "available", lambda device: None)
    assert "memory" not in finding("CPU").detail


def test_a_missing_and_an_old_package(versions):
    versions |= {"safetensors": None, "transformer-lens": "2.16.1", "jupyterlab": None}
    missing, old, lab = finding("safetensors"), finding("transformer-lens"), finding("jupyterlab")
    assert (missing.state, missing.fix) == ("wrong", 'pip install "safetensors>=0.5"')
    assert old.state == "wrong"
    assert old.detail.startswith("2.16.1; saewb is made for transformer-lens")
    assert (lab.state, lab.fix.split("  ")[0]) == ("absent", 'pip install "saewb[lab]"')
    assert not saewb.doctor().ok


def test_transformers_that_generates_wrong_text(versions):
    versions["transformers"] = "5.24.0"
    assert finding("transformers").state == "wrong"
    versions["transformers"] = "5.23.0"
    assert finding("transformers").state == "ok"


def test_folders(monkeypatch, tmp_path):
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(file / "hub"))
    assert finding("hub cache").fix == "export HF_HOME=<a folder of yours>"
    monkeypatch.setenv("SAEWB_CACHE", str(tmp_path / "deep" / "er"))
    assert finding("saewb cache").state == "ok"
    assert not (tmp_path / "deep").exists()  # it only looks
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    small = finding("saewb cache")
    assert (small.state, small.fix) == ("wrong", "export SAEWB_CACHE=<a folder on a larger disk>")


def test_offline_is_said(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert finding("HF_HUB_OFFLINE").state == "absent"


def test_a_kernel_of_another_environment(monkeypatch, tmp_path):
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    other = tmp_path / "python"
    other.write_text("")
    spec = {"argv": [str(other), "-m", "ipykernel_launcher"], "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    result = finding("kernel")
    assert (result.state, result.fix.split(" -m ")[0]) == ("wrong", sys.executable)
    spec["argv"][0] = sys.executable
    (kernel / "kernel.json").write_text(json.dumps(spec))
    assert finding("kernel").state == "ok"


def test_the_front_end_half_of_the_widgets(monkeypatch, tmp_path):
    import jupyter_core.paths

    monkeypatch.setattr(diagnostics, "_share_jupyter", lambda: tmp_path)
    monkeypatch.setattr(jupyter_core.paths, "jupyter_path", lambda *_: [])
    assert finding("anywidget in the page").state == "wrong"
    (tmp_path / "labextensions" / "anywidget").mkdir(parents=True)
    assert finding("anywidget in the page").state == "ok"


def test_colab_needs_none_of_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", object())
    assert finding("notebook").state == "ok"


def test_a_damaged_install(monkeypatch, tmp_path):
    monkeypatch.setattr(saewb.tiny, "folder", lambda what: tmp_path / what)
    assert finding("tiny sae").fix == "pip install --force-reinstall saewb"


class Refuses(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Refuses)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    Thread(target=server.handle_request, daemon=True).start()
    assert finding("hub", network=True).detail.endswith("answers (401)")
    server.server_close()
    assert finding("hub", network=True).state == "wrong"
    with pytest.raises(ValueError, match="timeout is 0"):
        saewb.doctor(timeout=0)


def test_on_the_command_line(monkeypatch, capsys):
    lines = (diagnostics.Finding("a", "fine"), diagnostics.Finding("b", "bad", "wrong", "mend b"))
    monkeypatch.setattr(saewb, "doctor", lambda network, check: diagnostics.Checkup(lines))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == "ok a  fine\n!! b  bad\n      fix:  mend b\n\n1 to mend: marked !!\n"
    monkeypatch.setattr(saewb, "doctor", lambda network, check: diagnostics.Checkup(lines[:1]))
    assert cli.main(["doctor"]) == 0


def checks(**how):
    return {f.name.removeprefix("check: "): f for f in saewb.doctor(**how).findings if f.name.startswith("check: ")}


def test_a_device_is_checked_on_request():
    """This CPU in float32 against float64, dense products and its own counts; a device that does not exist raises."""
    assert checks() == {}
    results = checks(check="cpu")
    assert list(results) == ["attach", "train", "index"]
    assert {f.state for f in results.values()} == {"ok"}, results
    with pytest.raises(ValueError, match="no device 'cpuu'"):
        saewb.doctor(check="cpuu")


def test_a_device_that_computes_something_else_is_seen(monkeypatch, capsys):
    attach, losses = diagnostics._attach, diagnostics._losses

    def inexact(model, tokens, device):
        latents, logits = attach(model, tokens, device)
        return (latents, logits) if model.cfg.dtype == torch.float64 else (latents, logits * 1.01)

    def fails(model, tokens, device, step):
        if step == "auto":
            raise RuntimeError("no kernel image is available")
        return losses(model, tokens, device, step)

    monkeypatch.setattr(diagnostics, "_attach", inexact)
    monkeypatch.setattr(diagnostics, "_losses", fails)
    results = checks(check="cpu")
    assert [f.state for f in results.values()] == ["wrong", "wrong", "ok"], results
    assert "differ from the CPU's by 1e-02" in results["attach"].detail
    assert results["attach"].fix
    assert "no kernel image" in results["train"].detail
    assert cli.main(["doctor", "--check", "cpu"]) == 1
    assert "check: train" in capsys.readouterr().out
