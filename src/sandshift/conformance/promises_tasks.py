"""What the contract says of containers (section 4: 4, 12 and 13): how they come to the destination, and what becomes of them.

The sandbox's containers are put into its saved state on the way, so no target needs any: at the destination a container is
what the saved state says, until the guest runs there.
"""

from __future__ import annotations

from typing import Final

from sandshift.conformance.answers import AE, FP, NO_ANSWER, OK, UNIMPLEMENTED, Answer, Skipped, hold, require
from sandshift.conformance.cases import case
from sandshift.conformance.events import listening
from sandshift.conformance.saved_state import FIRST_PID
from sandshift.conformance.scene import Scene, here
from sandshift.conformance.shim import RESUME, STOP
from sandshift.conformance.side import Side
from sandshift.conformance.tasks import RUNNING, V2, Tasks
from sandshift.wire.containerd import task_events_pb2
from sandshift.wire.sandshift import events_pb2

NF: Final = "NOT_FOUND"
WAITS_S: Final = 0.3
EXIT_MIGRATED: Final = 255
NAMES: Final = ("web", "db")


async def _imported(scene: Scene, *names: str) -> None:
    scene.have_containers(*(names or NAMES))
    await scene.imported()
    answer = await scene.dst.tasks.state("unknown")
    if answer.code == UNIMPLEMENTED:
        raise Skipped("the shim serves no containerd.task.v3.Task")


def _pid(answer: Answer) -> int:
    pid: int = answer.response.pid
    return pid


# 4. Task.Create and Task.Start


@case("Task.Create with the annotation answers the saved pid, in any order", "4.4")
async def patched(scene: Scene) -> None:
    await _imported(scene)
    for name in reversed(NAMES):
        answer = require(await scene.patch(name), OK, what=f"Task.Create for {name}")
        expected = FIRST_PID + NAMES.index(name)
        hold(
            _pid(answer) == expected,
            f"Task.Create for {name} answers pid {_pid(answer)}, saved was {expected}",
        )
    require(await scene.dst.prepare(scene.session), OK, what="PrepareSandbox with every container patched")


@case("Task.Create again is no error with the same values and ALREADY_EXISTS with others", "4.4")
async def patched_again(scene: Scene) -> None:
    await _imported(scene)
    first = require(await scene.patch("web"), OK, what="Task.Create")
    again = require(await scene.patch("web"), OK, what="the same Task.Create again")
    hold(_pid(first) == _pid(again), f"it answers pid {_pid(first)}, then {_pid(again)}")
    bundle = scene.containers["web"]
    others = {
        "another id": await scene.dst.tasks.create(bundle, "another"),
        "another bundle": await scene.dst.tasks.create(scene.bundles.patch_of("web"), here("web")),
        "another container of that id": await scene.dst.tasks.create(scene.containers["db"], here("web")),
    }
    for what, answer in others.items():
        require(answer, AE, what=f"Task.Create of what is patched, with {what}")
    require(await scene.patch("web"), OK, what="the first Task.Create after refusals")
    require(await scene.patch("db"), OK, what="Task.Create of the other container")


@case("Task.Create for a container that is not pending is NOT_FOUND", "4.4")
async def not_pending(scene: Scene) -> None:
    await _imported(scene)
    answer = await scene.dst.tasks.create(scene.bundles.patch_of("cache"), "cache")
    require(answer, NF, what="Task.Create for a container that the source has not", names=("cache",))
    hold(await scene.dst.state() == "DestinationImported", "a refused Task.Create changed the state")


@case("Task.Create without the annotation is refused at a destination", "4.4")
async def unannotated(scene: Scene) -> None:
    await _imported(scene)
    answer = await scene.dst.tasks.create(scene.bundles.make({}), "own")
    require(answer, FP, what="Task.Create without the annotation", names=(scene.session,))
    require(await scene.dst.tasks.state("own"), NF, what="State of what was refused")


@case("Task.Start of a patched container answers the saved pid and changes nothing", "4.4")
async def start_patched(scene: Scene) -> None:
    await _imported(scene)
    require(await scene.patch("web"), OK, what="Task.Create")
    for _twice in range(2):
        answer = require(
            await scene.dst.tasks.start(here("web")), OK, what="Task.Start of a patched container"
        )
        hold(_pid(answer) == FIRST_PID, f"Task.Start answers pid {_pid(answer)}, saved was {FIRST_PID}")
    require(await scene.patch("db"), OK, what="Task.Create of the other container")
    require(await scene.dst.prepare(scene.session), OK, what="PrepareSandbox")
    require(await scene.dst.tasks.start(here("db")), OK, what="Task.Start after PrepareSandbox")
    hold((await scene.dst.status()).vm_state == "incoming", "a Task.Start started something")


