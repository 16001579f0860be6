"""A statement is believed only if it is this session's, this side's, whole and unchanged."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import PeerProtocolError, Rejected
from sandshift.session.statement import (
    FRAME_BYTES_MAX,
    HANDOVER_BYTES_MAX,
    Ask,
    Cell,
    FrameReader,
    Seal,
    Statement,
    frame,
    key_id,
    unverified,
    unverified_session,
)
from sandshift.session.states import Side
from sandshift.wire.sandshift import state_pb2

KEY = bytes(range(32))
SEAL = Seal("s-1", KEY)

statements = st.builds(
    Statement,
    st.sampled_from(Cell),
    st.sampled_from(Ask),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.text(max_size=50),
    st.binary(max_size=200),
)


@given(statements)
def test_what_was_signed_is_what_is_read(statement: Statement) -> None:
    assert SEAL.open_frame(SEAL.sign(statement), side=statement.side) == statement


def test_cells_asks_and_sides_have_the_numbers_of_the_wire() -> None:
    assert {cell.name: cell.value for cell in Cell} == {
        name.removeprefix("CELL_"): number for name, number in state_pb2.Cell.items() if number
    }
    assert {ask.name: ask.value for ask in Ask} == {
        name.removeprefix("ASK_"): number for name, number in state_pb2.Ask.items()
    }
    assert {side.name: side.value for side in Side} == {
        name.removeprefix("SIDE_"): number for name, number in state_pb2.Side.items() if number
    }


def test_every_field_of_the_spec_is_in_the_signed_bytes() -> None:
    signed = state_pb2.SignedStatement.FromString(
        SEAL.sign(Statement(Cell.RELEASED, Ask.GIVE, 7, 8, "why", b"record"))
    )
    body = state_pb2.Statement.FromString(signed.statement)
    assert (body.version, body.session_id, body.side, body.cell) == (1, "s-1", 1, 2)
    assert body.key_id == hashlib.sha256(KEY).digest()[:8] == key_id(KEY)
    assert (body.ask, body.ask_number, body.answers) == (2, 7, 8)
    assert (body.reason, body.handover) == ("why", b"record")
    assert len(signed.hmac) == 32
    assert signed.hmac != hmac.digest(KEY, signed.statement, "sha256"), (
        "the key is derived for this purpose alone"
    )


def test_the_key_is_not_shown() -> None:
    assert KEY.hex() not in repr(SEAL)
    assert repr(KEY) not in repr(SEAL)


@pytest.mark.parametrize(
    ("seal", "why"),
    [
        (Seal("s-2", KEY), "is of session 's-2', not of 's-1'"),
        (Seal("s-1", bytes(32)), "is of another run of session 's-1'"),
    ],
)
def test_a_statement_of_another_session_is_refused(seal: Seal, why: str) -> None:
    foreign = seal.sign(Statement(Cell.READY))
    with pytest.raises(Rejected, match=f"peer_receipt {why}"):
        SEAL.open_receipt(foreign, side=Side.DESTINATION)
    with pytest.raises(PeerProtocolError, match=f"a handover frame {why}"):
        SEAL.open_frame(foreign, side=Side.DESTINATION)


def test_an_own_statement_is_not_taken_for_the_peers() -> None:
    with pytest.raises(Rejected, match="is not of the destination"):
        SEAL.open_receipt(SEAL.sign(Statement(Cell.OPEN)), side=Side.DESTINATION)


def test_a_cell_of_the_other_side_is_refused() -> None:
    with pytest.raises(Rejected, match="of the source shows RUNNING, a cell of the destination"):
        SEAL.open_receipt(_signed(cell=9, side=1), side=Side.SOURCE)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "has version 2; this shim knows 1"),
        ({"cell": 99}, "has cell 99 and ask 0, which nobody here knows"),
        ({"cell": 0}, "has cell 0 and ask 0"),
        ({"ask": 7}, "has cell 2 and ask 7"),
    ],
)
def test_what_nobody_here_knows_is_refused(changes: dict[str, int], why: str) -> None:
    with pytest.raises(Rejected, match=why):
        SEAL.open_receipt(_signed(**changes), side=Side.SOURCE)


def _signed(**changes: int) -> bytes:
    """A statement with a right signature over whatever it says."""
    said = {"version": 1, "side": 1, "cell": 2, "ask": 0} | changes
    body = state_pb2.Statement(session_id="s-1", key_id=key_id(KEY), **said).SerializeToString()
    return state_pb2.SignedStatement(statement=body, hmac=SEAL._hmac(body)).SerializeToString()


@given(st.integers(min_value=0), st.integers(1, 255))
def test_no_bit_of_it_can_be_changed(position: int, flip: int) -> None:
    signed = bytearray(SEAL.sign(Statement(Cell.HELD, Ask.TELL, 3, 4, "r")))
    signed[position % len(signed)] ^= flip
    with pytest.raises(PeerProtocolError):
        SEAL.open_frame(bytes(signed), side=Side.DESTINATION)


@given(st.binary(max_size=300))
def test_noise_is_refused_and_nothing_else_is_raised(noise: bytes) -> None:
    with pytest.raises(Rejected):
        SEAL.open_receipt(noise, side=Side.SOURCE)


@pytest.mark.parametrize(
    "asking",
    [Statement(Cell.HELD, Ask.TELL, 1), Statement(Cell.HELD, answers=1), Statement(Cell.HELD, ask_number=1)],
)
def test_a_frame_cannot_be_carried_as_a_receipt(asking: Statement) -> None:
    with pytest.raises(
        Rejected, match="is a frame of the channel: pass on what the other side's status call gives"
    ):
        SEAL.open_receipt(SEAL.sign(asking), side=Side.DESTINATION)


def test_a_statement_becomes_a_receipt_without_its_question() -> None:
    said = Statement(Cell.RELEASED, Ask.TELL, 3, 4, "why", b"h")
    assert said.as_receipt() == Statement(Cell.RELEASED, reason="why", handover=b"h")
    assert said.as_receipt().is_receipt
    assert not said.is_receipt


def test_a_handover_record_that_does_not_fit_is_refused_when_it_is_signed() -> None:
    with pytest.raises(ValueError, match=f"exceeds the {HANDOVER_BYTES_MAX} of a frame"):
        SEAL.sign(Statement(Cell.OPEN, handover=bytes(HANDOVER_BYTES_MAX + 1)))
    largest = SEAL.sign(Statement(Cell.OPEN, reason="r" * 10_000, handover=bytes(HANDOVER_BYTES_MAX)))
    assert len(largest) <= FRAME_BYTES_MAX


def test_too_many_bytes_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(Rejected, match=f"of 65537 bytes exceeds {FRAME_BYTES_MAX}"):
        SEAL.open_receipt(bytes(FRAME_BYTES_MAX + 1), side=Side.SOURCE)


def test_somebody_without_the_key_can_read_and_find_the_key() -> None:
    receipt = SEAL.sign(Statement(Cell.RUNNING))
    assert unverified(receipt).cell is Cell.RUNNING
    assert unverified_session(receipt) == ("s-1", key_id(KEY))
    with pytest.raises(Rejected, match="not a statement"):
        unverified(b"\xff\xff")


def test_a_session_key_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="a session key has 32 bytes, this one 16"):
        Seal("s-1", bytes(16))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.data())
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(
    frames: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(frame(one) for one in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader, read = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        read += reader.feed(stream[start:end])
    assert read == frames
    assert reader.idle


@pytest.mark.parametrize("length", [0, FRAME_BYTES_MAX + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_a_byte_of_it_is_kept(length: int) -> None:
    with pytest.raises(PeerProtocolError, match=f"a handover frame of {length} bytes"):
        list(FrameReader().feed(length.to_bytes(4, "big")))


def test_a_frame_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="exceeds 65536"):
        frame(bytes(FRAME_BYTES_MAX + 1))
    assert frame(b"ab") == b"\x00\x00\x00\x02ab"


def test_half_a_frame_is_not_idle() -> None:
    reader = FrameReader()
    assert list(reader.feed(b"\x00\x00\x00\x02a")) == []
    assert not reader.idle
