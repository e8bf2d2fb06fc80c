"""CataloguePicker without a browser: what it lists, what it says, and downloads from a hub that is a thread here."""

import doctest
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from helpers import panel_driver
from helpers.architecture_registry import feed_forward
from helpers.fake_hub import hub
from saewb_widgets import CataloguePicker
from saewb_widgets.catalogue_picker import filter
from saewb_widgets.catalogue_picker import panel as catalogue_picker

import saewb
from saewb.pretrained.load import save_sae

JB = ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
FILTERS = [
    {},
    {"model": "google/gemma-2-2b", "site": "resid_post", "layer": 20, "width": 16384},
    {"release": "gpt2-small-res-jb", "sort": "layer", "descending": True},
    {"l0": (20, 60), "sort": "l0"},
    {"l0": (None, 33.5), "sort": "bytes", "descending": True},
    {"l0": (200, None), "on_neuronpedia": True},
    {"on_neuronpedia": False, "query": "GEMMA transcoder (", "sort": "id"},
    {"query": "res 16k layer_1", "sort": "d_sae"},
    {"layer": 99},
]


@pytest.fixture(scope="module")
def everything():
    return saewb.catalogue()


def executed(panel, **given):
    exec(panel.code(), given)
    return given


@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_the_table_is_what_code_makes_and_one_page_of_it_is_sent(asked):
    panel = CataloguePicker(**asked)
    table = executed(panel)["table"]
    assert table.equals(panel.table)
    assert panel.rows["total"] == len(table)
    assert [r[:2] for r in panel.rows["rows"]] == table[["release", "id"]][:100].values.tolist()
    assert panel_driver.sent(panel) < 100_000


def test_rows_by_other_means(everything):
    panel = CataloguePicker(model="gemma-2-2b", query="Res 16K", l0=(50, 80), sort="l0", descending=True)
    assert panel.model == "google/gemma-2-2b"
    want = [
        (r.l0, r.release, r.id)
        for r in everything.itertuples()
        if r.model == "google/gemma-2-2b" and 50 <= r.l0 <= 80
        if all(w in f"{r.release} {r.id} {r.model} {r.hook} {r.repo}".lower() for w in ("res", "16k"))
    ]
    assert len(want) > 9
    assert [(r[6], r[0], r[1]) for r in panel.rows["rows"]] == sorted(want, key=lambda x: -x[0])[:100]


def test_a_model_lists_what_is_counted_for_it(everything):
    panel = CataloguePicker()
    assert sum(n for _, n in panel.left["release"]) == len(everything)
    for model, n in panel.left["model"][::7]:
        panel.model = model
        assert panel.rows["total"] == n == len(saewb.catalogue(model=model))
        # The counts of the models are of what would be listed instead, so they stay.
        assert len(panel.left["model"]) == everything.model.nunique()
        assert sum(n for _, n in panel.left["release"]) == n


def test_what_remains_after_other_filters(everything):
    panel = CataloguePicker(site="attn_out", width=32768)
    rows = everything[(everything.site == "attn_out") & (everything.d_sae == 32768)]
    assert dict(panel.left["release"]) == rows.release.value_counts().to_dict()
    assert dict(panel.left["layer"]) == rows.layer.value_counts().to_dict()
    assert [v for v, _ in panel.left["layer"]] == sorted(rows.layer.unique())
    assert dict(panel.left["site"]) == everything[everything.d_sae == 32768].site.value_counts().to_dict()
    panel.on_request("clear")
    assert (panel.site, panel.width, panel.rows["total"]) == ("", None, len(everything))


def test_scrolling_sends_the_rows_from_there():
    panel = CataloguePicker(sort="bytes")
    panel.offset = 13_800
    assert (panel.rows["offset"], len(panel.rows["rows"])) == (13_800, 57)
    assert [r[8] for r in panel.rows["rows"]] == [None] * 57  # not known: last in either direction
    panel.descending = True
    assert panel.offset == panel.rows["offset"] == 0
    panel.offset = 10**9
    assert len(panel.rows["rows"]) == 1


