"""How a session begins on either side: what is checked, and what is written down before anything is answered.

Checks come first and change nothing; arming comes last (contract 4.1). A refusal leaves the sandbox as it was.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, TypeVar

from google.protobuf.any_pb2 import Any as AnyMessage

from sandshift.errors import Blocked, IllegalMove
from sandshift.sandbox import codec
from sandshift.sandbox.model import check_room
from sandshift.sandbox.patching import Patching
from sandshift.session import options as option_rules
from sandshift.session import saved
from sandshift.session.ids import SandboxId, SessionId, session_id
from sandshift.session.journal import Opened
from sandshift.session.options import Backend, Options
from sandshift.session.record import Record
from sandshift.session.right_model import new_party
from sandshift.session.statement import Seal, key_id
from sandshift.session.states import Call, Side, State, refusal
from sandshift.shim.migration.books import Books
from sandshift.shim.migration.checks import destination_blockers, source_blockers
from sandshift.shim.migration.destination import Destination
from sandshift.shim.migration.session import first_ask_number
from sandshift.shim.migration.source import Source

if TYPE_CHECKING:
    from sandshift.config import Limits
    from sandshift.sandbox.model import Sandbox
    from sandshift.sandbox.shape import MachineShape
    from sandshift.shim.sandbox import LiveSandbox
    from sandshift.wire.migration import messages_pb2, options_pb2

T = TypeVar("T", Source, Destination)

GUEST_ROOT: Final = "disk0"
UNKNOWN_BACKEND: Final = Backend("QEMU", memory_digest=True)


def init_options(
    request: messages_pb2.PrepareAndExportSandboxRequest | messages_pb2.PrepareSandboxRequest,
) -> options_pb2.InitializeOptions | None:
    return request.init_options if request.HasField("init_options") else None


def require_room(model: Sandbox, shape: MachineShape, limits: Limits) -> None:
    """Raises NoRoom for more containers or disks, beside the guest's own root, than one sandbox may move with (contract 5)."""
    disks = sum(device.size_bytes > 0 and device.id != GUEST_ROOT for device in shape.devices)
    check_room(model, disks=disks, containers_max=limits.containers_max, disks_max=limits.disks_max)


