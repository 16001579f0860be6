"""The witness's rule on made-up stories, and what it takes from a tap."""

from __future__ import annotations

import struct

from tests.faults.witness import (
    DATAGRAM,
    PORT,
    UDP_PAYLOAD_AT,
    Sighting,
    Witness,
    _only_udp_to,
    clashes,
    longest_silence_ns,
    runners,
)

MARKER = b"a marker"
BEAT_NS = 5_000_000


def story(*parts: tuple[str, int, range]) -> list[Sighting]:
    """(host, first beat, numbers said on its beats)."""
    return [
        Sighting((first + beat) * BEAT_NS, host, number, 0, 0)
        for host, first, numbers in parts
        for beat, number in enumerate(numbers)
    ]


def test_one_guest_that_moves_away_and_comes_back_is_one_runner() -> None:
    seen = story(("a", 0, range(1, 50)), ("b", 60, range(50, 90)), ("a", 120, range(90, 99)))
    assert clashes(seen) == []
    assert runners(seen) == ["a", "b", "a"]


def test_two_that_go_on_from_one_image_are_two_runners() -> None:
    seen = story(("a", 0, range(1, 50)), ("a", 60, range(50, 60)), ("b", 60, range(50, 60)))
    assert str(clashes(seen)[0]) == "host b said 50 0.0 ms after host a had said 50"


def test_two_that_never_say_the_same_number_are_two_runners() -> None:
    seen = story(("a", 0, range(1, 50)), ("b", 10, range(1000, 1040)))
    assert len(clashes(seen)) == 38


def test_a_guest_that_begins_again_where_it_was_before_is_seen() -> None:
    (clash,) = clashes(story(("a", 0, range(1, 50)), ("b", 60, range(49, 52))))
    assert (clash.earlier.number, clash.later.number, clash.later.host) == (49, 49, "b")


def test_the_longest_silence_is_the_one_that_ends_after_the_fault() -> None:
    seen = story(("a", 0, range(1, 3)), ("a", 500, range(3, 5)), ("b", 600, range(5, 7)))
    assert longest_silence_ns(seen, since_ns=0) == 499 * BEAT_NS
    assert longest_silence_ns(seen, since_ns=550 * BEAT_NS) == 99 * BEAT_NS
    assert longest_silence_ns(seen, since_ns=900 * BEAT_NS) == 0


async def test_only_what_comes_out_of_the_guests_own_tap_counts() -> None:
    witness = Witness({})
    witness.watch(MARKER, "ss0123")
    ancillary = [(1, 35, struct.pack("qq", 7, 5))]

    def frame(marker: bytes) -> bytes:
        return bytes(UDP_PAYLOAD_AT) + DATAGRAM.pack(marker, 12, 3, 1)

    for interface, marker in (("br0", MARKER), ("ss9999", MARKER), ("ss0123", b"another!")):
        witness._take("a", frame(marker), ancillary, interface)
    witness._take("a", frame(MARKER)[:-1], ancillary, "ss0123")
    assert witness.seen == []
    witness._take("a", frame(MARKER), ancillary, "ss0123")
    assert witness.seen == [Sighting(7_000_000_005, "a", 12, 3, 1)]


def test_the_kernels_filter_keeps_the_guests_datagrams_and_nothing_else() -> None:
    program = [struct.unpack_from("HBBI", _only_udp_to(PORT), at) for at in range(0, 80, 8)]
    assert len(program) == 10

    def kept(frame: bytes) -> bool:
        """Runs the program as the kernel would. Source: linux/filter.h, the five instructions that it has."""
        register, at = 0, 0
        while True:
            code, if_true, if_false, operand = program[at]
            at += 1
            match code:
                case 0x28:
                    register = int.from_bytes(frame[operand : operand + 2], "big")
                case 0x30:
                    register = frame[operand]
                case 0x15:
                    at += if_true if register == operand else if_false
                case 0x06:
                    return operand > 0

    def udp(*, ethertype: int = 0x0800, first: int = 0x45, protocol: int = 17, port: int = PORT) -> bytes:
        ip = bytes([first, *bytes(8), protocol, *bytes(10)])
        return bytes(12) + ethertype.to_bytes(2, "big") + ip + bytes(2) + port.to_bytes(2, "big") + bytes(40)

    assert kept(udp())
    assert not kept(udp(ethertype=0x86DD))
    assert not kept(udp(first=0x46))
    assert not kept(udp(protocol=6))
    assert not kept(udp(port=PORT + 1))
