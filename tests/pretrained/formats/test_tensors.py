"""Files of tensors: read lazily, mapped where they can be, and refused when they lie; nothing in them is run."""

import json
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from helpers.examples import examples
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from saewb.errors import FormatError
from saewb.pretrained.formats import TensorFile
from saewb.pretrained.formats._tensors import check_finite

KINDS = ("safetensors", "npz", "packed.npz", "pt")
WANT = {"W": np.arange(48, dtype=np.float32).reshape(8, 6), "b": np.linspace(-1, 1, 6, dtype=np.float32)}


def write(path, kind, arrays=None):
    arrays = WANT if arrays is None else arrays
    if kind == "safetensors":
        save_file({name: torch.from_numpy(a) for name, a in arrays.items()}, path)
    elif kind == "pt":
        torch.save({name: torch.from_numpy(a) for name, a in arrays.items()}, path)
    else:
        (np.savez_compressed if kind.startswith("packed") else np.savez)(path, **arrays)
    return path


def content(kind, tmp):
    return write(tmp / f"whole.{kind}", kind).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written(kind, tmp_path):
    file = TensorFile(write(tmp_path / f"a.{kind}", kind))
    assert file.names == ("W", "b")
    assert (file.shape("W"), file.dtype("W")) == ((8, 6), torch.float32)
    assert "W" in file
    assert "V" not in file
    for name, array in WANT.items():
        assert torch.equal(file.tensor(name), torch.from_numpy(array))
    file.tensor("W").zero_()  # a private copy, or a private mapping
    assert torch.equal(TensorFile(file.path).tensor("W"), torch.from_numpy(WANT["W"]))
    with pytest.raises(FormatError, match=r"no tensor 'w'[\s\S]*W, b"):
        file.tensor("w")


