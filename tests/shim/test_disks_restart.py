"""Disks and a shim that is killed and started again, on a fake VM that goes on."""

from __future__ import annotations

from pathlib import Path

from sandshift.rootfs.plan import DiskFile
from tests.shim.house import two_hosts


async def test_a_disk_that_no_container_has_is_taken_out_by_the_next_shim(tmp_path: Path) -> None:
    """Its container was being made when the shim was killed, and was not written down yet."""
    async with two_hosts(tmp_path) as both:
        assert both.source.server is not None
        disk = DiskFile(Path("/l"), "erofs", 4096, "sha256:1", read_only=True)
        await both.source.server.sandbox.disks.attach("half-made", disk)
        assert "disk1" in {device.id for device in both.source.server.sandbox.require_machine().shape.devices}
        await both.source.stop()
        await both.source.start()
        sandbox = both.source.server.sandbox
        assert sandbox.disks.all() == []
        assert "disk1" not in {device.id for device in sandbox.require_machine().shape.devices}
        assert sandbox.spec is not None
        assert sandbox.spec.shape == sandbox.require_machine().shape
