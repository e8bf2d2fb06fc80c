"""README.md: its code runs, its names and files are there."""

import ast
import re
from pathlib import Path

import pytest

import saewb

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = {*saewb.__all__}


def test_the_code_runs_and_does_what_it_says(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    documents = saewb.tiny.held_out_texts()[:40]
    monkeypatch.setattr(saewb.tiny, "held_out_texts", lambda: documents)
    monkeypatch.chdir(tmp_path)
    names = {}
    code = code.replace("    model.generate(", "    said = model.generate(verbose=False, input=")
    code = code.replace("n_tokens=300_000", "n_tokens=20_480")
    exec(compile(code, "README.md", "exec"), names)
    names["run"].wait()
    before = names["model"].generate("It is a", do_sample=False, verbose=False)
    steered, clean = re.search(r'do_sample=False\)  # "(.+)"; it was "(.+)"', TEXT).groups()
    assert (steered in names["said"], clean in before) == (True, True)
    assert names["run"].sae.cfg.d_sae == 512
    assert (tmp_path / "features.html").stat().st_size > 100_000


def test_what_it_links_to_is_there():
    files = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert len(files) >= 11
    assert [file for file in files if not (ROOT / file).is_file()] == []
    listed = re.findall(r"\]\(notebooks/(\w+\.ipynb)\)", TEXT)
    assert listed == [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def test_headings_that_it_links_to_are_there():
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", TEXT)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= headings


def test_names_in_it_are_there():
    """Names in code, `saewb.x` or, in the table of what there is, `x` alone."""
    prose = re.sub(r"```.*?```", "", TEXT.partition("## Changes")[0], flags=re.S)  # changes name what is gone
    dotted = {name for code in re.findall(r"`([^`]+)`", prose) for name in re.findall(r"saewb\.(\w+)", code)}
    assert dotted
    assert dotted <= NAMES
    table = prose.partition("## What there is")[2].partition("##")[0]
    first = [cell for row in re.findall(r"(?m)^\| (`.*?) \|", table) for cell in re.findall(r"`(\w+)`", row)]
    assert len(first) > 20
    assert [name for name in first if name not in NAMES | {"saewb_widgets"}] == []


def test_each_promise_has_its_test():
    rows = re.findall(r"(?m)^\| .*`test_.*$", TEXT.partition("### Promises")[2].partition("\n## ")[0])
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) == 6
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names
        assert [name for name in names if f"def {name}(" not in tests] == []


def test_commands_in_it_are_there(capsys):
    from saewb.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    known = capsys.readouterr().out
    commands = set(re.findall(r"saewb (\w+)", " ".join(re.findall(r"`saewb [^`]*`", TEXT))))
    assert {"doctor", "lab", "eval", "train"} <= commands
    assert all(re.search(rf"\b{command}\b", known) for command in commands)


def test_its_code_is_python():
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        ast.parse(code)
