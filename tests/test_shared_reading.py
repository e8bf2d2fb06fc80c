"""Several processes read what one reads: index, evaluations, cache; failures, kills and folders are shared."""

import json

import pytest
import torch
from helpers import reading_worker, tiny_models

import saewb
from saewb.features.token_texts import TokenTexts


def assert_same(one, two, where=""):
    """Integers and texts are equal, floats to 1e-6."""
    assert type(one) is type(two), where
    if isinstance(one, TokenTexts):
        one, two = vars(one), vars(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where} {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, parts in enumerate(zip(one, two, strict=True)):
            assert_same(*parts, f"{where} {i}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype, where
        exact = not one.is_floating_point()
        tolerance = 0 if exact else 1e-6
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, equal_nan=True, msg=where)
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-9, nan_ok=True), where
    else:
        assert one == two, where


def of_index(index):
    return [index.info.to_json(), dict(index.tensors), index.token_texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process reads, and what three and two do."""
    folder = tmp_path_factory.mktemp("reading")
    torch.save(reading_worker.read(folder / "alone"), folder / "alone.pt")
    assert reading_worker.launch(3, "read", folder) == [0, 0, 0], tracebacks(folder)
    return folder


@pytest.fixture(scope="module")
def resumed(folder):
    """What three processes began, two of which ended it."""
    assert reading_worker.launch(3, "kill", folder) == [0, -9, 0], tracebacks(folder)
    half = saewb.load_index(folder / "killed" / "0")
    before = (half.info.rows, json.loads((folder / "interrupted_0").read_text()))
    assert reading_worker.launch(2, "resume", folder) == [0, 0], tracebacks(folder)
    return before


def tracebacks(folder):
    return "\n".join(path.read_text() for path in (*folder.glob("traceback_*"), *folder.glob("hangs_*")))


def load(path):
    return torch.load(path, weights_only=False)


def test_three_processes_read_what_one_reads(folder):
    one = load(folder / "alone.pt")
    for rank in range(3):
        assert_same(one, load(folder / f"read_{rank}.pt"), str(rank))
    assert one["evaluation"]["n_predictions"] > 100


def test_one_folder_holds_what_one_process_writes(folder):
    for i in range(2):
        alone, shared = (saewb.load_index(folder / name / "index" / str(i)) for name in ("alone", "shared"))
        assert_same(of_index(alone), of_index(shared))
    one, three = (
        sorted(path.name for path in (folder / name).rglob("*") if not path.name.startswith("tensors"))
        for name in ("alone", "shared")
    )
    assert one == three
    for path in (folder / "alone" / "cache").iterdir():
        assert path.read_bytes() == (folder / "shared" / "cache" / path.name).read_bytes()


def test_one_process_may_read_alone(folder):
    alone = [json.loads((folder / f"alone_{rank}").read_text()) for rank in range(3)]
    assert alone[0] == alone[2] != alone[1]
    assert alone[0] == [int((reading_worker.text() != tiny_models.BOS).sum()), 5.0]


def test_all_refuse_what_differs_or_is_wrong_in_one(folder):
    messages = [json.loads((folder / f"refused_{rank}").read_text()) for rank in range(3)]
    for rank, of in enumerate(messages):
        for name in ("index of another SAE", "evaluate another SAE"):
            assert of[name].startswith("ValueError: process 1 has another SAE than process 0"), (rank, of)
        for name in ("index of another text", "evaluate another text", "cache"):
            assert of[name].startswith("ValueError: process 1 has another text"), (rank, of)
        assert ("process 1 failed" in of["evaluate nothing"]) == (rank != 1), (rank, of)
        assert "holds other things" in of["index in a folder of other things"], (rank, of)


def test_a_failure_in_one_ends_all_with_its_reason(folder):
    for rank in range(3):
        errors = json.loads((folder / f"failed_{rank}").read_text())
        assert set(errors) == {"index", "evaluate", "cache"}
        for name, (message, seconds) in errors.items():
            want = "ArithmeticError: the third" if rank == 1 else "RuntimeError: process 1 failed: the third batch"
            assert message.startswith(want), (name, message)
            assert seconds < 10


def test_a_killed_process_ends_the_others(folder, resumed):
    assert resumed[0] == ((0, 12),)  # two rounds of three batches of two rows
    for rank in (0, 2):
        message, end = json.loads((folder / f"lost_{rank}").read_text())
        assert "another process of this launch failed or ended" in message
        assert end - float((folder / "killed_at").read_text()) < 10


def test_ctrl_c_in_one_stops_all_after_the_same_batch(folder, resumed):
    assert resumed[1] == [False, 12]
    assert json.loads((folder / "interrupted_2").read_text()) == [False, 12]


@pytest.mark.parametrize("name", ["failed/0", "failed/1", "killed/0", "killed/1", "interrupted"])
def test_an_index_goes_on_with_another_number_of_processes(folder, resumed, name):
    whole = saewb.load_index(folder / "alone" / "index" / name[-1].replace("d", "0"))
    assert_same(of_index(whole), of_index(saewb.load_index(folder / name)))


def test_a_cache_goes_on_with_another_number_of_processes(folder, resumed):
    cache = saewb.ActivationCache(folder / "half")
    whole = saewb.ActivationCache(folder / "alone" / "cache")
    assert torch.equal(cache[0:150].ids, whole[0:150].ids)
    torch.testing.assert_close(cache[0:150].values, whole[0:150].values)
