"""Streams of activations: the right rows of the right tokens, exactly as many, mixed by seed, resumed bit for bit."""

import gc
import itertools
import threading
import time

import pytest
import torch
from helpers import tiny_models
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb.data.shuffle_buffer import FifoBuffer, ShuffleBuffer
from saewb.data.sources import IterableSource
from saewb.data.stream import ActivationStream, stream_activations, stream_draws, stream_iterable, stream_tensors
from saewb.models import hook_points
from saewb.models.capture import Activations, capture

RESID, Z = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"


def same(a, b):
    return (
        a.values.keys() == b.values.keys()
        and all(torch.equal(a.values[name], b.values[name]) for name in a.values)
        and ((a.ids is None and b.ids is None) or torch.equal(a.ids, b.ids))
    )


def numbered(n, d=2, device="cpu"):
    """Row t holds t, so that rows can be told."""
    return torch.arange(n, dtype=torch.float32, device=device)[:, None].expand(n, d).contiguous()


def order(batches):
    return torch.cat([batch.values["activations"][:, 0] for batch in batches]).int().tolist()


# -- from a model ----------------------------------------------------------------------------------------------------


def test_rows_are_the_models_own_at_every_point(model):
    ids = tiny_models.tokens(rows=5, length=7)
    batches = list(stream_activations(model, ids, [RESID, Z, f"{Z}[2]"], batch_tokens=8, pass_tokens=14))
    got = saewb.models.capture.concatenate(batches)
    with torch.no_grad():
        seen = capture(model, ids, [RESID, Z])
    plain = (ids != tiny_models.BOS).flatten()
    n = len(got)
    assert [len(b) for b in batches] == [8] * (int(plain.sum()) // 8)
    want = {
        RESID: seen[RESID].flatten(0, 1),
        Z: seen[Z].flatten(2).flatten(0, 1),
        f"{Z}[2]": seen[Z][:, :, 2].flatten(0, 1),
    }
    for name, rows in want.items():
        torch.testing.assert_close(got.values[name], rows[plain][:n])
    assert got.ids.tolist() == ids.flatten()[plain][:n].tolist()
    assert got.ids.dtype == torch.int32


def test_positions_and_special_tokens(model):
    ids = tiny_models.tokens(rows=3, length=6)
    ids[1, 3] = 2  # EOS
    counts = {}
    for name, how in {
        "all": {"skip_special_tokens": False},
        "plain": {},
        "listed": {"skip_special_tokens": [int(ids[0, 1])]},
        "late": {"skip_special_tokens": False, "positions": slice(2, None, 2)},
    }.items():
        source = stream_activations(model, ids, RESID, batch_tokens=1, **how)
        counts[name] = [int(batch.ids) for batch in source]
    assert counts["all"] == ids.flatten().tolist()
    assert counts["plain"] == [i for i in ids.flatten().tolist() if i not in (1, 2, 3)]
    assert counts["listed"] == [i for i in ids.flatten().tolist() if i != int(ids[0, 1])]
    assert counts["late"] == ids[:, 2::2].flatten().tolist()


def test_only_needed_layers_run_and_the_lock_is_free_between_passes(model):
    stream = stream_activations(model, tiny_models.tokens(), RESID, batch_tokens=4)
    ran = []
    point = hook_points.resolve(model, "blocks.2.hook_resid_post").add(lambda x: ran.append(1))
    try:
        next(stream)
    finally:
        point.remove()
    assert stream.stop_layer == 2
    assert not ran
    free, lock = [], hook_points.lock(model)

    def take():
        free.append(lock.acquire(timeout=1))
        lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert free == [True]


def test_dtype_is_the_models_own_unless_asked():
    model = tiny_models.new_bridge(torch.bfloat16)
    assert (
        next(stream_activations(model, tiny_models.tokens(), RESID, batch_tokens=4)).values[RESID].dtype
        == torch.bfloat16
    )
    result = next(stream_activations(model, tiny_models.tokens(), RESID, batch_tokens=4, dtype=torch.float32))
    assert result.values[RESID].dtype == torch.float32
    assert not result.values[RESID].requires_grad


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"points": "blocks.1.hook_resid_pots"}, ValueError, "near: .*hook_resid_post"),
        ({"points": []}, ValueError, "no points"),
        ({"points": f"{Z}[9]"}, ValueError, "no head 9"),
        ({"points": f"{RESID}[0]"}, ValueError, "no head 0"),
        ({"points": "blocks.0.attn.hook_pattern"}, ValueError, r"batch, pos, heads"),
        ({"skip_special_tokens": range(32)}, ValueError, "1000 batches"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens=0"),
        ({"buffer_tokens": -1}, ValueError, "buffer_tokens=-1"),
        ({"prefetch": -1}, ValueError, "prefetch=-1"),
    ],
)
def test_errors_say_what_to_type(how, error, says):
    model = tiny_models.bridge()
    with pytest.raises(error, match=says):
        next(
            stream_activations(
                model, tiny_models.tokens(), **{"points": RESID, "repeat": True, "batch_tokens": 4, **how}
            )
        )


