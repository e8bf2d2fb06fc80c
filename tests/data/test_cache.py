"""The cache on the disk: exactly so many tokens, ids intact, goes on after a kill, read in any order."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.data.cache import ActivationCache, cache_activations
from saewb.data.shuffle_buffer import FifoBuffer
from saewb.data.stream import stream_activations
from saewb.errors import FormatError
from saewb.models.capture import concatenate

RESID, Z = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"


@pytest.fixture
def ids():
    return tiny_models.tokens(rows=60, length=20)


def cached(folder, ids, **how):
    return cache_activations(
        tiny_models.bridge(), ids, [RESID, Z], folder, **{"n_tokens": 1000, "shard_tokens": 300, **how}
    )


def test_tokens_and_ids_are_exactly_the_models(tmp_path, ids):
    cache = cached(tmp_path / "cache", ids)
    want = next(stream_activations(tiny_models.bridge(), ids, [RESID, Z], batch_tokens=1000))
    got = cache[0:1000]
    assert len(cache) == 1000
    for name in (RESID, Z):
        assert torch.equal(got.values[name], want.values[name])
    assert torch.equal(got.ids, want.ids)
    assert got.ids.dtype == torch.int32
    assert sorted(p.name for p in cache.folder.iterdir()) == [
        "index.json",
        *(f"shard_0000{i}.safetensors" for i in range(4)),
    ]
    assert torch.equal(cache[250:650].ids, want.ids[250:650])
    assert torch.equal(cache[990:].values[Z], want.values[Z][990:])


def test_ten_thousand_tokens_are_ten_thousand_and_half_precision_leaves_ids_alone(tmp_path):
    model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
    cache = cache_activations(model, texts, RESID, tmp_path / "c", 10_000, dtype=torch.float16, repeat=True)
    whole = cache[0:]
    assert len(cache) == len(whole) == len(whole.ids) == 10_000
    assert whole.values[RESID].dtype == torch.float16
    rows = saewb.pack(texts, model.tokenizer, 128)
    assert (
        whole.ids.tolist()
        == rows[~torch.isin(rows, torch.tensor(saewb.models.tokenizer.special_ids(model, True)))][:10_000].tolist()
    )
    assert int(whole.ids.max()) > 2048  # where float16 begins to skip integers


class Killed(BaseException):
    pass


def test_goes_on_after_an_interruption_with_the_same_bytes(tmp_path, ids, monkeypatch):
    want = cached(tmp_path / "whole", ids)
    import saewb.data.cache as module

    real, calls = module.save_state, []

    def interrupted(path, state):
        if len(calls) == 2:
            raise Killed
        calls.append(path)
        real(path, state)

    monkeypatch.setattr(module, "save_state", interrupted)
    with pytest.raises(Killed):
        cached(tmp_path / "cut", ids)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="not finished(.|\n)*goes on"):
        ActivationCache(tmp_path / "cut")
    with pytest.raises(ValueError, match="n_tokens=1000, not 900"):
        cached(tmp_path / "cut", ids, n_tokens=900)
    cached(tmp_path / "cut", ids)
    for shard in want.folder.iterdir():
        assert (tmp_path / "cut" / shard.name).read_bytes() == shard.read_bytes()


def test_goes_on_after_kill_9(tmp_path, ids):
    want = cached(tmp_path / "whole", ids)
    code = f"""
        import os, signal
        from helpers import tiny_models
        import saewb.data.cache as module
        real, calls = module.atomic_write, []
        def write(path, fill):  # killed while the third shard is being written
            calls.append(path)
            real(path, fill if len(calls) < 3 else lambda fresh: (fresh.write_bytes(b"half"), os.kill(os.getpid(), 9)))
        module.atomic_write = write
        model, tokens = tiny_models.bridge(), tiny_models.tokens(60, 20)
        module.cache_activations(model, tokens, [{RESID!r}, {Z!r}], {str(tmp_path / "cut")!r}, 1000, shard_tokens=300)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd="tests", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -9, done.stderr
    assert len(list((tmp_path / "cut").glob("shard_*"))) == 2
    cache = cached(tmp_path / "cut", ids)
    for shard in want.folder.glob("[!.]*"):
        assert (cache.folder / shard.name).read_bytes() == shard.read_bytes()


def test_a_finished_cache_is_opened_not_made_again(tmp_path, ids, monkeypatch):
    cache = cached(tmp_path / "c", ids)
    before = {p.name: p.stat().st_mtime_ns for p in cache.folder.iterdir()}
    assert len(cached(tmp_path / "c", ids)) == 1000
    assert {p.name: p.stat().st_mtime_ns for p in cache.folder.iterdir()} == before


