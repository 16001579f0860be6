"""Output by offset: no byte is lost and none comes twice, across freezing, thawing and another shim."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sandshift.errors import NotFound, Unavailable
from sandshift.shim import output as output_room
from sandshift.shim.output import DROP_BYTES, KEPT_BYTES_MAX, OutputFile, files_in
from sandshift.shim.processes import Exit, Processes


async def all_of(output: OutputFile) -> bytes:
    return b"".join([data async for _offset, data in output.read(follow=False)])


async def test_what_is_there_already_is_skipped_and_a_gap_is_refused(tmp_path: Path) -> None:
    output = OutputFile(tmp_path, "job", 1, 10)
    assert output.take(10, b"abc") == 13
    assert output.take(11, b"bcd") == 14
    assert output.take(20, b"far") == 14
    assert await all_of(output) == b"abcd"
    output.close()


async def test_after_a_freeze_nothing_is_taken_until_it_thaws(tmp_path: Path) -> None:
    output = OutputFile(tmp_path, "job", 1, 0)
    output.take(0, b"before ")
    assert output.freeze() == 7
    assert output.take(7, b"meanwhile") == 7
    output.thaw()
    assert output.take(7, b"after") == 12
    assert await all_of(output) == b"before after"
    output.close()


async def test_another_shim_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    first = OutputFile(tmp_path, "a.b", 2, 5)
    first.take(5, b"said")
    first.close()
    assert files_in(tmp_path) == [("a.b", 2, 5)]
    second = OutputFile(tmp_path, "a.b", 2, 5)
    assert second.delivered == 9
    second.close()


async def test_a_follower_gets_what_comes_later_and_ends_with_the_stream(tmp_path: Path) -> None:
    output = OutputFile(tmp_path, "job", 1, 0)
    got: list[bytes] = []

    async def follow() -> None:
        async for _offset, data in output.read(follow=True):
            got.append(data)

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    output.take(0, b"late")
    output.end()
    await asyncio.wait_for(following, 5)
    assert got == [b"late"]


async def test_both_streams_come_and_the_end_of_the_sandbox_ends_them(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    process = processes.adopt("job", 7, ["/bin/job"], {})
    process.outputs[1].take(0, b"out")
    process.outputs[2].take(0, b"err")
    await processes.end_all(Exit(255, 1))
    said = [item async for item in processes.logs("job", 0, follow=True)]
    assert sorted(said) == [(1, 0, b"out"), (2, 0, b"err")]
    assert process.exit.result() == Exit(255, 1)
    processes.forget_output()
    assert files_in(tmp_path) == []


async def test_an_unknown_process_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    processes.adopt("job", 7, [], {})
    with pytest.raises(NotFound, match=r"'jib'.*it has: job"):
        processes.get("jib")


MIB = 1 << 20


def told(output: OutputFile, mebibytes: range) -> None:
    """Each MiB is of one byte, its number."""
    for number in mebibytes:
        output.take(output.base + number * MIB, bytes([number]) * MIB)


async def test_of_a_stream_without_end_the_last_bytes_are_kept_and_the_disk_gets_the_others_back(
    tmp_path: Path,
) -> None:
    output = OutputFile(tmp_path, "job", 1, 1000)
    told(output, range(100))
    assert output.delivered == 1000 + 100 * MIB
    assert output.first == 1000 + 2 * DROP_BYTES
    assert output.path.stat().st_blocks * 512 <= KEPT_BYTES_MAX + DROP_BYTES
    pieces = [piece async for piece in output.read(follow=False)]
    assert pieces[0][0] == output.first
    assert b"".join(data for _, data in pieces) == b"".join(bytes([n]) * MIB for n in range(32, 100))
    output.close()


async def test_another_shim_goes_on_where_a_file_ends_whose_beginning_was_dropped(tmp_path: Path) -> None:
    first = OutputFile(tmp_path, "job", 1, 7)
    told(first, range(100))
    first.close()
    second = OutputFile(tmp_path, "job", 1, 7)
    assert (second.first, second.delivered) == (7 + 2 * DROP_BYTES, 7 + 100 * MIB)
    second.close()


async def test_a_reader_that_is_overtaken_goes_on_with_what_is_kept(tmp_path: Path) -> None:
    output = OutputFile(tmp_path, "job", 1, 0)
    told(output, range(1))
    reading = output.read(follow=True)
    assert (await anext(reading))[0] == 0
    told(output, range(1, 100))
    offset, data = await anext(reading)
    assert (offset, data[0]) == (output.first, output.first // MIB)
    await reading.aclose()  # type: ignore[attr-defined]
    output.close()


async def test_where_nothing_can_be_dropped_the_process_waits_and_what_was_delivered_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int, _length_bytes: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(output_room, "_make_hole", refuse)
    output = OutputFile(tmp_path, "job", 1, 0)
    told(output, range(80))
    with pytest.raises(
        Unavailable, match="holds 83886080 bytes, and the oldest cannot be dropped: Operation not supported"
    ):
        output.take(80 * MIB, b"more")
    assert (output.first, output.delivered) == (0, 80 * MIB)
    output.close()