@pytest.mark.parametrize("kind", ["npz", "packed.npz"])
def test_arrays_by_column_of_no_axis_and_empty(kind, tmp_path):
    arrays = {
        "columns": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        "scalar": np.float32(3.5),
        "empty": np.zeros((0, 3), np.float32),
        "whole": np.arange(5),
        "halves": np.arange(6, dtype=np.float16),
    }
    file = TensorFile(write(tmp_path / f"a.{kind}", kind, arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensor(name).numpy(), array)


def test_what_a_pt_file_holds_beside_tensors(tmp_path):
    inner = torch.nn.Linear(3, 4).state_dict()  # an OrderedDict with attributes
    held = {"ae": inner, "step": 7, "name": "TopK", "state": {"k": 32}, "p": torch.nn.Parameter(torch.ones(2))}
    held |= {"sizes": [1, 2], "half": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(held, tmp_path / "a.pt")
    file = TensorFile(tmp_path / "a.pt")
    assert file.names == ("ae/bias", "ae/weight", "half", "p")
    assert file.values == {"step": 7, "name": "TopK", "state/k": 32, "sizes": [1, 2]}
    assert torch.equal(file.tensor("ae/weight"), inner["weight"])
    assert not file.tensor("p").requires_grad


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux which files are mapped")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_mapped_not_copied(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    write(path, kind, {"W": np.ones((512, 512), np.float32)})
    tensor = TensorFile(path).tensor("W")
    with open("/proc/self/maps") as maps:
        mapped = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in mapped)
    assert tensor.sum() == 512 * 512


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt"])
def test_a_link_is_followed_and_what_is_no_file_is_refused(kind, tmp_path):
    path = write(tmp_path / f"blob.{kind}", kind)
    link = tmp_path / "snapshots" / f"a.{kind}"
    link.parent.mkdir()
    link.symlink_to(path)  # as in the hub's cache
    assert TensorFile(link).names == ("W", "b")
    os.mkfifo(tmp_path / f"pipe.{kind}")
    with pytest.raises(FormatError, match="not a regular file"):  # and does not wait for a writer
        TensorFile(tmp_path / f"pipe.{kind}")
    with pytest.raises(FormatError, match="not a regular file"):
        TensorFile(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        TensorFile(tmp_path / f"missing.{kind}")
    with pytest.raises(FormatError, match=r"\.safetensors, \.npz"):
        TensorFile(write(tmp_path / "a.ckpt", "pt"))


# --- numbers that are none


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_small_tensor_is_looked_at_whole(kind, value, tmp_path):
    bad = WANT["W"].copy()
    bad[3, 4] = value
    file = TensorFile(write(tmp_path / f"a.{kind}", kind, {**WANT, "W": bad}))
    with pytest.raises(FormatError, match="NaN or infinity in W"):
        file.tensor("W")
    assert file.tensor("b").isfinite().all()


def test_of_a_large_tensor_the_ends_are_looked_at_and_finite_looks_at_all(tmp_path):
    large = np.ones((1 << 11, 1 << 10), np.float32)
    for row, seen in ((0, True), (1000, False), (-1, True)):
        bad = large.copy()
        bad[row, -1 if row else 0] = np.nan
        file = TensorFile(write(tmp_path / f"{row}.safetensors", "safetensors", {"W": bad}))
        if seen:
            with pytest.raises(FormatError, match="in W"):
                file.tensor("W")
        else:
            with pytest.raises(FormatError, match="in W"):
                check_finite({"W": file.tensor("W")})
    check_finite({"W": torch.from_numpy(large), "n": torch.arange(3)})


# --- files that lie


def refused(path, message="", most=8 << 20):
    """A FormatError, with little allocated in Python and numpy on the way; the last test here sees torch's share."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            TensorFile(path).tensors()
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": ONE}, b"", None),  # numbers missing
        ({"a": ONE}, bytes(8), 1 << 60),
        ({"a": ONE}, bytes(8), 100),
        ({"a": {**ONE, "shape": [1 << 40]}}, bytes(8), None),
        ({"a": {**ONE, "shape": [-2]}}, bytes(8), None),
        ({"a": {**ONE, "shape": [1 << 32, 1 << 32]}}, bytes(8), None),  # the product overflows to 0
        ({"a": {**ONE, "shape": "2"}}, bytes(8), None),
        ({"a": {**ONE, "data_offsets": [0, 1 << 62]}}, bytes(8), None),
        ({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8), None),
        ({"a": {**ONE, "data_offsets": [-8, 0]}}, bytes(8), None),
        ({"a": ONE, "b": ONE}, bytes(8), None),  # overlapping
        ({"a": ONE}, bytes(16), None),  # something behind
        ({"a": {**ONE, "dtype": "F31"}}, bytes(8), None),
        ({"a": {"shape": [2]}}, bytes(8), None),
        ({"a": 3}, bytes(8), None),
        (b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), bytes(8), None),
        (b"[1]", b"", None),
        (b"[" * 50_000, b"", None),
        (b'{"__metadata__": 1}', b"", None),
        (b"\xff", b"", None),
    ],
)
def test_hostile_safetensors(header, data, length, tmp_path):
    refused(safetensors(tmp_path / "a.safetensors", header, data, length), r"a\.safetensors")


def test_a_header_of_100_mb_is_refused_by_its_length(tmp_path):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100 << 20))
        file.truncate(101 << 20)
    refused(path, "header has 104857600 bytes")


def test_eight_bit_floats_are_refused_by_name(tmp_path):
    save_file({"W": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "W is of kind 'F8_E4M3'")


def npy(header, data=b"", version=b"\x01\x00"):
    text = header if isinstance(header, bytes) else repr(header).encode()
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


def npz(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(name.replace("__", "/"), raw)
    return path


SAID = {"descr": "<f4", "fortran_order": False, "shape": (2,)}


@pytest.mark.parametrize(
    "raw",
    [
        npy({**SAID, "shape": (1 << 40,)}, bytes(8)),
        npy({**SAID, "shape": (-2,)}, bytes(8)),
        npy({**SAID, "shape": (True, 2)}, bytes(8)),
        npy({**SAID, "shape": [2]}, bytes(8)),
        npy({**SAID, "descr": "|O"}, pickle.dumps([1, 2])),
        npy({**SAID, "descr": ">f4"}, bytes(8)),
        npy({**SAID, "descr": [("a", "<f4")]}, bytes(8)),
        npy({**SAID, "fortran_order": 1}, bytes(8)),
        npy({**SAID, "more": 1}, bytes(8)),
        npy({"descr": "<f4"}, bytes(8)),
        npy(b"__import__('os').system('touch ran')", bytes(8)),
        npy(b"(" * 9_000, bytes(8)),
        npy(SAID, bytes(8), b"\x03\x00"),
        npy(SAID, bytes(4)),
        npy(SAID, bytes(12)),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"",
        pickle.dumps([1, 2]),
    ],
)
def test_hostile_npy_members(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        refused(npz(tmp_path / "a.npz", compression, **{"W.npy": raw}), r"a\.npz")
    assert not (tmp_path / "ran").exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    shape = (64 << 20,)
    raw = npy({**SAID, "descr": "|u1", "shape": shape}, bytes(shape[0]))
    path = npz(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, **{"W.npy": raw})
    assert path.stat().st_size < 1 << 20
    refused(path, "would unpack")
    small = npz(tmp_path / "zeros.npz", zipfile.ZIP_DEFLATED, **{"W.npy": npy(SAID, bytes(8))})
    assert TensorFile(small).tensor("W").tolist() == [0, 0]


@pytest.mark.parametrize("name", ["../W.npy", "/W.npy", "a/../../W.npy", "W.txt"])
def test_names_that_leave_the_file(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(name, npy(SAID, bytes(8)))
    refused(tmp_path / "a.npz", "member")


def test_two_members_of_one_name_and_other_packings(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("W.npy", npy(SAID, bytes(8)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("W.npy", npy(SAID, bytes(8)))
    refused(tmp_path / "a.npz", "1 different names")
    refused(npz(tmp_path / "b.npz", zipfile.ZIP_LZMA, **{"W.npy": npy(SAID, bytes(8))}), "stored or deflated")


class Run:
    def __init__(self, function=open, *arguments):
        self.call = function, arguments or ("ran", "w")

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "held",
    [
        {"W": Run()},
        {"W": torch.ones(2), "code": Run(os.system, "touch ran")},
        {"W": Run(eval, "open('ran', 'w')")},
        [torch.ones(2)],
        {"W": torch.eye(3).to_sparse()},
        {"W": torch.ones(1).expand(1 << 20, 1 << 20)},  # one number that says it is 2^40
        {"a": {"b": {"c": {"d": {"e": {"f": torch.ones(1)}}}}}},
    ],
)
def test_a_pickle_names_tensors_and_nothing_else(held, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(held, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"a\.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("raw", [pickle.dumps(Run()), pickle.dumps({"W": [1.0]}), b"", b"PK\x03\x04", b"\x80\x04."])
def test_what_is_no_zip_file_is_no_pt_file(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(raw)
    refused(tmp_path / "a.pt", "torch 1.6 or later")
    assert not (tmp_path / "ran").exists()


def test_a_pt_file_of_before_1_6_is_refused(tmp_path):
    torch.save({"W": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.pt", "torch 1.6 or later")


def rewritten(path, change):
    """The zip file with `change(name, raw)` in place of each member; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            new = change(name, raw)
            if new is not None:
                archive.writestr(name, new)
    return path


def test_a_pt_file_whose_numbers_are_short_or_missing(tmp_path):
    write(tmp_path / "a.pt", "pt")
    refused(rewritten(tmp_path / "a.pt", lambda n, raw: raw[:16] if n.endswith("data/0") else raw), r"a\.pt")
    write(tmp_path / "b.pt", "pt")
    refused(rewritten(tmp_path / "b.pt", lambda n, raw: None if n.endswith("data/0") else raw), r"b\.pt")
    write(tmp_path / "c.pt", "pt")
    refused(rewritten(tmp_path / "c.pt", lambda n, raw: None if n.endswith("data.pkl") else raw), "torch.save")
    write(tmp_path / "d.pt", "pt")
    huge = rewritten(tmp_path / "d.pt", lambda n, raw: raw.replace(b"K0", b"J\xff\xff\xff\x7f") if "pkl" in n else raw)
    refused(huge, r"d\.pt")


# --- any damage


def same_or_refused(path):
    """Reading gives tensors (bits of a number may be flipped unseen) or a FormatError; any other error fails."""
    try:
        file = TensorFile(path)
        for name in file.names:
            assert file.tensor(name).numel() * file.dtype(name).itemsize <= path.stat().st_size * 20 + (16 << 20)
    except FormatError:
        return


@pytest.mark.parametrize("kind", KINDS)
@examples(40)
@given(data=st.data())
def test_cut_short_or_with_bytes_flipped(kind, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = bytearray(content(kind, tmp_path))
    end = data.draw(st.integers(0, len(raw)))
    for at, bits in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255)), max_size=4)):
        raw[at] ^= bits
    if data.draw(st.booleans()):
        del raw[end:]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(raw)
    same_or_refused(path)


