"""From the package, from folders, from the hub; and back. The hub is a thread here, its client the real one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers.architecture_registry import ARCHITECTURES, activations, feed_forward
from helpers.fake_hub import hub

from saewb.errors import FormatError
from saewb.hub import _plain_http
from saewb.pretrained import catalogue
from saewb.pretrained.catalogue._expand import expand
from saewb.pretrained.formats import LAYOUTS, patterns
from saewb.pretrained.load import load_config, load_sae, save_sae
from saewb.pretrained.share import push_to_hub
from saewb.sae.sae import SAE

REPO = "some-one/their-saes"


def _published(tmp_path, *names):
    """The files of a repository with one SAE per folder."""
    result = {"README.md": b"theirs"}
    for seed, name in enumerate(names):
        folder = save_sae(feed_forward(seed, activation="jumprelu"), tmp_path / "published" / name)
        for file in folder.iterdir():
            result[f"{name}/{file.name}"] = file.read_bytes()
        result[f"{name}/optimizer.pt"] = b"never to be fetched"
    return result


def _client(code, endpoint, home, **environment):
    """What a fresh interpreter prints as JSON: huggingface_hub reads its settings once, at import."""
    before = "import json, saewb.pretrained.load as L, saewb.pretrained.share as S, torch\ntorch.set_num_threads(1)\n"
    caught = (
        "def tried(*a, **k):\n    try:\n        return repr(L.load_sae(*a, **k))\n"
        "    except Exception as e:\n        return f'{type(e).__name__}: {e}'\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", before + caught + code],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "hf_of_the_stand_in",
            "NO_PROXY": "127.0.0.1,localhost",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


# --- from the package and from folders


def test_the_embedded_one():
    sae = load_sae("tiny")
    assert sae.cfg.hook
    assert sae(torch.zeros(2, sae.cfg.d_in)).shape == (2, sae.cfg.d_in)


@pytest.mark.parametrize("kind", [str, Path])
def test_from_a_folder_and_a_folder_in_it(kind, tmp_path):
    folder = save_sae(feed_forward(), kind(tmp_path / "mine" / "layer_3"))
    assert folder.is_absolute()
    for sae in (
        load_sae(kind(folder)),
        load_sae(kind(tmp_path / "mine"), "layer_3"),
        load_sae(tmp_path, "mine/layer_3"),
    ):
        assert torch.equal(sae(activations(3)), feed_forward()(activations(3)))


def test_relative_folders_come_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_sae(feed_forward(), "some-one/their-saes")
    assert load_sae(REPO).cfg == feed_forward().cfg
    assert load_sae("./some-one", "their-saes").cfg == feed_forward().cfg


def test_dtype_and_device(tmp_path):
    folder = save_sae(feed_forward(), tmp_path / "sae")
    sae = load_sae(folder, dtype=torch.bfloat16, device="meta")
    assert (sae.dtype, sae.device.type) == (torch.bfloat16, "meta")


def test_a_folder_that_is_missing_is_told_with_its_neighbors(tmp_path):
    save_sae(feed_forward(), tmp_path / "layer_3")
    (tmp_path / "layer_3.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"near: layer_3\n  fix:  saewb\.load_sae\('.*/layer_3'\)"):
        load_sae(tmp_path / "layer_4")
    with pytest.raises(FileNotFoundError, match=r"fix:  saewb\.load_sae\('.*', 'layer_3'\)"):
        load_sae(tmp_path, "layer_33")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_sae(str(tmp_path / "no" / "such" / "place"))
    with pytest.raises(FormatError, match="no layout that saewb knows: the file"):
        load_sae(tmp_path / "layer_3.txt")


def test_a_name_that_is_nothing_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma-scope").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither the embedded one[\s\S]*near: gemma-scope[\s\S]*'owner/name'"):
        load_sae("gemma-scop")
    with pytest.raises(FileNotFoundError, match="near: tiny"):
        load_sae("tinny")


def test_a_folder_of_no_known_layout(tmp_path):
    (tmp_path / "ae.bin").touch()
    with pytest.raises(FormatError, match=r"ae\.bin"):
        load_sae(tmp_path)


@pytest.mark.parametrize("id", ["", "..", "a/../../b", "/etc", "a\\b"])
def test_an_id_stays_inside(id, tmp_path):
    with pytest.raises(ValueError, match="no folder inside"):
        load_sae(tmp_path, id)
    with pytest.raises(ValueError, match="no folder inside"):
        push_to_hub(feed_forward(hook=None), REPO, id)


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "", "owner/"])
def test_push_wants_an_owner_and_a_name(repo_id):
    with pytest.raises(ValueError, match="owner/name"):
        push_to_hub(feed_forward(), repo_id)


# --- the hub


def test_from_the_hub_then_from_its_cache(tmp_path):
    repos = {REPO: _published(tmp_path, "blocks.0.hook_mlp_out", "deep/blocks.1.hook_resid_mid")}
    code = f"""
