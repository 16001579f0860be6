"""ttrpc.aio.addresses and ttrpc.aio.peers."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from tests.ttrpc.raw import abstract
from ttrpc import Peer, PeerPolicy, listen, socket_path
from ttrpc.aio.peers import peer_of


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/run/x.sock", "/run/x.sock"),
        (Path("/run/x.sock"), "/run/x.sock"),
        ("unix:///run/x.sock", "/run/x.sock"),
        ("unix:/run/x.sock", "/run/x.sock"),
        ("\0name", "\0name"),
        ("@name", "\0name"),
        ("unix://@name", "\0name"),
        ("unix:///" + "x" * 106, "/" + "x" * 106),
    ],
)
def test_the_forms_of_an_address(address: str | Path, path: str) -> None:
    assert socket_path(address) == path


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("vsock://3:1024", "only Unix sockets have addresses here"),
        ("", "is empty"),
        ("unix://", "is empty"),
        ("\0", "is empty"),
        ("/" + "x" * 107, "longer than the 107 bytes"),
        ("/" + "ä" * 54, "longer than the 107 bytes"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        socket_path(address)


def test_a_socket_file_has_its_mode_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listen(path, mode=0o660).close()
    with listen(path) as listening:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not listening.getblocking()
        with pytest.raises(OSError, match="somebody listens there already"):
            listen(path)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(OSError, match="not by a socket"):
        listen(path)
    assert path.read_text() == "mine"


def test_an_abstract_name_is_free_again_when_closed_and_taken_meanwhile() -> None:
    name = abstract()
    with listen(name), pytest.raises(OSError, match="in use"):
        listen(name)
    listen(name).close()


def test_the_kernel_says_who_is_at_the_other_end_of_a_unix_socket_only() -> None:
    one, two = socket.socketpair()
    with one, two:
        assert peer_of(one) == Peer(os.getpid(), os.geteuid(), os.getegid())
    with socket.socket(socket.AF_INET) as other:
        assert peer_of(other) is None


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        (PeerPolicy.same_user_or_root(), {os.geteuid(), 0}),
        (PeerPolicy.same_user(), {os.geteuid()}),
        (PeerPolicy.root(), {0}),
        (PeerPolicy.users([1, 2]), {1, 2}),
        (PeerPolicy.users([1, 2], gids=[9]), set()),
        (PeerPolicy.users([1, 2], gids=[5]), {1, 2}),
        (PeerPolicy.anyone(), {os.geteuid(), 0, 1, 2, 77}),
    ],
)
def test_policies(policy: PeerPolicy, allowed: set[int]) -> None:
    assert {uid for uid in {os.geteuid(), 0, 1, 2, 77} if policy.allows(Peer(1, uid, 5))} == allowed
    assert policy.allows(None) is (policy == PeerPolicy.anyone())