def test_a_page_says_what_is_known_and_leaves_out_what_is_not(everything):
    panel = CataloguePicker(selected=JB)
    assert panel.page["bytes"] == 151_096_320
    assert panel.page["repo"] == "jbloom/GPT2-Small-SAEs-Reformatted"
    assert panel.page["links"][0][1].endswith("neuronpedia.org/gpt2-small/8-res-jb")
    assert "hook_out" not in panel.page
    panel._on_message(panel, {"do": "move", "by": 1})
    assert panel.selected == ("gpt2-small-res-jb", "blocks.9.hook_resid_pre")
    panel._on_message(panel, {"do": "move", "to": 0})
    assert panel.selected == tuple(everything.loc[0, ["release", "id"]])
    without = everything[everything.d_sae.isna()].iloc[0]
    panel.selected = (without.release, without.id)
    assert "d_sae" not in panel.page
    assert json.dumps(panel.get_state()["page"])
    panel.query = "nothing is like that"
    panel._on_message(panel, {"do": "move", "by": 1})
    assert (panel.position, panel.rows["rows"], panel.left["model"]) == (-1, [], [])


def test_wrong_values():
    panel = CataloguePicker(selected=JB)
    for trait, wrong, says in (
        ("model", "gemma-2-3b", "near: "),
        ("release", "gpt2-small-res-jp", "near: gpt2-small-res-jb"),
        ("site", "resid_pst", "near: resid_post"),
        ("sort", "size", "near: site"),
        ("l0", (5, 2), "want: \\(from, to\\)"),
        ("l0", (-1, None), "want: \\(from, to\\)"),
        ("selected", ("gpt2-small-res-jb", "blocks.8.hook_resid_pr"), "near: blocks.8.hook_resid_pre"),
        ("selected", ("no such", ""), "no release named"),
    ):
        with pytest.raises(ValueError, match=says):
            setattr(panel, trait, wrong)
        assert panel.error_message.startswith("ValueError: ")
    assert (panel.selected, panel.rows["total"]) == (JB, 13_857)
    panel.site = "z"
    assert panel.error_message == ""
    with pytest.raises(TypeError, match="near: release"):
        CataloguePicker(relase="x")
    with pytest.raises(ValueError, match="a row chosen"):
        CataloguePicker().load()
    with pytest.raises(ValueError, match="asked to 'explode'"):
        panel._on_message(panel, {"do": "explode"})


def test_a_saved_notebook_shows_rows_and_the_page(monkeypatch):
    panel = CataloguePicker(release="gpt2-small-res-jb", selected=JB)
    message = panel._repr_mimebundle_()[0]["text/html"]
    for text in ("blocks.0.hook_resid_pre", "151 MB", "24,576", "jbloom/GPT2-Small-SAEs-Reformatted"):
        assert text in message
    panel.page = {**panel.page, "repo": panel_driver.HOSTILE}
    assert "<img" not in panel.static_html()
    assert repr(panel) == "CataloguePicker(13 of 13,857 SAEs, gpt2-small-res-jb blocks.8.hook_resid_pre)"


# --- loading


class Slow:
    """In place of load_sae: it comes in steps that the test lets come."""

    def __init__(self):
        self.step, self.told, self.ended = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
        self.fails = None

    def __call__(self, release, id, progress=None, **how):
        if progress is None:  # as code() calls it
            return f"an SAE of {release} {id} {how}"
        try:
            for done in range(0, 101, 20):
                assert self.step.acquire(timeout=60)
                progress(done * 10**6, 10**8)
                self.told.release()
            if self.fails:
                raise self.fails
            return f"an SAE of {release} {id} {how}"
        finally:
            self.ended.set()

    def on(self, steps):
        for _ in range(steps):
            self.step.release()
        for _ in range(steps):
            assert self.told.acquire(timeout=60)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(saewb, "load_sae", result := Slow(), raising=False)
    return result


def collect(panel):
    panel._on_message(panel, {"do": "collect"})