import sys
ids = ["blocks.0.hook_mlp_out", "deep/blocks.1.hook_resid_mid"]
first = [tried({REPO!r}, id) for id in ids]
wrong = [tried({REPO!r}, "blocks.0.hook_mlp_in"), tried({REPO!r}), tried({REPO!r}, ids[0], revision="v2")]
none = [tried("some-one/nothing"), tried("some-one/closed")]
again = tried({REPO!r}, ids[0], force_download=True, dtype=torch.float64)
x = (torch.arange(24.0).reshape(3, 8) / 10 - 1)
print(json.dumps([first, wrong, none, again, L.load_sae({REPO!r}, ids[1])(x).tolist()]))
"""
    with hub(repos, closed=frozenset({"some-one/closed"})) as (endpoint, log):
        first, wrong, none, again, out = _client(code, endpoint, tmp_path / "home")
        fetched = [line for line in log if line.startswith("GET") and "/resolve/" in line]
    sae = feed_forward(1, activation="jumprelu")
    x = torch.arange(24.0).reshape(3, 8) / 10 - 1
    assert first == [repr(sae)] * 2
    assert again == repr(sae).replace("float32", "float64")
    torch.testing.assert_close(torch.tensor(out), sae(x).detach())
    assert {Path(line).name for line in fetched} == {"cfg.json", "sae_weights.safetensors"}
    assert sum("weights" in line for line in fetched) == 3  # each once, and one again by force
    assert not any("optimizer" in line for line in log)

    assert wrong[0].startswith("FileNotFoundError: the hub repository some-one/their-saes has no SAE in folder")
    assert "fix:  saewb.load_sae('some-one/their-saes', 'blocks.0.hook_mlp_out')" in wrong[0]
    assert "at its top (2 folders with one)" in wrong[1]
    assert wrong[2].startswith("FileNotFoundError: some-one/their-saes on the hub has no revision 'v2'")
    assert none[0].startswith("FileNotFoundError: no SAE at 'some-one/nothing'")
    assert "accepted its terms" in none[1]

    # The hub is gone: what was fetched is read, what was not is told apart from what does not exist.
    code = f"""
print(json.dumps([
    tried({REPO!r}, "deep/blocks.1.hook_resid_mid"),
    tried({REPO!r}, "blocks.9.hook_mlp_out"),
    tried("some-one/else", "x"),
]))
"""
    for environment in ({"HF_HUB_OFFLINE": "1"}, {}):
        there, not_there, unknown = _client(code, "http://127.0.0.1:9", tmp_path / "home", **environment)
        assert there == repr(sae)
        for message, name in ((not_there, REPO), (unknown, "some-one/else")):
            assert message.startswith(f"FileNotFoundError: {name}, folder")
            assert "is not in the hub's cache on this machine, and the hub cannot be reached" in message


def test_push_and_load_again(tmp_path):
    repos = {}
    code = """
from saewb.sae.sae import SAE, SAEConfig
sae = SAE(SAEConfig(d_in=4, d_sae=9, hook="blocks.0.hook_mlp_out", model="gpt2"), seed=3)
urls = [S.push_to_hub(sae, "me/mine", private=True)]
urls.append(S.push_to_hub(sae, "me/mine", "deep/two", commit_message="another"))
x = torch.ones(2, 4)
same = [torch.equal(L.load_sae("me/mine", id)(x), sae(x)) for id in ("blocks.0.hook_mlp_out", "deep/two")]
print(json.dumps([urls, same]))
"""
    with hub(repos) as (endpoint, log):
        urls, same = _client(code, endpoint, tmp_path / "home")
    assert all(url.startswith(f"{endpoint}/me/mine/commit/") for url in urls)
    assert same == [True, True]
    assert "private" in log
    assert sorted(repos["me/mine"]) == [
        "README.md",
        "blocks.0.hook_mlp_out/cfg.json",
        "blocks.0.hook_mlp_out/sae_weights.safetensors",
        "deep/two/cfg.json",
        "deep/two/sae_weights.safetensors",
    ]
    card = repos["me/mine"]["README.md"].decode()
    assert "saewb.load_sae('me/mine', 'blocks.0.hook_mlp_out')" in card  # the second push kept the first one's card
    assert sum("/commit/main" in line for line in log) == 2  # each push is one commit


def test_push_several_in_one_commit_with_a_card_of_figures(tmp_path):
    repos = {}
    code = """
