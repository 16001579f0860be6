"""What is looked at on this host before anything moves; what it means is decided in `sandbox/preflight.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sandshift.errors import Blocker, SandshiftError
from sandshift.sandbox import codec, preflight
from sandshift.sandbox.preflight import DiskFacts
from sandshift.session import options as option_rules
from sandshift.session import saved
from sandshift.session.options import Backend, Options
from sandshift.shim.sandbox import Life
from sandshift.vmm.machine import RunState
from sandshift.wire.sandshift import shim_pb2

if TYPE_CHECKING:
    from sandshift.sandbox.model import Sandbox
    from sandshift.sandbox.shape import MachineShape
    from sandshift.shim.sandbox import LiveSandbox


async def source_blockers(sandbox: LiveSandbox) -> list[Blocker]:
    """Everything that the source can know to stand in the way of a move. Looks only."""
    machine, spec = sandbox.machine, sandbox.spec
    if sandbox.life is not Life.READY or machine is None or spec is None or not machine.alive:
        return [
            Blocker(
                "sandbox.state", f"it is {sandbox.life.value}", "start it first: only a running sandbox moves"
            )
        ]
    found = []
    if (state := await machine.run_state()) is not RunState.RUNNING:
        found.append(
            Blocker(
                "sandbox.state", f"its VM is {state.value}", "resume it first: only a running sandbox moves"
            )
        )
    return found + preflight.source_blockers(sandbox.frozen_model(), spec.shape)


async def destination_blockers(
    sandbox: LiveSandbox,
    model: Sandbox,
    shape: MachineShape,
    *,
    exported_at_us: int,
    encrypted: bool,
    containers_come: bool = False,
) -> tuple[list[Blocker], list[str]]:
    """Everything that only this host can know, and warnings.

    Args:
        sandbox: that of this host, which receives.
        model, shape: what comes.
        exported_at_us: the source host's clock at its export.
        encrypted: whether the source encrypts.
        containers_come: its containers are still to be created here; only then can their disks be compared.
    """
    facts = await sandbox.parts.machines.facts(shape)
    here = _of_containers(model, shape) if containers_come else _plugged(sandbox)
    facts = replace(facts, disks=dict(facts.disks or {}) | here)
    if sandbox.wish.network_namespace:
        facts = replace(facts, addresses=await _addresses(sandbox, model))
    found = preflight.destination_blockers(model, shape, facts)
    if not encrypted and sandbox.config.migration.encryption != "off":
        found.append(
            Blocker(
                "migration.encryption",
                "the source sends in the clear and this host demands TLS-PSK",
                'set migration.encryption to "tls-psk" on the source, or to "off" here',
            )
        )
    return sorted(found), preflight.clock_warnings(exported_at_us, facts)


async def _addresses(sandbox: LiveSandbox, model: Sandbox) -> dict[str, tuple[str, ...]]:
    """What the pod's network here gives to each of the guest's cards, by their order; nothing where it has fewer."""
    cards = await sandbox.parts.taps.pod_cards(sandbox.sandbox_id, sandbox.wish.network_namespace)
    here = {card.id: card.addresses for card in cards}
    return {card.id: here.get(card.id, ()) for card in model.network_cards}


def _plugged(sandbox: LiveSandbox) -> dict[str, DiskFacts]:
    """The disks of containers that were created here."""
    return {disk.device.id: DiskFacts(disk.file.size_bytes, disk.file.digest) for disk in sandbox.disks.all()}


def _of_containers(model: Sandbox, shape: MachineShape) -> dict[str, DiskFacts]:
    """The disks that Task.Create will bring."""
    theirs = {name for one in model.containers for name in (*one.layers, *one.mounts)}
    return {
        device.id: DiskFacts(device.size_bytes, device.content_digest)
        for device in shape.devices
        if device.id in theirs
    }


async def preflight_source(
    sandbox: LiveSandbox, request: shim_pb2.PreflightRequest
) -> shim_pb2.PreflightResponse:
    """What stands in the way here, and the sandbox's description for the destination."""
    blockers = await source_blockers(sandbox)
    response = shim_pb2.PreflightResponse()
    if sandbox.spec is not None:
        options, problems = _options(request, sandbox.spec.shape)
        blockers += problems
        description = saved.Description(
            sandbox=codec.sandbox_to_proto(sandbox.frozen_model()),
            machine=codec.shape_to_proto(sandbox.spec.shape),
            options=options,
            encrypted=sandbox.config.migration.encryption != "off",
            exported_at_us=sandbox.clock_us(),
        )
        response.description = saved.describe(description)
    response.blockers.extend(_messages(blockers))
    return response


async def preflight_destination(
    sandbox: LiveSandbox, request: shim_pb2.PreflightRequest
) -> shim_pb2.PreflightResponse:
    """What stands in the way of the described sandbox here."""
    described = saved.read_description(request.description)
    model = codec.sandbox_from_proto(described.sandbox)
    shape = codec.shape_from_proto(described.machine)
    blockers, warnings = await destination_blockers(
        sandbox,
        model,
        shape,
        exported_at_us=described.exported_at_us,
        encrypted=described.encrypted,
        containers_come=True,
    )
    if not sandbox.life.vacant:
        blockers.append(Blocker("sandbox.id", f"{sandbox.sandbox_id} exists on this host", "stop it first"))
    blockers += _options(request, shape)[1]
    return shim_pb2.PreflightResponse(blockers=_messages(blockers), warnings=warnings)


def _options(request: shim_pb2.PreflightRequest, shape: MachineShape) -> tuple[Options, list[Blocker]]:
    backend = Backend.qemu(shape.qemu_version, shared_memory=shape.shared_memory)
    try:
        message = request.init_options if request.HasField("init_options") else None
        return option_rules.parse(message, backend=backend), []
    except SandshiftError as error:
        return Options(), [Blocker("init_options", error.message, "change the options")]


def _messages(blockers: list[Blocker]) -> list[shim_pb2.Blocker]:
    return [
        shim_pb2.Blocker(subject=one.subject, problem=one.problem, remedy=one.remedy)
        for one in sorted(set(blockers))
    ]
