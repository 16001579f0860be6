from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from sandshift.errors import Rejected
from sandshift.sandbox.shape import Device
from sandshift.vmm.command import Sockets, command_line
from sandshift.vmm.machine import DiskSource, MachineSpec
from sandshift.vmm.standard import DiskPlan, card_device, disk_device, standard_shape
from tests.vmm.specs import shape

SOCKETS = Sockets(qmp_fd=7, agent_fd=8)


def spec(**changes: object) -> MachineSpec:
    made = MachineSpec(
        name="s,1",
        shape=shape(disks=(DiskPlan(1 << 20, "sha256:a"),), macs=("52:54:00:00:00:01",)),
        run_dir=Path("/run/a,b"),
        kernel=Path("/boot/vmlinuz"),
        initramfs=Path("/boot/initramfs"),
        disks=(DiskSource("disk0", Path("/images/root,1.erofs")),),
        taps={"net0": "tap0"},
    )
    return replace(made, **changes)


def line(of: MachineSpec, **options: object) -> list[str]:
    return command_line(of, binary="qemu", sockets=SOCKETS, **options)


def values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == option]


def devices(arguments: list[str]) -> dict[str, dict[str, object]]:
    return {device["id"]: device for device in map(json.loads, values(arguments, "-device"))}


def test_virtual_cpus_never_start_by_themselves() -> None:
    assert "-S" in line(spec())
    assert "-S" in line(spec(), incoming=True)


def test_only_a_destination_waits_for_a_guest() -> None:
    assert values(line(spec()), "-incoming") == []
    assert values(line(spec(), incoming=True), "-incoming") == ["defer"]


def test_source_and_destination_differ_in_nothing_else() -> None:
    made = spec()
    assert [part for part in line(made, incoming=True) if part not in ("-incoming", "defer")] == line(made)


def test_every_device_stands_at_the_address_of_the_shape() -> None:
    found = devices(line(spec()))
    assert found["serial0"]["addr"] == "0x5"
    assert found["scsi0"]["addr"] == "0x6"
    assert found["net0"]["addr"] == "0x8"
    assert found["net0"]["mac"] == "52:54:00:00:00:01"
    assert found["net0"]["romfile"] == ""
    assert (found["disk0"]["channel"], found["disk0"]["scsi-id"], found["disk0"]["lun"]) == (0, 0, 0)
    assert found["agent"] == {
        "driver": "virtserialport",
        "id": "agent",
        "bus": "serial0.0",
        "nr": 1,
        "chardev": "agent",
        "name": "sandshift.agent",
    }


def test_a_read_only_disk_is_read_only_in_both_layers_and_keeps_its_locks() -> None:
    (node,) = map(json.loads, values(line(spec()), "-blockdev"))
    assert node["read-only"] is True
    assert node["file"] == {"driver": "file", "filename": "/images/root,1.erofs", "read-only": True}


def test_a_writable_disk_is_writable() -> None:
    writable = shape(disks=(DiskPlan(1 << 20, read_only=False),))
    (node,) = map(json.loads, values(line(spec(shape=writable, taps={})), "-blockdev"))
    assert node["read-only"] is False
    assert node["file"]["read-only"] is False


def test_commas_in_names_and_paths_do_not_end_an_option() -> None:
    arguments = line(spec())
    assert values(arguments, "-name") == ["guest=s,,1"]
    assert "file,id=console,path=/run/a,,b/console,append=on" in values(arguments, "-chardev")


def test_taps_come_without_scripts_and_without_vhost() -> None:
    (network,) = map(json.loads, values(line(spec()), "-netdev"))
    assert network == {
        "type": "tap",
        "id": "net0-tap",
        "ifname": "tap0",
        "script": "no",
        "downscript": "no",
        "vhost": False,
    }


def test_a_card_may_be_unplugged_but_not_forgotten() -> None:
    assert values(line(spec(taps={"net0": ""})), "-netdev") == []
    with pytest.raises(Rejected, match="network card net0: no tap is given for it on this host"):
        line(spec(taps={}))


