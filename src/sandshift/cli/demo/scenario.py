"""The demo itself: two hosts, a busy sandbox, the move under everybody's eyes, and what the evidence proves.

`Demo` is one run. Its steps are methods, so that a test can do harm between them and see that the proof fails.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sandshift.cli.demo.capture import Seen, capturing
from sandshift.cli.demo.client import CounterClient, ask_service
from sandshift.cli.demo.lab import Lab, LabHost, open_lab, require_root
from sandshift.cli.demo.proof import (
    Control,
    Evidence,
    Guest,
    MemoryCheck,
    Move,
    conversation,
    figures,
    longest_silence_ms,
)
from sandshift.cli.demo.settings import Settings
from sandshift.cli.demo.show import Show
from sandshift.cli.demo.topology import GUEST_ADDRESS, GUEST_MAC, PREFIX_LENGTH
from sandshift.cli.demo.workload import MIB, PAGE_BYTES, Workload
from sandshift.config import Places
from sandshift.errors import Aborted, Cancelled, NotSupported, SandshiftError
from sandshift.fleet.driver import migrate
from sandshift.fleet.host import NAMESPACE_DEFAULT, Host
from sandshift.fleet.launch import Card, Wish, launch, run_process, stop
from sandshift.fleet.request import Migration
from sandshift.fleet.result import MigrationResult
from sandshift.fleet.shim_client import Shim
from sandshift.image import build
from sandshift.wire.sandshift.shim_pb2 import StatusResponse

SANDBOX: Final = "demo"
CONTROL_SANDBOX: Final = "demo-control"
LISTEN_S: Final = 60.0
"""How long the workload may take to fill its working set: 1 s per 100 MiB under TCG, on a busy machine more."""
CHECK_S: Final = 120.0
"""How long a check of all pages may take: 0.5 s per 100 MiB under TCG."""
ANSWER_S: Final = 10.0
WARM_UP_S: Final = 1.5
"""Of conversation and writing before the move, to know how this machine is when nothing moves."""
AFTERWARDS_S: Final = 1.0
"""Of conversation and writing after the move."""
GAP_MARGIN_NS: Final = 500_000_000
"""A silence that begins so soon after the guest runs again is still counted as the move's."""
TUN: Final = Path("/dev/net/tun")


@dataclass(frozen=True, slots=True)
class Before:
    """What is known before the move."""

    guest: Guest
    pages_checked: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Watched:
    """A move and what was seen of it. Times are monotonic, ns."""

    before: Before
    result: MigrationResult
    seen: Seen
    talking_ns: int
    """The client talks since then."""
    began_ns: int
    moved_ns: int


