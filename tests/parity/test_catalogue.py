"""The catalogue against sae-lens's own: every id of every release, but for the slips corrected here, by name."""

from __future__ import annotations

import re

import pytest

from saewb.pretrained import catalogue
from saewb.pretrained.catalogue._expand import expand

directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory")

# --- what is corrected, by name (each also in the release's `note`)
L0_FROM_THE_NAME = {  # releases where sae-lens gives none, or few; the number is in the path
    *(f"gemma-scope-{size}-pt-{site}-canonical" for size in ("2b", "9b") for site in ("res", "mlp", "att")),
    "gemma-scope-27b-pt-res-canonical",
    "gemma-scope-9b-it-res-canonical",
}
L0_FROM_THE_ID = {"gemma-scope-2b-pt-res", "gemma-scope-9b-pt-res"}  # the four embedding SAEs of each
NEURONPEDIA = {
    ("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_pre"): "pythia-70m-deduped/e-res-sm",
    ("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8"): None,
    ("gemma-scope-9b-pt-res", "layer_20/width_131k/average_l0_114"): None,
}
L0 = {("gemma-scope-9b-pt-res-canonical", "layer_20/width_524k/canonical"): (78, 48)}  # theirs; as the path says
MODELS = {"gemma-scope-9b-it-res": "gemma-2-9b-it"}
WITHOUT_FACTOR = {"temporal-sae-gemma-2-2b", "temporal-sae-llama-3.1-8b"}  # sae-lens lists one and ignores it


@pytest.fixture(scope="module")
def theirs():
    return directory.get_pretrained_saes_directory()


def test_every_id_resolves_as_in_sae_lens(theirs):
    corrected, n = set(), 0
    assert set(catalogue.releases()) >= set(theirs)
    for release, lookup in theirs.items():
        spec = catalogue._spec(release)
        ours = expand(spec)
        assert spec["repo"] == lookup.repo_id
        assert spec.get("format", "sae_lens") == (lookup.conversion_func or "sae_lens")
        assert spec.get("overrides") == lookup.config_overrides
        label = spec.get("label", spec["model"])
        assert label == MODELS.get(release, lookup.model)
        assert sorted(ours["id"]) == sorted(lookup.saes_map)
        for row, id in enumerate(ours["id"]):
            n += 1
            assert ours["path"][row] == lookup.saes_map[id]
            want = NEURONPEDIA.get((release, id), lookup.neuronpedia_id[id])
            assert ours["neuronpedia"][row] == want, (release, id)
            corrected |= {(release, id)} & set(NEURONPEDIA)
            factor = None if release in WITHOUT_FACTOR else lookup.norm_scaling_factor.get(id)
            assert ours["norm_factor"][row] == (None if factor is None else pytest.approx(factor, rel=1e-15))
            explained = ours["variance_explained"][row]
            assert (1.0 if explained is None else explained) == lookup.expected_var_explained[id]
            l0 = lookup.expected_l0[id] or None
            if (release, id) in L0:
                before, l0 = L0[release, id]
                assert before == lookup.expected_l0[id]
            named = release in L0_FROM_THE_NAME or (release in L0_FROM_THE_ID and "embedding" in id)
            if named and l0 is None:
                l0 = float(re.search(r"average_l0_(\d+)", lookup.saes_map[id])[1])
            assert ours["l0"][row] == l0, (release, id)
    print(f"{n} ids of {len(theirs)} releases agree with sae-lens")
    assert n == 13_857 or len(theirs) != 170  # those of 6.54.12
    assert corrected == set(NEURONPEDIA)


def test_what_is_corrected_is_noted(theirs):
    for release in (
        L0_FROM_THE_NAME | L0_FROM_THE_ID | {one for one, _ in (*NEURONPEDIA, *L0)} | set(MODELS) | WITHOUT_FACTOR
    ):
        assert "sae-lens" in catalogue._spec(release).get("note", ""), release
