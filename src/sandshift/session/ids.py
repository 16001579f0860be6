"""The names of a session's parts: which are valid, and how a session is called on disk.

A session id comes from a stranger and may be any printable text, so it is never part of a path: `session_name` is.
A sandbox or container id follows containerd's rule for identifiers and is safe in a path.
"""

from __future__ import annotations

import hashlib
from typing import NewType

from sandshift.identifiers import IDENTIFIER_CHARACTERS_MAX, identifier, shown
from sandshift.session.statement import key_id
from sandshift.session.states import Side, check_session_id

SessionId = NewType("SessionId", str)
SandboxId = NewType("SandboxId", str)
ContainerId = NewType("ContainerId", str)

__all__ = [
    "IDENTIFIER_CHARACTERS_MAX",
    "ContainerId",
    "SandboxId",
    "SessionId",
    "Side",
    "container_id",
    "key_id",
    "sandbox_id",
    "session_id",
    "session_name",
    "shown",
]


def session_id(value: str) -> SessionId:
    """Check a session id: 1 to 256 bytes of printable UTF-8 (contract 4.16).

    Raises:
        Rejected: it is empty, too long, or holds a character that is not printable.
    """
    check_session_id(value)
    return SessionId(value)


def sandbox_id(value: str) -> SandboxId:
    """Check a sandbox id by containerd's rule.

    Raises:
        Rejected: it breaks the rule.
    """
    return SandboxId(identifier("sandbox_id", value))


def container_id(value: str) -> ContainerId:
    """Check a container id by containerd's rule.

    Raises:
        Rejected: it breaks the rule.
    """
    return ContainerId(identifier("container id", value))


def session_name(session: SessionId) -> str:
    """Name of a session in paths: 64 hexadecimal digits."""
    return hashlib.sha256(session.encode()).hexdigest()