# -- exact batches, mixed --------------------------------------------------------------------------------------------


@examples(50)
@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 8), st.integers(0, 30), st.integers(0, 3))
def test_every_token_once_in_batches_of_exactly_n(sizes, n, buffer, seed):
    chunks = list(numbered(sum(sizes)).split(sizes)) if sizes else []
    batches = list(stream_iterable(chunks, batch_tokens=n, buffer_tokens=buffer, seed=seed))
    assert all(len(batch) == n for batch in batches)
    assert len(batches) == sum(sizes) // n
    given = order(batches) if batches else []
    assert len(set(given)) == len(given)
    if buffer == 0:
        assert given == list(range(len(given)))


def test_mixing_reaches_over_the_whole_buffer_and_work_is_even():
    taken = []

    def chunks():
        for chunk in numbered(10_000).split(10):
            taken.append(len(chunk))
            yield chunk

    stream = stream_iterable(chunks(), batch_tokens=10, buffer_tokens=1000, seed=1)
    at = []
    batches = []
    for batch in stream:
        batches.append(batch.values["activations"][:, 0])
        at.append(len(taken))
    assert all(b - a <= 1 for a, b in itertools.pairwise(at[1:]))  # a chunk a batch after the first fill
    middle = torch.stack(batches)[200:800]  # rounds that are neither the first nor the last
    spread = middle.amax(1) - middle.amin(1)
    # 10 draws from 1000 neighbors: the range has mean 1000 * 9 / 11
    assert 780 < float(spread.mean()) < 860
    delay = torch.arange(200, 800)[:, None] * 10 - middle
    assert float(delay.abs().max()) <= 2000
    apart = middle - middle.mean(1, keepdim=True)
    assert torch.corrcoef(apart[:, :2].T)[0, 1].abs() < 0.3  # tokens of a batch know nothing of each other (-1/9)


def test_order_is_told_by_the_seed():
    def mixed(seed):
        return order(stream_iterable(numbered(500).split(7), batch_tokens=10, buffer_tokens=100, seed=seed))

    assert mixed(0) == mixed(0)
    assert mixed(0) != mixed(1)
    assert sorted(mixed(0)) == list(range(500))


def test_points_and_ids_stay_together_when_mixed():
    chunk = Activations({"a": numbered(100, 3), "b": -numbered(100, 2)}, torch.arange(100, dtype=torch.int32))
    for batch in stream_iterable([chunk], batch_tokens=7, buffer_tokens=30):
        assert torch.equal(batch.values["a"][:, 0], -batch.values["b"][:, 0])
        assert torch.equal(batch.values["a"][:, 0].int(), batch.ids)


# -- resume ----------------------------------------------------------------------------------------------------------

