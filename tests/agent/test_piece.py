"""Our own encoding of a ReadOutputResponse is protobuf's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sandshift.agent.piece import EncodedPiece
from sandshift.wire.sandshift import agent_pb2 as pb


@given(
    st.integers(0, 2**64 - 1), st.binary(max_size=400) | st.integers(1, 3).map(lambda n: bytes(n * 100_000))
)
def test_it_is_byte_for_byte_the_same(offset: int, data: bytes):
    assert (
        EncodedPiece(offset, data).SerializeToString()
        == pb.ReadOutputResponse(offset=offset, data=data).SerializeToString()
    )