def test_progress_then_the_sae(slow):
    panel = CataloguePicker(selected=JB, device="cpu")
    assert "\n# sae = saewb.load_sae('gpt2-small-res-jb', 'blocks.8.hook_resid_pre', device='cpu')" in panel.code()
    panel._on_message(panel, {"do": "load"})
    assert (panel.busy, panel.progress["total"], panel.sae) == ("loading blocks.8.hook_resid_pre", 0, None)
    slow.on(3)
    collect(panel)
    assert (panel.progress["done"], panel.progress["total"]) == (40_000_000, 100_000_000)
    panel.selected = ("gpt2-small-res-jb", "blocks.9.hook_resid_pre")  # while it loads
    slow.on(3)
    panel.wait(60)
    assert panel.sae == "an SAE of gpt2-small-res-jb blocks.8.hook_resid_pre {'device': 'cpu'}"
    assert (panel.busy, panel.progress, panel.loaded["id"]) == ("", {}, JB[1])
    assert executed(panel)["sae"] == panel.sae


def test_cancelling_stops_the_thread_and_a_newer_load_the_older(slow):
    panel = CataloguePicker(selected=JB)
    panel.load()
    slow.on(2)
    panel._on_message(panel, {"do": "cancel"})
    assert (panel.busy, panel.progress, panel.sae) == ("", {}, None)
    assert panel.notice == "cancelled: gpt2-small-res-jb, blocks.8.hook_resid_pre"
    slow.step.release()
    assert slow.ended.wait(60)
    collect(panel)
    assert (panel.error_message, panel.error, panel.sae) == ("", None, None)
    panel.cancel()  # nothing runs
    slow.ended.clear()
    panel.load()
    slow.on(1)
    panel.load("gpt2-small-res-jb", "blocks.1.hook_resid_pre")
    for _ in range(7):  # one step of the older, which ends it, and six of the newer
        slow.step.release()
    panel.wait(60)
    assert slow.ended.is_set()
    assert panel.loaded["id"] == "blocks.1.hook_resid_pre"


def test_what_fails_is_shown_and_the_panel_goes_on(slow):
    panel = CataloguePicker(selected=JB)
    slow.fails = ConnectionError("the download broke off.\n  fix:  saewb.load_sae(...)")
    panel.load()
    slow.on(6)
    with pytest.raises(ConnectionError, match="broke off"):
        panel.wait(60)
    assert panel.error_message.startswith("ConnectionError: the download broke off.\n  fix:")
    assert (panel.busy, panel.progress, panel.loaded) == ("", {}, {})
    panel.layer = 3
    assert panel.error_message == ""
    slow.fails = None
    panel.load()
    slow.on(6)
    panel.wait(60)
    assert panel.sae


# --- from a hub, by its real client, which reads its settings at import: so in an interpreter of its own

_PANEL = (
    f"JB = {JB}"
    + """
import json, time, threading, torch
from pathlib import Path
torch.set_num_threads(1)
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 2000  # bytes that it writes at once
from saewb_widgets import CataloguePicker
panel = CataloguePicker(selected=JB)

def until(what, seconds=100):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, [panel.progress, panel.error_message, threading.enumerate()]
        time.sleep(0.02)
        panel._on_message(panel, {"do": "collect"})

def loaded():
    panel.load()
    try:
        panel.wait(100)
    except Exception as error:
        assert panel.error is error and not panel.busy and not panel.progress
        return panel.error_message
    return panel.loaded["text"]

def threads():
    return [t.name for t in threading.enumerate() if t.name == "saewb load"]
"""
)


