"""Doing something in a network namespace without leaving one's own.

A thread enters the namespace, does it, and ends; the caller's thread never moves. A socket belongs for good to the
namespace it was made in, so connecting, listening and accepting need no thread: only the making does.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from sandshift.errors import NotFound, TimedOut, Unavailable
from sandshift.network_namespace import enter_file, run_in_file

NAMESPACE_FOLDER: Final = Path("/run/netns")
_LISTEN_BACKLOG: Final = 16

T = TypeVar("T")


def namespace_path(name: str) -> Path:
    """Where `ip netns` keeps the namespace."""
    return NAMESPACE_FOLDER / name


def enter(name: str) -> None:
    """Move the calling thread into the named namespace, for good; empty: stay. Also for a child before its exec.

    Raises:
        NotFound: there is no such namespace. Rejected: no privilege to enter it.
    """
    if not name:
        return
    try:
        enter_file(str(namespace_path(name)))
    except NotFound as error:
        raise NotFound(
            f"network namespace {name} does not exist: make it with 'ip netns add {name}', or correct"
            " host.network_namespace"
        ) from error


def run_in(name: str, action: Callable[[], T]) -> T:
    """Call `action` in the named namespace and give back what it gives. Blocks; from a loop use `asyncio.to_thread`.

    Raises what `action` raises, and what `enter` does.
    """
    try:
        return run_in_file(str(namespace_path(name)) if name else "", action)
    except NotFound as error:
        if name and not namespace_path(name).exists():
            raise NotFound(
                f"network namespace {name} does not exist: make it with 'ip netns add {name}', or correct"
                " host.network_namespace"
            ) from error
        raise


def make_socket(
    name: str, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
) -> socket.socket:
    """A socket that lives in the named namespace."""
    return run_in(name, lambda: socket.socket(family, kind, protocol))


async def connect_tcp(name: str, address: str, port: int, *, timeout_s: float) -> socket.socket:
    """A TCP connection from the named namespace, non-blocking, TCP_NODELAY set.

    Raises:
        Unavailable: refused or no route. TimedOut: no answer within `timeout_s`.
    """
    connection = make_socket(name, _family(address))
    try:
        connection.settimeout(0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
    except TimeoutError as error:
        connection.close()
        raise TimedOut(f"{address} port {port} did not answer within {timeout_s:g} s") from error
    except OSError as error:
        connection.close()
        raise Unavailable(f"cannot connect to {address} port {port}: {_words(error)}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def listen_tcp(name: str, address: str, port: int = 0) -> socket.socket:
    """A listening TCP socket in the named namespace, non-blocking; port 0: the kernel chooses.

    Raises:
        Unavailable: the port is taken, or the address is not this host's.
    """
    listener = make_socket(name, _family(address))
    try:
        listener.settimeout(0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        where = f"in network namespace {name}" if name else "here"
        raise Unavailable(f"cannot listen on {address} port {port} {where}: {_words(error)}") from error
    return listener


async def accept_tcp(listener: socket.socket, *, timeout_s: float) -> socket.socket:
    """The next connection of `listener`, non-blocking, TCP_NODELAY set.

    Raises:
        TimedOut: nobody connected within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    except TimeoutError as error:
        address, port = listener.getsockname()[:2]
        raise TimedOut(f"nobody connected to {address} port {port} within {timeout_s:g} s") from error
    connection.settimeout(0)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _words(error: OSError) -> str:
    """What the kernel said; asyncio replaces `strerror` by words of its own."""
    return os.strerror(error.errno) if error.errno else str(error)
