import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import Rejected
from sandshift.session import ids


@pytest.mark.parametrize(
    "value", ["s", "sess-1", "5f0b1190-63be-4e0c-b974-bd0f55675a42", "../../etc", "Sitzung ü 1", "a" * 256]
)
def test_printable_session_ids_are_taken_as_they_are(value):
    assert ids.session_id(value) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "session_id has 0 bytes; it must have 1 to 256"),
        ("a\nb", "session_id holds U+000A at position 1, which cannot be printed"),
        ("\u202e", "session_id holds U+202E at position 0, which cannot be printed"),
        ("\ud800", "session_id holds U+D800 at position 0, which cannot be printed"),
        ("a" * 257, "session_id has 257 bytes; it must have 1 to 256"),
        ("ü" * 129, "session_id has 258 bytes; it must have 1 to 256"),
    ],
)
def test_other_session_ids_are_refused_and_the_message_is_safe_to_print(value, message):
    with pytest.raises(Rejected) as caught:
        ids.session_id(value)
    assert caught.value.message == message


def test_what_is_shown_of_a_strangers_text_is_short_and_printable():
    assert ids.shown("a\nb") == "'a\\nb'"
    assert ids.shown("a" * 81) == "'" + "a" * 80 + "...'"


def refusal_of(value):
    try:
        assert ids.session_id(value) == value
    except Rejected as refusal:
        return refusal.message
    return None


@given(st.text(max_size=300))
def test_a_session_id_is_valid_exactly_if_it_is_printable_and_1_to_256_bytes(value):
    refusal = refusal_of(value)
    valid = value.isprintable() and 1 <= len(value.encode(errors="replace")) <= 256
    assert (refusal is None) == valid
    assert refusal is None or refusal.isprintable()


@pytest.mark.parametrize("value", ["a", "A1", "foo.bar", "foo-bar_baz.1", "0" * 76])
def test_containerd_ids_are_taken(value):
    assert ids.sandbox_id(value) == value
    assert ids.container_id(value) == value


@pytest.mark.parametrize("value", [".", "..", "-a", "a-", "a..b", "a.-b", "a/b", "a b", "ä", "a\n", "a__b"])
def test_ids_that_containerd_refuses_are_refused(value):
    with pytest.raises(Rejected, match="must be letters and digits"):
        ids.sandbox_id(value)


def test_an_empty_and_a_long_identifier_are_named():
    with pytest.raises(Rejected, match="sandbox_id is empty"):
        ids.sandbox_id("")
    with pytest.raises(Rejected, match=r"container id 'b{77}' has 77 characters: at most 76"):
        ids.container_id("b" * 77)
    with pytest.raises(Rejected, match=r"container id 'c{80}\.\.\.' has 81 characters"):
        ids.container_id("c" * 81)


def test_a_session_is_called_by_its_sha256_on_disk():
    name = ids.session_name(ids.session_id("../../etc"))
    assert name == hashlib.sha256(b"../../etc").hexdigest()
    assert len(name) == 64
