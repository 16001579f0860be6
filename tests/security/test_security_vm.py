"""Real QEMUs: the key, what is readable, and peers on the channel that have no key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import ttrpc
from sandshift.fleet.channel import make_channel
from sandshift.fleet.host import Host, shim_program
from sandshift.fleet.shim_client import Shim
from sandshift.session import saved
from sandshift.session.ids import SessionId
from sandshift.session.statement import Cell
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from tests.lab import Lab, open_lab
from tests.needs import needs_root
from tests.security.test_session_key import shows
from tests.security.test_strangers import modes
from tests.system.pair import NAMESPACE, RESUME, SANDBOX, SESSION, STOP, Pair, code_of, pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240), needs_root]
UNAVAILABLE = ttrpc.Code.UNAVAILABLE
NOISE = random.Random(8).randbytes(256 << 10)


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    overrides = {"migration.limits": {"stall_s": 6.0}}
    async with open_lab(overrides=overrides) as made:
        yield made


async def start_with_all_its_logs(host: Host) -> None:
    arguments = ("-namespace", NAMESPACE, "-id", SANDBOX, "-debug", "start")
    process = await asyncio.create_subprocess_exec(
        shim_program(),
        *arguments,
        cwd="/",
        env=host.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0


def places_of(host: Host) -> tuple[Path, Path]:
    return Path(host.config.places.run_dir), Path(host.config.places.state_dir)


def names_with(key: bytes, *hosts: Host) -> set[str]:
    """Of files that hold the key, in any of its shapes."""
    found = set()
    for folder in (place for host in hosts for place in places_of(host)):
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and shows(path.read_bytes(), key):
                    found.add(path.name)
    return found


def told_by_the_kernel(pid: int) -> bytes:
    """What everybody with /proc may read of a process, its environment too."""
    return b"".join((Path("/proc") / str(pid) / name).read_bytes() for name in ("cmdline", "environ", "comm"))


def core_limit(pid: int) -> str:
    lines = (Path("/proc") / str(pid) / "limits").read_text().splitlines()
    return next(line.split()[4] for line in lines if line.startswith("Max core file size"))


async def pids_of(shim: Shim) -> tuple[int, int]:
    status = await shim.status()
    return status.shim_pid, status.qemu_pid


async def test_the_key_of_a_real_move_is_where_it_is_needed_and_only_as_long(lab: Lab) -> None:
    for host in (lab.host_a, lab.host_b):
        await start_with_all_its_logs(Host.load(host.config_path))
    async with pair(lab, dirty_mib=20) as hosts:
        config = await hosts.export()
        key = saved.decode(config, expected=SessionId(SESSION)).session_key
        await hosts.import_config(config)
        await hosts.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=SESSION), timeout_s=30)
        await hosts.connect()
        await it_waits_with_its_key(hosts, key)
        await hosts.complete(hosts.transfers())
        assert names_with(key, hosts.a, hosts.b) == {"session.key", "session.config"}
        for shim in (hosts.s, hosts.d):
            for pid in await pids_of(shim):
                assert not shows(told_by_the_kernel(pid), key)
                assert core_limit(pid) == "0"
        for place in (*places_of(hosts.a), *places_of(hosts.b)):
            assert modes(place) == {}
        await hosts.finish()
        assert await hosts.runners() == ["destination"]
        assert names_with(key, hosts.a, hosts.b) == set()
        logs = [next(places_of(host)[0].rglob("shim.log")).read_bytes() for host in (hosts.a, hosts.b)]
        assert all(b" DEBUG " in log and not shows(log, key) for log in logs)


async def it_waits_with_its_key(hosts: Pair, key: bytes) -> None:
    """A receiving QEMU reads its key at the handshake: until then it lies in a closed folder beside it."""
    folder = hosts.b.config.sandbox_run_dir(NAMESPACE, SANDBOX) / "vm" / "keys"
    async with asyncio.timeout(10):
        while not (folder / "keys.psk").exists():
            await asyncio.sleep(0.02)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "keys.psk").stat().st_mode) == 0o600
    assert shows((folder / "keys.psk").read_bytes(), key)
    assert names_with(key, hosts.a) == {"session.key", "session.config"}


async def to_a_stranger(shim: Shim) -> socket.socket:
    """The shim gets one end of a connection; the other is ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        given, _ = server.accept()
    with given:
        described = Pair.give_socket
        await described(None, shim, given)  # type: ignore[arg-type]
    ours.setblocking(False)
    return ours


