"""What must be true of a pod at the end of a history: its output, its exits, its events, and what is left of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import ttrpc
from sandshift.sandbox.model import is_of_container
from sandshift.wire.containerd import task_pb2 as pb
from tests.sim.pod_events import wrong_events
from tests.sim.pod_truth import echoes, wrong_output
from tests.sim.stays import STDERR, STDOUT, Program, Stay

if TYPE_CHECKING:
    from tests.sim.pods import Caller, Pods

SETTLE_S: Final = 90.0
"""How long output and exits may take to be through: following is begun again after 30 s at most."""
LOOK_S: Final = 0.1
SIGKILL: Final = 9
CALL_S: Final = 20.0


def look_back(pods: Pods) -> None:
    """Whatever happened: nothing was lost in the middle of a stream, nothing repeated, nothing told twice."""
    for program in pods.programs.values():
        for stream in (STDOUT, STDERR):
            if wrong := wrong_output(program, pods.stays_of(program.base), stream):
                pods.wrong(wrong)
    for caller in pods.callers:
        for wrong in wrong_events(caller):
            pods.wrong(wrong)


async def settle(pods: Pods, runner: str) -> None:
    """The guest runs on `runner`: all that its processes have said until now arrives, every end is told there."""
    caller = next(one for one in pods.callers if one.host.name == runner)
    for stay in pods.stays:
        for fifos in stay.fifos.values():
            fifos.read_on()
    said, written = _said(pods, caller), _written(pods, caller)
    late: list[str] = []
    for _ in range(round(SETTLE_S / LOOK_S)):
        late = [*_late_output(pods, said), *_late_input(pods, written), *_late_ends(pods, caller)]
        if not late:
            break
        await asyncio.sleep(LOOK_S)
    for what in late:
        pods.wrong(f"after {SETTLE_S:g} s on {runner}: {what}")
    for stay in caller.stays:
        _check_ends(pods, caller, stay)


def _said(pods: Pods, caller: Caller) -> dict[tuple[str, int], int]:
    """How far every stream is in the guest."""
    said = dict(pods.truth.said)
    vm = caller.host.vm
    if vm is not None:
        for task in vm.look().containers.tasks.values():
            said.update({(task.process_id, number): one.end for number, one in task.streams.items()})
    return said


def _arrived(pods: Pods, program: Program, stream: int) -> int:
    stays = (stay for stay in pods.stays_of(program.base) if program.exec_id in stay.fifos)
    return sum(len(stay.fifos[program.exec_id].data(stream)) for stay in stays)


def _late_output(pods: Pods, said: dict[tuple[str, int], int]) -> list[str]:
    late = []
    for (process_id, stream), count in said.items():
        if process_id in pods.programs:
            arrived = _arrived(pods, pods.programs[process_id], stream)
            if arrived < count:
                late.append(f"{process_id} stream {stream}: {arrived} of {count} bytes have arrived")
    return late


def _written(pods: Pods, caller: Caller) -> dict[tuple[str, Stay], int]:
    """How much the callers here have written to the stdin of what lives, and still can."""
    written = {}
    for program in pods.programs.values():
        stay = caller.here(program.base)
        if program.echoes and stay is not None and program.exec_id in stay.fifos:
            written[program.process_id, stay] = len(stay.fifos[program.exec_id].written)
    return written


def _late_input(pods: Pods, written: dict[tuple[str, Stay], int]) -> list[str]:
    late = []
    for (process_id, stay), count in written.items():
        program, stays = pods.programs[process_id], pods.stays_of(stay.base)
        pieces = [one.fifos[program.exec_id].data(STDOUT) for one in stays if program.exec_id in one.fifos]
        come = echoes(program, stays, b"".join(pieces))[stay]
        if come < count and process_id not in pods.truth.exits:
            late.append(f"{process_id} stdin: {come} of {count} bytes have come out again")
    return late


def _late_ends(pods: Pods, caller: Caller) -> list[str]:
    late = []
    for program in pods.programs.values():
        stay = caller.here(program.base)
        if stay is None:
            late.append(f"container {program.base} is not there")
        elif program.process_id in pods.truth.exits and program.exec_id not in stay.exits:
            late.append(f"{program.process_id} has ended, and nobody was told")
    return late


def _check_ends(pods: Pods, caller: Caller, stay: Stay) -> None:
    """Where the guest runs, nothing has ended that runs."""
    if stay is not caller.here(stay.base):
        return
    for exec_id, code in stay.exits.items():
        real = pods.truth.exits.get(f"{stay.base}:{exec_id}")
        if code != real:
            pods.wrong(f"{stay} {exec_id} ended with {code}, and the guest runs here; it ended with {real}")


async def leave(pods: Pods, runner: str) -> None:
    """The user ends everything: every byte has come, every end is right, and nothing is left."""
    try:
        await _leave(pods, runner)
    except (ttrpc.StatusError, OSError) as error:
        pods.wrong(f"containers on {runner} cannot be ended and deleted: {error}")


async def _leave(pods: Pods, runner: str) -> None:
    caller = next(one for one in pods.callers if one.host.name == runner)
    client = await caller.host.client()
    stays = [stay for base in _bases(pods) if (stay := caller.here(base)) is not None]
    for stay in stays:
        if "" not in stay.exits:
            request = pb.KillRequest(id=stay.container_id, signal=SIGKILL, all=True)
            try:
                await client.task.kill(request, timeout_s=CALL_S)
            except ttrpc.StatusError as error:
                if error.code is not ttrpc.Code.NOT_FOUND:  # It has just ended by itself.
                    raise
        ended = await client.task.wait(pb.WaitRequest(id=stay.container_id), timeout_s=CALL_S)
        if ended.exit_status != pods.truth.exits[f"{stay.base}:"]:
            pods.wrong(f"{stay} was killed and ended with {ended.exit_status}")
    await settle(pods, runner)
    for stay in stays:
        for program in pods.execs_of(stay.base):
            request = pb.DeleteRequest(id=stay.container_id, exec_id=program.exec_id)
            await client.task.delete(request, timeout_s=CALL_S)
        await client.task.delete(pb.DeleteRequest(id=stay.container_id), timeout_s=CALL_S)
    await client.connection.close()
    for what in _left(caller):
        pods.wrong(f"all containers are deleted on {runner}, and there is still {what}")


def _bases(pods: Pods) -> list[str]:
    return sorted({program.base for program in pods.programs.values()})


def _left(caller: Caller) -> list[str]:
    host = caller.host
    left = [f"file {path.name}" for path in sorted(host.places.offsets_dir.glob("*"))]
    if host.server is not None:
        sandbox = host.server.sandbox
        left += [f"container {one.container_id}" for one in sandbox.containers.all()]
        left += [f"disk {one.device.id}" for one in sandbox.disks.all()]
    if host.vm is not None:
        inside = host.vm.guest.containers
        left += [f"process {name} in the guest" for name in inside.tasks if is_of_container(name)]
        left += [f"container {name} in the guest" for name in inside.containers]
    return left