def test_shuffled_reading_gives_each_token_once_and_resumes(tmp_path, ids):
    cache = cached(tmp_path / "c", ids)

    def new():
        return cache.stream(batch_tokens=50, seed=1, block_tokens=16, buffer_tokens=200, repeat=False, points=[RESID])

    batches = list(new())
    assert [len(b) for b in batches] == [50] * 20
    got = concatenate(batches)
    assert list(got.values) == [RESID]
    key = lambda x: sorted(map(tuple, x.tolist()))  # noqa: E731
    assert key(got.values[RESID]) == key(cache[0:].values[RESID])
    assert not torch.equal(got.ids, cache[0:].ids)
    one, two = new(), new()
    for _ in range(7):
        next(one)
    two.restore(one.state())
    assert all(torch.equal(a.values[RESID], b.values[RESID]) for a, b in zip(one, two, strict=True))
    assert torch.equal(concatenate(list(cache.stream(batch_tokens=100, seed=None, repeat=False))).ids, cache[0:].ids)


def test_reading_reads_only_what_is_asked(tmp_path, ids, monkeypatch):
    cache, read = cached(tmp_path / "c", ids), []
    real = ActivationCache._read
    monkeypatch.setattr(ActivationCache, "_read", lambda self, *a: (read.append(a[:3]), real(self, *a))[1])
    next(cache.stream(batch_tokens=16, block_tokens=16))
    assert len(read) <= 2


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"n_tokens": 19}, ValueError, r"a row has 20 tokens \(ctx_len\), more than the n_tokens=19"),
        ({"n_tokens": 0}, ValueError, "n_tokens=0"),
        ({"shard_tokens": 0}, ValueError, "shard_tokens=0"),
        ({"n_tokens": 5000}, ValueError, "the tokens ended.*n_tokens=5000"),
    ],
)
def test_errors_say_what_to_type(tmp_path, ids, how, error, says):
    with pytest.raises(error, match=says):
        cached(tmp_path / "c", ids, **how)


def test_folders_that_are_no_cache(tmp_path, ids):
    with pytest.raises(FileNotFoundError, match="no cache in"):
        ActivationCache(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        cached(tmp_path, ids)
    cache = cached(tmp_path / "c", ids)
    (cache.folder / "shard_00001.safetensors").unlink()
    with pytest.raises(saewb.FormatError, match=r"lacks shard_00001"):
        ActivationCache(cache.folder)
    (cache.folder / "index.json").write_text(json.dumps({"n_tokens": 3}))
    with pytest.raises(saewb.FormatError, match="no index"):
        ActivationCache(cache.folder)


# -- caches of other versions ----------------------------------------------------------------------------------------

OLD = Path(__file__).parents[1] / "fixtures" / "v0_1_0" / "cache"


def test_a_cache_of_0_1_0_opens_and_is_not_made_again(tmp_path):
    cache = ActivationCache(OLD)
    assert repr(cache) == f"ActivationCache(400 tokens: {RESID} 16)"
    batch = next(cache.stream(batch_tokens=400, block_tokens=400, seed=None))
    assert batch.values[RESID].shape == (400, 16)
    assert batch.ids.tolist() == cache[0:].ids.tolist()
    folder = shutil.copytree(OLD, tmp_path / "cache")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = cache_activations(tiny_models.bridge(), tiny_models.tokens(60, 20), RESID, folder, 400)
    assert again[0:].ids.tolist() == batch.ids.tolist()
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"saewb_cache": 2}, "has format 2; this saewb reads 1"),
        ({"saewb_cache": None}, "is no index"),
        ({"points": []}, "is no index"),
    ],
)
def test_a_cache_of_a_later_version_is_refused_in_a_line(tmp_path, change, says):
    folder = shutil.copytree(OLD, tmp_path / "cache")
    index = json.loads((folder / "index.json").read_text()) | change
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=says):
        ActivationCache(folder)


