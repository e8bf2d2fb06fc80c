"""`saewb demo` and `saewb lab`, as typed."""

import subprocess
import sys
from itertools import pairwise
from unittest import mock

import pytest

import saewb
from saewb import cli
from saewb.training.train import train_file


@pytest.mark.long
def test_demo_does_the_main_job_offline(capsys, tmp_path):
    page = tmp_path / "made" / "features.html"
    arguments = ["--prompt", "Paris is the capital", "--page", str(page), "--train-tokens", "20_000"]
    assert cli.main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    assert "finished: 19,456 of 19,456 tokens (100%)" in out
    mine = next(line for line in out.splitlines() if line.startswith("mine"))
    assert 0.1 < float(mine.split()[2]) < 0.9  # fvu of an SAE trained for a second
    assert out.splitlines()[-1] == f"The page of features is at {page}"
    assert page.read_text().startswith("<!doctype html>")
    assert "FeatureIndex(1024 latents on 41,997 tokens" in out
    assert "to the[ west]; it lies" in out, "features that a person can name come first"
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


def test_lab_of_an_installed_package_finds_the_notebooks_or_says_where_they_are(monkeypatch, tmp_path, capsys):
    started = []
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(cli.subprocess, "run", lambda command: started.append(command) or mock.Mock(returncode=0))
    monkeypatch.setattr(saewb, "__file__", str(tmp_path / "site-packages" / "saewb" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.lab(None) == 0
    assert f"are in saewb's repository, not in the package. Opening {tmp_path}" in capsys.readouterr().err
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_tour.ipynb").touch()
    assert cli.lab(None) == 0
    assert capsys.readouterr().err == ""
    assert [command[3] for command in started] == [f"--notebook-dir={tmp_path}", f"--notebook-dir={tmp_path}/notebooks"]


def test_demo_says_at_once_that_its_page_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--page", str(tmp_path / "file" / "page.html")]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "the page cannot be written" in output.err
    assert "fix:  saewb demo --page ~/saewb_demo.html" in output.err


def test_an_interrupted_demo_leaves_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(saewb, "load_model", interrupted)
    assert cli.main(["demo", "--page", str(tmp_path / "page.html")]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_eval_prints_a_table_and_keeps_it(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("The river flows through the city.\n\nMarie Curie was a Polish physicist.\n" * 20)
    arguments = ["eval", "tiny", "tiny", "--texts", str(texts), "--ctx-len", "16", "--n-rows", "4", "--no-losses"]
    assert cli.main([*arguments, "--folder", str(tmp_path / "kept")]) == 0
    printed = capsys.readouterr().out
    assert printed.split()[0:2] == ["name", "tiny"]
    assert "fvu" in printed
    assert "ce_clean" not in printed
    assert (tmp_path / "kept" / "evaluations.csv").exists()


def test_eval_says_what_is_wrong_in_one_breath(capsys):
    assert cli.main(["eval", "tiny", "./no_such_folder", "--n-rows", "2"]) == 1
    assert "no_such_folder does not exist" in capsys.readouterr().err


def test_a_file_of_references_within_references_is_refused(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghij")]
    (tmp_path / "t.yaml").write_text("\n".join([*lines, "tokens: *j", "saes: {}", "n_tokens: 1", "folder: x", ""]))
    with pytest.raises(saewb.FormatError, match="has references"):
        train_file(tmp_path / "t.yaml")