KINDS = {
    "model": lambda how: stream_activations(
        tiny_models.bridge(), tiny_models.tokens(60, 7), [RESID, Z], pass_tokens=28, repeat=True, batch_tokens=10, **how
    ),
    "tensor": lambda how: stream_tensors(numbered(99), batch_tokens=10, repeat=True, shuffle_seed=4),
    "iterable": lambda how: stream_iterable((x for x in numbered(3000).split(7)), batch_tokens=10, **how),
    "draws": lambda how: stream_draws(lambda n, rng: torch.randn(n, 3, generator=rng), seed=9, batch_tokens=10),
}


@examples(25)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 25), st.sampled_from([0, 40]), st.integers(0, 2))
def test_restored_streams_go_on_bit_for_bit(kind, n, buffer, prefetch):
    how = {"buffer_tokens": buffer, "prefetch": prefetch, "seed": 3}
    whole, again = KINDS[kind](how), KINDS[kind](how)
    for _ in range(n):
        next(whole)
    state = whole.state()
    want = [next(whole) for _ in range(15)]  # what comes next does not change the state that was taken
    again.restore(state)
    assert all(same(a, next(again)) for a in want)
    whole.close(), again.close()


# -- computed ahead --------------------------------------------------------------------------------------------------


def chunks_that_fail(after):
    for i in range(after):
        yield numbered(10) + i
    raise OSError("the disk is gone")


def test_computed_ahead_is_the_same_and_what_fails_comes_in_its_turn():
    stream = stream_iterable(chunks_that_fail(3), batch_tokens=10, prefetch=2)
    assert [float(next(stream).values["activations"][0, 0]) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):  # and again, for who asks again
        with pytest.raises(OSError, match="the disk is gone"):
            next(stream)
    assert not prefetching()


def prefetching():
    return [t for t in threading.enumerate() if t.name == "saewb-prefetch" and t.is_alive()]


def settled(n=0):
    """Threads end a moment after they are told to."""
    until = time.monotonic() + 10
    while len(prefetching()) > n and time.monotonic() < until:
        time.sleep(0.01)
    return len(prefetching()) == n


def test_the_thread_ends_when_closed_forgotten_or_done():
    gc.collect()
    assert settled()
    stream = stream_tensors(numbered(100), batch_tokens=10, repeat=True)
    ahead = ActivationStream(stream.source, 10, prefetch=2)
    next(ahead)
    assert len(prefetching()) == 1
    ahead.close()
    assert not prefetching()
    with pytest.raises(StopIteration):
        next(ahead)
    forgotten = ActivationStream(stream.source, 10, prefetch=1)
    next(forgotten)
    del forgotten
    gc.collect()
    assert settled()
    assert len(list(ActivationStream(IterableSource(numbered(50).split(5), "x"), 10, prefetch=1))) == 5
    assert settled()


def test_no_more_is_computed_ahead_than_asked():
    taken = []

    def chunks():
        for i in range(1000):
            taken.append(i)
            yield numbered(10)

    stream = stream_iterable(chunks(), batch_tokens=10, prefetch=3)
    next(stream)
    until = time.monotonic() + 10
    while len(taken) < 1 + 3 and time.monotonic() < until:
        time.sleep(0.01)
    stream.state()  # waits until the thread is at rest
    assert len(taken) == 1 + 3
    stream.close()


# -- sources ---------------------------------------------------------------------------------------------------------


def test_tensors_are_not_copied_and_repeat_in_another_order():
    x = numbered(10)
    assert next(stream_tensors(x, batch_tokens=4)).values["activations"].data_ptr() == x.data_ptr()
    stream = stream_tensors(x, batch_tokens=10, repeat=True, shuffle_seed=0)
    one, two = order([next(stream)]), order([next(stream)])
    assert sorted(one) == sorted(two) == list(range(10))
    assert one != two


