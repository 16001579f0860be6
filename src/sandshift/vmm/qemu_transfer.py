"""Transfers of one QEMU, out and in: over a channel, or to and from a template file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from sandshift.errors import Damaged, PeerProtocolError, SandshiftError, TimedOut, Unavailable
from sandshift.vmm import psk, transfer
from sandshift.vmm.channel import Channel
from sandshift.vmm.control import Control
from sandshift.vmm.events import EventStream
from sandshift.vmm.machine import (
    ChannelSecurity,
    MachineEvent,
    MigrationInfo,
    MigrationStatus,
    RunState,
    TransferSettings,
)
from sandshift.vmm.process import VmProcess

KEYS_FOLDER: Final = "keys"
CHANNEL_NAME: Final = "channel"
"""Of the descriptor that a transfer uses up."""
TEMPLATE_NAME: Final = "template"

CANCEL_S: Final = 10.0
HANDSHAKE_LOOK_S: Final = 0.25
TEMPLATE_S: Final = 120.0
"""For writing or reading a whole guest: a slow disk and 8 GiB."""
RESUME_TRIES_MAX: Final = 200
RESUME_WAIT_S: Final = 0.01
TOTALS_TRIES_MAX: Final = 5
TOTALS_WAIT_S: Final = 0.002
"""QEMU announces `completed` a moment before it fills in the totals."""


class Transfers:
    """Made by QemuMachine, which passes on each MIGRATION event before anybody else sees it.

    Args:
        control: the conversation with QEMU.
        process: its process.
        subscribe: gives a listener to the machine's events.
        tell: passes on an event that QEMU owes us.
    """

    def __init__(
        self,
        control: Control,
        process: VmProcess,
        *,
        subscribe: Callable[[], EventStream],
        tell: Callable[[MachineEvent], None],
    ) -> None:
        self._control = control
        self._process = process
        self._subscribe = subscribe
        self._tell = tell
        self._keys_folder = process.run_dir / KEYS_FOLDER
        self.incoming = False
        """A guest is expected or coming in: `cont` would be taken as a wish for later."""
        self._may_send = False
        """A transfer out was begun, by us or perhaps by an earlier shim."""
        self._channel: Channel | None = None
        """Held while a transfer goes on, to end it for the peer too if our VM process fails."""
        self._copies_kept = 0
        """Of the channel, in QEMU, beside the one that its transfer uses (Machine.keep_channel)."""
        self._receiving = MigrationStatus.NONE
        """The last that QEMU said of a transfer in."""
        self._never_began = False
        """A transfer in ended before QEMU took it up, of which QEMU says nothing."""
        self._credentials_made = 0
        self._task_handshake: asyncio.Task[None] | None = None

    async def find_out(self) -> None:
        """What an earlier shim had begun."""
        self.incoming = await self._control.run_state() is RunState.INMIGRATE
        self._may_send = not self.incoming

    async def being_sent(self) -> bool:
        """Whether a transfer out that is not over has stopped the guest. Asks QEMU only if there may be one."""
        for _ in range(RESUME_TRIES_MAX):
            if not self._may_send or await self._control.run_state() is not RunState.FINISH_MIGRATE:
                return False
            if transfer.is_under_way((await self.info()).status):
                return True
            # It failed: QEMU says so a moment before it resumes the guest.
            await asyncio.sleep(RESUME_WAIT_S)
        return True

    async def send(self, channel_fd: int, security: ChannelSecurity, settings: TransferSettings) -> None:
        values = transfer.parameters(settings)
        self._may_send = True
        try:
            await self._arm(transfer.capabilities_out(settings), values, security, sending=True)
            await self._give_channel(channel_fd)
            await self._control.do("send the guest", "migrate", {"uri": f"fd:{CHANNEL_NAME}"})
        except BaseException:
            await self._forget_channel()
            raise
        finally:
            psk.remove_keys(self._keys_folder)  # The sending side read it when the credentials were made.

    async def receive(self, channel_fd: int, security: ChannelSecurity) -> None:
        try:
            await self._arm(transfer.capabilities_in(), {}, security, sending=False)
            await self._give_channel(channel_fd)
            await self._control.do("receive a guest", "migrate-incoming", self._from(CHANNEL_NAME))
        except BaseException:
            await self._forget_channel()
            psk.remove_keys(self._keys_folder)
            raise
        # Ends with the handshake, or with us. Its exceptions are all handled inside.
        watch = self._watch_handshake()
        self._task_handshake = asyncio.create_task(watch, name=f"vm tls {self._control.name}")

    async def switch_over(self) -> None:
        state = {"state": MigrationStatus.PRE_SWITCHOVER.value}
        await self._control.do("switch over", "migrate-continue", state)

    async def cancel(self) -> None:
        if self.incoming:
            return
        with self._listening() as listener:
            if not transfer.is_under_way((await self.info()).status):
                return
            await self._control.do("cancel the transfer", "migrate_cancel")
            await self._ended(listener, CANCEL_S, "be cancelled")

    async def tune(self, settings: TransferSettings) -> None:
        values = transfer.parameters(settings)
        await self._control.do("change the transfer's settings", "migrate-set-parameters", values)

    async def info(self) -> MigrationInfo:
        for _ in range(TOTALS_TRIES_MAX):
            answer = await self._control.ask("query-migrate")
            info = transfer.migration_info(answer)
            unfilled = isinstance(answer, Mapping) and answer.get("total-time") == 0
            if not (info.status is MigrationStatus.COMPLETED and unfilled):
                break
            await asyncio.sleep(TOTALS_WAIT_S)
        if self._never_began and info.status in (MigrationStatus.NONE, MigrationStatus.SETUP):
            info = replace(info, status=MigrationStatus.FAILED)
        if self.incoming and info.status is MigrationStatus.FAILED:
            # A receiving QEMU says why on its standard error only.
            return transfer.with_error(info, self._process.stderr_tail())
        return info

    async def save(self, path: Path) -> None:
        """Write the guest, which is stopped, to a new file."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        values: transfer.Json = {"max-bandwidth": transfer.UNLIMITED_BYTES_PER_S}
        try:
            with self._listening() as listener:
                await self._arm(transfer.capabilities_file(), values, ChannelSecurity(), sending=True)
                await self._control.give_fd(TEMPLATE_NAME, fd)
                await self._control.do("save the guest", "migrate", {"uri": f"fd:{TEMPLATE_NAME}"})
                await self._completed(listener, f"be saved to {path}")
            await asyncio.to_thread(os.fsync, fd)
        except BaseException:
            _remove(path)
            raise
        finally:
            os.close(fd)

    async def load(self, template: Path) -> None:
        """Take the guest in that `save` wrote.

        Raises:
            Damaged: QEMU cannot read it as a guest of this shape.
        """
        fd = os.open(template, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self._listening() as listener:
                await self._arm(transfer.capabilities_file(), {}, ChannelSecurity(), sending=False)
                await self._control.give_fd(TEMPLATE_NAME, fd)
                await self._control.do("load the template", "migrate-incoming", self._from(TEMPLATE_NAME))
                await self._completed(listener, f"be loaded from {template}")
        finally:
            os.close(fd)

    def on_migration(self, status: MigrationStatus) -> None:
        """QEMU, or we in its stead, said how a transfer stands."""
        if self.incoming:
            self._receiving = status
            if status is not MigrationStatus.SETUP:
                psk.remove_keys(self._keys_folder)  # The handshake is over.
        if transfer.has_ended(status):
            self.end_channel(whole=status is MigrationStatus.COMPLETED)
        if status is MigrationStatus.COMPLETED:
            self.incoming = False

    def end_channel(self, *, whole: bool) -> None:
        """Our hold on the channel ends; unless `whole`, so does the channel. Idempotent."""
        if self._channel is not None:
            if not whole:
                self._channel.shut_down()
            self._channel.close()
            self._channel = None

    def let_go(self) -> None:
        """Stop watching; what goes on goes on."""
        if self._task_handshake is not None:
            self._task_handshake.cancel()
        self.end_channel(whole=True)

    def remove_keys(self) -> None:
        psk.remove_keys(self._keys_folder)

    async def _arm(
        self,
        capabilities: list[transfer.Json],
        values: transfer.Json,
        security: ChannelSecurity,
        *,
        sending: bool,
    ) -> None:
        credentials = await self._make_credentials(security, sending=sending)
        doing = "arm a transfer"
        await self._control.do(doing, "migrate-set-capabilities", {"capabilities": capabilities})
        await self._control.do(doing, "migrate-set-parameters", {**values, "tls-creds": credentials})

    async def _make_credentials(self, security: ChannelSecurity, *, sending: bool) -> str:
        """The id of a credentials object for this key; empty without a key. Each transfer has its own."""
        if not security.psk:
            return ""
        self._credentials_made += 1
        object_id = f"psk-{time.monotonic_ns()}-{self._credentials_made}"  # An earlier shim made some too.
        psk.write_keys(self._keys_folder, security.psk)
        arguments = psk.credentials(object_id, self._keys_folder, sending=sending)
        await self._control.do("take the channel's key", "object-add", arguments)
        return object_id

    async def _give_channel(self, channel_fd: int) -> None:
        self.end_channel(whole=True)
        self._channel = Channel(channel_fd)
        self._copies_kept = self._channel.copies_in(self._process.pid)
        await self._control.give_fd(CHANNEL_NAME, channel_fd)
        self._channel.never_block()

    async def _forget_channel(self) -> None:
        self.end_channel(whole=True)
        with contextlib.suppress(SandshiftError):
            await self._control.close_fd(CHANNEL_NAME)

    def _from(self, fd_name: str) -> dict[str, object]:
        arguments: dict[str, object] = {"uri": f"fd:{fd_name}"}
        if self._control.version >= (9, 1, 0):
            # Stay alive after a failure, so that its reason can be asked for.
            arguments["exit-on-error"] = False
        return arguments

    @contextlib.contextmanager
    def _listening(self) -> Iterator[EventStream]:
        listener = self._subscribe()
        try:
            yield listener
        finally:
            listener.close()

    async def _completed(self, listener: EventStream, what: str) -> None:
        await self._ended(listener, TEMPLATE_S, what)
        info = await self.info()
        if info.status is not MigrationStatus.COMPLETED:
            raise Damaged(f"sandbox {self._control.name} could not {what}: {info.error or info.status.value}")

    async def _ended(self, listener: EventStream, timeout_s: float, what: str) -> None:
        name = self._control.name
        try:
            async with asyncio.timeout(timeout_s):
                async for event in listener:
                    if event.name == "MIGRATION" and transfer.has_ended(status_of(event)):
                        return
        except TimeoutError as error:
            raise TimedOut(f"sandbox {name}: a transfer did not {what} within {timeout_s:g} s") from error
        raise Unavailable(f"sandbox {name}: QEMU ended before a transfer could {what}")

    async def _watch_handshake(self) -> None:
        """A receiving QEMU whose handshake failed prints that and closes the socket; its status stays `setup`."""
        while self._channel is not None and self._receiving in (MigrationStatus.NONE, MigrationStatus.SETUP):
            await asyncio.sleep(HANDSHAKE_LOOK_S)
            if self._channel is None or self._channel.copies_in(self._process.pid) > self._copies_kept:
                continue
            with contextlib.suppress(SandshiftError):
                if (await self.info()).status is MigrationStatus.SETUP:
                    self._never_began = True
                    failed = {"status": MigrationStatus.FAILED.value}
                    self._tell(MachineEvent("MIGRATION", failed, time.time_ns() // 1000))


def status_of(event: MachineEvent) -> MigrationStatus:
    """What a MIGRATION event says; NONE for a state that nobody here acts on."""
    try:
        return transfer.migration_status(str(event.data.get("status", "none")))
    except PeerProtocolError:
        return MigrationStatus.NONE


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
