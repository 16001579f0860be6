"""Statements: what one side of a session says about its cell, signed.

A statement is the same bytes as a frame on the channel and as a receipt that an orchestrator carries. Frames are
delimited by a 4-byte big-endian length; a receipt has ask, ask_number and answers zero, so that no answer of the past
can be passed off as an answer to a question of now.

The HMAC key is derived from the session key for this purpose alone. The session key is fresh for every session, so a
statement of another session (also one of the same id, or in the other direction) does not verify.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from google.protobuf.message import DecodeError

from sandshift.errors import PeerProtocolError, Rejected
from sandshift.session.states import SESSION_ID_BYTES_MAX, Side
from sandshift.wire.sandshift import state_pb2

VERSION: Final = 1
FRAME_BYTES_MAX: Final = 64 * 1024
RECEIPT_BYTES_MAX: Final = FRAME_BYTES_MAX
KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 8
REASON_CHARACTERS_MAX: Final = 1024
HANDOVER_BYTES_MAX: Final = 48 * 1024

_PURPOSE: Final = b"sandshift statement hmac 1"
_LENGTH: Final = struct.Struct(">I")


class Cell(enum.Enum):
    """A side's one durable word. Values are those of sandshift.state.v1.Cell."""

    OPEN = 1
    RELEASED = 2
    KEPT = 3
    GONE = 4
    NONE = 5
    READY = 6
    HELD = 7
    STARTING = 8
    RUNNING = 9
    RETURNING = 10
    REFUSED = 11
    LOST = 12

    @property
    def side(self) -> Side:
        return Side.SOURCE if self.value <= Cell.GONE.value else Side.DESTINATION


class Ask(enum.Enum):
    """What a frame asks of the other side. Values are those of sandshift.state.v1.Ask."""

    NOTHING = 0
    TELL = 1
    """Tell me your cell."""
    GIVE = 2
    """Give me the right to run."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One side's word about its cell, without what binds it to a session: that is the `Seal`'s."""

    cell: Cell
    ask: Ask = Ask.NOTHING
    ask_number: int = 0
    """Of this ask; 64 bits, counted per side and process life. 0 with ask NOTHING."""
    answers: int = 0
    """The peer's ask_number that this frame answers; 0: none."""
    reason: str = ""
    """Why the cell is what it is, for the peer's error texts."""
    handover: bytes = b""
    """A serialized HandoverRecord. Source only, from "memory complete" on; the same bytes each time."""

    @property
    def side(self) -> Side:
        return self.cell.side

    @property
    def is_receipt(self) -> bool:
        return self.ask is Ask.NOTHING and not self.ask_number and not self.answers

    def as_receipt(self) -> Statement:
        return replace(self, ask=Ask.NOTHING, ask_number=0, answers=0)


def key_id(session_key: bytes) -> bytes:
    """Names a session key without showing it."""
    return hashlib.sha256(session_key).digest()[:KEY_ID_BYTES]


