"""`saewb demo` and `saewb lab`, as typed."""

import subprocess
import sys

import pytest

from saewb import cli


def test_demo_does_the_main_job_offline(capsys, tmp_path):
    page = tmp_path / "made" / "features.html"
    assert cli.main(["demo", "--prompt", "Paris is the capital", "--page", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"The page of features is at {page}"
    assert page.read_text().startswith("<!doctype html>")
    assert "FeatureIndex(1024 latents on 41,997 tokens" in out
    assert "[ German] philosopher" in out, "features that a person can name come first"
    assert "SAE(topk k=16, 128 -> 1024 latents, blocks.2.hook_resid_post, tiny" in out
    assert "' capital'" in out
    rows = {line[:16].strip(): line[17:] for line in out.splitlines() if "%" in line}
    assert rows["with error term"] == rows["model"] != rows["with SAE"]
    assert "ce_recovered_zero" in out
    recovered = next(line for line in out.splitlines() if line.startswith("ce_recovered_zero"))
    assert float(recovered.split()[1]) > 0.9


def test_version_and_help(capsys):
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([argument])
        assert stopped.value.code == 0
    assert "saewb 0.1.0" in capsys.readouterr().out


def test_demo_takes_no_other_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--wrong"])
    assert "unrecognized arguments: --wrong" in capsys.readouterr().err


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_lab_says_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.lab(tmp_path) == 1
    assert 'pip install "saewb[lab]"' in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: True)
    assert cli.lab(tmp_path / "nowhere") == 1
    assert "no folder" in capsys.readouterr().err


def test_lab_opens_the_notebooks(monkeypatch):
    started = []

    def run(command):
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(cli.subprocess, "run", run)
    assert cli.main(["lab", "--no-browser", "--port=8899"]) == 0
    assert started[0][:3] == [sys.executable, "-m", "jupyterlab"]
    assert started[0][3].endswith("notebooks")
    assert started[0][4:] == ["--no-browser", "--port=8899"]