async def end_of_transfer(shim: Shim) -> ttrpc.Code:
    request = m.TransferSandboxRequest(session_id=SESSION)
    async with asyncio.timeout(60):
        async with contextlib.aclosing(shim.notifications(SESSION)) as told:
            moving = asyncio.create_task(shim.migration.transfer_sandbox(request, timeout_s=60))
            async for response in told:
                if response.notification.phase in (o.PHASE_FAILED, o.PHASE_DONE):
                    failed = ttrpc.Code(response.notification.failure.code)
                    break
        await asyncio.gather(moving, return_exceptions=True)
        return failed


async def undone(hosts: Pair) -> None:
    """The source runs on, and everything can begin anew."""
    assert await hosts.runners() == ["source"]
    await hosts.finalize(hosts.s, RESUME)
    await hosts.finalize(hosts.d, STOP)
    for shim in (hosts.s, hosts.d):
        await hosts.clean_up(shim)


async def test_qemus_that_meet_strangers_go_back_to_where_they_were(lab: Lab) -> None:
    """Noise to either, and a peer that takes the connection and says nothing: the guest runs on at its source, and then moves."""
    async with pair(lab, dirty_mib=20) as hosts:
        boot_id = await hosts.boot_id(hosts.s)
        for side in ("destination", "source"):
            await hosts.prepare()
            shim = hosts.s if side == "source" else hosts.d
            ours = await to_a_stranger(shim)
            with ours:
                await asyncio.get_running_loop().sock_sendall(ours, NOISE[: 64 << 10])
                assert await end_of_transfer(shim) is UNAVAILABLE
            await undone(hosts)
        await hosts.prepare()
        with await to_a_stranger(hosts.s):
            assert await end_of_transfer(hosts.s) is ttrpc.Code.DEADLINE_EXCEEDED
        await undone(hosts)
        await hosts.ready()
        await hosts.finish()
        assert await hosts.runners() == ["destination"]
        assert await hosts.boot_id(hosts.d) == boot_id


@pytest.mark.full
async def test_a_network_that_changes_one_byte_is_found_by_the_encryption(lab: Lab) -> None:
    async with pair(lab) as hosts:
        await hosts.prepare()
        channels = [await make_channel(hosts.a, hosts.b) for _ in range(2)]
        ends = [channels[0].destination, channels[1].source]
        await hosts.give_socket(hosts.d, channels[1].destination)
        await hosts.give_socket(hosts.s, channels[0].source)
        relays = [
            asyncio.create_task(relay(ends[0], ends[1], change_at=1 << 20)),
            asyncio.create_task(relay(*ends[::-1])),
        ]
        outcomes = await asyncio.gather(*hosts.transfers(), return_exceptions=True)
        assert code_of(outcomes[1]) is UNAVAILABLE
        assert code_of(outcomes[0]) in (
            UNAVAILABLE,
            ttrpc.Code.OK,
        )  # OK: nothing had come for 2 s (contract 4.7)
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)
        for channel in channels:
            channel.close()
        await undone(hosts)


async def relay(near: socket.socket, far: socket.socket, *, change_at: int = -1) -> None:
    """Pass on what comes, with the byte at `change_at` turned over."""
    loop, passed = asyncio.get_running_loop(), 0
    near.setblocking(False)
    far.setblocking(False)
    with contextlib.suppress(OSError):
        while data := bytearray(await loop.sock_recv(near, 64 << 10)):
            if passed <= change_at < passed + len(data):
                data[change_at - passed] ^= 1
            passed += len(data)
            await loop.sock_sendall(far, data)
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_WR)


