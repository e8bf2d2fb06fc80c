"""The command that compares saewb with its peers: what it runs, what it writes, and what it does when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import dashboard, environments, index, markdown
from benchmarks.__main__ import JOBS, main
from benchmarks.measure import Row, Table, loaded, medians
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

import saewb

ROOT = Path(saewb.__file__).parents[1]

pytestmark = pytest.mark.long


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_one_benchmark_by_name_writes_markdown(tmp_path):
    done = command("loading", "--quick", "--no-peers", "--markdown", tmp_path / "made.md")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "made.md").read_text().splitlines()
    assert lines[0].startswith("Measured on 20")
    assert "saewb 0." in lines[0]
    assert "cores" in lines[0]
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    ours = next(line for line in table if "saewb, SAELens layout" in line).split("|")
    assert ours[3].split()[1] in ("ms", "s")
    assert ours[4].strip() == "1"


def test_one_that_fails_says_so_and_the_others_go_on(tmp_path):
    done = command("dashboard", "loading", "--quick", "--envs", _broken(tmp_path), "--markdown", tmp_path / "made.md")
    made = (tmp_path / "made.md").read_text()
    assert done.returncode == 1
    assert "| **dashboard** (cpu) | failed |" in made
    assert "saewb, SAELens layout" in made


def _broken(folder: Path) -> Path:
    """Where sae-lens' environment is this one, and sae-dashboard's cannot be made."""
    python = folder / "sae-lens" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / "sae-lens" / "installed.txt").write_text(repr(environments._steps("sae-lens")))
    (folder / "sae-dashboard").write_text("a file, where a folder should be")
    return folder


def test_an_unknown_name_is_answered_with_those_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "atach"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "no benchmark atach; there are imports, attach" in capsys.readouterr().err


def test_every_job_is_a_module_that_takes_its_arguments():
    for job in JOBS.values():
        assert (ROOT / "tests" / "benchmarks" / f"{job.module}.py").is_file()


def test_markdown_has_a_column_for_each_device_and_failures():
    table = Table("work | one", (Row("saewb", 0.002), Row("peer", 0.0306, "4 | 5")), "saewb")
    quicker = Table("work | one", (Row("saewb", 0.0001), Row("peer", 0.0002)), "saewb")
    results = [
        markdown.Result("a", "cpu", (table,), {"machine": "M, 2 cores", "torch": "2"}),
        markdown.Result("a", "cuda", (quicker,), {"GPU": "G"}),
        markdown.Result("b", "cpu", (), failed="RuntimeError: no"),
    ]
    lines = markdown.markdown(results, "2026-01-02").splitlines()
    assert lines[0].startswith("Measured on 2026-01-02: M, 2 cores; torch 2, GPU G.")
    assert lines[2:] == [
        "| work |  | CPU | ratio | CUDA | ratio |  |",
        "| -- | -- | --: | --: | --: | --: | -- |",
        r"| work \| one | saewb | 2 ms | 1 | 0.1 ms | 1 |  |",
        r"|  | peer | 30.6 ms | 15.3 | 0.2 ms | 2 | 4 \| 5 |",
        "| **b** (cpu) | failed |  |  |  |  | RuntimeError: no |",
    ]


def test_the_readme_keeps_what_stands_around_the_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    for result in ("new\n", "newer\n"):
        markdown.put_into(readme, result)
        assert readme.read_text() == f"before\n{markdown.BEGIN}\n{result}{markdown.END}\nafter\n"
    readme.write_text("no place")
    with pytest.raises(ValueError, match="no place for the table"):
        markdown.put_into(readme, "new\n")
    assert readme.read_text() == "no place"


@given(st.lists(st.tuples(st.text(), st.none() | st.floats(0, 1e6), st.text()), max_size=4), st.text())
@examples(25)
def test_tables_survive_json(rows, title):
    from dataclasses import asdict

    table = Table(title, tuple(Row(*row) for row in rows), rows[0][0] if rows else "")
    assert loaded([asdict(table)]) == [table]
    assert str(table).splitlines()[0:1] == title.rstrip().splitlines()[0:1] or not title.strip()


def test_calls_are_taken_in_turn_and_the_first_round_does_not_count():
    seen = []
    took = medians({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, warm=lambda name: name == "b")
    assert "".join(seen) == "babab"
    assert all(0 <= value < 1 for value in took.values())


def test_a_list_of_tokens_read_as_an_index_has_it_is_what_an_index_has():
    """The part that makes SAEDashboard's list and saewb's comparable, on saewb's own activations."""
    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    texts = [document.text for document in saewb.tiny.held_out_texts()[:6]]
    ids = saewb.data.tokens.token_rows(model, texts, 32)
    ids = torch.cat([ids, ids[:3]])  # equal windows too
    created = saewb.build_index(model, sae, ids, window=dashboard.WINDOW)
    special = saewb.models.tokenizer.special_ids(model, True)
    with torch.no_grad():
        acts = sae.encode(saewb.models.capture.capture(model, ids, [sae.cfg.hook])[sae.cfg.hook])
    acts[torch.isin(ids, torch.tensor(special))] = 0
    order = acts.flatten(0, 1).sort(dim=0, descending=True, stable=True)
    compared = created.table().density.nlargest(20).index.tolist()
    theirs = {
        "position": order.indices.T[compared],
        "value": order.values.T[compared],
        "n_active": (acts.flatten(0, 1) > 0).sum(0)[compared],
        "logits_top": torch.tensor([[x.effect for x in created.latent(i).logits_top] for i in compared]),
        "logits_bottom": torch.tensor([[x.effect for x in created.latent(i).logits_bottom] for i in compared]),
    }
    result = dashboard.agreement(created, theirs, compared, ids)
    assert (result.contexts, result.firings, result.logits) == (20, 20, 20)
    wrong = {**theirs, "value": theirs["value"] * 1.1, "n_active": theirs["n_active"] + 1}
    result = dashboard.agreement(created, wrong, compared, ids)
    assert (result.contexts, result.firings, result.logits) == (0, 0, 20)


def test_contexts_are_the_same_where_only_ties_differ():
    ours = [(1, 9.0), (7, 5.0), (3, 5.00001), (8, 2.0)]
    assert dashboard.same_contexts(ours, [(1, 9.0), (3, 5.0), (7, 5.0), (9, 2.0)])  # the last one ties with another
    assert not dashboard.same_contexts(ours, [(2, 9.0), (3, 5.0), (7, 5.0), (8, 2.0)])
    assert not dashboard.same_contexts(ours, ours[:3])


def test_an_index_is_measured_whole(tmp_path):
    """The benchmark's chunks add up to the index that `build_index` makes of all rows."""
    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    ids = index.rows_of(model, 12 * index.CTX, None)
    options = index.arguments("").parse_args([])
    options.chunk, options.batch, options.forward_every = 5, 4, 2
    took, _, _, build = index.passes(model, sae, ids, options)
    assert [forward is not None for forward, _ in took] == [True, False, True]
    whole = saewb.build_index(model, sae, ids, batch_size=4)
    assert build.info.n_tokens == whole.n_tokens
    tensors = build.accumulator.tensors()
    assert torch.equal(tensors["top.position"], whole.tensors["top.position"])
    assert torch.equal(tensors["counts.by_position"], whole.tensors["counts.by_position"])
