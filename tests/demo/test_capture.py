"""The capture: the pattern is found when it is there, on a real bridge, and not when it is not."""

from __future__ import annotations

import asyncio
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift import net
from sandshift.cli.demo.capture import capturing, count_pattern_blocks
from sandshift.cli.demo.lab import open_lab
from sandshift.cli.demo.workload import pattern_page
from sandshift.errors import Unavailable
from tests.needs import needs_root

MARKER = b"\x01demo\xff\x00\x7f"


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 4031))
def test_a_piece_of_a_page_is_found_wherever_it_is_cut(before, number, generation, start):
    piece = pattern_page(MARKER, number, generation)[start : start + 79]
    expected = 1 if len(piece) == 79 else 0
    assert count_pattern_blocks(before.replace(MARKER, b"") + piece, MARKER) >= expected


def test_a_marker_alone_is_no_block():
    record = pattern_page(MARKER, 3, 4)[:16]
    assert count_pattern_blocks(record + bytes(64) + record * 3 + bytes(64), MARKER) == 0
    assert count_pattern_blocks(record + bytes(64) + record * 4, MARKER) == 1


def test_what_lies_behind_the_end_of_a_frame_is_not_looked_at():
    """The buffer still holds what the frame before left in it."""
    page = bytearray(pattern_page(MARKER, 3, 4))
    assert count_pattern_blocks(page, MARKER, 63) == 0
    assert count_pattern_blocks(page, MARKER, 64) == 1


def test_pages_are_counted_once_each():
    data = b"".join(pattern_page(MARKER, number, 1) for number in range(10))
    assert count_pattern_blocks(data, MARKER) == 10


async def send_across(lab, payload: bytes) -> None:
    """`payload` from host A to host B over TCP."""
    with net.listen_tcp(lab.host_b.namespace, lab.host_b.address) as listener:
        sender, receiver = await asyncio.gather(
            net.connect_tcp(lab.host_a.namespace, lab.host_b.address, listener.getsockname()[1], timeout_s=5),
            net.accept_tcp(listener, timeout_s=5),
        )
    loop = asyncio.get_running_loop()

    async def drain() -> None:
        left = len(payload)
        while left:
            left -= len(await loop.sock_recv(receiver, 1 << 20))

    with sender, receiver:
        await asyncio.gather(loop.sock_sendall(sender, payload), drain())


@needs_root
async def test_pages_that_cross_the_bridge_in_the_clear_are_found_and_scrambled_ones_are_not(tmp_path):
    pages = b"".join(pattern_page(MARKER, number, 5) for number in range(2048))
    async with open_lab(labs_folder=tmp_path / "labs") as lab:
        with capturing(lab.switch_namespace, lab.bridge, MARKER) as capture:
            await send_across(lab, os.urandom(len(pages)))
            scrambled = capture.stop()
        with capturing(lab.switch_namespace, lab.bridge, MARKER) as capture:
            await send_across(lab, pages)
            clear = capture.stop()
    assert (scrambled.pattern_blocks, scrambled.drops) == (0, 0)
    assert scrambled.bytes >= len(pages)
    assert clear.drops == 0
    assert clear.pattern_blocks == pytest.approx(2048, rel=0.2)


@needs_root
async def test_it_ends_at_once_though_packets_keep_coming(tmp_path):
    async with open_lab(labs_folder=tmp_path / "labs") as lab:
        loop = asyncio.get_running_loop()
        with (
            net.listen_tcp(lab.host_b.namespace, lab.host_b.address) as listener,
            capturing(lab.switch_namespace, lab.bridge, MARKER) as capture,
        ):
            port = listener.getsockname()[1]
            sender, receiver = await asyncio.gather(
                net.connect_tcp(lab.host_a.namespace, lab.host_b.address, port, timeout_s=5),
                net.accept_tcp(listener, timeout_s=5),
            )

            async def chatter() -> None:
                while True:
                    await loop.sock_sendall(sender, b"x")
                    await loop.sock_recv(receiver, 1)
                    await asyncio.sleep(0.001)

            talking = asyncio.create_task(chatter())
            async with asyncio.timeout(20):
                seen = await asyncio.to_thread(capture.stop)
            talking.cancel()
            await asyncio.wait([talking])
            sender.close()
            receiver.close()
    assert seen.packets > 0


@needs_root
def test_a_missing_interface_is_named():
    with pytest.raises(Unavailable, match="cannot capture on nobridge"), capturing("", "nobridge", MARKER):
        pass


@needs_root
async def test_what_the_kernel_could_not_keep_is_counted(tmp_path, monkeypatch):
    """With next to no buffer and a reader that is held up, packets drop, and the capture says so."""
    monkeypatch.setattr("sandshift.cli.demo.capture.RECEIVE_BUFFER_BYTES", 4096)
    async with open_lab(labs_folder=tmp_path / "labs") as lab:
        with capturing(lab.switch_namespace, lab.bridge, MARKER) as capture:
            subprocess.run(["ip", "netns", "exec", lab.host_a.namespace, "true"], check=True)
            await send_across(lab, os.urandom(16 << 20))
            assert capture.stop().drops > 0
