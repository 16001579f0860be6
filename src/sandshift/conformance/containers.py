"""Containers that run: what moves with them, and what becomes of them on either side (section 4: 4, 12 and 13).

They are made from a bundle that the target gives (`--bundle`); without one these cases are skipped.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final

from sandshift.conformance.answers import FP, OK, Broken, Skipped, hold, require
from sandshift.conformance.bounds import limit
from sandshift.conformance.cases import case
from sandshift.conformance.events import listening
from sandshift.conformance.scene import Scene, here
from sandshift.conformance.shim import RESUME, STOP
from sandshift.conformance.side import Side
from sandshift.conformance.tasks import RUNNING, SOURCE_CONTAINER, Fifo
from sandshift.wire.containerd import task_events_pb2

LINE_BYTES: Final = 9
SOME: Final = 20 * LINE_BYTES
EXIT_MIGRATED: Final = 255
EXIT_KILLED: Final = 137
NAME: Final = "counter"


async def _runs(scene: Scene) -> tuple[int, Fifo]:
    """A container that counts runs on the SRC: its pid and its output. Raises Skipped if there is no bundle."""
    if not scene.target.bundle:
        raise Skipped("no --bundle: there is no container that could run")
    scene.spoil()
    bundle = await asyncio.to_thread(scene.bundles.make, {}, scene.target.bundle)
    output = scene.bundles.fifo(bundle)
    answer = await scene.src.tasks.create(bundle, NAME, stdout=output.path)
    pid: int = require(answer, OK, what="Task.Create").response.pid
    require(await scene.src.tasks.start(NAME), OK, what="Task.Start")
    await output.until(SOME)
    return pid, output


async def _patched(scene: Scene) -> Fifo:
    """Imported, and the container made at the DST: its output there."""
    await scene.imported()
    annotations = {SOURCE_CONTAINER: NAME}
    bundle = await asyncio.to_thread(scene.bundles.make, annotations, scene.target.bundle)
    output = scene.bundles.fifo(bundle)
    answer = await scene.dst.tasks.create(bundle, here(NAME), stdout=output.path)
    require(answer, OK, what="Task.Create of the container at the DST")
    require(await scene.dst.tasks.start(here(NAME)), OK, what="Task.Start of it")
    return output


async def _transferred(scene: Scene) -> None:
    require(await scene.dst.prepare(scene.session), OK, what="PrepareSandbox")
    for side in Side:
        await scene.give_socket(side, flowing=True)
    require(await scene.src.transfer(scene.session), OK, what="TransferSandbox on the SRC")
    await scene.wait_for(Side.DESTINATION, "TransferCompleted")


async def _forward(scene: Scene) -> None:
    require(await scene.dst.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME) on the DST")
    require(await scene.src.finalize(scene.session, STOP), OK, what="FinalizeSandbox(STOP) on the SRC")


def _check_lines(output: bytes) -> None:
    """Raises Broken unless these are the numbered lines from the first on, each once."""
    whole = output[: len(output) // LINE_BYTES * LINE_BYTES]
    expected = b"".join(b"%08d\n" % number for number in range(len(whole) // LINE_BYTES))
    if whole != expected:
        at = next(index for index, pair in enumerate(zip(whole, expected, strict=True)) if pair[0] != pair[1])
        raise Broken(
            f"the output of both sides together is not what was written, from byte {at} on: {whole[at : at + 40]!r}"
        )


@case("output of a container goes on at the destination, no byte lost and none twice", "4.4", moves=True)
async def output_goes_on(scene: Scene) -> None:
    _pid, there = await _runs(scene)
    came = await _patched(scene)
    await _transferred(scene)
    await _forward(scene)
    after = await came.until(SOME)
    _check_lines(bytes(there.data) + after)
    state = require(await scene.dst.tasks.state(here(NAME)), OK, what="Task.State on the DST").response
    hold((state.pid, state.status) == (_pid, RUNNING), f"State says pid {state.pid}, status {state.status}")


@case("containers of a sandbox that has moved away exit with 255 on the source", "4.12", moves=True)
async def source_exits(scene: Scene) -> None:
    async with listening(scene, Side.SOURCE) as heard:
        pid, _there = await _runs(scene)
        await _patched(scene)
        waiting = scene.begin(scene.src.tasks.wait(NAME, 60.0))
        await _transferred(scene)
        await _forward(scene)
        answer = require(await waiting, OK, what="Task.Wait on the SRC")
        hold(answer.response.exit_status == EXIT_MIGRATED, f"the exit is {answer.response.exit_status}")
        envelope = await heard.wait_for("/tasks/exit")
        event = task_events_pb2.TaskExit.FromString(envelope.event.value)
        told = (event.container_id, event.pid, event.exit_status)
        hold(told == (NAME, pid, EXIT_MIGRATED), f"TaskExit says {told}")
        await heard.wait_for("/sandshift/migrated")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup on the SRC")
    deleted = require(await scene.src.tasks.delete(NAME), OK, what="Task.Delete on the SRC")
    hold(deleted.response.exit_status == EXIT_MIGRATED, f"Delete says {deleted.response.exit_status}")


@case("containers run on after a roll-back, no byte lost and none twice", "4.12", moves=True)
async def rolled_back(scene: Scene) -> None:
    _pid, there = await _runs(scene)
    came = await _patched(scene)
    await _transferred(scene)
    require(await scene.src.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME) on the SRC")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="FinalizeSandbox(STOP) on the DST")
    for side in Side:
        require(await scene.shims[side].cleanup(scene.session), OK, what=f"Cleanup on the {side.value}")
    _check_lines(await there.until(len(there.data) + SOME))
    hold(not came.data, f"the DST gave out {bytes(came.data[:40])!r}, and the guest never ran there")
    gone = require(await scene.dst.tasks.wait(here(NAME)), OK, what="Task.Wait of what was abandoned")
    hold(gone.response.exit_status == EXIT_MIGRATED, f"its exit is {gone.response.exit_status}")
    require(await scene.dst.tasks.delete(here(NAME)), OK, what="Task.Delete of what was abandoned")
    require(await scene.src.tasks.kill(NAME), OK, what="Task.Kill after the session")
    ended = require(await scene.src.tasks.wait(NAME), OK, what="Task.Wait after the session")
    hold(ended.response.exit_status == EXIT_KILLED, f"the exit is {ended.response.exit_status}")


@case("a container is killed on the source while memory flows", "4.13", moves=True)
async def killed_in_brownout(scene: Scene) -> None:
    await _runs(scene)
    await scene.export()
    await scene.give_socket(Side.SOURCE)
    scene.begin(scene.src.transfer(scene.session))
    await scene.wait_for(Side.SOURCE, "Transferring")
    require(
        await scene.src.tasks.delete(NAME), FP, what="Task.Delete while memory flows", names=(scene.session,)
    )
    require(await scene.src.tasks.kill(NAME), OK, what="Task.Kill while memory flows")
    ended = require(await scene.src.tasks.wait(NAME), OK, what="Task.Wait of what was killed")
    hold(ended.response.exit_status == EXIT_KILLED, f"the exit is {ended.response.exit_status}")
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup")
    require(await scene.src.tasks.delete(NAME), OK, what="Task.Delete after the session")


@case("a container with other files at the destination is refused, naming both contents", "4.4", moves=True)
async def other_files(scene: Scene) -> None:
    await _runs(scene)
    await scene.imported()
    other = await asyncio.to_thread(scene.bundles.make_other, scene.target.bundle, {SOURCE_CONTAINER: NAME})
    answer = await scene.dst.tasks.create(other, here(NAME))
    require(answer, FP, what="Task.Create with another root file system")
    both = set(re.findall(r"sha256:[0-9a-f]{64}", answer.message))
    hold(len(both) == 2, f"it does not name both contents: {answer.message!r}")
    hold(await scene.dst.state() == "DestinationImported", "a refused Task.Create changed the state")


@case("limit: one Task.Create too many is RESOURCE_EXHAUSTED and harms nothing", "5", moves=True)
async def too_many(scene: Scene) -> None:
    most = int(limit(scene, "containers_max"))
    if not scene.target.bundle:
        raise Skipped("no --bundle: there is no container that could run")
    scene.spoil()
    bundle = await asyncio.to_thread(scene.bundles.make, {}, scene.target.bundle)
    for number in range(most):
        answer = await scene.src.tasks.create(bundle, f"{NAME}-{number}")
        require(answer, OK, what=f"Task.Create {number + 1} of {most}")
    answer = await scene.src.tasks.create(bundle, NAME)
    require(answer, "RESOURCE_EXHAUSTED", what=f"Task.Create {most + 1} of {most}")
    require(await scene.src.tasks.delete(f"{NAME}-0"), OK, what="Task.Delete")
    require(await scene.src.tasks.create(bundle, NAME), OK, what="Task.Create after a Delete")