class Demo:
    """One run of the demo. `run` answers its figures; whatever happens, nothing of it is left."""

    def __init__(self, settings: Settings, show: Show) -> None:
        self.settings = settings
        self.show = show
        self.interrupted = False
        """Set by whoever cancels the run: a migration winds itself back and then answers as if it had not been told."""
        self.client: CounterClient | None = None
        """The one that talks throughout the move."""

    async def run(self) -> dict[str, object]:
        """The figures of `proof.figures`. A move that fails is told by them too.

        Raises:
            Rejected, NotSupported, NoRoom, Unavailable: this machine cannot run the demo; says what to do.
        """
        self.check_machine()
        await self.prepare_image()
        self.show.step("making two hosts, a client and a switch between them")
        async with open_lab(cache_dir=self.settings.cache_dir, overrides=self.settings.overrides()) as lab:
            evidence = await self.main_move(lab)
            if self.settings.control and not evidence.move.failure:
                evidence = replace(evidence, control=await self.control_move(lab))
        return figures(evidence)

    def check_machine(self) -> None:
        """What would only be found out after the image was built."""
        require_root()
        if not TUN.exists():
            raise NotSupported(
                f"this machine has no {TUN}: load it with 'modprobe tun', or give the device to the container"
                " that this runs in"
            )

    async def prepare_image(self) -> None:
        """The guest image, built if the cache has none."""
        cache_dir = self.settings.cache_dir or Path(Places().cache_dir)
        if await asyncio.to_thread(build.find, cache_dir) is None:
            self.show.step("building the guest image (once)")
            await asyncio.to_thread(build.build, cache_dir)

    # The move that is proven

    async def main_move(self, lab: Lab) -> Evidence:
        """Start the sandbox and its load on host A, move it to host B, and collect what all eyes saw."""
        settings, workload = self.settings, self.settings.workload
        self.show.step(f"starting a sandbox of {settings.memory_mib} MiB on host A")
        shim = await self.start_sandbox(lab.host_a, SANDBOX, workload)
        try:
            status = await shim.status()
        finally:
            await shim.close()
        self.show.step(
            f"inside it: a counter service, and a writer on {workload.working_set_mib} MiB at"
            f" {workload.dirty_mib_per_s} MiB/s"
        )
        self.client = client = await CounterClient.connect(
            lab.client_namespace, GUEST_ADDRESS, workload.port, timeout_s=LISTEN_S
        )
        client.start()
        try:
            watched = await self.watched_move(lab)
            failure = failure_of(watched.result)
            await asyncio.sleep(AFTERWARDS_S)
            self.show.step("checking every page, and the guest")
            memory, after, failure = await self.verify(lab, watched.before, failure)
        finally:
            await client.stop()
        return Evidence(
            move=move_of(status, watched.result, lab.host_a.config.migration.encryption, failure),
            conversation=conversation(
                client.answers,
                moved_ns=watched.moved_ns,
                unanswered=client.unanswered,
                failure=client.failure,
            ),
            client_gap_ms=longest_silence_ms(
                client.answers, from_ns=watched.began_ns, to_ns=watched.moved_ns + GAP_MARGIN_NS
            ),
            quiet_gap_ms=longest_silence_ms(
                client.answers, from_ns=watched.talking_ns, to_ns=watched.began_ns
            ),
            memory=memory,
            dirty_bytes_per_s_wanted=workload.dirty_mib_per_s * MIB,
            before=watched.before.guest,
            after=after,
            seen=watched.seen,
            control=None,
        )

    async def watched_move(self, lab: Lab) -> Watched:
        """Let the client talk for a while, then move the sandbox past the capture."""
        talking_ns = time.monotonic_ns()
        await asyncio.sleep(WARM_UP_S)
        before = await self.look(lab)
        began_ns = time.monotonic_ns()
        with capturing(lab.switch_namespace, lab.bridge, self.settings.workload.marker) as capture:
            self.show.step("moving it to host B, while the client talks and the writer writes")
            result = await self.move(lab.host_a, lab.host_b, SANDBOX)
            moved_ns = time.monotonic_ns()
            seen = await asyncio.to_thread(capture.stop)
        return Watched(before, result, seen, talking_ns, began_ns, moved_ns)

    async def start_sandbox(self, host: LabHost, name: str, workload: Workload) -> Shim:
        """The sandbox with its workload, on `host`."""
        card = Card((f"{GUEST_ADDRESS}/{PREFIX_LENGTH}",), mac=GUEST_MAC)
        wish = Wish(name, memory_bytes=self.settings.memory_bytes, card=card)
        shim = await launch(fleet_host(host), wish)
        try:
            await run_process(shim, tuple(workload.arguments()))
        except BaseException:
            await shim.close()
            raise
        return shim

    async def look(self, lab: Lab) -> Before:
        """How the guest and its writer are, now."""
        status = await self.ask(lab, "STATUS")
        return Before(
            guest_of(await self.ask(lab, "WHO")), integer(status, "pages_checked"), time.monotonic()
        )

    async def move(self, source: LabHost, destination: LabHost, name: str) -> MigrationResult:
        """Move the sandbox."""
        request = Migration(
            fleet_host(source), fleet_host(destination), name, f"demo-{uuid.uuid4().hex[:12]}"
        )
        result = await migrate(request, on_update=self.show.update)
        if self.interrupted:
            raise Cancelled("the demo was interrupted; the sandbox and both hosts are gone")
        return result

    async def verify(self, lab: Lab, before: Before, failure: str) -> tuple[MemoryCheck, Guest, str]:
        """Have the guest check all of its pages; a guest that does not answer is a failure, not an exception."""
        try:
            status = await self.ask(lab, "STATUS")
            elapsed_s = time.monotonic() - before.at_s
            rate = (integer(status, "pages_checked") - before.pages_checked) * PAGE_BYTES / elapsed_s
            after = guest_of(await self.ask(lab, "WHO"))
            memory = memory_of(await self.ask(lab, "CHECK", timeout_s=CHECK_S), round(rate))
        except SandshiftError as error:
            return MemoryCheck(), Guest(), failure or error.message
        return memory, after, failure

    async def ask(self, lab: Lab, command: str, *, timeout_s: float = ANSWER_S) -> dict[str, object]:
        """One command to the workload, from the client's place."""
        port = self.settings.workload.port
        return await ask_service(lab.client_namespace, GUEST_ADDRESS, port, command, timeout_s=timeout_s)

    # The control

    async def control_move(self, lab: Lab) -> Control:
        """A small sandbox moved with encryption off, past the same capture. The first one must be gone: same address."""
        self.show.step("control: the same with encryption off, to see that the capture finds what is there")
        workload = self.settings.control_workload()
        off = {"migration": {"encryption": "off"}}
        source, destination = (lab.variant(host, "clear", off) for host in (lab.host_a, lab.host_b))
        try:
            await self.stop_sandbox(lab.host_b, SANDBOX)
            shim = await self.start_sandbox(source, CONTROL_SANDBOX, workload)
            await shim.close()
            await self.listening(lab, workload)
            with capturing(lab.switch_namespace, lab.bridge, workload.marker) as capture:
                result = await self.move(source, destination, CONTROL_SANDBOX)
                seen = await asyncio.to_thread(capture.stop)
        except Cancelled:
            raise
        except SandshiftError as error:
            return Control(Seen(), 0, f"control: {error.message}")
        failure = failure_of(result)
        return Control(seen, result.bytes_transferred, f"control: {failure}" if failure else "")

    async def stop_sandbox(self, host: LabHost, name: str) -> None:
        """Off, at once."""
        await stop(fleet_host(host), NAMESPACE_DEFAULT, name, grace_s=0)

    async def listening(self, lab: Lab, workload: Workload) -> None:
        """Until the workload has filled its pages and listens."""
        client = await CounterClient.connect(
            lab.client_namespace, GUEST_ADDRESS, workload.port, timeout_s=LISTEN_S
        )
        await client.stop()


