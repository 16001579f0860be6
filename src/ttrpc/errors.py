"""What a call can raise.

StatusError                 the call ended with a code: in clients what the server answered, in handlers what to answer
└── ConnectionClosed        the peer went (UNAVAILABLE): whether the call was carried out is not known
ProtocolViolation           the peer sends what is not ttrpc: its connection is cut
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ttrpc.codes import Code

if TYPE_CHECKING:
    from google.protobuf.message import Message


class StatusError(Exception):
    """A call that ended with a code other than OK.

    Raise it in a handler to answer it. `number` is the code as it stood on the wire, also where gRPC has no name for
    it and `code` is UNKNOWN. `details` are messages; on the wire and when they come from it they are
    `google.protobuf.Any`.

    Raises:
        ValueError: the code is OK, which is not an error.
    """

    def __init__(self, code: Code | int, message: str = "", details: Iterable[Message] = ()) -> None:
        self.number = int(code)
        if self.number == Code.OK:
            raise ValueError("OK is not an error: return a response instead of raising StatusError(Code.OK)")
        self.code = Code.of(self.number)
        self.message = message
        self.details = tuple(details)
        super().__init__(self.number, message, self.details)

    def __str__(self) -> str:
        name = self.code.name if self.number == self.code else f"code {self.number}"
        return f"{name}: {self.message}" if self.message else name


class ConnectionClosed(StatusError):
    """The connection ended before the call did. The server may or may not have carried it out."""

    def __init__(self, message: str = "the connection is closed") -> None:
        super().__init__(Code.UNAVAILABLE, message)

    def __reduce__(self) -> tuple[type[ConnectionClosed], tuple[str]]:
        return type(self), (self.message,)


class ProtocolViolation(Exception):
    """The peer sends what no ttrpc peer sends. Nothing that follows can be understood: cut the connection."""