@case("Task.Create is the same call in version 2 of the service", "4.4")
async def version_2(scene: Scene) -> None:
    await _imported(scene, "web")
    older = Tasks(scene.dst.connection, V2)
    answer = await older.create(scene.containers["web"], here("web"))
    require(answer, OK, what="Task.Create of containerd.task.v2")
    hold(_pid(answer) == FIRST_PID, f"it answers pid {_pid(answer)}, saved was {FIRST_PID}")
    require(await scene.patch("web"), OK, what="the same in version 3")
    require(await older.start(here("web")), OK, what="Task.Start of containerd.task.v2")


@case("what was patched survives the destination's shim", "4.15")
async def patches_restored(scene: Scene) -> None:
    await _imported(scene)
    require(await scene.patch("web"), OK, what="Task.Create")
    await scene.dst.close()
    await scene.target.restart(Side.DESTINATION)
    await scene.reconnect(Side.DESTINATION)
    other = await scene.dst.tasks.create(scene.bundles.patch_of("web"), here("web"))
    require(other, AE, what="Task.Create with other values after a restart")
    require(await scene.dst.prepare(scene.session), FP, what="PrepareSandbox after a restart", names=("db",))
    require(await scene.patch("db"), OK, what="Task.Create of the other container after a restart")
    require(await scene.dst.prepare(scene.session), OK, what="PrepareSandbox with every container patched")


# 5. PrepareSandbox


@case("prepare with containers pending is refused, naming them in order", "4.5")
async def pending(scene: Scene) -> None:
    await _imported(scene, "web", "db", "cache")
    require(await scene.patch("web"), OK, what="Task.Create")
    answer = await scene.dst.prepare(scene.session)
    require(answer, FP, what="PrepareSandbox with containers pending", names=("cache, db",))
    hold("web" not in answer.message.split(" of ")[0], f"it names what is patched: {answer.message!r}")
    hold((await scene.dst.status()).vm_state == "absent", "a refused PrepareSandbox left a VM behind")


# 4 and 9. What becomes of them


@case("TaskCreate is told when the sandbox runs here and not before, TaskStart never", "4.4", moves=True)
async def told_at_resume(scene: Scene) -> None:
    async with listening(scene, Side.DESTINATION) as heard:
        await _imported(scene)
        for name in NAMES:
            require(await scene.patch(name), OK, what=f"Task.Create for {name}")
            require(await scene.dst.tasks.start(here(name)), OK, what=f"Task.Start for {name}")
        require(await scene.dst.prepare(scene.session), OK, what="PrepareSandbox")
        for side in Side:
            await scene.give_socket(side, flowing=True)
        require(await scene.src.transfer(scene.session), OK, what="TransferSandbox on the SRC")
        await scene.wait_for(Side.DESTINATION, "TransferCompleted")
        early = [topic for topic in heard.topics if topic.startswith("/tasks/")]
        hold(not early, f"before the sandbox runs here {early} were told")
        require(await scene.dst.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME)")
        for number, name in enumerate(NAMES):
            envelope = await heard.wait_for("/tasks/create", here(name).encode())
            event = task_events_pb2.TaskCreate.FromString(envelope.event.value)
            told = (event.container_id, event.bundle, event.pid)
            expected = (here(name), str(scene.containers[name]), FIRST_PID + number)
            hold(told == expected, f"TaskCreate says {told}, not {expected}")
        hold("/tasks/start" not in heard.topics, "TaskStart was told of what was started elsewhere")
        require(await scene.src.finalize(scene.session, STOP), OK, what="FinalizeSandbox(STOP)")


@case("a sandbox that has moved away is told with session and destination", "4.12", moves=True)
async def told_of_move(scene: Scene) -> None:
    async with listening(scene, Side.SOURCE) as heard:
        await scene.moved()
        envelope = await heard.wait_for("/sandshift/migrated")
    event = events_pb2.Migrated.FromString(envelope.event.value)
    hold(event.session_id == scene.session, f"the event names session {event.session_id!r}")
    hold(event.destination, "the event does not name the destination")
    hold(event.sandbox_id == scene.src.sandbox_id, f"the event names sandbox {event.sandbox_id!r}")


@case("containers of an import that was abandoned exit with 255 and can be deleted", "4.12")
async def abandoned(scene: Scene) -> None:
    await _imported(scene)
    require(await scene.patch("web"), OK, what="Task.Create")
    waiting = scene.begin(scene.dst.tasks.wait(here("web")))
    require(await scene.dst.cancel(scene.session), OK, what="Cancel")
    require(await scene.dst.cleanup(scene.session), OK, what="Cleanup")
    answer = require(await waiting, OK, what="Task.Wait of a container whose import was abandoned")
    hold(answer.response.exit_status == EXIT_MIGRATED, f"its exit is {answer.response.exit_status}")
    deleted = require(await scene.dst.tasks.delete(here("web")), OK, what="Task.Delete of it")
    hold(deleted.response.exit_status == EXIT_MIGRATED, f"Delete says {deleted.response.exit_status}")
    require(await scene.dst.tasks.state(here("web")), NF, what="State of what was deleted")


