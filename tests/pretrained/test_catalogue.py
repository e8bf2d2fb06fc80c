"""The catalogue: every row resolves, filters, near names, how long it takes. Parity with sae-lens: tests/parity."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter

import pytest

from saewb.pretrained import catalogue as module
from saewb.pretrained.catalogue import catalogue, find
from saewb.pretrained.catalogue._expand import expand, width


@pytest.fixture(scope="module")
def table():
    return catalogue()


def test_every_row_is_there(table):
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        assert len(catalogue()) == 13_857
        took.append(time.perf_counter() - begun)
    print(f"13,857 rows in {min(took) * 1000:.0f} ms (best of 5)")
    assert table["release"].nunique() == 170
    assert not table.duplicated(["release", "id"]).any()
    assert table[["repo", "path", "model", "hook", "site", "layer", "d_in", "format"]].notna().all().all()


def test_import_parses_nothing_and_needs_no_pandas():
    code = "import sys; from saewb.pretrained import catalogue;"
    code += "catalogue.find('gpt2-small-res-jb', 'blocks.8.hook_resid_pre');"
    code += "print('pandas' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "False"


def test_data_file_is_one_release_per_line_sorted():
    names = [json.loads(line)["release"] for line in module.lines()]
    assert names == sorted(names) == module.releases()


def test_find_agrees_with_the_table(table):
    for row in table.sample(40, random_state=0).itertuples():
        entry = find(row.release, row.id)
        for name in ("repo", "path", "format", "model", "hook", "layer", "d_in"):
            assert getattr(entry, name) == getattr(row, name)
        assert entry.l0 == row.l0 or (entry.l0 is None and math.isnan(row.l0))


def test_layers_are_those_of_the_hooks(table):
    layered = table[table["hook"] != "hook_embed"]
    assert (layered["hook"].str.extract(r"blocks\.(\d+)\.")[0].astype(int) == layered["layer"]).all()
    assert set(table[table["hook"] == "hook_embed"]["release"]) == {"gemma-scope-2b-pt-res", "gemma-scope-9b-pt-res"}


@pytest.mark.parametrize(
    ("release", "id", "megabytes"),
    [  # of published files, or by hand from published shapes
        ("gpt2-small-res-jb", "blocks.0.hook_resid_pre", 151.1),
        ("gemma-scope-2b-pt-res", "layer_0/width_16k/average_l0_13", 302.1),
        ("gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_12", 268.6),
        ("gemma-scope-9b-pt-res-canonical", "layer_20/width_131k/canonical", 3759.2),
        ("gemma-scope-2-4b-pt-res", "layer_17_width_16k_l0_big", 335.7),
        ("gemma-scope-2-1b-pt-transcoders-all", "layer_3_width_16k_l0_big_affine", 156.4),
        ("llama_scope_lxr_8x", "l0r_8x", 537.0),
        ("mwhanna-qwen3-4b-transcoders", "layer_0", 1678.1),
        ("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post", 1073.9),
    ],
)
def test_estimated_bytes(release, id, megabytes):
    assert find(release, id).bytes / 1e6 == pytest.approx(megabytes, abs=0.4)


def test_what_was_corrected():
    assert find("gemma-scope-9b-it-res", "layer_9/width_16k/average_l0_14").model == "google/gemma-2-9b-it"
    assert find("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_pre").neuronpedia == "pythia-70m-deduped/e-res-sm"
    assert find("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8").neuronpedia is None
    assert find("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical").l0 == 82
    assert find("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_21").l0 == 21
    assert find("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post").norm_factor is None


def test_target_l0_is_told_from_measured(table):
    assert set(table[table["format"] == "gemma_3"]["l0_is"]) == {"target"}
    assert set(table[table["release"] == "gemma-scope-2b-pt-res"]["l0_is"]) == {"measured"}
    assert table[table["l0"].isna()]["l0_is"].isna().all()
    # floor(30 + 30 min(1, 3*9/34)), by hand 53.8
    assert find("gemma-scope-2-4b-pt-res", "layer_9_width_16k_l0_medium").l0 == 53
    assert find("gemma-scope-2-4b-pt-res", "layer_9_width_262k_l0_medium_seed_1").l0 == 53


def test_filters(table):
    gemma = catalogue(model="gemma-2-2b")
    assert len(gemma) == len(catalogue(model="google/gemma-2-2b")) == sum(table["model"] == "google/gemma-2-2b")
    # v5 (8 releases of 12), hook-z, mlp, res-jb, feature splitting, 6 end-to-end releases of 3
    n_gpt2 = 8 * 12 + 12 + 12 + 13 + 8 + 6 * 3
    assert len(catalogue(model="GPT2-small")) == len(catalogue(model="openai-community/gpt2")) == n_gpt2
    result = catalogue(model="gemma-2-2b", site="blocks.0.hook_resid_post", width="16k", layer=[3, 4])
    assert set(result["layer"]) == {3, 4}
    assert set(result["d_sae"]) == {2**14}
    assert len(catalogue(width=16_384)) == len(catalogue(width="16k"))
    assert set(catalogue(site="transcoder", layer=range(2))["layer"]) == {0, 1}
    assert catalogue(l0=(50, 60))["l0"].between(50, 60).all()
    assert set(catalogue(l0=60)["l0"]) == {60}
    assert catalogue(neuronpedia=True)["neuronpedia"].notna().all()
    assert len(catalogue(neuronpedia=True)) + len(catalogue(neuronpedia=False)) == len(table)
    page = catalogue(neuronpedia="https://www.neuronpedia.org/gpt2-small/8-res-jb/1234")
    assert page["id"].tolist() == ["blocks.8.hook_resid_pre"]
    assert set(catalogue(architecture="gated")["release"]) == {"sae_bench_pythia70m_sweep_gated_ctx128_0730"}
    assert len(catalogue(model="gpt2", site="z", layer=40)) == 0  # each is there, not together


def test_nearest_l0_picks_one_of_each_release_layer_and_width():
    many = catalogue(release="gemma-scope-2b-pt-res", site="resid_post")
    one = catalogue(release="gemma-scope-2b-pt-res", site="resid_post", nearest_l0=50)
    groups = many.groupby(["layer", "d_sae"])
    assert len(one) == len(groups)
    for row in one.itertuples():
        group = groups.get_group((row.layer, row.d_sae))
        assert abs(row.l0 - 50) == (group["l0"] - 50).abs().min()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "gemma-2-2bb"}, "near: .*gemma-2-2b"),
        ({"release": "gpt2-small-res-jbb"}, "near: gpt2-small-res-jb"),
        ({"site": "resid_pst"}, "near: resid_post"),
        ({"site": "zzzz"}, "want: attn_out, embed, mlp_out"),
        ({"width": "17k"}, "near: 1"),
        ({"architecture": "jumpr"}, "fix:  saewb.catalogue\\(architecture='jumprelu'\\)"),
        ({"neuronpedia": "gpt2-small/9-res-jbb"}, "near: gpt2-small/9-res-jb"),
    ],
)
def test_a_name_that_is_nowhere_is_an_error_with_near_names(asked, message):
    with pytest.raises(ValueError, match=message):
        catalogue(**asked)


def test_find_errors_have_near_names():
    with pytest.raises(ValueError, match=r"near: gpt2-small-res-jb"):
        find("gpt2-small-res-j", "x")
    with pytest.raises(ValueError, match=r"near: blocks\.8\.hook_resid_pre.*\n  fix:  saewb\.load_sae\('gpt2-small-r"):
        find("gpt2-small-res-jb", "blocks.8.hook_resid_pr")
    with pytest.raises(ValueError, match=r"want: one of its 13 ids"):
        find("gpt2-small-res-jb", "?")


def test_expanding_by_hand():
    sets = [
        {
            "id": "l{0}w{1}",
            "axes": ["1-2", ["4k", "7"]],
            "not": [["2", "7"]],
            "path": {"text": "p{0}/{v}", "each": "a,b,c"},
            "hook": "h{0}",
            "d_sae": {"slot": 1},
            "l0": [5, None, 7],
            "neuronpedia": {"text": "n{0}", "where": [1], "in": [["4k"]]},
            "norm_factor": {"over": 64, "each": [2, 4, 8]},
        },
        {"id": "m{0}", "table": {"": "3"}, "hook": "=", "layer": 9, "skip": True},
    ]
    sets[1]["table"], sets[1]["id"] = {"8": "3"}, "m{0}-{1}"
    result = expand({"d_in": 2, "architecture": "jumprelu", "sets": sets})
    assert result["id"] == ["l1w4k", "l1w7", "l2w4k", "m8-3"]
    assert result["path"] == ["p1/a", "p1/b", "p2/c", "m8-3"]
    assert result["hook"] == ["h1", "h1", "h2", "m8-3"]
    assert result["layer"] == [1, 1, 2, 9]
    assert result["d_sae"] == [4096, 7, 4096, None]
    assert result["l0"] == [5, None, 7, None]
    assert result["neuronpedia"] == ["n1", None, "n2", None]
    assert result["norm_factor"] == [32, 16, 8, None]
    assert result["bytes"][1] == 4 * (7 * 2 * 2 + 7 + 7 + 2)
    assert result["bytes"][3] is None
    assert Counter(width(label) for label in ("1m", "65k", "12")) == {2**20: 1, 2**16: 1, 12: 1}
