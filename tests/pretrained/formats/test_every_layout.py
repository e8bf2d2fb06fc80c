"""What holds for every layout: one reader claims it, the files it names suffice, damage is a FormatError."""

import fnmatch
import json
import shutil

import pytest
import torch
import yaml
from helpers import format_fixtures
from helpers.examples import examples
from helpers.format_tensors import weights
from hypothesis import given
from hypothesis import strategies as st
from pretrained.formats import (
    test_crosscoder,
    test_gemma_scope,
    test_gemma_scope_2,
    test_llama_scope,
    test_saelens_runs,
    test_single_files,
    test_temporal_conf,
)
from sae.test_crosscoder import crosscoder

import saewb
from saewb.errors import FormatError
from saewb.pretrained.formats import LAYOUTS as READERS
from saewb.pretrained.formats import Provenance, detect, read

FORK, REPLICATION = test_crosscoder.fork_tensors(), test_crosscoder.replication_tensors()

# layout -> (writes it into a repository and says where in it, facts)
LAYOUTS = {
    "SAELens": (lambda repo: test_saelens_runs.checkpoint(repo / "output/k4", weights()), Provenance()),
    "GemmaScope": (
        lambda repo: test_gemma_scope.written(repo / test_gemma_scope.PATH),
        Provenance(repo=test_gemma_scope.RES),
    ),
    "GemmaScope2": (
        lambda repo: test_gemma_scope_2.written(repo / test_gemma_scope_2.PATHS["resid_post"]),
        Provenance(),
    ),
    "LlamaScope": (
        lambda repo: test_llama_scope.written(repo / test_llama_scope.PATH, test_llama_scope.made()),
        Provenance(),
    ),
    "LlamaScopeR1": (
        lambda repo: test_llama_scope.written_r1(repo / test_llama_scope.R1_PATH, test_llama_scope.made_r1(0.5)),
        Provenance(scaling_factor=0.5),
    ),
    "Temporal": (
        lambda repo: test_temporal_conf.written(repo / test_temporal_conf.FACTS.path, test_temporal_conf.weights()),
        test_temporal_conf.FACTS,
    ),
    "AttentionHookZ": (test_single_files.written_hook_z, Provenance()),
    "Goodfire": (lambda repo: test_single_files.written_goodfire(repo, weights()), Provenance()),
    "DeepSeekR1": (lambda repo: format_fixtures.deepseek_r1(repo).place, Provenance()),
    "OpenAI": (lambda repo: format_fixtures.openai(repo).place, Provenance()),
    "QwenScope": (lambda repo: format_fixtures.qwen_scope(repo).place, Provenance()),
    "Sparsify": (lambda repo: format_fixtures.sparsify(repo, next(iter(format_fixtures.SPARSIFY))).place, Provenance()),
    "CircuitTracerTranscoder": (lambda repo: format_fixtures.mwhanna(repo).place, Provenance()),
    "CrossCoderLayout": (lambda repo: saewb.save_sae(crosscoder(dtype=torch.float32), repo / "a"), Provenance()),
    "DictionaryLearningCrossCoder": (lambda repo: test_crosscoder.published(repo / "a", FORK), Provenance()),
    "DictionaryLearningCrossCoderCheckpoint": (
        lambda repo: test_crosscoder.published(repo / "a", FORK, "ae.pt"),
        Provenance(),
    ),
    "ReplicationCrossCoder": (lambda repo: test_crosscoder.replication(repo / "a", REPLICATION), Provenance()),
    "DictionaryLearning": (
        lambda repo: format_fixtures.dictionary_learning(repo / "a", "BatchTopKSAE").place,
        Provenance(),
    ),
}


