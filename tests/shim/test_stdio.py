"""Where output goes and input comes from: byte by byte, through fifos that are full, left alone, or closed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandshift.errors import NotSupported, Rejected, Unavailable
from sandshift.shim.tasks.offsets import INPUT_ASK, INPUT_CLOSED, STDIN, Offsets
from sandshift.shim.tasks.stdin import InputPump, tee
from sandshift.shim.tasks.stdio import Discard, FifoSink, FileSink, check_stdio, fifo_path, open_sink

STDOUT = 1


@pytest.fixture
def offsets(tmp_path: Path) -> Offsets:
    return Offsets(tmp_path / "offsets", "c1:")


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture
async def sink(fifo: Path, offsets: Offsets) -> AsyncIterator[FifoSink]:
    made = open_sink(str(fifo), offsets, STDOUT)
    assert isinstance(made, FifoSink)
    yield made
    made.close()


def test_offsets_are_there_for_the_next_shim_whatever_becomes_of_this_one(tmp_path: Path):
    if (child := os.fork()) == 0:
        mine = Offsets(tmp_path, "c1:")
        mine[STDOUT] = 1 << 40
        mine.set_flag(INPUT_CLOSED)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    theirs = Offsets(tmp_path, "c1:")
    assert theirs[STDOUT] == 1 << 40
    assert theirs.has(INPUT_CLOSED)
    assert not theirs.has(INPUT_ASK)
    theirs.set_flag(INPUT_CLOSED, on=False)
    assert not theirs.has(INPUT_CLOSED)
    theirs.close()
    theirs.close()
    again = Offsets(tmp_path, "c1:")
    again.remove()
    assert list(tmp_path.iterdir()) == []


async def test_output_waits_in_the_fifo_without_a_reader(sink: FifoSink, fifo: Path):
    assert sink.take(0, b"one\n") == 4
    assert sink.take(4, b"two\n") == 8
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 100) == b"one\ntwo\n"
    os.close(reader)
    assert sink.take(8, b"three\n") == 14, "a reader that went away is no broken pipe"
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 100) == b"three\n"
    os.close(reader)


async def test_what_was_delivered_is_skipped_and_a_gap_is_refused(sink: FifoSink, fifo: Path):
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink.take(0, b"abc")
    assert sink.take(1, b"bcd") == 4
    assert sink.take(9, b"later") == 4
    assert os.read(reader, 100) == b"abcd"
    os.close(reader)


async def test_whether_anybody_reads_is_seen_and_nothing_is_lost_by_looking(sink: FifoSink, fifo: Path):
    sink.take(0, b"kept")
    assert not sink.has_reader()
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert sink.has_reader()
    assert os.read(reader, 100) == b"kept"
    os.close(reader)
    assert not sink.has_reader()
    assert sink.take(4, b"still written") == 17
    fifo.unlink()
    assert not sink.has_reader()


async def test_a_full_fifo_takes_part_and_says_when_there_is_room(sink: FifoSink, fifo: Path):
    data = bytes(range(256)) * 8192
    taken = sink.take(0, data)
    assert 0 < taken < len(data)
    waiting = asyncio.create_task(sink.room())
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    got = os.read(reader, taken)
    await asyncio.wait_for(waiting, 5)
    while taken < len(data):
        taken = sink.take(taken, data[taken:])
        got += os.read(reader, 1 << 20)
    assert got == data
    os.close(reader)


async def test_a_frozen_sink_takes_nothing_until_it_is_thawed(sink: FifoSink):
    sink.take(0, b"abc")
    assert sink.freeze() == 3
    assert sink.take(3, b"def") == 3
    waiting = asyncio.create_task(sink.room())
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    sink.thaw()
    await asyncio.wait_for(waiting, 5)
    assert sink.take(3, b"def") == 6


async def test_the_end_comes_to_the_reader_when_it_has_everything(sink: FifoSink, fifo: Path):
    sink.take(0, b"last words")
    draining = asyncio.create_task(sink.drained())
    done, _ = await asyncio.wait([draining], timeout=0.1)
    assert not done, "nobody has read it"
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 100) == b"last words"
    await asyncio.wait_for(draining, 5)
    sink.close()
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_a_file_is_written_at_its_end(tmp_path: Path, offsets: Offsets):
    path = tmp_path / "logs" / "out put.log"
    sink = open_sink(f"file://{tmp_path}/logs/out%20put.log", offsets, STDOUT)
    assert isinstance(sink, FileSink)
    sink.take(0, b"one\n")
    sink.close()
    again = open_sink(f"file://{path}", offsets, STDOUT)
    assert again.delivered == 4
    again.take(0, b"one\ntwo\n")
    again.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_fifo_that_is_named_as_a_file_holds_nobody_up(tmp_path: Path, offsets: Offsets):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(Unavailable, match=f"output file {path} cannot be opened: No such device or address"):
        open_sink(f"file://{path}", offsets, STDOUT)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = open_sink(f"file://{path}", offsets, STDOUT)
    size = 4 << 20
    taken = sink.take(0, bytes(size))
    assert 0 < taken < size
    assert sink.take(0, bytes(size)) == taken
    sink.close()
    os.close(reader)


def test_no_name_is_nowhere(offsets: Offsets):
    sink = open_sink("", offsets, STDOUT)
    assert isinstance(sink, Discard)
    assert sink.take(0, bytes(1000)) == 1000


@pytest.mark.parametrize("value", ["binary:///bin/log?x=y", "streaming+unix:///run/x"])
def test_what_this_shim_does_not_write_to_is_named(value: str):
    with pytest.raises(NotSupported, match="writes to fifos and file:// paths, not to"):
        check_stdio("stdout", value)


def test_paths_that_are_no_fifo_are_refused(tmp_path: Path, offsets: Offsets):
    (tmp_path / "file").touch()
    with pytest.raises(Rejected, match="is not a fifo; write files as file://"):
        open_sink(str(tmp_path / "file"), offsets, STDOUT)
    with pytest.raises(Unavailable, match="No such file"):
        open_sink(str(tmp_path / "nothing"), offsets, STDOUT)
    with pytest.raises(NotSupported, match="stdin is read from a fifo"):
        fifo_path("file:///x")


def test_tee_leaves_what_it_copies():
    source, source_in = os.pipe()
    target, target_in = os.pipe()
    os.write(source_in, b"hello")
    assert tee(source, target_in, 100) == 5
    assert os.read(target, 100) == os.read(source, 100) == b"hello"
    with pytest.raises(BlockingIOError):
        tee(source, target_in, 100)
    os.close(source_in)
    assert tee(source, target_in, 100) == 0
    for descriptor in (source, target, target_in):
        os.close(descriptor)


class Stdin:
    """The guest's end of stdin: takes up to `room` bytes, by offset."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = asyncio.Event()
        self.came = asyncio.Event()
        self.blocked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.loses_answers = False

    async def write_input(self, process_id: str, offset: int, data: bytes, *, eof: bool = False) -> int:
        if data:
            self.blocked.set()
            await self.open.wait()
        assert offset <= len(self.data)
        self.data += data[len(self.data) - offset :]
        self.came.set()
        if eof:
            self.ended.set()
        if self.loses_answers and data:
            await asyncio.Event().wait()
        return len(self.data)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.data) < count:
                self.came.clear()
                await self.came.wait()


