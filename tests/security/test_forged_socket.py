"""A forged protocol_info over the real socket: what is not the caller's own, connected stream socket is not taken."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.shim.migration.service import MigrationService
from sandshift.shim.serve import translate
from sandshift.wire.migration import messages_pb2 as m
from tests.security import stranger
from tests.shim.house import SO_COOKIE, TwoHosts, channel, descriptor_of, two_hosts

IA, FP, AE = ttrpc.Code.INVALID_ARGUMENT, ttrpc.Code.FAILED_PRECONDITION, ttrpc.Code.ALREADY_EXISTS
BIG = (1 << 31) - 1


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        await both.prepare()
        yield both


def described(end: socket.socket, **changes: int) -> bytes:
    message = m.SocketDescriptor.FromString(descriptor_of(end))
    for name, value in changes.items():
        setattr(message, name, value)
    return message.SerializeToString()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - links, not files


async def refusal_of(hosts: TwoHosts, protocol_info: bytes) -> ttrpc.StatusError:
    """The source refuses it, and is unharmed: same state, no descriptor more, and the right socket is taken after it."""
    open_before = open_descriptors()
    request = m.CreateDuplicateSocketRequest(session_id=hosts.session, protocol_info=protocol_info)
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.s.migration.create_duplicate_socket(request, timeout_s=10)
    assert (await hosts.s.status()).session.state == "SourceExported"
    assert open_descriptors() == open_before
    return told.value


FORGED = {
    "another cookie": ({"so_cookie": 1 << 60}, "so_cookie is"),
    "no cookie": ({"so_cookie": 0}, "so_cookie = 0 is no socket's"),
    "another family of those allowed": ({"family": socket.AF_INET6}, "family is 2, described as 10"),
    "a family that is not allowed": ({"family": socket.AF_NETLINK}, "family = 16 is not one of"),
    "another type": ({"type": socket.SOCK_DGRAM}, "type = 2 is not SOCK_STREAM"),
    "another protocol": ({"protocol": socket.IPPROTO_UDP}, "protocol is 6, described as 17"),
    "a negative descriptor": ({"fd": -1}, "name no file descriptor"),
    "a huge descriptor": ({"fd": BIG}, f"fd = {BIG} is not open"),
    "a negative process": ({"pid": -1}, "name no file descriptor"),
    "no process": ({"pid": 0}, "name no file descriptor"),
    "a process that there is not": ({"pid": BIG}, f"pid = {BIG} is not a process of this host"),
    "a version of the future": ({"version": 2}, "version = 2 is not 1"),
}


@pytest.mark.parametrize("forged", FORGED)
async def test_a_descriptor_that_says_what_is_not_so_is_refused(
    hosts: TwoHosts, forged: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes, words = FORGED[forged]
    source, destination = channel()
    with source, destination:
        with caplog.at_level(logging.INFO, "sandshift"):
            error = await refusal_of(hosts, described(source, **changes))
        who = f"CreateDuplicateSocket of process {os.getpid()} of user {os.geteuid()}"
        assert f"{who}: INVALID_ARGUMENT: protocol_info" in caplog.text
        assert (error.code, words in error.message) == (IA, True), error.message
        await hosts.give_both(source, destination)
    await hosts.transfer()


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [
        (b"", "protocol_info is empty"),
        (b"\xff" * 40, "are no SocketDescriptor"),
        (bytes(628), "this is a Linux host, which takes no WSAPROTOCOL_INFO"),
        (b"\x08\x01" * 65, "protocol_info has 130 bytes"),
    ],
)
async def test_bytes_that_are_no_descriptor_are_refused(hosts: TwoHosts, bytes_: bytes, words: str) -> None:
    error = await refusal_of(hosts, bytes_)
    assert (error.code, words in error.message) == (IA, True), error.message


async def test_a_descriptor_of_something_else_is_refused(hosts: TwoHosts, tmp_path: Path) -> None:
    source, destination = channel()
    with source, destination, (tmp_path / "file").open("wb") as file, socket.socket() as alone:
        error = await refusal_of(hosts, described(source, fd=file.fileno()))
        assert (error.code, "fd is not a socket" in error.message) == (IA, True)
        error = await refusal_of(hosts, descriptor_of(alone))
        assert (error.code, "is not connected" in error.message) == (FP, True)
        other, others_peer = channel()
        with other, others_peer:
            error = await refusal_of(hosts, described(source, fd=other.fileno()))
            assert (error.code, "is not the socket described" in error.message) == (IA, True)


async def test_a_process_that_has_ended_hands_over_nothing(hosts: TwoHosts) -> None:
    source, destination = channel()
    with source, destination:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        error = await refusal_of(hosts, described(source, pid=ended.pid))
        assert (error.code, "is not a process of this host" in error.message) == (IA, True)


async def test_another_process_s_socket_needs_its_cookie_even_from_root(hosts: TwoHosts) -> None:
    """Root may hand over what another process holds, since root may take it anyway; a wrong guess is still refused."""
    source, destination = channel()
    with source, destination:
        holder = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=(source.fileno(),),
        )
        try:
            mine = described(source, pid=holder.pid)
            error = await refusal_of(hosts, described(source, pid=holder.pid, so_cookie=12345))
            assert (error.code, "so_cookie is" in error.message) == (IA, True)
            if os.geteuid() != 0:
                error = await refusal_of(hosts, mine)
                assert "is not the caller's own" in error.message
        finally:
            holder.communicate()


async def test_a_second_socket_is_refused_and_the_first_stays(hosts: TwoHosts) -> None:
    await hosts.connect()
    source, destination = channel()
    with source, destination:
        request = m.CreateDuplicateSocketRequest(
            session_id=hosts.session, protocol_info=descriptor_of(source)
        )
        with pytest.raises(ttrpc.StatusError, match="it already has its socket") as told:
            await hosts.s.migration.create_duplicate_socket(request, timeout_s=10)
        assert told.value.code is AE
    await hosts.transfer()


STRANGER = """
import asyncio, os, socket, sys
import ttrpc
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration.service_ttrpc import MigrationClient