def test_a_disk_without_a_path_is_refused() -> None:
    with pytest.raises(Rejected, match="disk disk0: 0 paths are given for it on this host, it needs one"):
        line(spec(disks=()))


def test_memory_is_shared_only_on_demand_and_bears_the_same_name_either_way() -> None:
    shared = line(spec())
    assert json.loads(values(shared, "-object")[0])["id"] == "pc.ram"
    assert values(shared, "-machine")[0].endswith(",memory-backend=pc.ram")
    plain = line(spec(shape=replace(spec().shape, shared_memory=False)))
    assert values(plain, "-object") == []
    assert "memory-backend" not in values(plain, "-machine")[0]
    assert values(plain, "-m") == values(shared, "-m") == ["131072k"]


def test_the_accelerator_is_named_and_never_left_to_qemu() -> None:
    assert values(line(spec()), "-accel") == ["tcg,thread=multi,tb-size=256"]
    kvm = replace(spec().shape, accelerator="kvm", cpu_model="EPYC-v1")
    assert values(line(spec(shape=kvm)), "-accel") == ["kvm"]
    assert values(line(spec()), "-cpu") == [f"{spec().shape.cpu_model},erms=off,fsrm=off"]
    assert values(line(spec(shape=kvm)), "-cpu") == ["EPYC-v1"]
    with pytest.raises(Rejected, match="accelerator 'kvm:tcg': it must be tcg or kvm"):
        line(spec(shape=replace(spec().shape, accelerator="kvm:tcg")))


def test_an_unknown_device_is_refused() -> None:
    strange = replace(spec().shape, devices=(Device(id="usb0", driver="usb-host", bus="usb.0", address="1"),))
    with pytest.raises(Rejected, match="device usb0: usb-host is not a device that sandboxes have"):
        line(spec(shape=strange))


def test_a_disk_with_a_strange_address_is_refused() -> None:
    disk = replace(disk_device(0, DiskPlan(1)), address="7")
    with pytest.raises(Rejected, match="disk disk0: address '7' is not channel:target:lun"):
        line(spec(shape=replace(spec().shape, devices=(disk,))))


def test_the_generation_of_the_guest_is_told_to_it() -> None:
    made = spec()
    assert devices(line(made))["vmgenid"]["guid"] == made.shape.generation_id
    assert "vmgenid" not in devices(line(spec(shape=replace(made.shape, generation_id=""))))


def test_folders_of_an_unpacked_qemu_are_looked_at_first() -> None:
    assert line(spec(), data_dirs=("/a", "/b"))[:5] == ["qemu", "-L", "/a", "-L", "/b"]


def test_two_sandboxes_with_the_same_wishes_get_the_same_devices() -> None:
    one, other = shape(macs=("52:54:00:00:00:01",)), shape(macs=("52:54:00:00:00:01",))
    assert one.devices == other.devices


def test_there_are_so_many_places_and_no_more() -> None:
    assert card_device(15, "").address == "0x17"
    with pytest.raises(Rejected, match="network card 16: a sandbox has room for 16 cards"):
        card_device(16, "")
    with pytest.raises(Rejected, match="disk 256: a sandbox has room for 256 disks"):
        disk_device(256, DiskPlan(1))


def test_memory_is_whole_mebibytes() -> None:
    with pytest.raises(Rejected, match="memory of 1000 bytes: it must be a whole number of MiB"):
        shape(memory_bytes=1000)
    with pytest.raises(Rejected, match="0 vCPUs"):
        standard_shape(
            machine_type="pc-q35-10.0",
            accelerator="tcg",
            cpu_model="max",
            qemu_version="10.0.2",
            memory_bytes=1 << 20,
            vcpus=0,
            kernel_command_line="",
            kernel_sha256="",
            initramfs_sha256="",
            uuid="",
            generation_id="",
        )
