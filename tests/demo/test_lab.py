"""The lab on the real kernel: it stands, it is one network, and nothing of it is left afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sandshift import net
from sandshift.cli.demo.lab import open_lab
from sandshift.cli.demo.topology import NAMESPACE_PREFIX
from sandshift.errors import Rejected
from tests.needs import needs_root

pytestmark = needs_root


def namespaces_of(lab_id: str) -> list[Path]:
    return list(Path("/run/netns").glob(f"{NAMESPACE_PREFIX}{lab_id}-*"))


async def is_inside(pid: int, namespace: str) -> None:
    """Wait until the process has entered: `ip netns exec` is still outside when it has been started."""
    inside = (Path("/run/netns") / namespace).stat().st_ino
    while Path(f"/proc/{pid}/ns/net").stat().st_ino != inside:
        await asyncio.sleep(0.01)


async def test_the_client_and_both_hosts_reach_each_other_across_the_switch(tmp_path):
    async with open_lab(labs_folder=tmp_path / "labs") as lab:
        for listening, calling in [
            (lab.host_a, lab.host_b.namespace),
            (lab.host_b, lab.host_a.namespace),
            (lab.host_a, lab.client_namespace),
        ]:
            with net.listen_tcp(listening.namespace, listening.address) as listener:
                connection, accepted = await asyncio.gather(
                    net.connect_tcp(calling, listening.address, listener.getsockname()[1], timeout_s=5),
                    net.accept_tcp(listener, timeout_s=5),
                )
                connection.close()
                accepted.close()
        assert lab.host_a.config.host.network_namespace == lab.host_a.namespace
    assert namespaces_of(lab.topology.lab_id) == []


async def test_a_taken_down_lab_leaves_no_process_namespace_or_folder(tmp_path):
    """One process in a namespace, one only known by its environment, both of which would outlive their parent."""
    async with open_lab(labs_folder=tmp_path / "labs") as lab:
        inside = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", lab.host_a.namespace, "sleep", "600", start_new_session=True
        )
        outside = await asyncio.create_subprocess_exec(
            "sleep", "600", env=lab.host_b.environment, start_new_session=True
        )
        await asyncio.wait_for(is_inside(inside.pid, lab.host_a.namespace), 5)
    assert await asyncio.wait_for(inside.wait(), 5) == -signal.SIGKILL
    assert await asyncio.wait_for(outside.wait(), 5) == -signal.SIGKILL
    assert namespaces_of(lab.topology.lab_id) == []
    assert not lab.folder.exists()


async def test_who_only_looks_into_the_folder_is_spared(tmp_path):
    """A shell whose working directory is in the lab's folder has the folder in its environment too."""
    async with open_lab(labs_folder=tmp_path / "labs") as lab:
        onlooker = await asyncio.create_subprocess_exec(
            "sleep", "600", env={**os.environ, "PWD": f"{lab.folder}/a", "NOTE": "SANDSHIFT_CONFIG"}
        )
    assert onlooker.returncode is None
    onlooker.kill()
    assert await onlooker.wait() == -signal.SIGKILL


async def test_a_failure_inside_takes_the_lab_down_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        async with open_lab(labs_folder=tmp_path / "labs") as lab:
            _ = 1 / 0
    assert namespaces_of(lab.topology.lab_id) == []


async def test_a_lab_cancelled_at_any_of_its_first_steps_leaves_nothing(tmp_path):
    labs = tmp_path / "labs"

    async def stay() -> None:
        async with open_lab(labs_folder=labs):
            await asyncio.Event().wait()

    before = set(Path("/run/netns").glob(f"{NAMESPACE_PREFIX}*"))
    for delay_s in (0.0, 0.005, 0.03, 0.1):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stay(), delay_s)
    assert {path.name for path in labs.iterdir() if path.is_dir()} == set() if labs.exists() else True
    assert set(Path("/run/netns").glob(f"{NAMESPACE_PREFIX}*")) <= before


async def test_two_labs_stand_side_by_side_and_the_second_spares_the_first(tmp_path):
    labs = tmp_path / "labs"
    async with open_lab(labs_folder=labs) as first:
        async with open_lab(labs_folder=labs) as second:
            assert not set(first.topology.namespaces) & set(second.topology.namespaces)
        assert len(namespaces_of(first.topology.lab_id)) == 4


KILLED_MAKER = """
import asyncio, os, signal, subprocess, sys
from pathlib import Path
from sandshift.cli.demo.lab import open_lab
from tests.demo.test_lab import is_inside

async def main():
    async with open_lab(labs_folder=Path(sys.argv[1])) as lab:
        left = subprocess.Popen(
            ["ip", "netns", "exec", lab.host_a.namespace, "sleep", "600"], start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        await asyncio.wait_for(is_inside(left.pid, lab.host_a.namespace), 5)
        print(lab.topology.lab_id, left.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_what_a_killed_run_left_is_recognised_and_taken_down_by_the_next(tmp_path):
    labs = tmp_path / "labs"
    ran = subprocess.run(
        [sys.executable, "-c", KILLED_MAKER, str(labs)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    lab_id, pid = ran.stdout.split()
    assert len(namespaces_of(lab_id)) == 4
    assert (labs / lab_id).exists()
    async with open_lab(labs_folder=labs):
        pass
    assert namespaces_of(lab_id) == []
    assert not (labs / lab_id).exists()
    # A zombie whose parent has not come round yet has no command line.
    command = Path(f"/proc/{pid}/cmdline")
    assert not command.exists() or command.read_bytes() == b""


async def test_a_host_can_be_had_by_another_file_that_differs_only_where_it_says(tmp_path):
    async with open_lab(labs_folder=tmp_path / "labs", overrides={"vm": {"memory_mib": 128}}) as lab:
        clear = lab.variant(lab.host_a, "clear", {"migration": {"encryption": "off"}})
        assert clear.config.migration.encryption == "off"
        assert lab.host_a.config.migration.encryption == "tls-psk"
        assert clear.config.vm == lab.host_a.config.vm
        assert clear.config.places == lab.host_a.config.places
        assert clear.config_path != lab.host_a.config_path


async def test_without_root_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(Rejected, match="only root can make: run it as root"):
        async with open_lab(labs_folder=tmp_path):
            pass


async def test_a_folder_that_others_can_write_is_refused(tmp_path):
    labs = tmp_path / "labs"
    labs.mkdir()
    labs.chmod(0o777)
    with pytest.raises(Rejected, match="can be written by others than root"):
        async with open_lab(labs_folder=labs):
            pass