def test_a_shard_that_changed_on_disk_is_noticed(tmp_path, ids, monkeypatch):
    cache = cached(tmp_path / "cache", ids)
    shard = tmp_path / "cache" / "shard_00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-40] ^= 2
    shard.write_bytes(raw)
    opened = ActivationCache(cache.folder)
    assert len(opened[0:300].ids) == 300
    with pytest.raises(FormatError, match=r"shard_00001.safetensors is damaged: its sha256"):
        opened[250:400]
    monkeypatch.setattr("saewb._files.HASHED_BYTES", 10)
    opened = ActivationCache(cache.folder)
    assert len(opened[250:400].ids) == 150
    with pytest.raises(FormatError, match=r"shard_00001.safetensors is damaged"):
        opened.verify()
    shard.write_bytes((tmp_path / "cache" / "shard_00003.safetensors").read_bytes())
    with pytest.raises(FormatError, match="does not have the tensors"):
        ActivationCache(cache.folder)[250:400]


def test_a_cache_that_goes_on_after_an_interrupt_has_all_its_hashes(tmp_path, ids, monkeypatch):
    whole = cached(tmp_path / "whole", ids)
    take = FifoBuffer.take

    def interrupted(self, n):
        if (tmp_path / "part" / "shard_00001.safetensors").exists():
            raise KeyboardInterrupt
        return take(self, n)

    monkeypatch.setattr(FifoBuffer, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "part", ids)
    monkeypatch.undo()
    again = cached(tmp_path / "part", ids)
    again.verify()
    hashes = [json.loads((cache.folder / "index.json").read_text())["sha256"] for cache in (whole, again)]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 4


# -- of what it is ---------------------------------------------------------------------------------------------------


def test_a_cache_is_of_its_model_tokens_and_settings(tmp_path, ids):
    model = tiny_models.new_bridge()

    def again(tokens=ids, **how):
        return cache_activations(model, tokens, RESID, tmp_path / "c", **{"n_tokens": 200, "shard_tokens": 64, **how})

    first = again()
    assert torch.equal(again()[0:].values[RESID], first[0:].values[RESID])
    other = ids.clone()
    other[-1, -1] = 4 if other[-1, -1] != 4 else 5  # beyond what was cached, too
    with pytest.raises(ValueError, match=r"is of other tokens \(by content: tokens (.|\n)*fix: .*into a new folder"):
        again(other)
    with pytest.raises(ValueError, match=r"other settings: dtype=None, not 'float16'"):
        again(dtype=torch.float16)
    with (
        saewb.attach(model, tiny_models.sae("blocks.0.hook_resid_post")),
        pytest.raises(ValueError, match="another model"),
    ):
        again()
    weight = model.blocks[0].mlp.out.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"is of another model \(by content: model"):
        again()
    with torch.no_grad():
        weight.copy_(before)
    assert len(again()) == 200


def test_an_interrupted_cache_goes_on_with_the_same_only(tmp_path, ids, monkeypatch):
    take = FifoBuffer.take

    def interrupted(self, n):
        if (tmp_path / "c" / "shard_00001.safetensors").exists():
            raise KeyboardInterrupt
        return take(self, n)

    monkeypatch.setattr(FifoBuffer, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "c", ids)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="other tokens"):
        cached(tmp_path / "c", ids + (ids == 5))
    assert len(cached(tmp_path / "c", ids)) == len(cached(tmp_path / "whole", ids))


def test_texts_are_compared_by_content(tmp_path):
    model, texts = tiny_models.bridge(), ["w1 w2 w3 w4 w5 w6", "w7 w8 w9"] * 12

    def again(tokens, name="c"):
        return cache_activations(model, tokens, RESID, tmp_path / name, 24, ctx_len=8)

    again(texts)
    again(list(texts))
    for others in ([*texts[:-1], "w1"], texts[::-1], texts[:-1]):
        with pytest.raises(ValueError, match="other tokens"):
            again(others)
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(texts))
    again(saewb.TextFiles(path), "files")
    path.rename(tmp_path / "b.txt")
    again(saewb.TextFiles(tmp_path / "b.txt"), "files")
    (tmp_path / "b.txt").write_text("\n\n".join(reversed(texts)))
    with pytest.raises(ValueError, match="other tokens"):
        again(saewb.TextFiles(tmp_path / "b.txt"), "files")
    again(iter(texts), "iterator")  # cannot be looked at: goes on, as long as it is one
    again(iter(texts), "iterator")
    with pytest.raises(ValueError, match="tokens unknown, not"):
        again(texts, "iterator")


def test_a_cache_of_0_1_0_of_something_else_is_noticed(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"is of other tokens, by its first \d+ tokens"):
        cache_activations(tiny_models.bridge(), tiny_models.tokens(60, 20, seed=1), RESID, folder, 400)
    model = tiny_models.new_bridge()
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"is of another model, by its first \d+ tokens"):
        cache_activations(model, tiny_models.tokens(60, 20), RESID, folder, 400)
