"""What the demo may be asked for, and how it says no."""

from __future__ import annotations

import pytest

from sandshift.cli.demo.settings import CONTROL_WORKING_SET_MIB, Settings
from sandshift.cli.demo.topology import Topology, config_toml, merged
from sandshift.cli.demo.workload import Workload
from sandshift.config import load
from sandshift.errors import Rejected


def test_what_is_asked_for_reaches_the_hosts_files(tmp_path):
    settings = Settings(memory_mib=512, qemu="/opt/q/bin/qemu", qemu_data_dirs=("/opt/q/share",))
    path = tmp_path / "config.toml"
    path.write_text(
        config_toml(
            Topology("a1b2c3").host_a, folder=tmp_path, cache_dir=tmp_path, overrides=settings.overrides()
        )
    )
    config = load(path)
    assert (config.vm.memory_mib, config.vm.qemu) == (512, "/opt/q/bin/qemu")
    assert config.vm.qemu_data_dirs == ["/opt/q/share"]


def test_the_hosts_own_qemu_is_used_where_none_is_named():
    assert Settings().overrides() == {"vm": {"memory_mib": 256}}


@pytest.mark.parametrize("memory_mib", [0, 127, 65537])
def test_memory_out_of_range_is_refused_with_the_range(memory_mib):
    with pytest.raises(Rejected, match=f"memory {memory_mib} MiB is outside 128 to 65536 MiB"):
        Settings(memory_mib=memory_mib)


def test_a_working_set_that_does_not_fit_is_refused_with_what_would():
    with pytest.raises(
        Rejected,
        match="a working set of 200 MiB needs a guest of at least 328 MiB, and memory is 256 MiB: raise --memory",
    ):
        Settings(workload=Workload(working_set_mib=200))
    assert Settings(memory_mib=328, workload=Workload(working_set_mib=200)).memory_bytes == 328 << 20


def test_the_control_looks_for_the_same_marker_with_a_small_load():
    settings = Settings(workload=Workload(working_set_mib=100, dirty_mib_per_s=20))
    control = settings.control_workload()
    assert control.marker == settings.workload.marker
    assert control.working_set_mib == CONTROL_WORKING_SET_MIB
    assert Settings(workload=Workload(working_set_mib=2)).control_workload().working_set_mib == 2


def test_every_run_has_a_marker_of_its_own():
    assert Workload().marker != Workload().marker


def test_of_two_overrides_the_upper_one_counts():
    below = {"vm": {"memory_mib": 256, "qemu": "a"}}
    above = {"vm": {"qemu": "b"}, "migration": {"encryption": "off"}}
    assert merged(below, above) == {
        "vm": {"memory_mib": 256, "qemu": "b"},
        "migration": {"encryption": "off"},
    }
    assert below == {"vm": {"memory_mib": 256, "qemu": "a"}}
