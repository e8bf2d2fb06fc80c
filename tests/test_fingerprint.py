"""Digests: equal for equal content wherever it lies, different after a change of any bit, dtype, shape or token."""

import hashlib

import pytest
import torch
from helpers import tiny_models
from helpers.architecture_registry import ARCHITECTURES
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb import fingerprint
from saewb.fingerprint import (
    check_same,
    differences,
    files_digest,
    joined_rows,
    rows_digest,
    sae_digest,
    tensor_digest,
    tensors_digest,
    texts_digest,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def flip(tensor, element, bit):
    """Change one bit of a tensor, in place."""
    raw = tensor.detach().view(-1)[element : element + 1].view(torch.uint8)
    raw[bit // 8] ^= 1 << bit % 8


@examples(40)
@given(data=st.data())
def test_one_bit_of_any_tensor_counts(data):
    shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
    tensors = {}
    for name in data.draw(st.lists(st.text(max_size=3), min_size=1, max_size=4, unique=True)):
        dtype = data.draw(st.sampled_from(DTYPES[:-1]))
        tensors[name] = torch.randint(0, 9, tuple(data.draw(shapes))).to(dtype)
    before = tensors_digest(tensors)
    assert tensors_digest({name: t.clone() for name, t in reversed(tensors.items())}) == before
    name = data.draw(st.sampled_from(sorted(tensors)))
    t = tensors[name]
    element = data.draw(st.integers(0, t.numel() - 1))
    bit = data.draw(st.integers(0, 8 * t.element_size() - 1))
    flip(t, element, bit)
    assert tensors_digest(tensors) != before
    flip(t, element, bit)
    assert tensors_digest(tensors) == before


def test_of_a_tensor_it_is_the_sha256_of_blocks(monkeypatch):
    monkeypatch.setattr(fingerprint, "_BLOCK", 64)
    t = torch.arange(40.0).reshape(10, 4)
    blocks = b"".join(hashlib.sha256(t[i : i + 4].numpy().tobytes()).digest() for i in (0, 4, 8))
    of_tensor = hashlib.sha256(b"torch.float32 (10, 4)" + blocks).hexdigest()
    assert tensor_digest(t) == fingerprint.values_digest([("", of_tensor)])


def test_layout_device_and_sharing_do_not_count_but_shape_and_dtype_do():
    t = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    same = [t.clone(), t.T.contiguous().T, torch.cat([t, t])[:6], t.repeat(1, 2)[:, :8], torch.nn.Parameter(t)]
    assert {tensor_digest(x) for x in same} == {tensor_digest(t)}
    others = [t.reshape(8, 6), t.T, t.double(), t.view(torch.int32), t[None], -t, t[:5]]
    assert len({tensor_digest(x) for x in (t, *others)}) == 1 + len(others)
    assert tensors_digest({"a": t, "b": t}) == tensors_digest({"a": t, "b": t.clone()})
    assert tensor_digest(torch.tensor(3.0)) != tensor_digest(torch.tensor([3.0]))
    for odd in (torch.zeros(0, 3), torch.empty(3, device="meta"), torch.zeros(2, dtype=torch.complex64).conj()):
        assert tensor_digest(odd) == tensor_digest(odd)
    with torch.inference_mode():
        assert tensor_digest(torch.ones(3)) == tensor_digest(torch.ones(3).clone())


def test_a_digest_used_again_is_not_stale(monkeypatch):
    monkeypatch.setattr(fingerprint, "_SMALL", 100)
    t = torch.nn.Parameter(torch.zeros(64, 64))
    hashed, real = [], fingerprint._blocks
    monkeypatch.setattr(fingerprint, "_blocks", lambda t: hashed.append(1) or real(t))

    def digest():
        return tensors_digest({"t": t}, reuse=True)

    first = digest()
    assert (digest(), len(hashed)) == (first, 1)
    with torch.no_grad():
        t[5, 5] = 1  # counted by torch
    assert (digest() != first, len(hashed)) == (True, 2)
    t.data.mul_(0.5)  # not counted: seen in the sample
    assert digest() == tensors_digest({"t": t}) != first
    with torch.inference_mode():
        t.add_(1)
    assert digest() == tensors_digest({"t": t})
    t.data = torch.zeros(64, 64)  # other memory
    assert digest() == first
    assert tensors_digest({"t": torch.zeros(64, 64)}, reuse=True) == first


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_an_sae_is_all_its_weights_and_its_settings(name):
    sae = ARCHITECTURES[name]()
    before = sae_digest(sae)
    assert sae_digest(sae.with_config(metadata={"note": 1}, model="another name")) == before
    assert sae_digest(sae.double()) != before
    sae = sae.float()
    assert sae_digest(sae) == before
    for tensor in sae.state_dict().values():
        flip(tensor, tensor.numel() - 1, 3)
        assert sae_digest(sae) != before
        flip(tensor, tensor.numel() - 1, 3)
    assert sae_digest(sae) == before
    assert sae_digest(sae.with_config(hook="blocks.7.hook_resid_post")) != before


def test_a_saved_sae_is_the_same_one(tmp_path):
    sae = saewb.load_sae("tiny")
    saewb.save_sae(sae, tmp_path / "s")
    assert sae_digest(saewb.load_sae(tmp_path / "s")) == sae_digest(sae)


@examples(40)
@given(data=st.data())
def test_rows_add_up_in_any_order_and_each_token_and_number_counts(data):
    ids = torch.randint(0, 50, (data.draw(st.integers(2, 9)), 4), generator=torch.Generator().manual_seed(0))
    whole, cut = rows_digest(ids, 3), data.draw(st.integers(1, len(ids) - 1))
    parts = [rows_digest(ids[:cut], 3), rows_digest(ids[cut:], 3 + cut)]
    assert joined_rows(*parts) == joined_rows(*reversed(parts)) == whole
    assert rows_digest(ids.to(torch.int32), 3) == whole
    changed, (row, place) = ids.clone(), (data.draw(st.integers(0, len(ids) - 1)), data.draw(st.integers(0, 3)))
    changed[row, place] += 1
    assert rows_digest(changed, 3) != whole
    assert rows_digest(ids, 4) != whole


def test_texts_and_files(tmp_path):
    assert texts_digest(["ab", "c"]) != texts_digest(["a", "bc"])
    assert texts_digest(["ab"]) == texts_digest(iter(["ab"]))
    assert texts_digest([[1, 2]]) == texts_digest([torch.tensor([1, 2])]) != texts_digest([[1, 3]])
    assert texts_digest(["\ud800"]) != texts_digest(["\ud801"])
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, content in zip(paths, (b"one", b"two"), strict=True):
        path.write_bytes(content)
    before = files_digest(paths)
    assert files_digest(paths[::-1]) != before
    paths[0].rename(tmp_path / "c")
    assert files_digest([tmp_path / "c", paths[1]]) == before
    paths[1].write_bytes(b"twp")
    assert files_digest([tmp_path / "c", paths[1]]) != before


def test_a_large_file_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_WHOLE_FILE", 1 << 20)
    path = tmp_path / "large"
    path.write_bytes(bytes(3 << 20))
    before = files_digest([path])
    for content in (bytes((3 << 20) - 1) + b"x", b"x" + bytes((3 << 20) - 1), bytes((3 << 20) - 1)):
        path.write_bytes(content)
        assert files_digest([path]) != before


def test_what_differs_is_said():
    a = {"SAE": "1" * 64, "model": "2" * 64, "tokens": None}
    assert differences(a, a) == []
    assert differences(a, {**a, "tokens": "3" * 64}) == ["tokens unknown, not 3333333333"]
    check_same("it", a, a, fix="")
    with pytest.raises(
        ValueError, match=r"^it is of another model and other tokens \(by content: model 2222222222, not"
    ):
        check_same("it", a, {**a, "model": "4" * 64, "tokens": "5" * 64}, fix="f()")


def test_a_model_after_a_pass_is_the_same_and_each_weight_counts():
    from saewb.models.active import model_digest

    model = tiny_models.new_bridge()
    before = model_digest(model)
    model(tiny_models.tokens())
    saewb.build_index(model, tiny_models.sae("blocks.1.hook_resid_post"), tiny_models.tokens(4, 9), n_top=2)
    assert model_digest(model) == before == model_digest(tiny_models.new_bridge())
    assert model_digest(tiny_models.new_bridge(torch.bfloat16)) != before
    for weight in model.original_model.state_dict().values():
        flip(weight, weight.numel() // 2, 1)
        assert model_digest(model) != before
        flip(weight, weight.numel() // 2, 1)
    assert model_digest(model) == before
