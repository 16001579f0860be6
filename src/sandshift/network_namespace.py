"""Entering a network namespace by its file: for threads, and for children before their exec."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from sandshift.errors import NotFound, Rejected, Unavailable

_CLONE_NEWNET: Final = 0x40000000
"""Source: linux/sched.h."""

T = TypeVar("T")


def enter_file(path: str) -> None:
    """Move the calling thread into the namespace that `path` ("/run/netns/a", "/proc/1/ns/net") stands for, for good.

    Raises:
        NotFound: there is no such file. Rejected: no privilege to enter it. Unavailable: it is no network namespace.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"network namespace {path} does not exist: its pod or host may be gone") from error
    except OSError as error:
        raise Rejected(f"network namespace {path} cannot be opened: {error.strerror}") from error
    try:
        # os.setns came with Python 3.12.
        if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            if code == errno.EPERM:
                raise Rejected(
                    f"network namespace {path}: entering it needs root (CAP_SYS_ADMIN); run it as root"
                )
            raise Unavailable(f"network namespace {path} cannot be entered: {os.strerror(code)}")
    finally:
        os.close(descriptor)


_libc = ctypes.CDLL(None, use_errno=True)


def run_in_file(path: str, action: Callable[[], T]) -> T:
    """Call `action` in the namespace of `path`, in a thread that ends with it; empty: here. Gives what it gives. Blocks.

    A child that `action` starts is in that namespace too. Raises what `action` raises, and what `enter_file` does.
    """
    if not path:
        return action()
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            enter_file(path)
            results.append(action())
        except BaseException as error:  # noqa: BLE001  (carried over to the caller's thread)
            failures.append(error)

    thread = threading.Thread(target=work, name=f"in {path}", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
