"""What building an index holds at its peak is what is stated; measured, each in a new process."""

import pytest
from helpers.peak_memory import peak_bytes

from saewb.features.config import PAIRS
from saewb.features.logit_effects import weights_bytes
from saewb.features.neighbors import nearest_bytes
from saewb.kernels.select import ApproximateTopK

MB = 2**20


@pytest.mark.long
def test_the_whole_of_an_index_stays_within_what_is_stated():
    before = """
import saewb
model = saewb.load_model("tiny", device="cpu")
rows = saewb.data.tokens.token_rows(model, [document.text for document in saewb.tiny.texts()], 128)[:24]

def wide(d_sae, rows):
    sae = saewb.SAE(saewb.SAEConfig(model.cfg.d_model, d_sae, activation="topk", k=32, hook="blocks.2.hook_resid_post"))
    return saewb.build_index(model, sae, rows)

wide(64, rows[:8])"""
    code = """
index = wide(8192, rows)
print(index.info.config.nbytes, sum(t.nbytes for t in index.tensors.values()), model.cfg.d_model, model.cfg.d_vocab)
"""
    lines = []
    took = peak_bytes(before, code, lines)
    stated, saved, d_model, d_vocab = map(int, lines[0].split())
    a_batch = 32 * MB + 150 * 8 * 128 * 32  # latents, and what fires on 8 rows
    the_sae = 3 * 4 * 8192 * d_model
    choosing = ApproximateTopK.max_bytes(d_model, 8192)
    assert saved < took < stated + weights_bytes(8192, d_model, d_vocab) + a_batch + the_sae + choosing


def test_logit_effects_hold_one_block_of_them():
    before = """
from saewb.features.logit_effects import logit_effects
directions, w = torch.randn(4096, 4), torch.randn(4, 49152)
logit_effects(directions[:8], w, 10)"""
    took = peak_bytes(before, "logit_effects(directions, w, 10)")  # all of them would be 768 MiB
    assert took < weights_bytes(4096, 4, 49152, n_nearest=0)


def test_neighbors_hold_one_block_of_cosines():
    before = """
from saewb.features.neighbors import nearest
rows = torch.randn(16384, 16)
nearest(rows[:2048], 8, "decoder")"""
    took = peak_bytes(before, "nearest(rows, 8, 'decoder')")  # all of them would be 1 GiB
    assert took < nearest_bytes(16384, 16) + 16 * 8 * 16384


@pytest.mark.parametrize("d_sae", [300, pytest.param(30_000, marks=pytest.mark.long)])
def test_what_fires_together_is_sorted_some_pairs_at_a_time(d_sae):
    before = f"""
from saewb.features.neighbors import coactive
active = torch.randint(0, {d_sae}, (2**12, 64), dtype=torch.int32)
active[:, 0] = 7  # one that always fires
coactive(active[:64], {d_sae}, 10)"""
    took = peak_bytes(before, f"coactive(active, {d_sae}, 10)")  # all pairs would be 128 MiB, several times
    assert took < 2**12 * 64 * 40 + 32 * 8 * PAIRS + d_sae * 124