def in_an_interpreter(code, endpoint, home, **environment):
    """What it prints as JSON."""
    saved = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    hub_is = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    ran = subprocess.run(
        [sys.executable, "-c", _PANEL + code],
        env={**saved, **hub_is, "HF_TOKEN": "hf_of_the_stand_in", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture
def published(tmp_path):
    """A repository of the catalogue with one SAE of 70 kB in it."""
    entry = saewb.pretrained.catalogue.find(*JB)
    sae = feed_forward(2, d_in=64, d_sae=128, hook=entry.hook, model="gpt2-small")
    folder = save_sae(sae, tmp_path / "published")
    return entry, {f"{entry.path}/{file.name}": file.read_bytes() for file in folder.iterdir()}


def test_a_download_with_progress_cancelled_and_begun_again(published, tmp_path):
    entry, files = published
    size = len(files[f"{entry.path}/sae_weights.safetensors"])
    code = """
ends = []
for _ in range(3):  # cancelled each time when a little more has come
    panel.load()
    until(lambda: panel.progress["done"] > 0)
    ends.append(panel.progress)
    panel.cancel()
    until(lambda: not threads())
    ends.append([panel.busy, panel.progress, panel.sae is None, panel.error_message])
whole = [str(p) for p in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/**/sae_weights.safetensors")]
constants.HF_HUB_OFFLINE = True
offline = loaded()  # nothing of what came in part is taken for an SAE
constants.HF_HUB_OFFLINE = False
seen = []
panel.load()
until(lambda: (seen.append(panel.progress.get("done")), panel.loaded)[1])
exec(panel.code(), made := {})
same = torch.equal(made["sae"].W_dec, panel.sae.W_dec)
print(json.dumps([ends, whole, offline, seen, panel.loaded["text"], same]))
"""
    faults = {"sae_weights.safetensors": [(4000, 0.1)] * 4}
    with hub({entry.repo: files}, faults=faults) as (endpoint, log):
        ends, whole, offline, seen, text, same = in_an_interpreter(code, endpoint, tmp_path / "home")
    assert whole == []
    assert offline.startswith("FileNotFoundError: ")
    assert "HF_HUB_OFFLINE" in offline.splitlines()[0]
    for going, after in zip(ends[::2], ends[1::2], strict=True):
        assert 0 < going["done"] < going["total"]
        assert after == ["", {}, True, ""]
    assert log.count("hung up") >= 1
    assert log.count("slowly") == 4
    numbers = [done for done in seen if done is not None]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 3
    assert max(numbers) <= ends[0]["total"] <= size + 2000
    assert text.startswith("SAE(relu, 64 -> 128 latents")
    assert same


def test_no_network_a_gated_place_and_one_that_is_not_there(published, tmp_path):
    entry, files = published
    closed, missing = (
        ("gemma-scope-2b-pt-res", "layer_0/width_16k/average_l0_13"),
        ("gpt2-small-mlp-tm", "blocks.3.hook_mlp_out"),
    )
    repos = [saewb.pretrained.catalogue.find(*name).repo for name in (closed, missing)]
    code = f"""
said = []
for name in ({closed}, {missing}):
    panel.selected = name
    said += [loaded()]
panel.selected = JB
constants.HF_HUB_OFFLINE = True
said += [loaded(), panel.rows["total"]]
constants.HF_HUB_OFFLINE = False
print(json.dumps([*said, loaded(), panel.error_message]))
"""
    with hub({entry.repo: files}, closed={repos[0]}) as (endpoint, _):
        gated, nothing, away, total, there, error_message = in_an_interpreter(code, endpoint, tmp_path / "home")
    assert gated.startswith(f"FileNotFoundError: {repos[0]} on the hub is there for those only who accepted")
    assert nothing.startswith(f"FileNotFoundError: no SAE at {repos[1]!r}")
    assert "the hub cannot be reached" in away
    assert total == 13_857
    assert there.startswith("SAE(relu, 64 -> 128 latents")
    assert error_message == ""


def test_no_network_is_said_in_one_line(tmp_path):
    with socket.socket() as taken:  # nobody listens there
        taken.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{taken.getsockname()[1]}"
        text = in_an_interpreter("print(json.dumps([loaded(), panel.rows['total']]))", away, tmp_path / "home")
    first, *more = text[0].splitlines()
    assert first.startswith("FileNotFoundError: ")
    assert "the hub cannot be reached" in first
    assert [line.split(":")[0].strip() for line in more] in (["fix"], ["want"], ["want", "fix"])
    assert text[1] == 13_857


def test_examples_run():
    outcome = doctest.testmod(catalogue_picker)
    assert outcome.attempted > 5
    assert outcome.failed == 0
    assert [filter.size(n) for n in (None, 500_000, 151_096_320)] == ["", "0.5 MB", "151 MB"]
