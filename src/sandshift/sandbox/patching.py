"""Patches: how an imported sandbox's containers get their places on the new host (contract 4.4).

A Task.Create with the source-container annotation is a patch: it names a container of the source and supplies the new
id, bundle, stdio and rootfs. Any order, the sandbox container among them; the same again changes nothing; a refusal
leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec

from sandshift.errors import AlreadyThere, Damaged, IllegalMove, NotFound
from sandshift.sandbox.model import Sandbox


class Mount(msgspec.Struct, frozen=True):
    """One mount of a container's root file system, as the snapshotter of this host gives it."""

    type: str
    source: str
    target: str = ""
    options: tuple[str, ...] = ()


class Patch(msgspec.Struct, frozen=True):
    """What one Task.Create at the destination supplies."""

    source_id: str
    """The container's id on the source: the annotation's value."""
    container_id: str
    """Its id here."""
    bundle: str = ""
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False
    rootfs: tuple[Mount, ...] = ()


@dataclass(frozen=True, slots=True)
class Patching:
    """An imported sandbox, and what has been supplied for its containers so far."""

    sandbox: Sandbox
    """As imported: containers under their ids of the source."""
    applied: Mapping[str, Patch] = field(default_factory=lambda: MappingProxyType({}))
    """By id of the source."""

    @property
    def pending(self) -> tuple[str, ...]:
        """Ids of the source's containers for which nothing was supplied yet, sorted."""
        return tuple(sorted({one.container_id for one in self.sandbox.containers} - self.applied.keys()))

    def pid_of(self, source_id: str) -> int:
        """The saved pid of a container's init, which Task.Create and Task.Start answer."""
        return next((one.pid for one in self.sandbox.containers if one.container_id == source_id), 0)

    def patched_as(self, container_id: str) -> Patch | None:
        """The patch that made `container_id` here, if one did."""
        return next((patch for patch in self.applied.values() if patch.container_id == container_id), None)

    def apply(self, patch: Patch) -> Patching:
        """What follows from a patch. The same patch again changes nothing.

        Raises:
            NotFound: the sandbox has no such container.
            AlreadyThere: it was patched with other values, or its new id is another container's.
        """
        before = self.applied.get(patch.source_id)
        if before == patch:
            return self
        if before is not None:
            raise AlreadyThere(
                f"container {patch.source_id} of the source is {before.container_id} here already, made with other "
                f"values: {', '.join(_differing(before, patch))}"
            )
        if patch.source_id not in {one.container_id for one in self.sandbox.containers}:
            raise NotFound(
                f"the sandbox has no container {patch.source_id} that is pending a patch; pending: "
                f"{', '.join(self.pending) or 'none'}"
            )
        if (other := self.patched_as(patch.container_id)) is not None:
            raise AlreadyThere(
                f"container id {patch.container_id} is taken here by container {other.source_id} of the source"
            )
        return replace(self, applied=MappingProxyType({**self.applied, patch.source_id: patch}))

    def require_complete(self) -> None:
        """Raises IllegalMove, naming what is pending."""
        if self.pending:
            raise IllegalMove(
                f"containers {', '.join(self.pending)} of the source are pending a patch: create each with annotation "
                "io.microsoft.migration.source-container-id before PrepareSandbox"
            )

    def patched(self) -> Sandbox:
        """The sandbox with its containers under their ids of this host; those not patched keep the source's."""
        containers = tuple(
            replace(one, container_id=patch.container_id)
            if (patch := self.applied.get(one.container_id))
            else one
            for one in self.sandbox.containers
        )
        return replace(self.sandbox, containers=containers)


def patch_bytes(patch: Patch) -> bytes:
    """A patch for the journal."""
    return msgspec.msgpack.encode(patch)


def patch_from_bytes(data: bytes) -> Patch:
    """What `patch_bytes` wrote.

    Raises:
        Damaged: it did not.
    """
    try:
        return msgspec.msgpack.decode(data, type=Patch)
    except msgspec.MsgspecError as error:
        raise Damaged("a patch in the journal cannot be read") from error


def _differing(one: Patch, other: Patch) -> list[str]:
    return [name for name in Patch.__struct_fields__ if getattr(one, name) != getattr(other, name)]