class Opening:
    def __init__(self, sandbox: LiveSandbox) -> None:
        self._sandbox = sandbox

    # Source

    async def export(self, request: messages_pb2.PrepareAndExportSandboxRequest) -> tuple[Source, AnyMessage]:
        """Raises Rejected for options that cannot be honoured, Blocked naming everything that stands in the way."""
        sandbox = self._sandbox
        named = session_id(request.session_id)
        options = self._options(request)
        blockers = await source_blockers(sandbox)
        if blockers:
            raise Blocked(f"sandbox {sandbox.sandbox_id} cannot move", blockers)
        assert sandbox.spec is not None, "a sandbox that may move has a VM"
        require_room(sandbox.frozen_model(), sandbox.spec.shape, sandbox.config.migration.limits)
        state = self._saved_state(named, options)
        config = saved.encode(state)
        source = await self._begin(Source, named, options, state, config)
        return source, config

    def _options(self, request: messages_pb2.PrepareAndExportSandboxRequest) -> Options:
        spec = self._sandbox.spec
        backend = UNKNOWN_BACKEND
        if spec is not None:
            backend = Backend.qemu(spec.shape.qemu_version, shared_memory=spec.shape.shared_memory)
        return option_rules.parse(init_options(request), backend=backend)

    def _saved_state(self, named: SessionId, options: Options) -> saved.SavedState:
        sandbox = self._sandbox
        assert sandbox.spec is not None, "a sandbox that may move has a VM"
        return saved.SavedState(
            session_id=named,
            session_key=secrets.token_bytes(saved.SESSION_KEY_BYTES),
            sandbox=codec.sandbox_to_proto(sandbox.frozen_model()),
            machine=codec.shape_to_proto(sandbox.spec.shape),
            options=options,
            encrypted=sandbox.config.migration.encryption != "off",
            exported_at_us=sandbox.clock_us(),
        )

    def exported_again(
        self, request: messages_pb2.PrepareAndExportSandboxRequest, active: Source | Destination
    ) -> AnyMessage:
        """The same blob for the same options; others are refused."""
        if self._options(request) != active.options:
            error = refusal(Call.PREPARE_AND_EXPORT, active.session.standing)
            raise IllegalMove(f"{error.message}; the options are not those of the first call")
        return AnyMessage.FromString(active.books.config)

    # Destination

    async def import_sandbox(self, request: messages_pb2.ImportSandboxRequest) -> Destination:
        sandbox = self._sandbox
        named = session_id(request.session_id)
        wanted = saved.read_import(request, own=SandboxId(sandbox.sandbox_id))
        state = saved.decode(wanted.config, expected=named)
        if not sandbox.life.vacant:
            raise IllegalMove(
                f"sandbox {sandbox.sandbox_id} is {sandbox.life.value}: a sandbox is imported into a shim that has none; "
                "create it with the annotation io.sandshift.migration.destination=true"
            )
        model = codec.sandbox_from_proto(state.sandbox).moved_into(sandbox.sandbox_id)
        shape = codec.shape_from_proto(state.machine)
        require_room(model, shape, sandbox.config.migration.limits)
        destination = await self._begin(Destination, named, state.options, state, wanted.config)
        destination.patching = Patching(model)
        destination.shape, destination.exported_at_us = shape, state.exported_at_us
        if wanted.revision is saved.Revision.HEAD:
            destination.head_was_seen()
        return destination

    def imported_again(
        self, request: messages_pb2.ImportSandboxRequest, active: Source | Destination
    ) -> None:
        wanted = saved.read_import(request, own=SandboxId(self._sandbox.sandbox_id))
        held = AnyMessage.FromString(active.books.config)
        if saved.config_digest(wanted.config) != saved.config_digest(held):
            error = refusal(Call.IMPORT, active.session.standing)
            raise IllegalMove(f"{error.message}; the config is not that of the first call")

    async def prepare(self, request: messages_pb2.PrepareSandboxRequest, destination: Destination) -> None:
        """Raises IllegalMove naming containers that were not created here yet, Blocked naming everything that only this host
        knows to stand in the way; nothing has changed then."""
        destination.patching.require_complete()
        await destination.find_disks()
        shape = destination.shape
        backend = Backend.qemu(shape.qemu_version, shared_memory=shape.shared_memory)
        held = AnyMessage.FromString(destination.books.config)
        options = option_rules.parse(
            init_options(request), backend=backend, own_compatibility_data=saved.compatibility_data(held)
        )
        blockers, warnings = await destination_blockers(
            self._sandbox,
            destination.model,
            destination.shape,
            exported_at_us=destination.exported_at_us,
            encrypted=destination.books.encrypted,
        )
        if request.HasField("init_options"):
            blockers += option_rules.disagreements(destination.options, options)
        if blockers:
            raise Blocked(f"sandbox {self._sandbox.sandbox_id} cannot come to this host", blockers)
        destination.session.warnings += warnings
        await destination.prepare()

    # Both

    async def _begin(
        self, kind: type[T], named: SessionId, options: Options, state: saved.SavedState, config: AnyMessage
    ) -> T:
        sandbox = self._sandbox
        side = Side.SOURCE if kind is Source else Side.DESTINATION
        first = State.SOURCE_EXPORTED if side is Side.SOURCE else State.DESTINATION_IMPORTED
        party = new_party(side, named, first, next_ask=first_ask_number())
        opened = Opened(
            side=side.name,
            session_id=named,
            sandbox_id=sandbox.sandbox_id,
            key_id=key_id(state.session_key),
            options=option_rules.to_proto(options).SerializeToString(),
            encrypted=state.encrypted,
            config_digest=saved.config_digest(config),
            opened_at_us=sandbox.clock_us(),
        )
        books = await Books.open(
            sandbox.places,
            sandbox.disk,
            opened,
            party.record,
            key=state.session_key,
            config=config.SerializeToString(),
        )
        bounds = option_rules.limits(options, sandbox.config.migration.limits)
        return kind(sandbox, books, party, Seal(named, state.session_key), options, bounds, Record(side))
