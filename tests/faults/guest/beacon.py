"""Runs inside the guest, behind the source of the demo's `WorkingSet`: says every 5 ms that it runs, and how its memory is.

Each datagram goes to everybody on the network: marker, number, generation of the memory pattern, pages found wrong.
Between two of them a few pages of the pattern are checked and written anew, so a page that lost a write on the way to
another host is found by the guest itself within one sweep.

Arguments: broadcast address, port, marker (16 hex digits), pages, pages per beat.
"""

import socket
import struct
import sys
import time

BEAT_S = 0.005
DATAGRAM = struct.Struct("<8sQQQ")


def say_on(address: str, port: int, marker: bytes, pages: int, pages_per_beat: int) -> None:
    working_set = WorkingSet(marker, pages)  # type: ignore[name-defined]  # noqa: F821
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
        speaker.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        number = 0
        due_s = time.monotonic()
        while True:
            working_set.rewrite(pages_per_beat)
            due_s = max(due_s + BEAT_S, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))
            number += 1
            datagram = DATAGRAM.pack(marker, number, working_set.generation, len(working_set.bad))
            speaker.sendto(datagram, (address, port))


say_on(sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
