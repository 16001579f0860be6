"""The lab as data: names that fit, and configuration files that our own loader takes."""

from __future__ import annotations

from pathlib import Path

from sandshift.cli.demo.topology import Topology, config_toml
from sandshift.config import load

PLACES = {"folder": Path("/x/lab/a"), "cache_dir": Path("/x/cache")}


def test_every_name_belongs_to_one_lab():
    one, other = Topology("a1b2c3"), Topology("ffffff")
    assert not set(one.namespaces) & set(other.namespaces)
    assert all("a1b2c3" in name for name in one.namespaces)


def test_deleting_the_namespaces_is_all_that_undoing_takes():
    topology = Topology("a1b2c3")
    assert topology.namespace_plan().undo_batch().splitlines() == [
        f"netns delete {name}" for name in reversed(topology.namespaces)
    ]
    assert topology.cable_plan().undo_batch() == ""


def test_a_hosts_file_is_what_the_loader_reads(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(config_toml(Topology("a1b2c3").host_b, **PLACES))
    config = load(path)
    assert config.host.name == "host-b"
    assert config.host.network_namespace == "sslab-a1b2c3-b"
    assert config.host.migration_address == "10.77.0.2"
    assert config.network.bridge == "br0"
    assert config.places.run_dir == "/x/lab/a/run"
    assert config.places.cache_dir == "/x/cache"


def test_overrides_of_every_kind_reach_the_file(tmp_path):
    path = tmp_path / "config.toml"
    overrides = {
        "vm": {
            "qemu": 'odd "path"\\qemu',
            "qemu_data_dirs": ["/a", "/b"],
            "memory_mib": 512,
            "template": False,
        },
        "migration": {"encryption": "off"},
        "host": {"name": "other"},
    }
    path.write_text(config_toml(Topology("a1b2c3").host_a, **PLACES, overrides=overrides))
    config = load(path)
    assert config.vm.qemu == 'odd "path"\\qemu'
    assert config.vm.qemu_data_dirs == ["/a", "/b"]
    assert (config.vm.memory_mib, config.vm.template) == (512, False)
    assert config.migration.encryption == "off"
    assert (config.host.name, config.host.network_namespace) == ("other", "sslab-a1b2c3-a")
