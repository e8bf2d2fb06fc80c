"""Whatever is wrong with the files of a layout, reading them is a FormatError: nothing is run, little is allocated."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc

import pytest
import torch
import yaml
from helpers.examples import examples
from helpers.format_fixtures import (
    deepseek_r1,
    dictionary_learning,
    gemma,
    mntss,
    mwhanna,
    openai,
    qwen_scope,
    sparsify,
)
from hypothesis import given
from hypothesis import strategies as st

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, read

LAYOUTS = {
    "dictionary_learning": lambda place: dictionary_learning(place, "MatryoshkaBatchTopKSAE"),
    "gated": lambda place: dictionary_learning(place, "GatedAutoEncoder"),
    "deepseek_r1": deepseek_r1,
    "openai": openai,
    "qwen_scope": qwen_scope,
    "sparsify": lambda place: sparsify(place, "transcode"),
    "mwhanna": lambda place: mwhanna(place, threshold="activation_function.threshold"),
    "mntss": mntss,
    "gemma": gemma,
}
PICKLED = [name for name in LAYOUTS if name not in ("sparsify", "mwhanna", "mntss", "gemma")]
CONFIGURED = [name for name in LAYOUTS if name not in ("deepseek_r1", "openai")]
REFUSED = (FormatError, FileNotFoundError)
MODEST = examples(40, derandomize=True)
ABSURD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def weights_of(written):
    """A file with weights, and all its siblings that are not weights."""
    place = written.place if written.place.is_file() else None
    suffixes = (".pt", ".safetensors")
    files = sorted(path for path in (place.parent if place else written.place).iterdir() if path.is_file())
    return place or next(path for path in files if path.suffix in suffixes), [
        path for path in files if path.suffix not in suffixes
    ]


def reads_or_refuses(place):
    """Read it; True if that was refused, and in either case little was allocated on the way."""
    tracemalloc.start()
    try:
        read(place, Provenance(repo="a/qwen3-4b"))
        refused = False
    except REFUSED:
        refused = True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20, f"{peak} bytes"
    return refused


class Runs:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("layout", PICKLED)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_runs_nothing(layout, zipped, tmp_path):
    written, trace = LAYOUTS[layout](tmp_path / "files"), tmp_path / "ran"
    file, _ = weights_of(written)
    hostile = {**written.stored, next(iter(written.stored)): Runs(trace)}
    if zipped:
        torch.save(hostile, file)
    else:
        file.write_bytes(pickle.dumps(hostile))
    assert reads_or_refuses(written.place)
    assert not trace.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_and_changed_bytes(layout, tmp_path):
    written = LAYOUTS[layout](tmp_path)
    file, _ = weights_of(written)
    whole = file.read_bytes()

    @MODEST
    @given(st.integers(0, len(whole) - 1), st.one_of(st.none(), st.integers(0, 255)))
    def check(at, byte):
        file.write_bytes(whole[:at] if byte is None else whole[:at] + bytes([byte]) + whole[at + 1 :])
        refused = reads_or_refuses(written.place)
        assert refused or byte is not None

    check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", ["integers", "complex", "shape", "nothing", "nan"])
def test_tensors_of_another_kind(layout, change, tmp_path):
    written = LAYOUTS[layout](tmp_path)
    of_files = layout in ("mntss", "gemma")
    stored = next(iter(written.stored.values())) if of_files else written.stored
    for name, tensor in stored.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or name.startswith("latents_"):
            continue
        other = {
            "integers": lambda t: t.long(),
            "complex": lambda t: torch.ones(t.shape, dtype=torch.complex64),
            "shape": lambda t: t.reshape(1, *t.shape),
            "nothing": lambda t: t.reshape(-1)[:0],
            "nan": lambda t: torch.full_like(t, torch.nan),
        }[change](tensor)
        wrong = {**stored, name: other.contiguous()}
        written.save({next(iter(written.stored)): wrong} if of_files else wrong)
        assert reads_or_refuses(written.place), name


@pytest.mark.parametrize("layout", CONFIGURED)
def test_configurations_with_absurd_values(layout, tmp_path):
    written = LAYOUTS[layout](tmp_path)
    for path in weights_of(written)[1]:
        text = path.read_text()
        _try_absurd_values(path, written.place)
        path.write_text(text)


def _try_absurd_values(path, place):
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    content = load(path.read_text())

    @MODEST
    @given(st.data())
    def check(data):
        path.write_text(dump(_replaced(content, data, ABSURD)))
        reads_or_refuses(place)

    check()


def _replaced(content, data, values):
    """The same with the value of one key, however deep, another one."""
    key = data.draw(st.sampled_from(sorted(content)))
    if isinstance(content[key], dict) and content[key] and data.draw(st.booleans()):
        return {**content, key: _replaced(content[key], data, values)}
    return {**content, key: data.draw(values)}


@pytest.mark.parametrize("layout", CONFIGURED)
@pytest.mark.parametrize("text", ["", "\x00\xff", "[" * 1000, "{", "null", "3", "[]", '"text"'])
def test_configurations_that_are_none(layout, text, tmp_path):
    written = LAYOUTS[layout](tmp_path)
    _, configs = weights_of(written)
    for path in configs:
        before = path.read_text()
        path.write_text(text)
        assert reads_or_refuses(written.place) or (path.suffix == ".yaml" and text in ("", "null"))
        path.write_text(before)


def test_references_in_yaml_do_not_fill_the_memory(tmp_path):
    """Nine lists of nine references each are 9^9 words when printed."""
    place = mwhanna(tmp_path).place
    bomb = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "config.yaml").write_text("\n".join([*bomb, "model_name: *a9"]))
    assert reads_or_refuses(place)
    (tmp_path / "config.yaml").write_text("\n".join([*bomb, "model_name: gpt2", "feature_input_hook: {x: *a9}"]))
    assert reads_or_refuses(place)


def test_a_folder_of_many_layers_that_are_not_there(tmp_path):
    written = mntss(tmp_path, n=2)
    for i in range(2, 300):
        (tmp_path / f"W_enc_{i}.safetensors").write_bytes(b"")
    assert reads_or_refuses(written.place)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_factor_is_never_ignored(layout, tmp_path):
    place = LAYOUTS[layout](tmp_path).place
    with pytest.raises(FormatError, match=r"scaling_factor=2.0 was given"):
        read(place, Provenance(scaling_factor=2.0))
    read(place, Provenance(scaling_factor=None))
