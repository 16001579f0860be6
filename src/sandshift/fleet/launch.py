"""Starting and stopping a sandbox without containerd: the calls that containerd would make, in its order."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.any_pb2 import Any as AnyMessage

import ttrpc
from sandshift.errors import AlreadyThere, IllegalMove, NotFound, Unavailable
from sandshift.fleet.calls import refuse_if_taken
from sandshift.fleet.host import NAMESPACE_DEFAULT, Host, delete_shim, start_shim
from sandshift.fleet.shim_client import Shim, connect, end_shim
from sandshift.status import from_status
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.sandshift import shim_pb2, state_pb2

CREATE_S: Final = 30.0
START_S: Final = 120.0
"""A cold start under TCG takes 3 s, and a template is built at the first start of its kind."""
STOP_S: Final = 10
"""How long the guest may take to power off before it is switched off."""
STOP_MARGIN_S: Final = 20.0
PROCESS_S: Final = 30.0
INIT_PROCESS: Final = "main"
"""Id of the process that a sandbox was started for."""


@dataclass(frozen=True, slots=True)
class Card:
    """The sandbox's network card."""

    addresses: tuple[str, ...]
    """With prefix length: "10.9.0.50/24"."""
    gateway: str = ""
    mac: str = ""
    """Empty: the shim makes one."""
    mtu: int = 0
    """0: the guest's default."""


@dataclass(frozen=True, slots=True)
class Wish:
    """The sandbox that is wanted. What is not said comes from the host's configuration."""

    sandbox_id: str
    namespace: str = NAMESPACE_DEFAULT
    memory_bytes: int = 0
    vcpus: int = 0
    hostname: str = ""
    card: Card | None = None
    cold: bool = False
    annotations: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> shim_pb2.SandboxOptions:
        cards = []
        if self.card is not None:
            cards.append(
                state_pb2.NetworkCard(
                    id="net0",
                    mac=self.card.mac,
                    addresses=self.card.addresses,
                    gateway=self.card.gateway,
                    mtu=self.card.mtu,
                )
            )
        return shim_pb2.SandboxOptions(
            memory_bytes=self.memory_bytes,
            vcpus=self.vcpus,
            hostname=self.hostname,
            network_cards=cards,
            cold=self.cold,
        )


async def launch(host: Host, wish: Wish) -> Shim:
    """Start a sandbox on `host` and answer the connection to its shim. All or nothing: a failure leaves nothing.

    Raises:
        AlreadyThere: the id is taken. Rejected, Blocked, NoRoom, Unavailable: what the shim says about the sandbox.
    """
    await refuse_if_taken(host, wish.namespace, wish.sandbox_id)
    shim: Shim | None = None
    ours = False
    try:
        await start_shim(host, wish.namespace, wish.sandbox_id)
        shim = await connect(host, wish.namespace, wish.sandbox_id)
        await _create(shim, wish)
        ours = True
        start = sandbox_pb2.StartSandboxRequest(sandbox_id=wish.sandbox_id)
        await shim.said(shim.sandbox.start_sandbox(start, timeout_s=START_S))
    except BaseException as error:
        if shim is not None:
            await shim.close()
        # Refused before it was created: somebody was faster with the same id, and it is not ours to remove.
        if ours or not isinstance(error, AlreadyThere | IllegalMove):
            await end_shim(host, wish.namespace, wish.sandbox_id)
        raise
    return shim


async def _create(shim: Shim, wish: Wish) -> None:
    options = AnyMessage()
    options.Pack(wish.options())
    create = sandbox_pb2.CreateSandboxRequest(
        sandbox_id=wish.sandbox_id, options=options, annotations=wish.annotations
    )
    await shim.said(shim.sandbox.create_sandbox(create, timeout_s=CREATE_S))


async def run_process(
    shim: Shim,
    arguments: tuple[str, ...],
    *,
    process_id: str = INIT_PROCESS,
    environment: Mapping[str, str] | None = None,
    cwd: str = "",
) -> int:
    """Start a process in the sandbox's VM; answers its pid there. Twice with the same id is one call."""
    request = shim_pb2.RunProcessRequest(
        process_id=process_id, args=arguments, env=dict(environment or {}), cwd=cwd
    )
    return (await shim.said(shim.shim.run_process(request, timeout_s=PROCESS_S))).pid


async def logs(
    shim: Shim, process_id: str, *, stream: int = 0, follow: bool = False
) -> AsyncIterator[shim_pb2.LogsResponse]:
    """What a process has written: 1 stdout, 2 stderr, 0 both. With `follow` until it ends."""
    request = shim_pb2.LogsRequest(process_id=process_id, stream=stream, follow=follow)
    try:
        async for response in shim.shim.logs(request):
            yield response
    except ttrpc.StatusError as error:
        raise from_status(error) from error


async def stop(host: Host, namespace: str, sandbox_id: str, *, grace_s: int = STOP_S) -> None:
    """Stop a sandbox and remove all that this host has of it. A shim that died is removed with what it left.

    Raises:
        NotFound: there is no such sandbox. IllegalMove: a migration session is open; names it and what to do.
    """
    if not host.has_shim(namespace, sandbox_id):
        raise NotFound(
            f"sandbox {sandbox_id} on host {host.name} does not exist; 'sandshift ls' shows those that do"
        )
    try:
        shim = await connect(host, namespace, sandbox_id)
    except Unavailable:
        await delete_shim(host, namespace, sandbox_id)
        return
    async with contextlib.aclosing(shim):
        await _refuse_if_it_moves(shim)
        with contextlib.suppress(NotFound):  # created, and never started
            request = sandbox_pb2.StopSandboxRequest(sandbox_id=sandbox_id, timeout_secs=grace_s)
            await shim.said(shim.sandbox.stop_sandbox(request, timeout_s=grace_s + STOP_MARGIN_S))
    await end_shim(host, namespace, sandbox_id)


async def _refuse_if_it_moves(shim: Shim) -> None:
    session = (await shim.status()).session
    if session.active:
        raise IllegalMove(
            f"sandbox {shim.sandbox_id} is in migration session {session.session_id!r} ({session.state}): finish or undo"
            f" it with 'sandshift migrate {shim.sandbox_id} --session {session.session_id} --to CONFIG', then stop it"
        )