from saewb.sae.sae import SAE, SAEConfig
made = {
    f"layer_{n}": SAE(
        SAEConfig(4, 9, "topk", k=2, hook=f"blocks.{n}.hook_resid_pre", model="me/small",
                  metadata={"training_tokens": 1000 * n, "dataset_path": "some/texts", "held_out": {"l0": 2.0}}),
        seed=n,
    )
    for n in (1, 2)
}
S.push_to_hub(made, "me/mine", figures={"layer_2": {"fvu": 0.123456, "ce_recovered": 0.9}})
x = torch.ones(2, 4)
same = [torch.equal(L.load_sae("me/mine", id)(x), sae(x)) for id, sae in made.items()]
print(json.dumps([same, L.load_sae("me/mine", "layer_1").cfg.metadata["source"]["files"]]))
"""
    with hub(repos) as (endpoint, log):
        same, hashes = _client(code, endpoint, tmp_path / "home")
    assert same == [True, True]
    assert sum("/commit/main" in line for line in log) == 1
    assert sum(line.startswith("PUT") for line in log) == 2  # the weights, each apart from the commit
    weights = repos["me/mine"]["layer_1/sae_weights.safetensors"]
    assert hashes["layer_1/sae_weights.safetensors"] == hashlib.sha256(weights).hexdigest()
    card = repos["me/mine"]["README.md"].decode()
    assert "base_model: me/small" in card
    assert "| layer_2 | blocks.2.hook_resid_pre | blocks.2.hook_resid_pre | topk k=2 | 4 | 9 | float32 |" in card
    assert "- data set: some/texts" in card
    assert "- training tokens, layer_2: 2000" in card
    assert "| layer_2 | 2.0 | 0.1235 | 0.9 |".replace("2.0", "2") in card
    assert "saewb.load_sae('me/mine', 'layer_1')" in card
    assert "SAE.from_pretrained(release='me/mine', sae_id='layer_1')" in card


def test_push_checks_everything_before_anything_is_sent(tmp_path):
    sae = feed_forward()
    with pytest.raises(ValueError, match="figures for"):
        push_to_hub({"a": sae}, REPO, figures={"b": {"l0": 1.0}})
    with pytest.raises(ValueError, match="no id besides"):
        push_to_hub({"a": sae}, REPO, "b")
    with pytest.raises(ValueError, match="at least one"):
        push_to_hub({}, REPO)
    with pytest.raises(ValueError, match="no normalization 'centered'"):
        push_to_hub({"a": sae, "b": feed_forward(normalization="centered", model="google/gemma-2-2b")}, REPO)


def test_push_leaves_a_card_that_is_there_alone(tmp_path):
    repos = {"me/mine": {"README.md": b"my own words"}}
    code = """
from saewb.sae.sae import SAE, SAEConfig
S.push_to_hub(SAE(SAEConfig(d_in=4, d_sae=9)), "me/mine", "x")
print("[]")
"""
    with hub(repos) as (endpoint, _):
        _client(code, endpoint, tmp_path / "home")
    assert repos["me/mine"]["README.md"] == b"my own words"
    assert "x/cfg.json" in repos["me/mine"]


# --- what goes wrong on the way


def test_a_download_tells_how_far_it_is_and_can_be_cancelled(tmp_path):
    code = f"""
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 100  # bytes that it writes at once

class Stop(Exception):
    pass

def stop(done, total):
    if done >= 300:
        raise Stop("enough")

cancelled = ""
try:
    L.load_sae({REPO!r}, "one", progress=stop)
except Stop as error:
    cancelled = str(error)
