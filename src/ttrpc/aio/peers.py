"""Who is at the other end of a Unix socket, and who may be. The kernel says it: nothing on the wire."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_UCRED: Final = struct.Struct("3i")
_UID_MASK: Final = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Peer:
    """A process, as it was when it connected."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer | None:
    """SO_PEERCRED of a connected Unix socket; None for other kinds of sockets."""
    if connection.family != socket.AF_UNIX:
        return None
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid & _UID_MASK, gid & _UID_MASK)


@dataclass(frozen=True, slots=True)
class PeerPolicy:
    """Which peers a server talks to. The rest are closed before their first byte is read."""

    uids: frozenset[int] | None
    """None: any."""
    gids: frozenset[int] | None = None
    """None: any. Where both are given both must fit."""
    needs_credentials: bool = True
    """Peers of which the kernel knows no user (TCP, vsock) are refused."""

    @classmethod
    def same_user_or_root(cls) -> PeerPolicy:
        return cls(frozenset((os.geteuid(), 0)))

    @classmethod
    def same_user(cls) -> PeerPolicy:
        return cls(frozenset((os.geteuid(),)))

    @classmethod
    def root(cls) -> PeerPolicy:
        return cls(frozenset((0,)))

    @classmethod
    def users(cls, uids: Iterable[int], gids: Iterable[int] | None = None) -> PeerPolicy:
        return cls(frozenset(uids), None if gids is None else frozenset(gids))

    @classmethod
    def anyone(cls) -> PeerPolicy:
        """Everybody who can connect: the socket's place and mode are the only guard."""
        return cls(None, None, needs_credentials=False)

    def allows(self, peer: Peer | None) -> bool:
        if peer is None:
            return not self.needs_credentials
        return (self.uids is None or peer.uid in self.uids) and (self.gids is None or peer.gid in self.gids)
