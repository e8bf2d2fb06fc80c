"""An SAE of 2 GB, sparse on the disk: reading it and looking at one latent touches a few pages of it."""

import json
import struct
import subprocess
import sys

import pytest

D, F = 2048, 131_072  # two matrices of 1 GiB each
SHAPES = {"W_dec": (F, D), "W_enc": (D, F), "b_dec": (D,), "b_enc": (F,), "threshold": (F,)}
LATENT = 77_777

_ONE_ROW = """
import re, sys
import torch, safetensors.torch, saewb.sae, saewb.sae.matching_pursuit, saewb.sae.temporal
from pathlib import Path
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # kB; see tests/peak.py
before = peak()
from saewb.pretrained.formats import read
sae = read(Path(sys.argv[1]))
row = sae.W_dec[int(sys.argv[2])].detach()
print(sae.cfg.d_sae, float(row[0]), float(row[-1]), float(row.sum()), (peak() - before) // 1024)
"""


def sparse(path, names):
    """A safetensors file all of zeros but one decoder row, as long as it says and almost nothing on the disk."""
    header, at = {}, 0
    for ours, theirs in names.items():
        size = 4
        for width in SHAPES[ours]:
            size *= width
        header[theirs] = {"dtype": "F32", "shape": SHAPES[ours], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + at)
        file.seek(start + header[names["W_dec"]]["data_offsets"][0] + LATENT * D * 4)
        file.write(struct.pack(f"<{D}f", *range(1, D + 1)))


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, and memory in Linux' units")
@pytest.mark.parametrize("layout", ["saelens", "gemma_scope_2"])
def test_one_latent_of_a_large_sae(layout, tmp_path):
    if layout == "saelens":
        cfg = {"d_in": D, "d_sae": F, "architecture": "jumprelu", "apply_b_dec_to_input": False, "dtype": "float32"}
        cfg["metadata"] = {"sae_lens_version": "6.54.12"}
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        weights, names = tmp_path / "sae_weights.safetensors", {name: name for name in SHAPES}
    else:
        weights, names = tmp_path / "params.safetensors", {name: name.lower() for name in SHAPES}
    sparse(weights, names)
    assert weights.stat().st_size > 2 << 30
    if weights.stat().st_blocks * 512 > 64 << 20:
        pytest.skip("this file system has no files with holes")
    done = subprocess.run(
        [sys.executable, "-c", _ONE_ROW, tmp_path, str(LATENT)], capture_output=True, text=True, check=True
    )
    d_sae, first, last, total, megabytes = done.stdout.split()
    assert (int(d_sae), float(first), float(last)) == (F, 1, D)
    assert float(total) == D * (D + 1) / 2
    assert int(megabytes) < 200, f"{megabytes} MB"