async def test_input_goes_in_as_it_comes_and_ends_only_after_close_io(fifo: Path, offsets: Offsets):
    pump, guest = InputPump(fifo, offsets, "c1:"), Stdin()
    pump.follow(guest)
    for word in (b"one ", b"two "):
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, word)
        os.close(writer)
    await guest.until(8)
    assert not guest.ended.is_set(), "a caller who goes away is no end of input"
    writer = os.open(fifo, os.O_WRONLY)
    pump.close_input()
    os.write(writer, b"three")
    os.close(writer)
    async with asyncio.timeout(5):
        await guest.ended.wait()
    assert bytes(guest.data) == b"one two three"
    await pump.let_go()
    pump.close()


async def test_a_guest_that_takes_nothing_holds_up_the_writer(fifo: Path, offsets: Offsets):
    pump, guest = InputPump(fifo, offsets, "c1:"), Stdin()
    guest.open.clear()
    pump.follow(guest)
    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    written = os.write(writer, bytes(1 << 20))
    await asyncio.wait_for(guest.blocked.wait(), 5)
    with pytest.raises(BlockingIOError):
        os.write(writer, b"more")
    guest.open.set()
    await guest.until(written)
    assert os.write(writer, b"more") == 4
    await guest.until(written + 4)
    os.close(writer)
    await pump.let_go()
    pump.close()


async def test_input_whose_answer_was_lost_is_sent_once(fifo: Path, offsets: Offsets):
    guest = Stdin()
    pump = InputPump(fifo, offsets, "c1:")
    writer = os.open(fifo, os.O_WRONLY)
    os.write(writer, b"abc")
    guest.loses_answers = True
    pump.follow(guest)
    await guest.until(3)
    await pump.let_go()
    assert offsets[STDIN] == 0, "the shim never heard that it arrived"
    pump.close()
    guest.loses_answers = False
    again = InputPump(fifo, offsets, "c1:")
    os.write(writer, b"def")
    again.follow(guest)
    await guest.until(6)
    assert bytes(guest.data) == b"abcdef"
    os.close(writer)
    await again.let_go()
    assert offsets[STDIN] == 6
    again.close()


class Stumbling(Stdin):
    """Takes part of what comes, and its answer is an error, once."""

    stumbles = True

    async def write_input(self, process_id: str, offset: int, data: bytes, *, eof: bool = False) -> int:
        if data and self.stumbles:
            self.stumbles = False
            await super().write_input(process_id, offset, data[:1])
            raise Unavailable("the link begins anew")
        return await super().write_input(process_id, offset, data, eof=eof)


async def test_input_goes_on_after_an_error_of_the_agent_s_and_nothing_comes_twice(
    fifo: Path, offsets: Offsets
):
    pump, guest = InputPump(fifo, offsets, "c1:"), Stumbling()
    writer = os.open(fifo, os.O_WRONLY)
    os.write(writer, b"abc")
    pump.follow(guest)
    await guest.until(3)
    pump.close_input()
    os.close(writer)
    async with asyncio.timeout(5):
        await guest.ended.wait()
    assert bytes(guest.data) == b"abc"
    assert not guest.stumbles
    await pump.let_go()
    pump.close()


def test_stdin_that_is_no_fifo_is_refused(tmp_path: Path, offsets: Offsets):
    file = tmp_path / "input"
    file.write_bytes(b"word")
    with pytest.raises(Rejected, match=r"stdin path .*/input is not a fifo: make it with mkfifo"):
        InputPump(file, offsets, "c1:")


async def test_at_the_destination_input_goes_on_where_the_guest_is(fifo: Path, offsets: Offsets):
    guest = Stdin()
    guest.data += b"said on the source "
    offsets.set_flag(INPUT_ASK)
    writer = os.open(fifo, os.O_RDWR)
    os.write(writer, b"and here")
    pump = InputPump(fifo, offsets, "c1:")
    pump.follow(guest)
    await guest.until(27)
    assert bytes(guest.data) == b"said on the source and here"
    assert not offsets.has(INPUT_ASK)
    os.close(writer)
    await pump.let_go()
    pump.close()