@pytest.mark.parametrize("kind", KINDS)
@examples(15)
@given(raw=st.binary(max_size=200))
@example(raw=b"PK\x05\x06" + bytes(18))  # a zip file of nothing
def test_any_bytes(kind, raw, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(raw)
    same_or_refused(path)


_HOSTILE = """
import re, struct, sys
from pathlib import Path
import torch
from saewb.errors import FormatError
from saewb.pretrained.formats import TensorFile
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # kB; see tests/peak.py
before = peak()
for path in sys.argv[1:]:
    try:
        TensorFile(path).tensors()
    except FormatError:
        continue
    raise SystemExit(f"{path} was read")
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures in Linux' units")
def test_hostile_files_allocate_little(tmp_path):
    """Peak memory of a process that is handed one file of each kind that claims a terabyte."""
    import subprocess

    terabyte = {"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    paths = [safetensors(tmp_path / "a.safetensors", terabyte, bytes(8))]
    paths.append(npz(tmp_path / "a.npz", **{"W.npy": npy({**SAID, "shape": (1 << 38,)}, bytes(8))}))
    zeros = npy({**SAID, "descr": "|u1", "shape": (128 << 20,)}, bytes(128 << 20))
    paths.append(npz(tmp_path / "bomb.npz", zipfile.ZIP_DEFLATED, **{"W.npy": zeros}))
    torch.save({"W": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    paths += [tmp_path / "a.pt"]
    done = subprocess.run([sys.executable, "-c", _HOSTILE, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, f"{done.stdout} MB"
