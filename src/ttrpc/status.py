"""Statuses: what a server's exception becomes on the wire, and what a client makes of it. The only place that knows.

A `StatusError` goes out as it is. A few exceptions of the standard library say by themselves which code they mean.
Everything else is a bug of the handler: the client learns UNKNOWN and that the server's log has the rest, and never the
exception's own text, which may hold a secret, nor a traceback.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from ttrpc.codes import Code
from ttrpc.errors import StatusError
from ttrpc.frames import MESSAGE_BYTES_MAX
from ttrpc.wire.ttrpc_pb2 import Response, Status

logger = logging.getLogger("ttrpc")

STATUS_MESSAGE_CHARACTERS_MAX: Final = 16384
UNEXPLAINED: Final = "the handler failed: the server's log has the details"
DEADLINE_MESSAGE: Final = "context deadline exceeded"
"""Go's words: clients of Go servers look for them."""


def status_of(error: BaseException, method: str = "") -> StatusError:
    """What to answer for an exception that came out of the handler of `method`. Logs the traceback of a bug."""
    if isinstance(error, StatusError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return StatusError(Code.CANCELLED, "the call was cancelled")
    if isinstance(error, TimeoutError):
        return StatusError(Code.DEADLINE_EXCEEDED, DEADLINE_MESSAGE)
    if isinstance(error, NotImplementedError):
        return StatusError(Code.UNIMPLEMENTED, "this is not implemented")
    logger.error("%s: the handler raised %s", method, type(error).__name__, exc_info=error)
    return StatusError(Code.UNKNOWN, UNEXPLAINED)


def encode_error(error: StatusError, message_bytes_max: int = MESSAGE_BYTES_MAX) -> bytes:
    """The Response for an error: no payload (Go's client would read that first), a message that is UTF-8 (else it would
    lose the status), cut to a bound; details only as far as they fit."""
    message = error.message
    if len(message) > STATUS_MESSAGE_CHARACTERS_MAX:
        message = message[: STATUS_MESSAGE_CHARACTERS_MAX - 1] + "…"
    text = message.encode("utf-8", "replace").decode("utf-8")
    number = (error.number + 0x8000_0000) % 0x1_0000_0000 - 0x8000_0000
    status = Status(code=number or Code.UNKNOWN, message=text, details=map(_as_any, error.details))
    data = Response(status=status).SerializeToString()
    if len(data) <= message_bytes_max:
        return data
    return Response(status=Status(code=status.code, message=text)).SerializeToString()


def decode_error(status: Status) -> StatusError:
    """What a client raises for a status with a code other than OK."""
    return StatusError(status.code, status.message, status.details)


def _as_any(detail: Message) -> Any:
    if isinstance(detail, Any):
        return detail
    packed = Any()
    packed.Pack(detail)
    return packed


def oversized(length: int, maximum: int) -> StatusError:
    """The one wording, which is Go's too, for a message above the limit, on either side and in either direction."""
    return StatusError(
        Code.RESOURCE_EXHAUSTED, f"message length {length} exceed maximum message size of {maximum}"
    )
