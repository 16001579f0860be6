from __future__ import annotations

import contextlib
import os
import socket

import pytest

from sandshift.vmm.channel import Channel, end_connection
from tests.vmm.machine_suite import channel


def test_what_a_channel_sets_holds_for_all_duplicates() -> None:
    ours, theirs = channel()
    held = Channel(ours.fileno())
    assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert os.get_blocking(ours.fileno())
    held.never_block()
    assert not os.get_blocking(ours.fileno())
    held.close()
    theirs.close()
    ours.close()


def test_a_unix_socket_is_a_channel_too() -> None:
    ours, theirs = socket.socketpair()
    held = Channel(ours.fileno())
    held.shut_down()
    held.close()
    assert theirs.recv(1) == b""
    theirs.close()
    ours.close()


def test_to_close_a_hold_leaves_the_connection_whole() -> None:
    ours, theirs = channel()
    Channel(ours.fileno()).close()
    ours.setblocking(True)
    ours.sendall(b"still here")
    assert theirs.recv(100) == b"still here"
    theirs.close()
    ours.close()


def test_an_ended_connection_fails_a_peer_that_waits_to_write_though_others_hold_this_end() -> None:
    ours, theirs = channel()
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while theirs.send(bytes(1 << 16)):
            pass
    end_connection(ours)
    theirs.settimeout(5.0)
    with pytest.raises(ConnectionError):
        theirs.sendall(bytes(1 << 20))
    theirs.close()
    ours.close()
