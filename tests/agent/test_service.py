"""The agent's calls, over the link, with real processes."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import struct

import pytest

from sandshift.agent.output import STREAM_BYTES_MAX, STREAM_BYTES_MIN
from sandshift.agent.streams import READ_BYTES
from sandshift.errors import AlreadyThere, IllegalMove, NotFound, Rejected
from sandshift.guest.client import Guest
from sandshift.sandbox.model import NetworkCard
from tests.agent.house import House, Sink, agent_house


@pytest.fixture
async def house(tmp_path):
    async with agent_house(tmp_path) as made:
        yield made


@pytest.fixture
async def guest(house: House):
    async with house.guest() as connected:
        yield connected


async def output_of(guest: Guest, process_id: str, stream: int = 1) -> bytes:
    sink = Sink()
    await guest.follow_output(process_id, stream, sink.delivered, sink.take)
    return bytes(sink.data)


async def test_a_process_runs_and_its_output_and_exit_are_told(guest):
    pid = await guest.start_process("p", ["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert pid > 0
    assert await output_of(guest, "p", 1) == b"out\n"
    assert await output_of(guest, "p", 2) == b"err\n"
    ended = await guest.wait_process("p")
    assert ended.code == 3
    assert ended.exited_at_ns > 0
    assert await guest.wait_process("p") == ended


async def test_environment_and_folder_are_those_asked_for(guest, tmp_path):
    await guest.start_process(
        "p", ["sh", "-c", "echo $WORD; pwd; echo $PATH"], env={"WORD": "x y"}, cwd=str(tmp_path)
    )
    lines = (await output_of(guest, "p")).decode().splitlines()
    assert lines[:2] == ["x y", str(tmp_path)]
    assert "/usr/bin" in lines[2]


async def test_starting_twice_is_starting_once_and_another_process_of_that_id_is_refused(guest):
    first = await guest.start_process("p", ["sleep", "60"])
    assert await guest.start_process("p", ["sleep", "60"]) == first
    with pytest.raises(AlreadyThere, match="process p is another one"):
        await guest.start_process("p", ["sleep", "61"])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            ["/no/such/program"],
            NotFound,
            "process p cannot be started: /no/such/program: No such file or directory",
        ),
        (["/etc"], Rejected, "process p cannot be started: /etc: Permission denied"),
        ([], Rejected, "a process needs an id and a program"),
    ],
)
async def test_what_cannot_be_started_is_refused_and_leaves_nothing(guest, args, error, message):
    with pytest.raises(error, match=message):
        await guest.start_process("p", args)
    assert await guest.list_processes() == []


async def test_an_unknown_process_is_named(guest):
    with pytest.raises(NotFound, match="process q is not known"):
        await guest.wait_process("q")
    with pytest.raises(NotFound, match="process q is not known"):
        await guest.signal_process("q", signal.SIGTERM)
    await guest.forget_process("q")


async def test_signals_reach_the_process_or_its_whole_group(guest):
    await guest.start_process("one", ["sleep", "60"])
    await guest.signal_process("one", signal.SIGTERM)
    assert (await guest.wait_process("one")).code == 128 + signal.SIGTERM
    await guest.signal_process("one", signal.SIGTERM)
    await guest.start_process("group", ["sh", "-c", "sleep 60 & sleep 60 & echo up; wait"])
    await guest.signal_process("group", signal.SIGKILL, whole_group=True)
    assert (await guest.wait_process("group")).code == 128 + signal.SIGKILL
    await output_of(guest, "group")
    await guest.start_process("other", ["sleep", "60"])
    with pytest.raises(Rejected, match="there is no signal 99"):
        await guest.signal_process("other", 99)


async def test_a_running_process_is_not_forgotten_and_an_ended_one_is(guest):
    await guest.start_process("p", ["sh", "-c", "read line"], stdin=True)
    with pytest.raises(IllegalMove, match="process p is still running"):
        await guest.forget_process("p")
    await guest.write_input("p", 0, b"", eof=True)
    await guest.wait_process("p")
    await guest.forget_process("p")
    await guest.forget_process("p")
    assert await guest.list_processes() == []


async def test_stdin_arrives_once_whatever_is_repeated(guest):
    await guest.start_process("cat", ["cat"], stdin=True)
    assert await guest.write_input("cat", 0, b"hello ") == 6
    assert await guest.write_input("cat", 0, b"hello ") == 6
    assert await guest.write_input("cat", 3, b"lo world") == 11
    with pytest.raises(Rejected, match="stdin is taken up to 11, not to 20"):
        await guest.write_input("cat", 20, b"gap")
    assert await guest.write_input("cat", 11, b"", eof=True) == 11
    assert await output_of(guest, "cat") == b"hello world"


async def test_megabytes_of_stdin_wait_for_the_reader(guest):
    data = bytes(range(256)) * 8192
    await guest.start_process("sum", ["sh", "-c", "sleep 0.2; sha256sum"], stdin=True)
    assert await guest.write_input("sum", 0, data, eof=True) == len(data)
    assert (await output_of(guest, "sum")).decode().split()[0] == hashlib.sha256(data).hexdigest()


async def test_stdin_of_a_process_that_reads_none_goes_nowhere(guest):
    await guest.start_process("true", ["true"], stdin=True)
    await guest.wait_process("true")
    assert await guest.write_input("true", 0, bytes(1 << 20)) == 1 << 20
    await guest.start_process("no stdin", ["cat"])
    assert await output_of(guest, "no stdin") == b""
    with pytest.raises(IllegalMove, match="was started without stdin"):
        await guest.write_input("no stdin", 0, b"x")


async def test_a_terminal_is_one(guest):
    await guest.start_process(
        "tty", ["sh", "-c", "test -t 0 && test -t 1 && tty; read x; echo got $x"], terminal=True
    )
    await guest.write_input("tty", 0, b"word\n")
    text = (await output_of(guest, "tty")).decode()
    assert "/dev/pts/" in text
    assert "got word" in text
    assert (await guest.wait_process("tty")).code == 0


async def test_output_that_nobody_takes_stops_the_writer_at_the_bound(house, guest):
    await guest.start_process("yes", ["yes"])
    buffer = house.table.output("yes", 1).buffer
    while not buffer.is_full:
        await asyncio.sleep(0.01)
    held = buffer.end
    await asyncio.sleep(0.05)
    assert buffer.end == held <= STREAM_BYTES_MAX + (256 << 10)
    sink = Sink()
    following = asyncio.create_task(guest.follow_output("yes", 1, sink.delivered, sink.take))
    while len(sink.data) < 3 * STREAM_BYTES_MAX:
        await asyncio.sleep(0.01)
    following.cancel()
    assert bytes(sink.data) == b"y\n" * (len(sink.data) // 2)


async def test_acknowledged_output_is_gone_and_reading_it_is_refused(house, guest):
    await guest.start_process("p", ["echo", "0123456789"])
    assert await output_of(guest, "p") == b"0123456789\n"
    assert house.table.output("p", 1).buffer.acknowledged == 11
    sink = Sink()
    with pytest.raises(Rejected, match="process p stream 1: offset 0 is not in 11 to 11"):
        await guest.follow_output("p", 1, sink.delivered, sink.take)
    with pytest.raises(Rejected, match="process p has no stream 7"):
        await guest.follow_output("p", 7, sink.delivered, sink.take)


async def test_the_list_tells_how_far_each_process_has_written(guest):
    await guest.start_process("a", ["sh", "-c", "printf 12345; printf 123 >&2; exit 7"])
    await guest.wait_process("a")
    await output_of(guest, "a", 1)
    await output_of(guest, "a", 2)
    (told,) = await guest.list_processes()
    assert (told.process_id, told.exited, told.exit_code) == ("a", True, 7)
    assert (told.stdout_offset, told.stderr_offset) == (5, 3)
    assert told.args == ("sh", "-c", "printf 12345; printf 123 >&2; exit 7")


async def test_the_boot_id_is_not_looked_at_before_the_guest_is_itself(house, guest):
    told = await guest.info()
    assert (told.boot_id, told.personalized, house.system.id_reads) == ("", False, 0)
    await guest.personalize(entropy=bytes(32), machine_id="a" * 32, hostname="box")
    told = await guest.info()
    assert told.boot_id == "0f0e0d0c-0000-4000-8000-000000000001"
    assert told.personalized


async def test_a_guest_is_made_itself_randomness_first(house, guest):
    cards = [NetworkCard("net0", "52:54:00:00:00:01", ("10.9.0.50/24",), "10.9.0.1", 1400)]
    await guest.personalize(
        entropy=b"e" * 64,
        machine_id="c" * 32,
        hostname="box-7",
        cards=cards,
        nameservers=["9.9.9.9"],
        clock_ns=lambda: 5_000_000_000,
    )
    assert [what for what, _ in house.system.done] == [
        "entropy",
        "clock",
        "machine id",
        "hostname",
        "nameservers",
        "network",
    ]
    done = dict(house.system.done)
    assert done["entropy"] == b"e" * 64
    assert done["clock"] == 5_000_000_000
    assert done["nameservers"] == ["9.9.9.9"]
    kinds = [struct.unpack_from("=IH", message)[1] for message in done["network"]]
    assert kinds == [16, 16, 20, 24]


async def test_a_wrong_wish_changes_nothing(house, guest):
    for wish, message in (
        ({"entropy": b"short"}, "5 bytes of entropy are given, 32 are needed"),
        (
            {"cards": [NetworkCard("a"), NetworkCard("b"), NetworkCard("c")]},
            "network card 2: the machine has 2",
        ),
        ({"cards": [NetworkCard("a", addresses=("10.0.0.1",))]}, "no address with a prefix length"),
        ({"cards": [NetworkCard("a", mac="nonsense")]}, "no network card's address"),
        ({"cards": [NetworkCard("a", gateway="somewhere")]}, "'somewhere' is no IP address"),
    ):
        full = {"entropy": bytes(32), "machine_id": "a", "hostname": "b"} | wish
        with pytest.raises(Rejected, match=message):
            await guest.personalize(**full)
    assert house.system.done == []
    house.system.refuse = "no such device"
    with pytest.raises(IllegalMove, match="the guest cannot be made itself: no such device"):
        await guest.personalize(entropy=bytes(32), machine_id="a", hostname="b")
    assert not (await guest.info()).personalized


async def test_the_clock_is_stepped_and_the_error_told(house, guest):
    house.system.now_ns = 10_000_000_000
    assert await guest.set_clock(lambda: 12_500_000_000) == -2_500_000_000
    assert await guest.set_clock(lambda: 12_500_000_000) == 0
    with pytest.raises(Rejected, match="0 ns is no time"):
        await guest.set_clock(lambda: 0)


async def test_power_off_answers_first(house, guest):
    await guest.power_off()
    while not house.system.done:
        await asyncio.sleep(0.01)
    assert house.system.done == [("power off", None)]


async def test_a_stream_that_others_left_no_room_goes_on_when_theirs_is_taken(house, guest):
    house.table.room.bytes_max = 400 << 10
    await guest.start_process("greedy", ["head", "-c", "1000000", "/dev/zero"])
    greedy = house.table.output("greedy", 1).buffer
    async with asyncio.timeout(20):
        while not greedy.is_full:
            await asyncio.sleep(0.005)
    await guest.start_process("small", ["head", "-c", "1000000", "/dev/zero"])
    small = house.table.output("small", 1).buffer
    async with asyncio.timeout(20):
        while not small.is_full:
            await asyncio.sleep(0.005)
    # Its share and one read at most, however its reads came: less than the bound, so that there is room once theirs is taken.
    stopped_at = small.end
    assert stopped_at < STREAM_BYTES_MIN + READ_BYTES
    assert len(await output_of(guest, "greedy")) == 1_000_000
    async with asyncio.timeout(20):
        while small.end == stopped_at:
            await asyncio.sleep(0.005)
    assert len(await output_of(guest, "small")) == 1_000_000
    assert house.table.room.used_bytes == 0
    assert not house.table.room.waiting
