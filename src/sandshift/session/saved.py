"""The saved state: what the source hands to the destination through a caller who cannot look inside.

An Any that holds an envelope (versions, SHA-256) around a payload (`SavedSandbox`). The payload carries the session key:
it is in no repr, no message and no log. What is told apart for the caller: not ours (Rejected), written for other
readers (IllegalMove, with both ranges), damaged (Damaged).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from sandshift.errors import Damaged, IllegalMove, NoRoom, Rejected
from sandshift.session import ids
from sandshift.session import options as option_rules
from sandshift.session.ids import SandboxId, SessionId
from sandshift.session.options import Options
from sandshift.wire.migration import messages_pb2
from sandshift.wire.sandshift import state_pb2

TYPE_URL: Final = "sandshift.dev/sandshift.state.v1.SavedState"
SCHEMA_VERSION: Final = 1
"""What this sandshift writes, and the newest that it knows."""
MIN_READER_VERSION: Final = 1
"""The oldest reader that understands what this sandshift writes."""
OLDEST_READABLE: Final = 1
SESSION_KEY_BYTES: Final = 32
CONFIG_BYTES_MAX: Final = 4 * 1024 * 1024 - 64 * 1024
"""Leaves room for the rest of a 4 MiB message on its way to the destination."""


class Revision(enum.Enum):
    """Which revision of the contract a client speaks, where a message tells."""

    HEAD = "head"
    R2691 = "2691"


@dataclass(frozen=True, slots=True)
class SavedState:
    """A sandbox on its way. `sandbox` and `machine` stay messages here: the sandbox room turns them into its own."""

    session_id: SessionId
    session_key: bytes = field(repr=False)
    sandbox: state_pb2.Sandbox
    machine: state_pb2.MachineShape
    options: Options
    """In force on the source."""
    encrypted: bool
    """The source sends through TLS-PSK."""
    exported_at_us: int
    """The source host's clock, microseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Description:
    """A sandbox as it would be saved now, for a preflight: nothing in it is secret, nothing has been armed."""

    sandbox: state_pb2.Sandbox
    machine: state_pb2.MachineShape
    options: Options
    encrypted: bool
    exported_at_us: int


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """An ImportSandboxRequest of either revision."""

    revision: Revision
    sandbox_id: SandboxId | None
    """None in revision 2691: the shim's own is meant."""
    config: AnyMessage


def encode(state: SavedState) -> AnyMessage:
    """The config of a PrepareAndExportSandboxResponse. The same state gives the same bytes.

    Raises:
        NoRoom: the sandbox is described by more than fits into a message.
    """
    payload = _payload(state).SerializeToString(deterministic=True)
    envelope = state_pb2.SavedState(
        schema_version=SCHEMA_VERSION,
        min_reader_version=MIN_READER_VERSION,
        sha256=hashlib.sha256(payload).digest(),
        payload=payload,
    )
    config = AnyMessage(type_url=TYPE_URL, value=envelope.SerializeToString(deterministic=True))
    if (size_bytes := config.ByteSize()) > CONFIG_BYTES_MAX:
        raise NoRoom(
            f"the saved state has {size_bytes} bytes and at most {CONFIG_BYTES_MAX} fit into a message: "
            "remove annotations or containers from the sandbox"
        )
    return config


def decode(config: AnyMessage, *, expected: SessionId) -> SavedState:
    """What `encode` was given.

    Raises:
        Rejected: not a saved state of sandshift, or that of another session than `expected`.
        IllegalMove: a version that this sandshift does not read; names both ranges.
        Damaged: not the bytes that were written.
    """
    if config.type_url != TYPE_URL:
        raise Rejected(
            f"config has type {ids.shown(config.type_url)}: a saved state of sandshift has {TYPE_URL!r}"
        )
    try:
        envelope = state_pb2.SavedState.FromString(config.value)
    except DecodeError as error:
        raise Damaged("the saved state cannot be read: carry the source's config unchanged") from error
    _check_versions(envelope)
    if not hmac.compare_digest(hashlib.sha256(envelope.payload).digest(), envelope.sha256):
        raise Damaged("the saved state does not match its SHA-256: carry the source's config unchanged")
    try:
        payload = state_pb2.SavedSandbox.FromString(envelope.payload)
    except DecodeError as error:
        raise Damaged("the saved state's payload cannot be read") from error
    state = _state(payload)
    if state.session_id != expected:
        raise Rejected(
            f"config belongs to session {ids.shown(state.session_id)}, the request names {ids.shown(expected)}: "
            "both sides of a migration use one session_id"
        )
    return state


def describe(description: Description) -> bytes:
    """What the source's Preflight answers for the destination's: a sandbox as it would be saved, no session, no key."""
    payload = _described(description)
    return payload.SerializeToString(deterministic=True)


