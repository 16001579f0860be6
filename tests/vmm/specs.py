"""Specs for machines of the tests."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

from sandshift.sandbox.shape import MachineShape
from sandshift.vmm.machine import DiskSource, MachineSpec
from sandshift.vmm.standard import DiskPlan, standard_shape
from tests.vmm.guest import COMMAND_LINE

MEMORY_BYTES = 128 << 20


def shape(
    *, disks: tuple[DiskPlan, ...] = (), macs: tuple[str, ...] = (), memory_bytes: int = MEMORY_BYTES
) -> MachineShape:
    return standard_shape(
        machine_type="pc-q35-10.0",
        accelerator="tcg",
        cpu_model="max",
        qemu_version="10.0.2",
        memory_bytes=memory_bytes,
        vcpus=1,
        kernel_command_line=COMMAND_LINE,
        kernel_sha256="",
        initramfs_sha256="",
        uuid=str(uuid.uuid4()),
        generation_id=str(uuid.uuid4()),
        disks=disks,
        macs=macs,
        shared_memory=True,
    )


def fresh_spec(
    run_dir: Path,
    name: str,
    kernel: Path,
    initramfs: Path,
    *,
    like: MachineSpec | None = None,
    disk: Path | None = None,
) -> MachineSpec:
    """A spec in `run_dir`, which is made: of a new sandbox, or of the same as `like`."""
    run_dir.mkdir(mode=0o700, exist_ok=True)
    if like is not None:
        return replace(like, name=name, run_dir=run_dir)
    plans = (DiskPlan(disk.stat().st_size, "sha256:given"),) if disk else ()
    sources = (DiskSource("disk0", disk),) if disk else ()
    return MachineSpec(
        name=name,
        shape=shape(disks=plans),
        run_dir=run_dir,
        kernel=kernel,
        initramfs=initramfs,
        disks=sources,
    )