async def main():
    near, far = socket.socketpair()
    cookie = int.from_bytes(near.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
    info = m.SocketDescriptor(
        version=1, pid=os.getppid(), fd=near.fileno(), so_cookie=cookie, family=1, type=1
    ).SerializeToString()
    client = await ttrpc.connect(sys.argv[1])
    try:
        await MigrationClient(client).create_duplicate_socket(
            m.CreateDuplicateSocketRequest(session_id="s", protocol_info=info), timeout_s=10
        )
    except ttrpc.StatusError as error:
        print(error.code.name, error.message)

asyncio.run(main())
"""


async def test_only_root_may_name_another_process(tmp_path: Path) -> None:
    """On a socket that lets everybody in, unlike the shim's own: the descriptor is held against the caller's credentials."""
    if os.geteuid() != 0:
        pytest.skip("optional: needs root to become another user")
    async with two_hosts(tmp_path) as hosts:
        server = ttrpc.Server(allow=ttrpc.PeerPolicy.anyone(), unary_interceptors=(translate,))
        server.register(MigrationService(hosts.source.server.desk))  # type: ignore[union-attr]
        with stranger.folder_for_everybody() as folder:
            path = str(folder / "open.sock")
            serving = asyncio.create_task(server.serve(ttrpc.listen(path, mode=0o666)))
            try:
                said = await stranger.run(STRANGER, path)
            finally:
                await server.shutdown(0.2)
                await serving
    assert said.startswith("INVALID_ARGUMENT protocol_info: pid = ")
    assert "is not the caller's own" in said
    assert "only root may hand over another process's socket" in said


def test_the_cookie_is_the_kernel_s_number_of_one_socket() -> None:
    one, other = socket.socketpair()
    with one, other:
        cookies = {end.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8) for end in (one, other)}
    assert len(cookies) == 2
