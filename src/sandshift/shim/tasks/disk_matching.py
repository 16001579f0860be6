"""Which files of this host are the disks of a container that comes from elsewhere: the same content, disk by disk. Pure.

QEMU takes another disk under a running guest without a word, and the guest then reads what was never there: so each of
the container's read-only disks is matched by the digest of its content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sandshift.errors import IllegalMove

if TYPE_CHECKING:
    from sandshift.rootfs.plan import DiskFile, RootfsPlan
    from sandshift.sandbox.model import Container
    from sandshift.sandbox.shape import MachineShape


def needs_disks(container: Container) -> bool:
    """Whether anything of it is on a disk of its own."""
    return bool(container.layers or container.mounts)


def match(
    container: Container, shape: MachineShape, plan: RootfsPlan, folders: Sequence[DiskFile] = ()
) -> Mapping[str, DiskFile]:
    """Device id -> the file that is this disk here.

    Args:
        container: as its source knows it.
        shape: the machine that comes, with the digest of each disk.
        plan: the root file system that a Task.Create gives here. What it has for changes is not used: they come along.
        folders: the packed folders of its mounts here, in their order.

    Raises:
        IllegalMove: a disk has another content here, or there is another number of them; names both, for each.
    """
    wanted = {device.id: device.content_digest for device in shape.devices}
    problems = [
        *_differences("layer", container.layers, plan.layers, wanted),
        *_differences("mounted folder", container.mounts, folders, wanted),
    ]
    if problems:
        raise IllegalMove(
            f"container {container.container_id} has other files here than on the source: {'; '.join(problems)}: give it "
            "the same image, of the same platform, and the same mounts"
        )
    return dict(zip((*container.layers, *container.mounts), (*plan.layers, *folders), strict=True))


def _differences(
    what: str, device_ids: Sequence[str], files: Sequence[DiskFile], wanted: Mapping[str, str]
) -> list[str]:
    if len(device_ids) != len(files):
        return [f"{len(device_ids)} of {what} there, {len(files)} here"]
    return [
        f"{what} {device_id} is {wanted.get(device_id) or 'unknown'} there and {file.digest} here"
        for device_id, file in zip(device_ids, files, strict=True)
        if wanted.get(device_id) != file.digest
    ]
