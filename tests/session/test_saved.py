import dataclasses
import hashlib

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import given, settings
from hypothesis import strategies as st

from sandshift.errors import Damaged, IllegalMove, NoRoom, Rejected, SandshiftError
from sandshift.session import saved
from sandshift.session.ids import SandboxId, SessionId
from sandshift.session.options import Options
from sandshift.session.saved import Description, Revision, SavedState
from sandshift.wire.migration import messages_pb2
from sandshift.wire.sandshift import state_pb2

KEY = bytes(range(32))
SESSION = SessionId("sess-1")
OWN = SandboxId("box-1")


def state(**changes):
    usual = SavedState(
        session_id=SESSION,
        session_key=KEY,
        sandbox=state_pb2.Sandbox(sandbox_id="box-1", hostname="box", annotations={"b": "2", "a": "1"}),
        machine=state_pb2.MachineShape(machine_type="pc-q35-10.0", accelerator="tcg", memory_bytes=1 << 28),
        options=Options(checksum_verification=True, maximum_passes=9),
        encrypted=True,
        exported_at_us=1_750_000_000_123_456,
    )
    return dataclasses.replace(usual, **changes)


def envelope(**changes):
    built = state_pb2.SavedState.FromString(saved.encode(state()).value)
    for name, value in changes.items():
        setattr(built, name, value)
    return AnyMessage(type_url=saved.TYPE_URL, value=built.SerializeToString())


def repacked(change):
    built = state_pb2.SavedState.FromString(saved.encode(state()).value)
    payload = state_pb2.SavedSandbox.FromString(built.payload)
    change(payload)
    data = payload.SerializeToString()
    return envelope(payload=data, sha256=hashlib.sha256(data).digest())


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_saved_state_arrives_as_it_left(encrypted):
    sent = state(encrypted=encrypted)
    assert saved.decode(saved.encode(sent), expected=SESSION) == sent


def test_the_same_state_gives_the_same_bytes():
    assert saved.encode(state()) == saved.encode(state())


def test_the_session_key_is_in_no_repr_and_in_no_message():
    shown = repr(state())
    assert "session_key" not in shown
    assert repr(KEY) not in shown
    with pytest.raises(Damaged) as caught:
        saved.decode(envelope(sha256=b"x"), expected=SESSION)
    assert repr(KEY)[2:20] not in str(caught.value)


def test_a_config_that_is_not_ours_is_refused_with_its_type():
    with pytest.raises(
        Rejected, match=r"config has type 'type\.googleapis\.com/x': a saved state of sandshift has"
    ):
        saved.decode(AnyMessage(type_url="type.googleapis.com/x"), expected=SESSION)


def test_an_envelope_that_cannot_be_read_is_damaged():
    with pytest.raises(Damaged, match="cannot be read: carry the source's config unchanged"):
        saved.decode(AnyMessage(type_url=saved.TYPE_URL, value=b"\xff\xff"), expected=SESSION)


def test_an_altered_payload_is_damaged():
    with pytest.raises(Damaged, match="does not match its SHA-256"):
        saved.decode(envelope(payload=b""), expected=SESSION)


def test_a_payload_that_is_no_message_is_damaged():
    with pytest.raises(Damaged, match="payload cannot be read"):
        saved.decode(envelope(payload=b"\xff", sha256=hashlib.sha256(b"\xff").digest()), expected=SESSION)


def test_a_newer_state_that_we_may_read_is_read():
    newer = envelope(schema_version=7, min_reader_version=1)
    assert saved.decode(newer, expected=SESSION) == state()


def test_a_state_for_newer_readers_is_refused_with_both_ranges():
    with pytest.raises(IllegalMove) as caught:
        saved.decode(envelope(schema_version=3, min_reader_version=2), expected=SESSION)
    assert caught.value.message == (
        "the saved state has schema version 3 for readers of versions 2 to 3; this sandshift reads versions 1 to 1: "
        "bring both hosts to releases whose ranges overlap"
    )


def test_a_state_older_than_we_read_is_refused_with_both_ranges(monkeypatch):
    written = envelope()
    monkeypatch.setattr(saved, "OLDEST_READABLE", 2)
    monkeypatch.setattr(saved, "SCHEMA_VERSION", 4)
    with pytest.raises(
        IllegalMove,
        match="has schema version 1 for readers of versions 1 to 1; this sandshift reads versions 2 to 4",
    ):
        saved.decode(written, expected=SESSION)


@pytest.mark.parametrize(("schema", "reader"), [(0, 0), (1, 0), (1, 2)])
def test_versions_that_no_writer_writes_are_damage(schema, reader):
    with pytest.raises(Damaged, match=f"says schema version {schema} for readers from {reader} on"):
        saved.decode(envelope(schema_version=schema, min_reader_version=reader), expected=SESSION)


def test_a_key_of_another_length_is_damage_and_the_key_is_not_shown():
    with pytest.raises(Damaged, match="session key has 5 bytes, not 32"):
        saved.decode(repacked(lambda payload: setattr(payload, "session_key", b"short")), expected=SESSION)


