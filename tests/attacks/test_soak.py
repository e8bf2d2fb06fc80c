"""A kernel in use for long: attach, generate, index, cache, train, panels; memory, threads, descriptors stay flat.

A minute with `pytest -m attack tests/attacks/test_soak.py`; an hour with SAEWB_SOAK_SECONDS=3600.
"""

import ctypes
import gc
import os
import shutil
import statistics
import threading
import time
from pathlib import Path

import pytest
import saewb_widgets
import torch
from helpers import tiny_models

import saewb

SECONDS = float(os.environ.get("SAEWB_SOAK_SECONDS", 60))
MEBIBYTES = 24  # by which the process may grow between the second and the last quarter of the rounds
AT = "blocks.1.hook_resid_post"


def _round(model, sae, folder):
    """Everything a session does once; nothing of it is kept."""
    ids = tiny_models.tokens(rows=6, length=12)
    with saewb.attach(model, sae, error_term=True), torch.no_grad():
        model(ids)
    tokens = saewb.generate_tokens(model, "w1 w2", lambda: saewb.steer(model, sae, {3: 4.0}), max_new_tokens=4)
    assert len(list(tokens)) == 4
    saewb.read_prompt(model, "w1 w2 w3", sae).to_frame()
    saewb.attribute(model, ids[:1], sae, ("w1", "w2"))
    saewb.evaluate(model, sae, ids)
    saewb.latent_matrix(model, sae, ids, min_fires=1).partners(0)
    saewb.stats.coactivation.coactivation([sae.encode(torch.randn(64, sae.cfg.d_in))])
    index = saewb.build_index(model, sae, ids, folder=folder / "index", n_top=2, per_quantile=1, batch_size=3)
    index.save_html(folder / "page.html", [0, 1])
    index = saewb.load_index(folder / "index")
    index.search("w1", 3), index.table(), index.matrix(1)
    cache = saewb.cache_activations(model, ids, AT, folder / "cache", 60, shard_tokens=20)
    how = {"n_tokens": 256, "batch_tokens": 32, "buffer_tokens": 0, "checkpoint_every_tokens": 64}
    run = saewb.train(None, cache, saewb.TopK(d_sae=24, k=3), folder=folder / "run", **how).wait()
    saewb.save_sae(run.sae, folder / "sae")
    saewb.load_sae(folder / "sae")
    saewb.resume_run(folder / "run", tokens=cache, n_tokens=320).wait()
    _panels(model, sae, index, run)


def _panels(model, sae, index, run):
    explorer = saewb_widgets.PromptExplorer(model, sae, index)
    explorer.prompt = "w1 w2 w3"
    explorer.wait(60)
    steering = saewb_widgets.SteeringPanel(model, sae, index, latents={3: 2.0})
    others = [saewb_widgets.FeatureBrowser(index, model, sae), saewb_widgets.TrainingPanel(run)]
    others += [saewb_widgets.SuperpositionPanel(sae), saewb_widgets.CorrelationPanel(sae)]
    for panel in (explorer, steering, *others):
        panel._repr_mimebundle_()
        panel.close()


def _measures():
    """Resident memory in MiB after a collection, threads, descriptors, objects."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is free is not in use
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return rss, threading.active_count(), len(os.listdir("/proc/self/fd")), len(gc.get_objects())


@pytest.mark.attack
@pytest.mark.timeout(SECONDS * 2 + 600)
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_an_hour_of_use_leaves_memory_threads_and_descriptors_flat(tmp_path):
    model, sae = tiny_models.new_bridge(), tiny_models.sae(AT, "topk", k=4)
    before, rows, end = tiny_models.snapshot(model), [], time.monotonic() + SECONDS
    while time.monotonic() < end or len(rows) < 8:
        _round(model, sae, folder := tmp_path / f"{len(rows)}")
        shutil.rmtree(folder)
        rows.append(_measures())
        if len(rows) % 20 == 1:
            print(
                f"{len(rows)} rounds: {rows[-1][0]:.0f} MiB, {rows[-1][1:]} threads, descriptors, objects", flush=True
            )
    quarter = len(rows) // 4
    early, late = rows[quarter : 2 * quarter], rows[-quarter:]
    print(f"{len(rows)} rounds; second quarter {_typical(early)}, last {_typical(late)}")
    memory, threads, descriptors, objects = (b - a for a, b in zip(_typical(early), _typical(late), strict=True))
    assert memory < MEBIBYTES
    assert threads <= 0
    assert descriptors <= 0
    assert objects < 4 * quarter  # two in a round
    assert tiny_models.snapshot(model) == before


def _typical(rows):
    return [round(statistics.median(column), 1) for column in zip(*rows, strict=True)]
