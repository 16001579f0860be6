"""Containers in a real guest: what they are given, how they start and end, what is refused. All in one VM."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandshift.errors import AlreadyThere, IllegalMove, NotFound, Rejected
from sandshift.sandbox.disks import DiskLayer, GuestMount, GuestRootfs
from sandshift.vmm.qemu_machine import QemuMachine
from tests.agent.container_rig import (
    FOLDER_LUN,
    ROOT_LUN,
    SCRATCH_LUN,
    SPARE_LUN,
    WHOLE_LUN,
    Ward,
    needs_busybox,
    sh,
    spec,
    until_said,
    ward_of,
)
from tests.image import rig as rigs
from tests.image.rig import Rig

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    needs_busybox,
    *rigs.needs_vm,
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def house() -> AsyncIterator[tuple[QemuMachine, Ward]]:
    with tempfile.TemporaryDirectory(prefix="sandshift-containers-") as folder:
        async with ward_of(Rig(rigs.image(), Path(folder)), "containers") as made:
            yield made


@pytest_asyncio.fixture(loop_scope="module")
async def ward(house) -> AsyncIterator[Ward]:
    yield house[1]
    await house[1].clear()


async def test_a_container_is_what_its_spec_says(ward):
    said = await ward.said(
        "c",
        sh(
            "id -u; id -g; echo $WORD; pwd; ulimit -n; grep CapEff /proc/self/status;"
            "grep NoNewPrivs /proc/self/status; echo $$; cat /proc/sys/kernel/shmmni; cat /proc/self/cgroup",
            process__user={"uid": 1000, "gid": 1000, "additionalGids": [5]},
            process__env=["PATH=/bin", "WORD=x y"],
            process__cwd="/tmp",
            process__rlimits=[{"type": "RLIMIT_NOFILE", "hard": 77, "soft": 77}],
            linux__sysctl={"kernel.shmmni": "4097"},
        ),
    )
    lines = said.splitlines()
    assert lines[:5] == ["1000", "1000", "x y", "/tmp", "77"]
    assert lines[5].split()[1] == "0000000000000000"
    assert lines[6].split()[1] == "1"
    assert lines[7:] == ["1", "4097", "0::/"]


async def test_the_pods_files_are_in_every_container_that_brings_none_of_its_own(ward):
    await ward.guest.containers.prepare_pod(
        hosts=b"10.0.0.1 peer\n", resolv_conf=b"nameserver 10.0.0.2\n", shm_bytes=5 << 20
    )
    own = GuestMount("/etc/hosts", content=b"10.0.0.9 mine\n", mode=0o600, read_only=True)
    script = "cat /etc/hosts /etc/resolv.conf; hostname; cat /etc/hostname; df -m /dev/shm | tail -1"
    said = (await ward.said("c", sh(script))).split()
    assert said[:4] == ["10.0.0.1", "peer", "nameserver", "10.0.0.2"]
    assert said[4:6] == ["containers", "containers"]
    assert said[7] == "5"
    said = await ward.said(
        "c", sh("cat /etc/hosts; stat -c %a /etc/hosts; echo x >/etc/hosts || echo refused"), mounts=[own]
    )
    assert said.split() == ["10.0.0.9", "mine", "600", "refused"]


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$; sleep 9", 0), ("exec nosuch", 127)]
)
async def test_exit_codes_are_exact(ward, script, code):
    await ward.run("c", sh(script))
    if "kill" in script:  # process 1 of a namespace cannot kill itself
        await ward.guest.signal_process("c:", 9)
        code = 137
    assert await ward.end("c") == code


async def test_a_signal_reaches_the_init_or_everybody(ward):
    script = "trap 'echo got; exit 3' TERM; sleep 100 & echo up; wait; wait"
    await ward.run("c", sh(script))
    pids = await ward.guest.containers.pids("c")
    assert [one.process_id for one in pids if one.process_id] == ["c:"]
    await until_said(ward, "c:", "up")
    await ward.guest.signal_process("c:", 15)
    assert await ward.output("c:") == "up\ngot\n"
    assert await ward.end("c") == 3
    await ward.run("c", sh(script))
    await until_said(ward, "c:", "up")
    await ward.guest.signal_process("c:", 9, whole_group=True)
    assert await ward.end("c") == 137


async def test_a_container_that_was_never_started_can_be_deleted(ward):
    await ward.create("c", sh("echo never"))
    await ward.remove("c")
    assert await ward.guest.list_processes() == []
    with pytest.raises(NotFound, match="container c is not in the guest"):
        await ward.guest.containers.start("c")


async def test_deleting_what_is_being_made_waits_for_it(ward):
    making = asyncio.create_task(ward.create("c", sh("echo never")))
    await asyncio.sleep(0)
    await ward.guest.info()
    await ward.guest.containers.delete("c")
    assert await making > 0
    assert await ward.guest.containers.delete("c") is None
    with pytest.raises(NotFound, match="container c is not in the guest"):
        await ward.guest.containers.start("c")
    await ward.remove("c")


async def test_every_call_may_be_repeated(ward):
    containers = ward.guest.containers
    pids = await asyncio.gather(*(ward.create("c", sh("sleep 100")) for _ in range(3)))
    assert len(set(pids)) == 1
    with pytest.raises(AlreadyThere, match="container c is another one"):
        await ward.create("c", sh("sleep 101"))
    await asyncio.gather(*(containers.start("c") for _ in range(3)))
    await containers.start("c")
    with pytest.raises(IllegalMove, match="container c is still running: end it first"):
        await containers.delete("c")
    first = await ward.exec("c", "e", "sleep", "100")
    assert await ward.exec("c", "e", "sleep", "100") == first
    with pytest.raises(AlreadyThere, match="process c:e is another one"):
        await ward.exec("c", "e", "sleep", "101")
    await ward.guest.signal_process("c:", 9)
    await ward.guest.wait_process("c:")
    assert (await ward.guest.wait_process("c:e")).code == 137
    await asyncio.gather(*(containers.delete("c") for _ in range(2)))
    with pytest.raises(AlreadyThere, match="are still known: forget them first"):
        await ward.create("c", sh("sleep 100"))
    await ward.remove("c")


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (spec("/no/such"), NotFound, r"container c cannot be made: exec: .*/no/such"),
        (spec("nosuch"), NotFound, r'exec: "nosuch": executable file not found in \$PATH'),
        (spec("/etc/noexec"), Rejected, "/etc/noexec.*permission denied"),
        (
            spec("sh", process__cwd="/etc/noexec"),
            Rejected,
            "container c cannot be made: mkdir /etc/noexec: not a directory",
        ),
        (
            spec("sh", linux__sysctl={"net.no.such": "1"}),
            Rejected,
            "kernel setting net.no.such cannot be '1'",
        ),
        (spec("sh", process__rlimits=[{"type": "RLIMIT_X", "hard": 1, "soft": 1}]), Rejected, "RLIMIT_X"),
    ],
)
async def test_what_cannot_be_made_is_said_in_one_line_and_leaves_nothing(ward, made, error, message):
    with pytest.raises(error, match=message) as told:
        await ward.create("c", made)
    assert "\n" not in told.value.message
    assert await ward.guest.list_processes() == []
    assert await ward.said("c", sh("echo fine")) == "fine\n"


async def test_roots_that_are_not_there_or_not_what_is_said_are_refused(ward):
    for rootfs, error, message in (
        (GuestRootfs(layers=(DiskLayer(ROOT_LUN, "ext4"),)), Rejected, "cannot be mounted as ext4: Invalid"),
        (
            GuestRootfs(layers=(DiskLayer(ROOT_LUN, "vfat"),)),
            Rejected,
            "file system 'vfat' cannot be mounted",
        ),
    ):
        with pytest.raises(error, match=message):
            await ward.create("c", sh("true"), rootfs=rootfs)
    assert await ward.said("c", sh("echo fine")) == "fine\n"


async def test_changes_go_to_guest_memory_up_to_a_limit(ward):
    rootfs = GuestRootfs(layers=(DiskLayer(ROOT_LUN, "erofs"),), writable_bytes=2 << 20)
    script = (
        "echo new >/etc/new; cat /etc/new; dd if=/dev/zero of=/big bs=64k count=64 2>&1 | tail -1; rm /bin/id"
    )
    assert "new" in await ward.said("c", sh(script), rootfs=rootfs)
    said = await ward.said(
        "c", sh("ls /etc/new 2>/dev/null; ls /big /bin/id 2>/dev/null; true"), rootfs=rootfs
    )
    assert said == "/bin/id\n"
    full = "dd if=/dev/zero of=/big bs=64k count=64 2>&1 || echo full"
    assert "No space left" in await ward.said("c", sh(full), rootfs=rootfs)


async def test_changes_go_to_a_disk_and_stay_there(ward):
    rootfs = GuestRootfs(layers=(DiskLayer(ROOT_LUN, "erofs"),), writable=DiskLayer(SCRATCH_LUN, "ext4"))
    for expected in ("1\n", "1\n1\n"):
        assert await ward.said("c", sh("echo 1 >>/data/log; cat /data/log"), rootfs=rootfs) == expected
    whole = GuestRootfs(writable=DiskLayer(WHOLE_LUN, "ext4"))
    for expected in ("2\n", "2\n2\n"):
        assert await ward.said("c", sh("echo 2 >>/data/log; cat /data/log"), rootfs=whole) == expected


async def test_layers_lie_over_each_other_the_topmost_first(ward):
    rootfs = GuestRootfs(layers=(DiskLayer(FOLDER_LUN, "erofs"), DiskLayer(ROOT_LUN, "erofs")))
    assert await ward.said("c", sh("cat /inner/word"), rootfs=rootfs) == "packed\n"


async def test_packed_folders_and_shared_folders_are_bound_where_the_spec_wants_them(ward):
    layer = DiskLayer(FOLDER_LUN, "erofs")
    empty_dir = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/shared"
    made = sh("cat /p/word /whole/inner/word; echo hi >/e/f; touch /p/x || echo refused; sleep 100")
    made["mounts"] += [
        {"destination": "/p", "type": "bind", "source": "/host/p", "options": ["rbind", "ro"]},
        {"destination": "/e", "type": "bind", "source": empty_dir, "options": ["rbind", "rw"]},
    ]
    mounts = [
        GuestMount("/p", layer=layer, layer_path="inner", read_only=True),
        GuestMount("/whole", layer=layer, read_only=True),
    ]
    await ward.run("c", made, mounts=mounts)
    await until_said(ward, "c:", "refused")
    other = sh("cat /e/f; grep -o 'volumes /e tmpfs' /proc/mounts")
    other["mounts"] += made["mounts"][-1:]
    assert await ward.said("d", other) == "hi\nvolumes /e tmpfs\n"
    await ward.guest.signal_process("c:", 9)
    await ward.end("c")
    for path, error in (("nothing", NotFound), ("out", Rejected)):
        with pytest.raises(error, match=path):
            await ward.create("c", sh("true"), mounts=[GuestMount("/p", layer=layer, layer_path=path)])


async def test_a_deleted_container_lets_its_disk_go(house):
    machine, ward = house
    rootfs = GuestRootfs(layers=(DiskLayer(SPARE_LUN, "erofs"),))
    assert await ward.said("c", sh("echo once"), rootfs=rootfs) == "once\n"
    await machine.detach_disk(f"disk{SPARE_LUN}")
    names = [device.id for device in machine.shape.devices]
    assert f"disk{SPARE_LUN}" not in names
    assert f"disk{ROOT_LUN}" in names


async def test_containers_of_a_pod_share_network_shm_and_processes_if_they_ask(ward):
    shared = {"type": "pid", "path": "/proc/4242/ns/pid"}
    kinds = [{"type": kind} for kind in ("ipc", "uts", "mount", "network")]
    one = sh(
        "echo word >/dev/shm/w; nc -l -p 7777 -e echo over & sleep 100", linux__namespaces=[*kinds, shared]
    )
    await ward.run("a", one)
    script = (
        "until nc 127.0.0.1 7777; do :; done; cat /dev/shm/w; ps -o args | grep -c 'sleep 10[0]'; echo $$"
    )
    said = (await ward.said("b", sh(script, linux__namespaces=[*kinds, shared]))).split()
    assert said[:3] == ["over", "word", "1"]
    assert int(said[3]) > 1
    alone = await ward.said("b", sh("ps -o args | grep -c 'sleep 10[0]'; echo $$; true"))
    assert alone.split() == ["0", "1"]
    await ward.guest.signal_process("a:", 9)
    assert await ward.end("a") == 137


async def test_stdin_goes_in_and_its_end_too(ward):
    await ward.run("c", spec("cat"), stdin=True)
    assert await ward.guest.write_input("c:", 0, b"in and out\n", eof=True) == 11
    assert await ward.output("c:") == "in and out\n"
    assert await ward.end("c") == 0


async def test_a_terminal_is_one_and_takes_a_size(ward):
    await ward.run("c", sh("tty; read x; stty size; echo got $x"), terminal=True, stdin=True)
    await until_said(ward, "c:", "/dev/pts/0\r\n")
    await ward.guest.resize_terminal("c:", columns=123, rows=45)
    await ward.guest.write_input("c:", 0, b"word\n")
    said = (await ward.output("c:")).splitlines()
    assert said[0] == "/dev/pts/0"
    assert said[-2:] == ["45 123", "got word"]
    assert await ward.end("c") == 0


async def test_exec_sessions_have_their_own_user_environment_terminal_and_exit(ward):
    await ward.run("c", sh("sleep 100"))
    session = await ward.exec(
        "c",
        "e1",
        "sh",
        "-c",
        "id -u; echo $X; pwd; exit 5",
        user={"uid": 7, "gid": 7},
        env=["PATH=/bin", "X=1"],
        cwd="/tmp",
    )
    assert await ward.output(session) == "7\n1\n/tmp\n"
    assert (await ward.guest.wait_process(session)).code == 5
    session = await ward.exec("c", "e2", "sh", "-c", "tty; echo up; read x", terminal=True, stdin=True)
    assert {one.process_id for one in await ward.guest.containers.pids("c")} >= {"c:", "c:e2"}
    await until_said(ward, session, "up\r\n")
    await ward.guest.write_input(session, 0, b"\n")
    assert (await ward.output(session)).startswith("/dev/pts/")
    with pytest.raises(NotFound, match='process c:e3 cannot be started: exec: "nosuch"'):
        await ward.exec("c", "e3", "nosuch")
    with pytest.raises(IllegalMove, match="process c:e1: it has no terminal"):
        await ward.guest.resize_terminal("c:e1", columns=1, rows=1)
    await ward.guest.signal_process("c:", 9)
    await ward.guest.wait_process("c:")
    with pytest.raises(IllegalMove, match="container c has ended"):
        await ward.exec("c", "e4", "true")
    await ward.remove("c")
    with pytest.raises(NotFound, match="container c is not in the guest"):
        await ward.exec("c", "e5", "true")