@dataclass(frozen=True, slots=True)
class Seal:
    """Signs and verifies the statements of one session."""

    session_id: str
    session_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.session_key) != KEY_BYTES:
            raise ValueError(f"a session key has {KEY_BYTES} bytes, this one {len(self.session_key)}")

    @property
    def key_id(self) -> bytes:
        return key_id(self.session_key)

    def sign(self, statement: Statement) -> bytes:
        """A serialized SignedStatement: a receipt as it is, a frame once `frame` has put its length before it.

        Raises:
            ValueError: its handover record is too long to fit a frame.
        """
        if len(statement.handover) > HANDOVER_BYTES_MAX:
            raise ValueError(
                f"a handover record of {len(statement.handover)} bytes exceeds the {HANDOVER_BYTES_MAX} of a frame"
            )
        body = state_pb2.Statement(
            version=VERSION,
            session_id=self.session_id,
            key_id=self.key_id,
            side=state_pb2.Side.ValueType(statement.side.value),
            cell=state_pb2.Cell.ValueType(statement.cell.value),
            reason=statement.reason[:REASON_CHARACTERS_MAX],
            handover=statement.handover,
            ask=state_pb2.Ask.ValueType(statement.ask.value),
            ask_number=statement.ask_number,
            answers=statement.answers,
        ).SerializeToString()
        return state_pb2.SignedStatement(statement=body, hmac=self._hmac(body)).SerializeToString()

    def open_frame(self, data: bytes, *, side: Side) -> Statement:
        """The statement in a frame that `side` must have sent.

        Raises:
            PeerProtocolError: it is not a statement of that side in this session. Close the channel.
        """
        try:
            return self._open(data, side)
        except _NotOurs as problem:
            raise PeerProtocolError(f"a handover frame {problem}") from None

    def open_receipt(self, data: bytes, *, side: Side) -> Statement:
        """The statement in a receipt that `side` must have made.

        Raises:
            Rejected: it is not a receipt of that side in this session.
        """
        try:
            statement = self._open(data, side)
        except _NotOurs as problem:
            raise Rejected(f"peer_receipt {problem}") from None
        if not statement.is_receipt:
            raise Rejected(
                "peer_receipt is a frame of the channel: pass on what the other side's status call gives"
            )
        return statement

    def _open(self, data: bytes, side: Side) -> Statement:
        if len(data) > FRAME_BYTES_MAX:
            raise _NotOurs(f"of {len(data)} bytes exceeds {FRAME_BYTES_MAX}")
        signed, body = state_pb2.SignedStatement(), state_pb2.Statement()
        try:
            signed.ParseFromString(data)
            body.ParseFromString(signed.statement)
        except DecodeError:
            raise _NotOurs("is not a statement") from None
        self._check_binding(body, side)
        # Last, so that the messages above can say what is wrong; nothing of the body is used before this line.
        if not hmac.compare_digest(self._hmac(signed.statement), signed.hmac):
            raise _NotOurs(f"claims session {self.session_id!r} and is not signed with its key")
        return _parse(body, side)

    def _check_binding(self, body: state_pb2.Statement, side: Side) -> None:
        if body.version != VERSION:
            raise _NotOurs(f"has version {body.version}; this shim knows {VERSION}")
        if body.session_id != self.session_id:
            raise _NotOurs(
                f"is of session {body.session_id[:SESSION_ID_BYTES_MAX]!r}, not of {self.session_id!r}"
            )
        if body.key_id != self.key_id:
            raise _NotOurs(
                f"is of another run of session {self.session_id!r} "
                f"(key {body.key_id.hex()[:16]}, here {self.key_id.hex()})"
            )
        if body.side != side.value:
            raise _NotOurs(f"is not of the {side.word}")

    def _hmac(self, body: bytes) -> bytes:
        key = hmac.digest(self.session_key, _PURPOSE, "sha256")
        return hmac.digest(key, body, "sha256")


class _NotOurs(Exception):
    """Completes a sentence that begins with what it was."""


def _parse(body: state_pb2.Statement, side: Side) -> Statement:
    try:
        cell, ask = Cell(body.cell), Ask(body.ask)
    except ValueError:
        raise _NotOurs(f"has cell {body.cell} and ask {body.ask}, which nobody here knows") from None
    if cell.side is not side:
        raise _NotOurs(f"of the {side.word} shows {cell.name}, a cell of the {cell.side.word}")
    return Statement(cell, ask, body.ask_number, body.answers, body.reason, body.handover)


def unverified_session(data: bytes) -> tuple[str, bytes]:
    """Session id and key id that a signed statement claims, both unproven: to find the key it has to be verified with.

    Raises:
        Rejected: these bytes are not a statement.
    """
    signed, body = state_pb2.SignedStatement(), state_pb2.Statement()
    try:
        signed.ParseFromString(data)
        body.ParseFromString(signed.statement)
    except DecodeError:
        raise Rejected("these bytes are not a statement") from None
    return body.session_id, body.key_id


def unverified(data: bytes) -> Statement:
    """What a signed statement says, unproven: for somebody who carries receipts, who has no key and decides nothing
    that the shims do not verify themselves.

    Raises:
        Rejected: these bytes are not a statement.
    """
    signed, body = state_pb2.SignedStatement(), state_pb2.Statement()
    try:
        signed.ParseFromString(data)
        body.ParseFromString(signed.statement)
        return _parse(body, Side(body.side))
    except (DecodeError, ValueError, _NotOurs):
        raise Rejected("these bytes are not a statement") from None


def frame(signed: bytes) -> bytes:
    """What goes on the channel: length, then the signed statement."""
    if len(signed) > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {len(signed)} bytes exceeds {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(signed)) + signed


class FrameReader:
    """Cuts the channel's bytes into frames. Sans-IO: feed it what was read, in pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Frames that are whole now, in order: pass each to `Seal.open_frame`.

        Raises:
            PeerProtocolError: a length outside 1 to `FRAME_BYTES_MAX`. Close the channel.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if not 1 <= length <= FRAME_BYTES_MAX:
                raise PeerProtocolError(
                    f"a handover frame of {length} bytes; 1 to {FRAME_BYTES_MAX} are allowed"
                )
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            whole = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield whole

    @property
    def idle(self) -> bool:
        """Nothing of a frame is waiting for its rest."""
        return not self._buffer
