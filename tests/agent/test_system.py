"""What the agent reads of its machine and writes to it, in a root of our own."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

import pytest

from sandshift.agent import port
from sandshift.agent.system import System


@pytest.fixture
def root(tmp_path) -> Path:
    for folder in ("etc", "proc/sys/kernel/random", "sys/class/net", "sys/class/virtio-ports"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def card(root: Path, name: str, pci: str, index: int) -> None:
    device = root / "sys/devices/pci0000:00" / pci / "virtio1"
    (device / "net" / name).mkdir(parents=True)
    (device / "net" / name / "ifindex").write_text(f"{index}\n")
    (device / "net" / name / "device").symlink_to(device)
    (root / "sys/class/net" / name).symlink_to(device / "net" / name)


def test_cards_are_counted_in_the_order_of_their_slots_not_of_their_names(root):
    card(root, "eth0", "0000:00:0a.0", 2)
    card(root, "eth1", "0000:00:08.0", 3)
    (root / "sys/class/net/lo").mkdir()
    system = System(root)
    assert [system.card_index(place) for place in (0, 1)] == [3, 2]
    with pytest.raises(LookupError, match="network card 2: the machine has 2"):
        system.card_index(2)


def test_what_is_not_there_reads_as_empty(root):
    system = System(root)
    assert (system.machine_id(), system.boot_id(), system.generation_id()) == ("", "", "")
    assert system.memory_total_bytes() == 0


def test_memory_and_ids_are_read(root):
    (root / "proc/meminfo").write_text("MemFree: 1 kB\nMemTotal:  227000 kB\n")
    (root / "proc/sys/kernel/random/boot_id").write_text("an-id\n")
    system = System(root)
    assert system.memory_total_bytes() == 227000 * 1024
    assert system.boot_id() == "an-id"


def test_the_generation_id_is_read_as_qemu_lays_it_out(root):
    known = uuid.UUID("12345678-9abc-def0-1122-334455667788")
    place = root / "sys/firmware/qemu_fw_cfg/by_name/etc/vmgenid_guid"
    place.mkdir(parents=True)
    (place / "raw").write_bytes(bytes(40) + known.bytes_le + bytes(4040))
    assert System(root).generation_id() == str(known)
    (place / "raw").write_bytes(bytes(10))
    assert System(root).generation_id() == ""


def test_ids_names_and_servers_are_written_where_programs_look(root, monkeypatch):
    named = []
    monkeypatch.setattr(socket, "sethostname", named.append)
    system = System(root)
    system.set_machine_id("c" * 32)
    system.set_hostname("box-7")
    system.set_nameservers(["9.9.9.9", "fd00::53"])
    assert named == ["box-7"]
    assert system.machine_id() == "c" * 32
    assert (root / "etc/hostname").read_text() == "box-7\n"
    assert "127.0.1.1 box-7\n" in (root / "etc/hosts").read_text()
    assert (root / "etc/resolv.conf").read_text() == "nameserver 9.9.9.9\nnameserver fd00::53\n"


def test_the_port_is_found_by_its_name_among_others(root):
    assert port.find(root) is None
    for device, name in (("vport1p1", "org.qemu.guest_agent.0"), ("vport1p2", port.PORT_NAME)):
        (root / "sys/class/virtio-ports" / device).mkdir()
        (root / "sys/class/virtio-ports" / device / "name").write_text(name + "\n")
    assert port.find(root) == root / "dev/vport1p2"


def test_a_machine_without_the_port_is_told(monkeypatch):
    monkeypatch.setattr(port, "APPEARS_S", 0.01)
    monkeypatch.setattr(port, "find", lambda: None)
    with pytest.raises(port.NoPort, match=r"no virtio-serial port sandshift.agent within 0 s"):
        port.open_port()