@pytest.mark.full
async def test_what_goes_over_the_network_shows_nothing_of_the_guest(lab: Lab) -> None:
    """A pattern that the guest's memory is full of is not in the bytes between the hosts."""
    from sandshift.fleet.launch import run_process  # noqa: PLC0415

    word = os.urandom(8).hex()
    program = f"import time\nb=bytearray(('{word}'*4).encode()*200000)\nwhile True:\n time.sleep(9)"
    async with pair(lab) as hosts:
        await run_process(hosts.s, ("python3", "-c", program))
        await asyncio.sleep(2)  # The guest fills its memory meanwhile: nothing tells when it has.
        await hosts.prepare()
        channels = [await make_channel(hosts.a, hosts.b) for _ in range(2)]
        ends = [channels[0].destination, channels[1].source]
        await hosts.give_socket(hosts.d, channels[1].destination)
        await hosts.give_socket(hosts.s, channels[0].source)
        heard: list[bytes] = []
        relays = [
            asyncio.create_task(listen(ends[0], ends[1], heard)),
            asyncio.create_task(relay(*ends[::-1])),
        ]
        await hosts.complete(hosts.transfers())
        everything = b"".join(heard)
        assert len(everything) > 10 << 20
        assert word.encode() not in everything
        await hosts.finish()
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)
        for channel in channels:
            channel.close()
        assert await hosts.runners() == ["destination"]


async def listen(near: socket.socket, far: socket.socket, heard: list[bytes]) -> None:
    loop = asyncio.get_running_loop()
    near.setblocking(False)
    far.setblocking(False)
    with contextlib.suppress(OSError):
        while data := await loop.sock_recv(near, 64 << 10):
            heard.append(data)
            await loop.sock_sendall(far, data)


@pytest.mark.full
async def test_noise_after_the_memory_closes_the_channel_and_receipts_finish_the_move(lab: Lab) -> None:
    """Somebody in between passes everything on until both have all of it, and then speaks in the place of both."""
    async with pair(lab) as hosts:
        await hosts.prepare()
        channels = [await make_channel(hosts.a, hosts.b) for _ in range(2)]
        near, far = channels[0].destination, channels[1].source
        await hosts.give_socket(hosts.d, channels[1].destination)
        await hosts.give_socket(hosts.s, channels[0].source)
        relays = [asyncio.create_task(relay(near, far)), asyncio.create_task(relay(far, near))]
        await hosts.complete(hosts.transfers())
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)
        for end in (near, far):
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(end, NOISE[:1000])
        for host in (hosts.a, hosts.b):
            log = next(places_of(host)[0].rglob("shim.log"))
            async with asyncio.timeout(10):
                while "the channel is lost: a handover frame of" not in log.read_text():
                    await asyncio.sleep(0.02)
        cells = [(await shim.status()).session.cell for shim in (hosts.s, hosts.d)]
        assert cells == [Cell.OPEN.value, Cell.READY.value]
        with pytest.raises(ttrpc.StatusError, match="the destination does not answer"):
            await with_receipt(hosts.s, STOP, hosts.d)
        await with_receipt(hosts.d, RESUME, hosts.s)
        await with_receipt(hosts.s, STOP, hosts.d)
        assert await hosts.runners() == ["destination"]
        for channel in channels:
            channel.close()


async def with_receipt(shim: Shim, action: m.FinalizeAction.ValueType, peer: Shim) -> None:
    receipt = (await peer.status()).session.receipt
    request = m.FinalizeSandboxRequest(session_id=SESSION, action=action, peer_receipt=receipt)
    await shim.migration.finalize_sandbox(request, timeout_s=30)
