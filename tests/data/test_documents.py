"""Epochs: every index once in each, in an order of its own, resumed exactly."""

import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.data.documents import EpochCursor, epoch_order


def indices(cursor, n, size, n_taken):
    """The next indices of a cursor over n, taken in pieces of at most `size`."""
    taken = []
    while len(taken) < n_taken:
        piece = cursor.take(size, repeat=True)
        taken += torch.arange(n)[piece].tolist()
    return taken


@examples(40)
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([None, 0, 7]), st.integers(0, 5))
def test_every_epoch_has_every_index_once_and_a_restored_cursor_goes_on(n, size, seed, n_before):
    cursor, again = EpochCursor(n, seed), EpochCursor(n, seed)
    for _ in range(n_before):
        cursor.take(size, repeat=True)
    state = cursor.state()
    again.restore(state)
    assert indices(cursor, n, size, 3 * n) == indices(again, n, size, 3 * n)
    whole = indices(EpochCursor(n, seed), n, size, 2 * n)
    assert sorted(whole[:n]) == sorted(whole[n : 2 * n]) == list(range(n))


def test_it_ends_after_an_epoch_unless_it_repeats():
    cursor = EpochCursor(3, None)
    assert cursor.take(5, repeat=False) == slice(0, 5)
    with pytest.raises(StopIteration):
        cursor.take(5, repeat=False)
    assert (cursor.epoch, cursor.take(2, repeat=True), cursor.epoch) == (0, slice(0, 2), 1)


def test_orders_are_those_of_the_seed_and_the_epoch():
    assert torch.equal(epoch_order(50, 3, 1), epoch_order(50, 3, 1))
    assert not torch.equal(epoch_order(50, 3, 1), epoch_order(50, 3, 2))
    assert not torch.equal(epoch_order(50, 3, 1), epoch_order(50, 4, 1))