@pytest.mark.parametrize("chunk", [3, "text", [1.0], None])
def test_what_is_no_activation(chunk):
    with pytest.raises(TypeError, match="instead of activations"):
        next(stream_iterable([chunk], batch_tokens=2))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"all with as many rows"):
        Activations({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"all with as many rows"):
        Activations({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"ids of shape \(3,\)"):
        Activations({"a": torch.zeros(2, 3)}, torch.zeros(3))
    with pytest.raises(ValueError, match="no tokens"):
        stream_tensors(torch.zeros(0, 3))


def test_a_buffer_takes_no_more_than_its_size():
    batches = ShuffleBuffer(IterableSource(numbered(400).split(3), "x"), 10, 100, seed=0)
    next(batches)
    assert batches._buffer.n_bytes == 100 * 2 * 4
    left = FifoBuffer(IterableSource(numbered(400).split(50), "x"), 10)
    next(left)
    assert sum(len(part) for part in left._pending) == 40


# -- a buffer that fills ---------------------------------------------------------------------------------------------


def filled_by_pieces(**how):
    return stream_iterable(numbered(400).split(7), batch_tokens=10, buffer_tokens=95, seed=3, **how)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_buffer_filled_by_pieces_gives_the_same_batches(prefetch):
    stream, report = filled_by_pieces(prefetch=prefetch), []
    assert stream.filling == (0, 100)
    assert stream.peek().values["activations"][0, 0] == 0  # and it stays where it is
    while stream.fill():
        report.append(stream.filling)
    assert report == [*((n, 100) for n in range(7, 99, 7)), None]
    assert stream.filling is None
    assert stream.fill() is False
    assert order(stream) == order(filled_by_pieces())
    assert (stream.peek() is None, stream.fill()) == (prefetch > 0, False)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("pieces", [0, 1, 9, 30])
def test_a_state_of_a_buffer_that_fills_goes_on_with_what_is_there(pieces, prefetch):
    stream = filled_by_pieces(prefetch=prefetch)
    for _ in range(pieces):
        stream.fill()
    state = stream.state()
    again = filled_by_pieces(prefetch=2 - prefetch)
    again.restore(state)
    assert state["source"]["fresh"]["source"]["given"] == min(15, pieces)  # nothing is computed anew
    assert order(again) == order(stream) == order(filled_by_pieces())


def test_a_source_that_ends_while_the_buffer_fills():
    short = lambda n: stream_iterable(numbered(n).split(7), batch_tokens=10, buffer_tokens=100)  # noqa: E731
    stream = short(35)
    while stream.fill():
        pass
    assert stream.filling is None
    assert stream._buffer._buffer.n_bytes == 35 * 2 * 4
    assert sorted(order(stream)) == sorted(order(short(35)))
    assert len(set(order(short(35)))) == 30
    empty = short(0)
    assert (empty.fill(), empty.filling, list(empty), empty.peek()) == (False, None, [], None)


def test_a_stream_is_looked_at_without_taking_from_it():
    for prefetch, buffer in itertools.product([0, 2], [0, 30]):
        stream = stream_iterable(numbered(100).split(7), batch_tokens=10, buffer_tokens=buffer, prefetch=prefetch)
        first = stream.peek()
        assert {name: value.shape for name, value in first.values.items()} == {"activations": (7, 2)}
        assert sorted(order(stream)) == list(range(100))


# -- put back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_batch_that_is_put_back_comes_again_also_after_a_restore(prefetch):
    stream, plain = filled_by_pieces(prefetch=prefetch), list(filled_by_pieces())
    stream.put_back()  # nothing was taken: nothing happens
    assert same(next(stream), plain[0])
    assert same(next(stream), plain[1])
    stream.put_back()
    stream.put_back()  # once only
    assert same(stream.peek(), plain[1])
    for again in (filled_by_pieces(prefetch=2 - prefetch), filled_by_pieces(prefetch=prefetch)):
        again.restore(stream.state())
        assert order(again) == order(plain[1:])
    old = {"stream": stream.state(), "again": None}  # as 0.1.0 wrote it
    old["again"], old["stream"]["ahead"] = old["stream"]["ahead"][0], old["stream"]["ahead"][1:]
    again = filled_by_pieces()
    again.restore(old)
    assert order(again) == order(stream) == order(plain[1:])
