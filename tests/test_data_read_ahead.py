"""Micro-batches made on another thread: the same ones, no more than asked for, and errors where they belong."""

import threading
import time

import pytest

from hf_mlx.data.loader import read_ahead


class Source:
    """Counts 0, 1, 2, …; notes how far it was read, and from which thread."""

    def __init__(self, count, fails_at=None):
        self.count, self.fails_at = count, fails_at
        self.read, self.threads = 0, set()

    def __iter__(self):
        for number in range(self.count):
            self.threads.add(threading.current_thread())
            self.read += 1
            if number == self.fails_at:
                raise ValueError(f"row {number}")
            yield number


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.mark.parametrize("count", [1, 3, 50])
def test_all_come_in_their_order_from_one_other_thread(count):
    source = Source(20)

    assert list(read_ahead(iter(source), count)) == list(range(20))
    assert len(source.threads) == 1 and threading.current_thread() not in source.threads


def test_it_reads_as_far_ahead_as_it_is_told_and_ends_with_its_reader():
    source = Source(20)
    items = read_ahead(iter(source), 3)
    assert [next(items), next(items)] == [0, 1]
    assert wait_until(lambda: source.read == 5)
    (thread,) = source.threads
    items.close()

    assert wait_until(lambda: not thread.is_alive()) and source.read == 5


def test_an_error_is_raised_when_its_turn_comes():
    items = read_ahead(iter(Source(20, fails_at=2)), 4)

    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="row 2"):
        next(items)
