"""Finding a disk by its place."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import ttrpc
from sandshift.agent import disks


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A guest in which disk 3 is sdc; a plain file stands for the device."""
    (tmp_path / "sys/bus/scsi/devices/0:0:0:3/block/sdc").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/sdc").touch()
    monkeypatch.setattr(Path, "is_block_device", Path.is_file)
    return tmp_path


async def test_a_disk_is_found_by_its_place(root: Path) -> None:
    assert await disks.wait_for(3, root) == str(root / "dev/sdc")
    with pytest.raises(ttrpc.StatusError, match="disk 4 has not appeared in the guest within 0 s"):
        await disks.wait_for(4, root, appears_s=0)


async def test_a_node_without_its_disk_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def not_yet(path: Path, flags: int) -> int:
        tried.append(path)
        if len(tried) < 3:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return whole(path, flags)

    whole = os.open
    monkeypatch.setattr(os, "open", not_yet)
    assert await disks.wait_for(3, root) == str(root / "dev/sdc")
    assert len(tried) == 3
