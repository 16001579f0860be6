from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from sandshift.shim.haste import ThreadHaste


class Niceness:
    """A kernel that keeps each thread's niceness; `floor`: what this process may go down to."""

    def __init__(self, usual: int, *, floor: int = -20) -> None:
        self.usual = usual
        self.floor = floor
        self.of: dict[int, int] = {}

    def get(self, which: int, thread: int) -> int:
        assert which == os.PRIO_PROCESS
        return self.of.get(thread or threading.get_native_id(), self.usual)

    def put(self, which: int, thread: int, nice: int) -> None:
        assert which == os.PRIO_PROCESS
        if nice < min(self.floor, self.get(which, thread)):
            raise PermissionError(1, "Operation not permitted")
        self.of[thread] = nice


@pytest.fixture
def worker() -> Iterator[int]:
    """A second thread's id."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    assert thread.native_id is not None
    yield thread.native_id
    over.set()
    thread.join()


def test_all_threads_go_first_and_back_again(worker: int) -> None:
    kernel = Niceness(3)
    haste = ThreadHaste(get=kernel.get, put=kernel.put)
    haste.begin()
    haste.begin()
    assert {kernel.of[threading.get_native_id()], kernel.of[worker]} == {-7}
    haste.end()
    haste.end()
    assert {kernel.of[threading.get_native_id()], kernel.of[worker]} == {3}


def test_nothing_goes_below_the_kernels_least(worker: int) -> None:
    kernel = Niceness(-15)
    ThreadHaste(get=kernel.get, put=kernel.put).begin()
    assert kernel.of[worker] == -20


@pytest.mark.usefixtures("worker")
def test_without_the_right_to_hurry_nothing_changes_and_nothing_fails() -> None:
    kernel = Niceness(0, floor=0)
    haste = ThreadHaste(get=kernel.get, put=kernel.put)
    haste.begin()
    haste.end()
    assert kernel.of == {}


def test_the_real_kernel_takes_it_or_refuses_it_without_a_word() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    haste = ThreadHaste()
    haste.begin()
    assert os.getpriority(os.PRIO_PROCESS, 0) in (before, max(-20, before - 10))
    haste.end()
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
