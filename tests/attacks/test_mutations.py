"""Mutated files of every reader, published and our own: what they load is whole, or an error of saewb's names them.

Many mutations by hand: `pytest -m attack tests/attacks/test_mutations.py`; a few of each with the other tests.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from helpers import format_fixtures, gguf_files, tiny_models
from helpers.mutations import mutations
from pretrained.formats.test_every_layout import LAYOUTS

import saewb
from saewb.data.cache import ActivationCache, cache_activations
from saewb.errors import FormatError
from saewb.evals.result import EvaluationStore
from saewb.models.gguf import gguf_folder
from saewb.pretrained.formats import Provenance, read
from saewb.sae.sae import SAE, SAEConfig
from saewb.stats.coactivation import Coactivation, coactivation
from saewb.synthetic import Hierarchy, Magnitudes, Node, SyntheticData, constant, load_synthetic, random_dictionary

MANY = int(os.environ.get("SAEWB_ATTACK_TRIES", 500))
FEW = 8  # with the other tests
MEGABYTES = 300  # that all mutations of a reader may add to the largest memory of the process
AT = "blocks.1.hook_resid_post"
REFUSED = (FormatError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


# -- published layouts: {name: (writes a folder, reads it)} ----------------------------------------------------------


def _published(name):
    write, provenance = LAYOUTS[name]
    places: list[str] = []

    def prepare(folder: Path) -> None:
        folder.mkdir()
        places.append(write(folder).relative_to(folder).as_posix())

    def use(folder: Path) -> None:
        sae = read(folder / places[0], provenance)
        assert sae.W_dec.shape == (sae.cfg.d_sae, sae.cfg.d_out)
        assert sae(torch.zeros(2, 3, sae.cfg.d_in)).shape == (2, 3, sae.cfg.d_out)

    return prepare, use


def _cross_layer(write):
    places: list[str] = []

    def prepare(folder: Path) -> None:
        places.append(write(folder).place.relative_to(folder).as_posix())

    def use(folder: Path) -> None:
        sae = read(folder / places[0], Provenance())
        assert len(sae.cfg.d_sae) > 0

    return prepare, use


# -- our own formats -------------------------------------------------------------------------------------------------


def _stream():
    draws = lambda n, rng: torch.randn(n, 8, generator=rng)  # noqa: E731
    return saewb.stream_draws(draws, seed=3, batch_tokens=32)


def write_run(folder: Path) -> None:
    options = {"n_tokens": 96, "batch_tokens": 32, "log_every_steps": 1, "folder": folder}
    saewb.train(None, _stream(), saewb.TopK(d_sae=24, k=3), **options).wait()


def use_run(folder: Path) -> None:
    run = saewb.read_run(folder)
    compile(run.code, "cell", "exec")
    repr(run), run.history, run.frac, run.resumable
    saewb.run_curves(run)
    assert saewb.load_sae(folder / "saes" / "sae").cfg.d_in == 8


def resume_run(folder: Path) -> None:
    saewb.resume_run(folder, tokens=_stream(), n_tokens=128).wait()


def write_index(folder: Path) -> None:
    index = saewb.build_index(tiny_models.bridge(), tiny_models.sae(AT), tiny_models.tokens(8, 12), n_top=3)
    index.save(folder)


def use_index(folder: Path) -> None:
    index = saewb.load_index(folder)
    for i in range(0, len(index), 7):
        latent = index.latent(i)
        latent.to_dict()
    index.ranking(3), index.table(), index.search("w1", 3), index.search(5, 3)
    index.matrix(1)
    index.save_html(folder / "page.html", [0, 1])


def write_cache(folder: Path) -> None:
    ids = tiny_models.tokens(rows=20, length=20)
    cache_activations(tiny_models.bridge(), ids, AT, folder, n_tokens=200, shard_tokens=90)


def use_cache(folder: Path) -> None:
    cache = ActivationCache(folder)
    assert cache[0 : len(cache)].values[next(iter(cache.points))].shape[0] == len(cache)
    next(cache.stream(batch_tokens=50, buffer_tokens=0))


def write_sae(folder: Path) -> None:
    saewb.save_sae(SAE(SAEConfig(8, 24, "topk", k=3, hook=AT, metadata={"a": {"b": [1, 2.5, "c"]}})), folder)


def use_sae(folder: Path) -> None:
    sae = saewb.load_sae(folder)
    assert sae(torch.zeros(2, sae.cfg.d_in)).shape == (2, sae.cfg.d_out)
    compile(repr(sae.cfg.hook), "cell", "eval")


def write_synthetic(folder: Path) -> None:
    trees = Hierarchy([Node(0, (Node(1), Node(2)), exclusive=True)], "relative")
    magnitudes, dictionary = Magnitudes("folded_normal", 2.0, 0.5), random_dictionary(12, 4)
    SyntheticData(dictionary, constant(12, 0.1), magnitudes, None, trees, compensate=False).save(folder)


def use_synthetic(folder: Path) -> None:
    load_synthetic(folder).sample(50)


def write_coactivation(folder: Path) -> None:
    folder.mkdir()
    z = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) > 0.6
    coactivation([z.float()]).save(folder / "pairs.safetensors")


def use_coactivation(folder: Path) -> None:
    table = Coactivation.load(folder / "pairs.safetensors")
    table.phi(range(3), range(3))
    repr(table)


def write_evaluations(folder: Path) -> None:
    EvaluationStore(folder, {"a": 1}).write("one", "tiny", {"l0": 3.0, "kl": float("nan"), "hook": AT})


def use_evaluations(folder: Path) -> None:
    figures = EvaluationStore(folder, {"a": 1}).read("one", "tiny")
    assert figures is None or (isinstance(figures, dict) and all(isinstance(name, str) for name in figures))


def write_gguf(folder: Path) -> None:
    folder.mkdir()
    tensors = gguf_files.llama_tensors(gguf_files.hf_llama(False))
    gguf_files.write_gguf(folder / "m.gguf", gguf_files.llama_metadata(), tensors)


def use_gguf(folder: Path) -> None:
    gguf_folder(folder / "m.gguf", folder / "cache")


OWN = {
    "run": (write_run, use_run),
    "run, resumed": (write_run, resume_run),
    "index": (write_index, use_index),
    "cache": (write_cache, use_cache),
    "saved SAE": (write_sae, use_sae),
    "synthetic data": (write_synthetic, use_synthetic),
    "coactivation": (write_coactivation, use_coactivation),
    "evaluations": (write_evaluations, use_evaluations),
    "gguf": (write_gguf, use_gguf),
}
READERS = {
    **{name: _published(name) for name in LAYOUTS},
    "CircuitTracerCrossLayer": _cross_layer(format_fixtures.mntss),
    "GemmaScope2CrossLayer": _cross_layer(format_fixtures.gemma),
    **OWN,
}


def attack(name: str, tmp_path: Path, n: int, seed: int) -> dict[str, int]:
    """Read `n` mutations; an error that is not saewb's, or too much memory, fails."""
    write, use = READERS[name]
    write(tmp_path / "valid")
    use(shutil.copytree(tmp_path / "valid", tmp_path / "whole"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, faults = {"loaded": 0, "refused": 0}, []
    for what, folder in mutations(tmp_path / "valid", seed, n):
        try:
            use(folder)
            outcomes["loaded"] += 1
        except Exception as error:
            # Of a resumed run also that a state is of another configuration, in the words of `explain`.
            if isinstance(error, REFUSED) or (type(error) is ValueError and "\n  want:" in str(error)):
                outcomes["refused"] += 1
                continue
            faults.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name}: {n} mutations, {outcomes}, {len(faults)} faults, {added:.0f} MB more")
    assert not faults, f"{len(faults)} of {n}:\n" + "\n".join(faults[:25])
    assert added < MEGABYTES, f"{added:.0f} MB more"
    return outcomes


@pytest.mark.attack
@pytest.mark.parametrize("name", READERS)
def test_many_mutations(name, tmp_path):
    slow = {"gguf": 10, "run, resumed": 4}
    attack(name, tmp_path, MANY // slow.get(name, 1), seed=1)


@pytest.mark.parametrize("name", [name for name in OWN if name != "gguf"])
def test_a_few_mutations(name, tmp_path):
    attack(name, tmp_path, FEW, seed=2)