from pathlib import Path
whole = [str(p) for p in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/one/sae_weights.safetensors")]
seen, xet = [], [constants.HF_HUB_DISABLE_XET]
def note(done, total):
    seen.append((done, total))
    xet.append(constants.HF_HUB_DISABLE_XET)
sae = L.load_sae({REPO!r}, "one", progress=note)
xet.append(constants.HF_HUB_DISABLE_XET)
print(json.dumps([cancelled, whole, seen, repr(sae), xet]))
"""
    with hub({REPO: _published(tmp_path, "one")}) as (endpoint, _):
        got = _client(code, endpoint, tmp_path / "home", HF_HUB_DISABLE_XET="0")
    cancelled, whole, seen, sae, xet = got
    assert (xet[0], set(xet[1:-1]), xet[-1]) == (False, {True}, False)  # Xet could not be cancelled
    assert cancelled == "enough"
    assert whole == []
    assert sae == repr(feed_forward(0, activation="jumprelu"))
    assert len(seen) > 3
    assert all(0 <= done <= total for done, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_of_several_downloads_without_xet_the_last_one_puts_it_back(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    one, two = ExitStack(), ExitStack()
    one.enter_context(_plain_http())
    two.enter_context(_plain_http())
    one.close()
    assert constants.HF_HUB_DISABLE_XET
    with pytest.raises(RuntimeError), two:
        raise RuntimeError
    assert not constants.HF_HUB_DISABLE_XET


def test_downloads_go_on_where_they_broke_off_and_damage_is_found(tmp_path):
    names = ["dropped", "wrong", "busy", "short", "gone"]
    repos = {REPO: _published(tmp_path, *names), "some-one/busy": {}, "some-one/secret": {}}
    weights = "/sae_weights.safetensors"
    faults = {
        f"dropped{weights}": [700],
        f"wrong{weights}": ["wrong"],
        f"busy{weights}": ["busy"],
        f"short{weights}": ["short"],
        f"gone{weights}": [200, 100] + [0] * 8,
        "some-one/busy": ["busy"] * 20,
    }
    code = f"""
import logging, time
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 100  # bytes that it writes at once
time.sleep = lambda seconds: None  # huggingface_hub waits between attempts
logging.disable(logging.CRITICAL)
first = {{name: tried({REPO!r}, name) for name in {names}}}
again = {{name: tried({REPO!r}, name) for name in {names}}}
others = [tried("some-one/busy", "x"), tried("some-one/secret", "x")]
print(json.dumps([first, again, others]))
"""
    with hub(repos, secret={"some-one/secret"}, faults=faults) as (endpoint, log):
        first, again, others = _client(code, endpoint, tmp_path / "home")
    assert set(again.values()) == {repr(feed_forward(0, activation="jumprelu"))}, again
    assert first["dropped"] == first["busy"] == again["dropped"]
    assert "from 700" in log
    assert first["wrong"].startswith("OSError: wrong/sae_weights.safetensors came damaged: its sha256 is")
    assert "It was thrown away" in first["wrong"]
    assert first["gone"].startswith("ConnectionError: some-one/their-saes: the download of")
    assert "files that came whole are kept" in first["gone"]
    assert first["short"].startswith("OSError: some-one/their-saes: the download of 2.5 kB failed: Consistency check")
    assert "too many requests for now (HTTP 429); try again in 1 s" in others[0]
    assert others[1].startswith("FileNotFoundError")
    assert "some-one/secret" in others[1]


def test_a_release_of_the_catalogue_brings_what_its_files_do_not_say(tmp_path):
    """gpt2-small-mlp-tm: a factor, centered weights, a path with a colon, and a data set, all from the catalogue."""
    entry = catalogue.find("gpt2-small-mlp-tm", "blocks.3.hook_mlp_out")
    plain = feed_forward(2, hook=entry.hook, model="gpt2-small", metadata={"dataset_path": "?"})
    folder = save_sae(plain, tmp_path / "published")
    raw = json.loads((folder / "cfg.json").read_text()) | {"normalize_activations": "expected_average_only_in"}
    files = {f"{entry.path}/cfg.json": json.dumps(raw).encode()}
    files[f"{entry.path}/sae_weights.safetensors"] = (folder / "sae_weights.safetensors").read_bytes()
    code = f"""
ids = ["gpt2-small-mlp-tm", "blocks.3.hook_mlp_out"]
cfg = L.load_config(*ids)
cached = tried({entry.repo!r}, {entry.path!r})
x = (torch.arange(24.0).reshape(3, 8) / 10 - 1)
sae = L.load_sae(*ids)
same = L.load_sae({entry.repo!r}, {entry.path!r})
kept = L.load_sae(L.save_sae(sae, {str(tmp_path / "kept")!r}))
less = dict(cfg.metadata, source=sae.cfg.metadata["source"])
facts = [cfg.model, cfg.normalization, cfg.metadata, sae.cfg.metadata["source"]]
facts += [kept.cfg == sae.cfg, same.cfg == sae.cfg, [{{**vars(cfg), "metadata": less}} == vars(sae.cfg)]]
print(json.dumps([facts, sae(x).tolist(), tried("gpt2-small-mlp-tm"), tried("gpt2-small-mlp-tm", "blocks.3.hook_mlp")]))
"""
    with hub({entry.repo: files}) as (endpoint, log):
        facts, out, no_id, wrong_id = _client(code, endpoint, tmp_path / "home")
    assert facts[:2] == ["gpt2", "centered"]
    assert facts[2]["dataset_path"] == "Skylion007/openwebtext"
    assert facts[2]["source"]["files"] == {f"{entry.path}/cfg.json": None}
    sha = hashlib.sha256(files[f"{entry.path}/sae_weights.safetensors"]).hexdigest()
    source = facts[3]
    assert source["files"] == {f"{entry.path}/cfg.json": None, f"{entry.path}/sae_weights.safetensors": sha}
    assert (source["release"], source["id"], source["repo"]) == (entry.release, entry.id, entry.repo)
    assert len(source["commit"]) == 40
    assert facts[4:] == [True, True, [True]]
    x = torch.arange(24.0).reshape(3, 8) / 10 - 1
    mean, f = x.mean(-1, keepdim=True), entry.norm_factor
    torch.testing.assert_close(torch.tensor(out), plain(f * (x - mean)) / f + mean, atol=1e-5, rtol=1e-5)
    assert "fix:  saewb.load_sae('gpt2-small-mlp-tm', 'blocks.0.hook_mlp_out')" in no_id
    assert "near: blocks.3.hook_mlp_out" in wrong_id
    assert sum("cfg.json" in line and line.startswith("GET") for line in log) == 1  # the second call has it cached


def test_a_large_download_says_how_large(tmp_path):
    repos = {REPO: _published(tmp_path, "a")}
    code = f"""
import contextlib, io, saewb.hub
saewb.hub.LARGE = 1000
said = io.StringIO()
with contextlib.redirect_stderr(said):
    L.load_sae({REPO!r}, "a")
    L.load_sae({REPO!r}, "a")
print(json.dumps(said.getvalue()))
"""
    with hub(repos) as (endpoint, _):
        said = _client(code, endpoint, tmp_path / "home")
    total = sum(len(repos[REPO][f"a/{name}"]) for name in ("cfg.json", "sae_weights.safetensors"))
    assert said.count("to download") == 1  # not for what is cached
    assert f"some-one/their-saes: {total / 1000:.1f} kB to download (a/cfg.json, a/sae_weights.safetensors)" in said


def test_every_format_of_the_catalogue_has_a_reader():
    formats = {json.loads(line).get("format", "sae_lens") for line in catalogue.lines()}
    assert formats == {alias for layout in LAYOUTS for alias in layout.aliases}
    for line in catalogue.lines():
        spec = json.loads(line)
        for path in expand(spec)["path"]:
            assert patterns(path, spec.get("format", "sae_lens")), (spec["release"], path)


def test_configuration_without_weights_is_that_with_weights(tmp_path):
    for name, make in ARCHITECTURES.items():
        sae = make()
        if isinstance(sae, SAE) and sae.cfg.activation == "groupmax":
            continue  # no file has it
        folder = save_sae(sae, tmp_path / name)
        want = load_sae(folder).cfg
        (folder / "sae_weights.safetensors").unlink()
        assert load_config(folder) == want, name
    (tmp_path / "params.npz").touch()
    with pytest.raises(ValueError, match="not in the SAELens layout"):
        load_config(tmp_path)


def test_loading_does_not_import_the_hub_until_it_is_needed():
    code = "import saewb.pretrained.load, sys; print('huggingface_hub' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "False"
