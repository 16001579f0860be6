"""ttrpc.metadata."""

from __future__ import annotations

import pytest

from ttrpc.metadata import Metadata, key_values
from ttrpc.wire.ttrpc_pb2 import KeyValue


def test_keys_are_found_in_any_case_and_the_first_value_is_the_value() -> None:
    metadata = Metadata.received(
        [KeyValue(key="A", value="1"), KeyValue(key="b", value="2"), KeyValue(key="a", value="3")]
    )
    assert (metadata["a"], metadata["A"], metadata.all("A")) == ("1", "1", ("1", "3"))
    assert (list(metadata), len(metadata), "B" in metadata, 3 in metadata) == (["a", "b"], 2, True, False)
    assert repr(metadata) == "Metadata({'a': ['1', '3'], 'b': ['2']})"


def test_what_is_missing_raises_or_gives_the_default() -> None:
    with pytest.raises(KeyError):
        Metadata()["a"]
    assert (Metadata().get("a"), Metadata().all("a")) == (None, ())


def test_received_metadata_can_be_sent_on_whole() -> None:
    sent = [KeyValue(key="a", value="1"), KeyValue(key="a", value="2")]
    assert key_values(Metadata.received(sent)) == sent


def test_bytes_are_refused_because_ttrpc_has_no_binary_metadata() -> None:
    with pytest.raises(TypeError):
        key_values({"a": [b"1"]})  # type: ignore[list-item]
