import dataclasses
import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import IllegalMove, Rejected
from sandshift.session import descriptor as rules
from sandshift.session.descriptor import Descriptor, SocketFacts
from sandshift.wire.migration import messages_pb2

USER = {"caller_pid": 41, "caller_uid": 1000}
ROOT = {"caller_pid": 1, "caller_uid": 0}
DESCRIBED = Descriptor(pid=41, fd=7, cookie=99, family=2, type=1, protocol=6)
FACTS = SocketFacts(cookie=99, family=2, type=1, protocol=6, connected=True)


def info(**changes):
    fields = {"version": 1, "pid": 41, "fd": 7, "so_cookie": 99, "family": 2, "type": 1, "protocol": 6}
    return messages_pb2.SocketDescriptor(**{**fields, **changes}).SerializeToString()


def refusal(data, caller=USER):
    with pytest.raises(Rejected) as caught:
        rules.parse(data, **caller)
    return caught.value.message


def test_a_callers_own_socket_is_taken():
    assert rules.parse(info(), **USER) == DESCRIBED


def test_the_numbers_are_those_of_this_system():
    assert (rules.AF_UNIX, rules.AF_INET, rules.AF_INET6) == (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
    assert socket.SOCK_STREAM == rules.SOCK_STREAM


@pytest.mark.parametrize("family", [1, 2, 10])
def test_each_family_that_can_carry_memory_is_taken(family):
    assert rules.parse(info(family=family), **USER).family == family


def test_root_may_hand_over_another_processs_socket_and_nobody_else_may():
    assert rules.parse(info(pid=4242), **ROOT).pid == 4242
    assert refusal(info(pid=4242)) == (
        "protocol_info: pid = 4242 is not the caller's own (41): only root may hand over another process's socket"
    )
    unknown = refusal(info(), {"caller_pid": None, "caller_uid": None})
    assert "pid = 41 is not the caller's own (unknown)" in unknown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 0}, "protocol_info: version = 0 is not 1"),
        ({"version": 2}, "protocol_info: version = 2 is not 1"),
        ({"pid": 0}, "protocol_info: pid = 0, fd = 7 name no file descriptor"),
        ({"pid": -1}, "protocol_info: pid = -1, fd = 7 name no file descriptor"),
        ({"fd": -1}, "protocol_info: pid = 41, fd = -1 name no file descriptor"),
        ({"so_cookie": 0}, "protocol_info: so_cookie = 0 is no socket's: read SO_COOKIE of the socket"),
        ({"family": 17}, "protocol_info: family = 17 is not one of AF_UNIX (1), AF_INET (2), AF_INET6 (10)"),
        ({"type": 2}, "protocol_info: type = 2 is not SOCK_STREAM (1)"),
    ],
)
def test_what_describes_no_channel_is_refused(changes, message):
    assert refusal(info(**changes)) == message


def test_a_wsaprotocol_info_is_refused_cleanly():
    service_flags = struct.pack("<5I", 0x66, 0, 0, 0, 8)
    native = service_flags + os.urandom(628 - len(service_flags))
    assert refusal(native) == (
        "protocol_info has 628 bytes and a SocketDescriptor at most 128: this is a Linux host, which takes no "
        "WSAPROTOCOL_INFO"
    )


def test_nothing_and_rubbish_are_refused():
    assert refusal(b"") == "protocol_info is empty: give a serialized SocketDescriptor"
    assert refusal(b"\xff\xff") == "protocol_info: these 2 bytes are no SocketDescriptor"


def test_the_largest_descriptor_fits():
    largest = dict.fromkeys(("pid", "fd", "family", "type", "protocol"), -(1 << 31))
    assert len(info(version=(1 << 32) - 1, so_cookie=(1 << 64) - 1, **largest)) <= rules.DESCRIPTOR_BYTES_MAX


def refused_or_family(data):
    try:
        return rules.parse(data, **ROOT).family
    except Rejected as refused:
        return refused.message


@given(st.binary(max_size=700))
def test_any_bytes_are_a_descriptor_or_are_refused(data):
    found = refused_or_family(data)
    assert found in rules.FAMILIES or found.startswith("protocol_info")


def test_the_socket_described_is_taken():
    rules.check(DESCRIBED, FACTS)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("cookie", "so_cookie is 5, described as 99"),
        ("family", "family is 5, described as 2"),
        ("type", "type is 5, described as 1"),
        ("protocol", "protocol is 5, described as 6"),
    ],
)
def test_another_socket_is_refused_naming_what_differs(field, said):
    with pytest.raises(Rejected) as caught:
        rules.check(DESCRIBED, dataclasses.replace(FACTS, **{field: 5}))
    assert caught.value.message == (
        f"protocol_info: file descriptor 7 of process 41 is not the socket described: {said}"
    )


def test_all_differences_are_named_at_once():
    with pytest.raises(Rejected, match=r"so_cookie is 1, .*; family is 10, .*; protocol is 0, "):
        rules.check(DESCRIBED, SocketFacts(cookie=1, family=10, type=1, protocol=0, connected=False))


def test_a_socket_that_is_not_connected_is_refused_as_such():
    with pytest.raises(IllegalMove, match="file descriptor 7 of process 41 is not connected: connect it"):
        rules.check(DESCRIBED, dataclasses.replace(FACTS, connected=False))