def made(name, root):
    """The fixture of a layout in an own repository, and where in it."""
    write, facts = LAYOUTS[name]
    (root / "repo").mkdir(parents=True)
    place = write(root / "repo")
    return place, place.relative_to(root / "repo").as_posix(), facts


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_layout_claims_it(name, tmp_path):
    place, _, _ = made(name, tmp_path)
    assert [type(layout).__name__ for layout in READERS if layout.detect(place)] == [name]
    nothing = [layout for layout in READERS if layout.detect(tmp_path) or layout.detect(tmp_path / "missing")]
    assert nothing == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_files_it_names_are_those_it_needs(name, tmp_path):
    place, path, facts = made(name, tmp_path)
    want = read(place, facts)
    patterns = detect(place).patterns(path)
    root = tmp_path / "repo"
    for file in sorted(root.rglob("*")):
        inside = file.relative_to(root).as_posix()
        if file.is_file() and any(fnmatch.fnmatchcase(inside, pattern) for pattern in patterns):
            (tmp_path / "fetched" / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "fetched" / inside)
    assert not list((tmp_path / "fetched").rglob("trainer_state.pt"))
    got = read(tmp_path / "fetched" / path, facts)
    assert got.cfg == want.cfg
    for key, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[key], tensor)


@pytest.mark.parametrize("name", LAYOUTS)
def test_dtype_and_device_asked_for(name, tmp_path):
    place, _, facts = made(name, tmp_path)
    sae = read(place, facts, dtype=torch.float16, device="meta")
    assert {p.dtype for p in sae.parameters()} == {torch.float16}
    assert {p.device.type for p in sae.parameters()} == {"meta"}
    assert len({p.dtype for p in read(place, facts).parameters()}) == 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_messages_name_the_layout(name, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FormatError) as caught:
        detect(tmp_path)
    layout = next(layout for layout in READERS if type(layout).__name__ == name)
    assert layout.name in str(caught.value)
    assert all(mark in str(caught.value) for mark in layout.marks)


@pytest.mark.parametrize("name", LAYOUTS)
@examples(25)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(name, data, tmp_path_factory):
    """One file cut short, with bytes flipped, emptied or gone: an SAE of the right widths, or a FormatError."""
    place, path, facts = made(name, tmp_path_factory.mktemp(name))
    root = place.parents[path.count("/")]
    patterns = detect(place).patterns(path)
    files = [f for f in sorted(root.rglob("*")) if any(fnmatch.fnmatchcase(str(f), f"*{p}") for p in patterns)]
    victim = data.draw(st.sampled_from(files), label="file")
    raw = bytearray(victim.read_bytes())
    for at, bits in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255)), max_size=3)):
        raw[at] ^= bits
    del raw[data.draw(st.integers(0, len(raw)) | st.just(len(raw))) :]
    victim.unlink()
    if data.draw(st.integers(0, 9)):
        victim.write_bytes(raw)
    layout = next(layout for layout in READERS if type(layout).__name__ == name)
    try:
        sae = layout.read(place, facts)
    except (FormatError, FileNotFoundError):
        return
    assert sae.W_dec.shape == (sae.cfg.d_sae, sae.cfg.d_out)


CONFIGURED = [name for name in LAYOUTS if name not in ("GemmaScope", "Goodfire", "DeepSeekR1", "OpenAI")]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 70)
    | st.just(10**400)
    | st.floats()
    | st.sampled_from([0.5, 2.0, 16, 40, "topk", "relu", "blocks.3.hook_resid_post", "model.layers.3.output"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["in", "out", "k"]), inner, max_size=2),
    max_leaves=3,
)


@pytest.mark.parametrize("name", CONFIGURED)
@examples(40)
@given(data=st.data())
def test_any_configuration_is_read_or_refused(name, data, tmp_path_factory):
    """One or two of its values are others: an SAE, or a FormatError; any other error fails."""
    place, _, facts = made(name, tmp_path_factory.mktemp(name))
    folder = place if place.is_dir() else place.parent
    configs = [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".yaml") and f.name != "runner_cfg.json"]
    config = data.draw(st.sampled_from(configs))
    content = yaml.safe_load(config.read_text())  # JSON too is YAML
    for _ in range(data.draw(st.integers(1, 2))):
        block = data.draw(st.sampled_from([content, *(value for value in content.values() if isinstance(value, dict))]))
        if block:
            block[data.draw(st.sampled_from(sorted(block)))] = data.draw(VALUES)
    config.write_text(json.dumps(content) if config.suffix == ".json" else yaml.safe_dump(content))
    layout = next(layout for layout in READERS if type(layout).__name__ == name)
    try:
        sae = layout.read(place, facts)
    except FormatError:
        return
    assert sae.W_dec.shape == (sae.cfg.d_sae, sae.cfg.d_out)
