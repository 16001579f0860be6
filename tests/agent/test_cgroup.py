"""Control groups, on folders that look like them."""

from __future__ import annotations

import pytest

from sandshift.agent import cgroup
from sandshift.agent.cgroup import Group, delegate
from sandshift.agent.disks import find, wait_for
from sandshift.agent.incidents import Incidents
from sandshift.agent.pod import sysctl_place
from ttrpc import Code, StatusError


@pytest.fixture
def group(tmp_path):
    made = Group("c", top=tmp_path)
    made.path.mkdir(parents=True)
    return made


def write(group: Group, **files: str) -> None:
    for name, text in files.items():
        (group.path / name.replace("_", ".", 1)).write_text(text)


def test_what_the_kernel_counts_is_told_by_its_name(group):
    write(
        group,
        cpu_stat="usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_throttled 2\nthrottled_usec 5\n",
        memory_current="4096\n",
        memory_max="max\n",
        memory_stat="anon 1\nfile 2\n",
        memory_events="low 0\noom 3\noom_kill 2\n",
        pids_current="7\n",
        pids_max="20\n",
        io_stat="8:0 rbytes=10 wbytes=20 rios=1\n8:16 rbytes=1 wbytes=2\n",
    )
    assert group.stats() == {
        "cpu_usage_us": 30,
        "cpu_user_us": 20,
        "cpu_system_us": 10,
        "cpu_throttled_periods": 2,
        "cpu_throttled_us": 5,
        "memory_usage_bytes": 4096,
        "memory_limit_bytes": 0,
        "memory_anon_bytes": 1,
        "memory_file_bytes": 2,
        "pids_current": 7,
        "pids_limit": 20,
        "oom_kills": 2,
        "io_read_bytes": 11,
        "io_write_bytes": 22,
    }


def test_a_group_that_is_gone_has_nobody_and_counts_nothing(tmp_path):
    group = Group("gone", top=tmp_path)
    assert group.pids() == []
    assert group.stats() == {"oom_kills": 0, "io_read_bytes": 0, "io_write_bytes": 0}
    group.kill()


def test_everybody_below_is_in_it(group):
    (group.path / "inner").mkdir()
    write(group, cgroup_procs="30\n2\n")
    (group.path / "inner/cgroup.procs").write_text("7\n")
    assert group.pids() == [2, 7, 30]


async def test_removing_one_that_is_gone_is_done(tmp_path):
    await Group("gone", top=tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


async def test_one_that_does_not_end_is_named(group, monkeypatch):
    monkeypatch.setattr(cgroup, "SETTLES_S", 0.0)
    write(group, cgroup_events="populated 1\nfrozen 0\n", cgroup_procs="12\n")
    with pytest.raises(StatusError, match=r"container c: processes \[12\] do not end within 0 s"):
        await group.remove()
    assert (group.path / "cgroup.kill").read_text() == "1"
    with pytest.raises(StatusError, match="container c does not stand still within 0 s"):
        await group.freeze(frozen=True)
    await group.freeze(frozen=False)
    assert (group.path / "cgroup.freeze").read_text() == "0"


def test_delegation_asks_for_what_the_kernel_has(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpu memory rdma\n")
    delegate(tmp_path)
    delegate(tmp_path)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (tmp_path / "pod/cgroup.subtree_control").read_text() == "+cpu +memory"


async def test_incidents_are_numbered_kept_and_told_from_a_number_on(group):
    incidents = Incidents()
    write(group, memory_events="oom_kill 0\n")
    incidents.watch("c", group)
    incidents.look("c")
    for kills in (1, 1, 2):
        write(group, memory_events=f"oom_kill {kills}\n")
        incidents.look("c")
    following = incidents.follow(2)
    one = await anext(following)
    assert (one.number, one.container_id, one.kind) == (2, "c", "oom")
    incidents.drop("c")
    incidents.look("c")
    first = await anext(incidents.follow(0))
    assert first.number == 1
    incidents.close()


async def test_a_disk_that_does_not_appear_is_named(tmp_path):
    (tmp_path / "sys/bus/scsi/devices/0:0:0:7/block/sdh").mkdir(parents=True)
    assert find(7, tmp_path) is None  # named, and its node not made yet
    with pytest.raises(StatusError, match=r"disk 7 has not appeared in the guest within 0.01 s") as told:
        await wait_for(7, tmp_path, appears_s=0.01)
    assert told.value.code is Code.NOT_FOUND


@pytest.mark.parametrize(
    ("name", "place"),
    [("net.ipv4.ip_forward", "net/ipv4/ip_forward"), ("net/ipv4/conf/eth0.1/x", "net/ipv4/conf/eth0.1/x")],
)
def test_kernel_settings_are_found_by_either_spelling(name, place):
    assert sysctl_place(name) == place


@pytest.mark.parametrize("name", ["", "net..x", "../etc/passwd", "/net/x", "net/../../x"])
def test_what_is_no_kernel_setting_is_refused(name):
    with pytest.raises(StatusError, match="is no name of a kernel setting"):
        sysctl_place(name)
