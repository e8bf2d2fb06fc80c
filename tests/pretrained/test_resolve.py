"""What a source and an id mean, before anything is read or fetched."""

from __future__ import annotations

import pytest

from saewb.pretrained.formats import Provenance
from saewb.pretrained.resolve import Source, resolve


def test_the_package_a_folder_and_a_file(tmp_path):
    assert resolve("tiny", None).local.is_dir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a.pt").touch()
    assert resolve(tmp_path, "a").local == tmp_path / "a"
    assert resolve(str(tmp_path / "a.pt"), None).local == tmp_path / "a.pt"
    assert resolve(tmp_path, "a").provenance(2.0) == Provenance(scaling_factor=2.0)


def test_a_release_and_the_repository_it_stands_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = resolve("gpt2-small-mlp-tm", "blocks.3.hook_mlp_out")
    published = source.published
    assert (source.local, source.repo, source.path) == (None, published.repo, published.path)
    provenance = source.provenance()
    assert (provenance.model, provenance.hook, provenance.layer) == (published.model, published.hook, 3)
    assert provenance.scaling_factor == published.norm_factor
    assert source.provenance(2.0).scaling_factor == 2.0  # what was given comes first
    record = source.record({"a": 1}, {"commit": "c"})
    names = {"release": "gpt2-small-mlp-tm", "id": "blocks.3.hook_mlp_out", "repo": source.repo, "path": source.path}
    assert record == {"model": published.model, "metadata": {"a": 1, "source": {**names, "commit": "c"}}}
    on_neuronpedia = resolve("gpt2-small-res-jb", "blocks.8.hook_resid_pre").record({}, {"commit": "c"})
    assert on_neuronpedia["metadata"]["neuronpedia_id"] == "gpt2-small/8-res-jb"
    again = resolve(published.repo, published.path)
    assert (again.published, again.provenance()) == (published, provenance)


def test_a_repository_that_the_catalogue_does_not_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = resolve("some-one/their-saes", "a//b/")
    assert source == Source("saewb.load_sae('some-one/their-saes', 'a//b/')", repo="some-one/their-saes", path="a/b")
    assert source.provenance() == Provenance(repo="some-one/their-saes", path="a/b")
    names = {"repo": "some-one/their-saes", "path": "a/b"}
    assert source.record({}, {"commit": "c"}) == {"metadata": {"source": {**names, "commit": "c"}}}
    assert source.record({"a": 1}, {}) == {}  # local files


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="and no id"):
        resolve("gpt2-small-mlp-tm", None)
    with pytest.raises(ValueError, match="the release first"):
        resolve("blocks.3.hook_mlp_out", "gpt2-small-mlp-tm")
    with pytest.raises(FileNotFoundError, match="is a language model, not an SAE"):
        resolve("gemma-2-2b", None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve("./nothing", None)
    with pytest.raises(TypeError, match="got a int"):
        resolve(3, None)