def read_description(data: bytes) -> Description:
    """What `describe` was given.

    Raises:
        Rejected: it is no description, or says what this sandshift does not know.
    """
    try:
        payload = state_pb2.SavedSandbox.FromString(data)
    except DecodeError as error:
        raise Rejected("description cannot be read: give what the source's Preflight answered") from error
    if payload.session_key:
        raise Rejected(
            "description holds a session key: give what the source's Preflight answered, not a saved state"
        )
    return Description(
        sandbox=payload.sandbox,
        machine=payload.machine,
        options=option_rules.parse(payload.options, backend=option_rules.ANY_BACKEND),
        encrypted=_encrypted(payload),
        exported_at_us=payload.exported_at.ToMicroseconds(),
    )


def compatibility_data(config: AnyMessage) -> tuple[bytes, ...]:
    """What a client of revision 2691 may send back as this blob's own machine description: the blob, or its machine."""
    try:
        payload = state_pb2.SavedState.FromString(config.value).payload
        machine = state_pb2.SavedSandbox.FromString(payload).machine
    except DecodeError:
        return (config.value,)
    return (config.value, machine.SerializeToString(deterministic=True))


def config_digest(config: AnyMessage) -> bytes:
    """SHA-256 by which a repeated import is known to be the same."""
    return hashlib.sha256(config.type_url.encode() + b"\0" + config.value).digest()


def read_import(request: messages_pb2.ImportSandboxRequest, *, own: SandboxId) -> ImportRequest:
    """Tell the revisions apart: field 3 present is head; a field 2 that is an Any with a type_url is 2691.

    Raises:
        Rejected: neither, or a sandbox_id other than the shim's `own`.
    """
    if request.HasField("config"):
        return ImportRequest(Revision.HEAD, _named_sandbox(request.sandbox_id_or_config, own), request.config)
    try:
        config = AnyMessage.FromString(request.sandbox_id_or_config)
    except DecodeError:
        config = AnyMessage()
    if not config.type_url:
        raise Rejected(
            "ImportSandboxRequest holds no config: give it in field 3 with the sandbox_id in field 2, or, as revision "
            "2691 does, in field 2"
        )
    return ImportRequest(Revision.R2691, None, config)


def _named_sandbox(raw: bytes, own: SandboxId) -> SandboxId:
    try:
        named = ids.sandbox_id(raw.decode())
    except UnicodeDecodeError as error:
        raise Rejected("sandbox_id is not UTF-8") from error
    if named != own:
        raise Rejected(f"sandbox_id {ids.shown(named)} is not this shim's sandbox {ids.shown(own)}")
    return named


def _check_versions(envelope: state_pb2.SavedState) -> None:
    written, readers = envelope.schema_version, envelope.min_reader_version
    if not 1 <= readers <= written:
        raise Damaged(
            f"the saved state says schema version {written} for readers from {readers} on: it was altered"
        )
    if written < OLDEST_READABLE or readers > SCHEMA_VERSION:
        raise IllegalMove(
            f"the saved state has schema version {written} for readers of versions {readers} to {written}; this "
            f"sandshift reads versions {OLDEST_READABLE} to {SCHEMA_VERSION}: bring both hosts to releases whose "
            "ranges overlap"
        )


_ENCRYPTION: Final = {
    state_pb2.ENCRYPTION_NONE: False,
    state_pb2.ENCRYPTION_TLS_PSK: True,
}


def _payload(state: SavedState) -> state_pb2.SavedSandbox:
    payload = _described(state)
    payload.session_id = state.session_id
    payload.session_key = state.session_key
    return payload


def _described(state: SavedState | Description) -> state_pb2.SavedSandbox:
    exported_at = Timestamp()
    exported_at.FromMicroseconds(state.exported_at_us)
    return state_pb2.SavedSandbox(
        sandbox=state.sandbox,
        machine=state.machine,
        options=option_rules.to_proto(state.options),
        encryption=state_pb2.ENCRYPTION_TLS_PSK if state.encrypted else state_pb2.ENCRYPTION_NONE,
        exported_at=exported_at,
    )


def _encrypted(payload: state_pb2.SavedSandbox) -> bool:
    if (encrypted := _ENCRYPTION.get(payload.encryption)) is None:
        raise Rejected(
            f"the saved state asks for encryption {payload.encryption}, which this sandshift does not know"
        )
    return encrypted


def _state(payload: state_pb2.SavedSandbox) -> SavedState:
    if len(payload.session_key) != SESSION_KEY_BYTES:
        raise Damaged(
            f"the saved state's session key has {len(payload.session_key)} bytes, not {SESSION_KEY_BYTES}"
        )
    return SavedState(
        session_id=ids.session_id(payload.session_id),
        session_key=payload.session_key,
        sandbox=payload.sandbox,
        machine=payload.machine,
        options=option_rules.parse(payload.options, backend=option_rules.ANY_BACKEND),
        encrypted=_encrypted(payload),
        exported_at_us=payload.exported_at.ToMicroseconds(),
    )