def fleet_host(host: LabHost) -> Host:
    """The lab's host as the fleet knows it."""
    return Host(host.config, host.config_path)


def failure_of(result: MigrationResult) -> str:
    """What went wrong; empty: nothing."""
    if result.moved:
        return ""
    reason = result.reason.message if result.reason else "the move ended undecided"
    return f"{result.failed_call}: {reason}" if result.failed_call else reason


def move_of(status: StatusResponse, result: MigrationResult, encryption: str, failure: str) -> Move:
    """What the shim said before the move and the driver after it."""
    return Move(
        accelerator=status.accelerator,
        qemu_version=status.qemu_version,
        memory_bytes=status.memory_bytes,
        total_ms=result.total_ms or 0.0,
        blackout_ms=result.blackout_ms or 0.0,
        bytes_transferred=result.bytes_transferred,
        passes=result.passes,
        encryption=encryption,
        failure=failure,
    )


def guest_of(answer: dict[str, object]) -> Guest:
    uptime_s = answer.get("uptime_s")
    return Guest(
        str(answer.get("boot_id", "")), float(uptime_s) if isinstance(uptime_s, int | float) else 0.0
    )


def memory_of(report: dict[str, object], bytes_per_s: int) -> MemoryCheck:
    """The writer's report after its check of all pages. Raises Aborted if it is not that."""
    if report.get("event") != "final":
        raise Aborted(
            f"the writer answered CHECK with {report.get('event')!r}, which is no report of a whole check"
        )
    examples = report.get("examples")
    return MemoryCheck(
        pages=integer(report, "pages"),
        pages_checked=integer(report, "pages_checked"),
        pages_stale=integer(report, "pages_stale"),
        generation=integer(report, "generation"),
        bytes_per_s=bytes_per_s,
        examples=tuple(examples) if isinstance(examples, list) else (),
    )


def integer(answer: dict[str, object], key: str) -> int:
    """An answer's number; what is missing counts as none."""
    value = answer.get(key)
    return value if isinstance(value, int) else 0
