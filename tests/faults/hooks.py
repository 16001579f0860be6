"""Hooks around everything of a shim that a trap can name (`steps.py` lists them), put there from outside."""

from __future__ import annotations

from typing import Any

from sandshift.session.right_model import (
    DestroyVm,
    FrameRead,
    KeepLastStatement,
    Record,
    RightEvent,
    SendFrame,
)
from sandshift.session.states import Action
from sandshift.shim.migration.books import Books
from sandshift.shim.migration.destination import Destination
from sandshift.shim.migration.pacing import Pacer
from sandshift.shim.migration.service import MigrationService
from sandshift.shim.migration.session import Session
from sandshift.shim.migration.side import EventQueue, SessionSide
from sandshift.shim.migration.source import LOOKED, Source
from sandshift.vmm.machine import Machine, MachineEvent
from tests.faults.trap import Hooks


def install(hooks: Hooks) -> None:
    """Put a hook around everything that a trap can name (`steps.py` lists them)."""
    _around_calls(hooks)
    _around_records(hooks)
    _around_acts(hooks)
    _before_events(hooks)


def _around_calls(hooks: Hooks) -> None:
    def hook(method: str, name: str) -> None:
        original = getattr(MigrationService, method)

        async def handle(self: MigrationService, request: Any, context: Any) -> Any:
            action = f" {Action(request.action).name}" if name == "FinalizeSandbox" else ""
            hooks.step(f"asked {name}{action}")
            response = await original(self, request, context)
            hooks.step(f"answers {name}{action}")
            return response

        setattr(MigrationService, method, handle)

    hook("prepare_and_export_sandbox", "PrepareAndExportSandbox")
    hook("import_sandbox", "ImportSandbox")
    hook("prepare_sandbox", "PrepareSandbox")
    hook("create_duplicate_socket", "CreateDuplicateSocket")
    hook("transfer_sandbox", "TransferSandbox")
    hook("finalize_sandbox", "FinalizeSandbox")
    hook("cancel", "Cancel")
    hook("cleanup", "Cleanup")

    close = SessionSide.close

    async def close_with_hook(self: SessionSide) -> None:
        hooks.step("closes the session")
        await close(self)

    SessionSide.close = close_with_hook  # type: ignore[method-assign]


def _around_records(hooks: Hooks) -> None:
    write = SessionSide.write_record
    open_books = Books.open.__func__  # type: ignore[attr-defined]

    async def write_with_hooks(self: SessionSide, records: list[Record]) -> None:
        last = records[-1]
        hooks.step(f"writes {last.cell.name} {last.state.value}")
        await write(self, records)
        hooks.step(f"wrote {last.cell.name} {last.state.value}")

    async def open_with_hooks(cls: type[Books], *arguments: Any, **named: Any) -> Books:
        hooks.step("opens the books")
        books: Books = await open_books(cls, *arguments, **named)
        hooks.step("opened the books")
        return books

    SessionSide.write_record = write_with_hooks  # type: ignore[method-assign]
    Books.open = classmethod(open_with_hooks)  # type: ignore[assignment]


def _around_acts(hooks: Hooks) -> None:
    do, start, feed_soon = Session._do, Session._start, Session.feed_soon

    async def do_with_hooks(self: Session, step: Any) -> None:
        match step:
            case SendFrame(statement):
                name = f"{statement.cell.name} {statement.ask.name}"
                before, after = f"sends {name}", f"sent {name}"
            case DestroyVm():
                before, after = "destroys the VM", "destroyed the VM"
            case KeepLastStatement():
                before, after = "keeps the statement", "kept the statement"
            case _:
                before, after = "replies", "replied"
        hooks.step(before)
        await do(self, step)
        hooks.step(after)

    async def start_with_hooks(self: Session, licence: object) -> RightEvent:
        hooks.step("starts the vCPUs")
        outcome = await start(self, licence)
        hooks.step("started the vCPUs")
        return outcome

    def feed_soon_with_hook(self: Session, event: RightEvent) -> None:
        if isinstance(event, FrameRead):
            hooks.step(f"heard {event.statement.cell.name} {event.statement.ask.name}")
        feed_soon(self, event)

    Session._do = do_with_hooks  # type: ignore[method-assign]
    Session._start = start_with_hooks  # type: ignore[method-assign]
    Session.feed_soon = feed_soon_with_hook  # type: ignore[method-assign]


def _before_events(hooks: Hooks) -> None:
    on_source, on_destination, settle = Source._on_event, Destination._on_event, Source._settle

    def name_of(event: MachineEvent | None) -> str:
        if event is None:
            return "event tick"
        return f"event {event.name} {event.data.get('status', event.data.get('pass', ''))}".rstrip()

    async def source_with_hook(
        self: Source, machine: Machine, pacer: Pacer, events: EventQueue, event: MachineEvent | None
    ) -> None:
        if event is None or event.name != LOOKED:  # That one is the shim's own.
            hooks.step(name_of(event))
        await on_source(self, machine, pacer, events, event)

    async def destination_with_hook(self: Destination, machine: Machine, event: MachineEvent) -> None:
        hooks.step(name_of(event))
        await on_destination(self, machine, event)

    async def settle_with_hook(self: Source, machine: Machine, pacer: Pacer) -> None:
        await settle(self, machine, pacer)
        hooks.step("switched over")

    Source._on_event = source_with_hook  # type: ignore[method-assign]
    Destination._on_event = destination_with_hook  # type: ignore[method-assign]
    Source._settle = settle_with_hook  # type: ignore[method-assign]