@case("the id of a container that an abandoned import left is taken until it is deleted", "4.4")
async def taken_id(scene: Scene) -> None:
    await _imported(scene, "web")
    require(await scene.patch("web"), OK, what="Task.Create")
    for side in Side:
        require(await scene.shims[side].cancel(scene.session), OK, what="Cancel")
        require(await scene.shims[side].cleanup(scene.session), OK, what="Cleanup")
    scene.session += "-again"
    await scene.imported()
    require(await scene.patch("web"), AE, what="Task.Create with the id of what was abandoned")
    for side in Side:
        require(await scene.shims[side].cancel(scene.session), OK, what="Cancel")
        require(await scene.shims[side].cleanup(scene.session), OK, what="Cleanup")
    require(await scene.dst.tasks.delete(here("web")), OK, what="Task.Delete of what was abandoned")
    scene.session += "-again"
    await scene.imported()
    require(await scene.patch("web"), OK, what="Task.Create with the id of what was deleted")


# 13. Other calls during a session


@case("Task State, Connect, Pids and Wait answer while the sandbox comes", "4.13")
async def answers_during(scene: Scene) -> None:
    await _imported(scene)
    for name in NAMES:
        require(await scene.patch(name), OK, what=f"Task.Create for {name}")
    require(await scene.dst.prepare(scene.session), OK, what="PrepareSandbox")
    tasks, name = scene.dst.tasks, here("web")
    state = require(await tasks.state(name), OK, what="Task.State").response
    hold(
        (state.pid, state.status) == (FIRST_PID, RUNNING),
        f"State says pid {state.pid}, status {state.status}",
    )
    hold(state.bundle == str(scene.containers["web"]), f"State says bundle {state.bundle}")
    connected = require(await tasks.connect(name), OK, what="Task.Connect").response
    hold(connected.task_pid == FIRST_PID, f"Connect says pid {connected.task_pid}")
    pids = require(await tasks.pids(name), OK, what="Task.Pids").response.processes
    hold(FIRST_PID in [one.pid for one in pids], f"Pids says {[one.pid for one in pids]}")
    require(await tasks.wait(name, WAITS_S), NO_ANSWER, what="Task.Wait of what has not ended")


@case("Task calls that would change the sandbox are refused at once while it moves", "4.13")
async def changes_during(scene: Scene) -> None:
    await _imported(scene, "web")
    require(await scene.patch("web"), OK, what="Task.Create")
    require(await scene.dst.prepare(scene.session), OK, what="PrepareSandbox")
    for what, answer in (await scene.dst.tasks.changes(here("web"))).items():
        require(answer, FP, what=f"Task.{what} on the DST", names=(scene.session,))
    require(await scene.dst.tasks.kill(here("web")), FP, what="Task.Kill on the DST", names=(scene.session,))
    for what, answer in (await scene.src.tasks.changes("web")).items():
        require(answer, FP, what=f"Task.{what} on the SRC", names=(scene.session,))
    answer = await scene.src.tasks.create(scene.bundles.make({}), "own")
    require(answer, FP, what="Task.Create on the SRC", names=(scene.session,))


@case("Task.Kill is let through on the source until the blackout starts", "4.13", moves=True)
async def kill_during(scene: Scene) -> None:
    """Of a container that there is not: it is looked for while the guest runs there, and not any more afterwards."""
    await scene.connected(flowing=False)
    if (await scene.src.tasks.state("unknown")).code == UNIMPLEMENTED:
        raise Skipped("the shim serves no containerd.task.v3.Task")
    require(await scene.src.tasks.kill("none"), NF, what="Task.Kill on the SRC before the transfer")
    calling = scene.begin(scene.src.transfer(scene.session))
    await scene.wait_for(Side.SOURCE, "Transferring")
    require(await scene.src.tasks.kill("none"), NF, what="Task.Kill on the SRC while memory flows")
    assert scene.relay is not None
    scene.relay.flow()
    require(await calling, OK, what="TransferSandbox on the SRC")
    require(
        await scene.src.tasks.kill("none"),
        FP,
        what="Task.Kill on the SRC after the blackout began",
        names=(scene.session,),
    )
    require(await scene.dst.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME)")
    require(await scene.src.finalize(scene.session, STOP), OK, what="FinalizeSandbox(STOP)")


@case("Task.Kill is let through on a source whose move was cancelled before the blackout", "4.13")
async def kill_after_cancel(scene: Scene) -> None:
    await scene.export()
    if (await scene.src.tasks.state("unknown")).code == UNIMPLEMENTED:
        raise Skipped("the shim serves no containerd.task.v3.Task")
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    require(await scene.src.tasks.kill("none"), NF, what="Task.Kill in Cancelled")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME)")
    require(await scene.src.tasks.kill("none"), NF, what="Task.Kill in Finalized")