def test_an_unknown_encryption_is_refused():
    with pytest.raises(Rejected, match="asks for encryption 9, which this sandshift does not know"):
        saved.decode(repacked(lambda payload: setattr(payload, "encryption", 9)), expected=SESSION)


def test_another_sessions_config_is_refused_naming_both():
    with pytest.raises(Rejected, match="config belongs to session 'sess-1', the request names 'sess-2'"):
        saved.decode(saved.encode(state()), expected=SessionId("sess-2"))


def test_a_sandbox_that_does_not_fit_into_a_message_is_refused_at_export():
    big = state_pb2.Sandbox(annotations={"a": "x" * saved.CONFIG_BYTES_MAX})
    with pytest.raises(NoRoom, match=rf"has \d+ bytes and at most {saved.CONFIG_BYTES_MAX} fit"):
        saved.encode(state(sandbox=big))


def test_the_largest_config_leaves_64_kib_of_a_message():
    assert saved.CONFIG_BYTES_MAX == 4 * 1024 * 1024 - 64 * 1024
    room = saved.CONFIG_BYTES_MAX - saved.encode(state(sandbox=state_pb2.Sandbox(hostname=""))).ByteSize()
    config = saved.encode(state(sandbox=state_pb2.Sandbox(hostname="x" * (room - 64))))
    assert room - 64 < config.ByteSize() <= saved.CONFIG_BYTES_MAX


@given(st.integers(0, len(saved.encode(state()).value) * 8 - 1))
@settings(max_examples=300)
def test_no_flipped_bit_goes_unnoticed(bit):
    config = saved.encode(state())
    value = bytearray(config.value)
    value[bit // 8] ^= 1 << (bit % 8)
    try:
        taken = saved.decode(AnyMessage(type_url=config.type_url, value=bytes(value)), expected=SESSION)
    except SandshiftError:
        return
    assert taken == state()


def test_compatibility_data_is_the_blob_or_its_machine():
    config = saved.encode(state())
    assert saved.compatibility_data(config) == (
        config.value,
        state().machine.SerializeToString(deterministic=True),
    )
    assert saved.compatibility_data(AnyMessage(value=b"\xff")) == (b"\xff",)


def test_a_repeated_import_is_known_by_type_and_bytes():
    first = AnyMessage(type_url="a", value=b"bc")
    assert saved.config_digest(first) == saved.config_digest(AnyMessage(type_url="a", value=b"bc"))
    assert saved.config_digest(first) != saved.config_digest(AnyMessage(type_url="ab", value=b"c"))


def test_head_has_the_config_in_field_3_and_the_sandbox_id_in_field_2():
    config = saved.encode(state())
    request = messages_pb2.ImportSandboxRequest(session_id="s", sandbox_id_or_config=b"box-1", config=config)
    read = saved.read_import(request, own=OWN)
    assert (read.revision, read.sandbox_id, read.config) == (Revision.HEAD, "box-1", config)


def test_revision_2691_has_the_config_in_field_2():
    config = saved.encode(state())
    request = messages_pb2.ImportSandboxRequest(
        session_id="s", sandbox_id_or_config=config.SerializeToString()
    )
    read = saved.read_import(request, own=OWN)
    assert (read.revision, read.sandbox_id, read.config) == (Revision.R2691, None, config)


@pytest.mark.parametrize("raw", [b"", b"box-1", b"\xff\xff\xff", AnyMessage(value=b"x").SerializeToString()])
def test_an_import_without_config_is_refused(raw):
    request = messages_pb2.ImportSandboxRequest(session_id="s", sandbox_id_or_config=raw)
    with pytest.raises(Rejected, match="ImportSandboxRequest holds no config"):
        saved.read_import(request, own=OWN)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"box-2", "sandbox_id 'box-2' is not this shim's sandbox 'box-1'"),
        (b"", "sandbox_id is empty"),
        (b"\xff", "sandbox_id is not UTF-8"),
        (b"..", "sandbox_id '..' must be letters and digits"),
    ],
)
def test_head_must_name_the_shims_own_sandbox(raw, message):
    request = messages_pb2.ImportSandboxRequest(sandbox_id_or_config=raw, config=AnyMessage(type_url="x"))
    with pytest.raises(Rejected, match=message):
        saved.read_import(request, own=OWN)


def test_a_description_for_a_preflight_holds_neither_session_nor_key():
    full = state()
    sent = Description(full.sandbox, full.machine, full.options, full.encrypted, full.exported_at_us)
    data = saved.describe(sent)
    assert saved.read_description(data) == sent
    payload = state_pb2.SavedSandbox.FromString(data)
    assert (payload.session_id, payload.session_key) == ("", b"")


def test_what_is_no_description_is_refused():
    with pytest.raises(
        Rejected, match="description cannot be read: give what the source's Preflight answered"
    ):
        saved.read_description(b"\xff")
    with pytest.raises(Rejected, match="description holds a session key"):
        saved.read_description(state_pb2.SavedState.FromString(saved.encode(state()).value).payload)
    with pytest.raises(Rejected, match="memory_transport = 0 is not one of"):
        saved.read_description(b"")
