"""What this host can do: asked of QEMU once, and kept as long as QEMU, kernel and CPU stay the same.

The accelerator is KVM only where the CPU has hardware virtualisation and a stock kernel really boots: a /dev/kvm that
opens and makes VMs may be a software KVM that cannot run one (measured). QEMU is never asked to choose.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from sandshift.config import Vm
from sandshift.errors import Blocked, Blocker, SandshiftError
from sandshift.vmm import hypervisor
from sandshift.vmm.hypervisor import Hypervisor
from sandshift.vmm.process import listen_unix, read_tail, spawn
from sandshift.vmm.qmp import Qmp, QmpRefused

SURVEY_S: Final = 20.0
BOOT_S: Final = 20.0
"""A stock kernel needs 2 s to its panic under TCG; the software KVM that we met needs 24 s to its first words."""
VERSION_S: Final = 10.0
PROBE_MEMORY: Final = "128M"
PROBE_COMMAND_LINE: Final = "console=ttyS0 panic=-1 reboot=t no_timer_check"
PROBE_SIGN: Final = "Unable to mount root fs"
"""A kernel without anything to mount says this when it is through with its own start."""
CONSOLE_TAIL_BYTES: Final = 1 << 16
CACHE_FOLDER: Final = "hypervisor"
CPUINFO: Final = Path("/proc/cpuinfo")
KVM_DEVICE: Final = Path("/dev/kvm")
TUN_DEVICE: Final = Path("/dev/net/tun")
T = TypeVar("T", bound=msgspec.Struct)


class _Verdict(msgspec.Struct, frozen=True):
    boots: bool


def host_blockers(vm: Vm) -> list[Blocker]:
    """What this host lacks to run any sandbox at all. Looks only; milliseconds."""
    found = []
    if shutil.which(vm.qemu) is None:
        found.append(
            Blocker(
                "qemu",
                f"{vm.qemu} is not installed",
                "install qemu-system-x86 9.0 or newer (Debian 12: from bookworm-backports), or set vm.qemu",
            )
        )
    if not TUN_DEVICE.exists():
        found.append(Blocker("network.tun", f"{TUN_DEVICE} is missing", "load the module: modprobe tun"))
    if os.geteuid() != 0:
        found.append(Blocker("user", "sandshift needs root for taps and namespaces", "run it as root"))
    return found


async def survey(vm: Vm, cache_dir: Path, kernel: Path | None = None) -> Hypervisor:
    """What the configured QEMU can do here, with the accelerator that sandboxes get.

    Args:
        vm: the configuration; its accelerator, CPU model and data directories count.
        cache_dir: where answers are kept; a folder of our own is made in it.
        kernel: a stock guest kernel to try KVM with. Without one KVM is not tried, so "auto" is TCG.

    Raises:
        Blocked: QEMU is missing or too old for the accelerator, or KVM is asked for and does not work; all is named.
        Unavailable: QEMU does not answer.
    """
    if missing := [blocker for blocker in host_blockers(vm) if blocker.subject == "qemu"]:
        raise Blocked("this host cannot run sandboxes", missing)
    cache = _Cache(cache_dir / CACHE_FOLDER, await asyncio.to_thread(_identity, vm))
    accelerator = await _accelerator(vm, cache, kernel)
    name = f"{accelerator}-{vm.cpu_model or 'default'}"
    kept = await asyncio.to_thread(cache.get, name, Hypervisor)
    # What is kept is of this very program: it need not be run to tell its version.
    version = (
        hypervisor.parse_version(f"version {kept.version}") if kept else await asyncio.to_thread(_version, vm)
    )
    if too_old := hypervisor.version_blockers(version, accelerator):
        raise Blocked("this host cannot run sandboxes", too_old)
    if kept is not None:
        return kept
    found = await _ask(vm, accelerator)
    await asyncio.to_thread(cache.put, name, found)
    return found


async def kernel_boots(vm: Vm, accelerator: str, kernel: Path, *, deadline_s: float = BOOT_S) -> bool:
    """Whether a stock kernel gets through its start here. It is given nothing else, and ends by itself."""
    with tempfile.TemporaryDirectory(prefix="sandshift-probe-") as folder:
        console = Path(folder) / "console"
        arguments = [
            *_base(vm, accelerator),
            *("-machine", "q35", "-m", PROBE_MEMORY, "-no-reboot"),
            *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
            *("-kernel", str(kernel), "-append", PROBE_COMMAND_LINE),
        ]
        process = spawn(arguments, Path(folder), inherited_fds=())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    await process.ended.wait()
        finally:
            await process.kill()
        return PROBE_SIGN in read_tail(console, CONSOLE_TAIL_BYTES)


async def _accelerator(vm: Vm, cache: _Cache, kernel: Path | None) -> str:
    if vm.accelerator == "tcg":
        return "tcg"
    problem = await _kvm_problem(vm, cache, kernel)
    if not problem:
        return "kvm"
    if vm.accelerator == "kvm":
        remedy = 'set vm.accelerator = "tcg", or use a host whose CPU virtualises in hardware'
        raise Blocked("this host cannot run sandboxes", [Blocker("accelerator", problem, remedy)])
    return "tcg"


async def _kvm_problem(vm: Vm, cache: _Cache, kernel: Path | None) -> str:
    """Why KVM cannot be used; empty: it can."""
    if not hypervisor.has_virtualisation(await asyncio.to_thread(CPUINFO.read_text)):
        return f"the CPU shows neither vmx nor svm in {CPUINFO}"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"{KVM_DEVICE} cannot be opened"
    if kernel is None:
        return "there is no guest kernel yet to try KVM with"
    status = await asyncio.to_thread(kernel.stat)
    name = f"boots-{status.st_size}-{status.st_mtime_ns}"
    verdict = await asyncio.to_thread(cache.get, name, _Verdict)
    if verdict is None:
        verdict = _Verdict(boots=await kernel_boots(vm, "kvm", kernel))
        await asyncio.to_thread(cache.put, name, verdict)
    return (
        "" if verdict.boots else f"a stock kernel does not boot with {KVM_DEVICE}: it may be a software KVM"
    )


async def _ask(vm: Vm, accelerator: str) -> Hypervisor:
    """Ask a QEMU without a machine."""
    with tempfile.TemporaryDirectory(prefix="sandshift-survey-") as folder:
        path = Path(folder) / "qmp"
        with listen_unix(path) as listener:
            arguments = [
                *_base(vm, accelerator),
                *("-machine", "none"),
                *("-chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"),
                *("-mon", "chardev=qmp,mode=control"),
            ]
            process = spawn(arguments, Path(folder), inherited_fds=(listener.fileno(),))
        try:
            qmp = await Qmp.connect(path, "survey", lambda _: None, timeout_s=SURVEY_S)
            try:
                return await _answers(qmp, vm, accelerator)
            finally:
                await qmp.close()
        except Blocked:
            raise
        except SandshiftError as error:
            problem = f"QEMU with {accelerator} does not answer: {process.stderr_tail() or error.message}"
            remedy = "look at what it says, and check vm.qemu and vm.accelerator"
            raise Blocked("this host cannot run sandboxes", [Blocker("qemu", problem, remedy)]) from error
        finally:
            await process.kill()


async def _answers(qmp: Qmp, vm: Vm, accelerator: str) -> Hypervisor:
    models = hypervisor.cpu_models(await qmp.execute("query-cpu-definitions"))
    model = vm.cpu_model or hypervisor.default_cpu_model(accelerator, models)
    types = await qmp.execute("qom-list-types", {"implements": "device", "abstract": False})
    names = (
        [str(entry["name"]) for entry in types if isinstance(entry, dict)] if isinstance(types, list) else []
    )
    off = hypervisor.TCG_FEATURES_OFF if accelerator == "tcg" else ()
    features = await _features(qmp, model)
    return Hypervisor(
        version=".".join(str(part) for part in qmp.version),
        accelerator=accelerator,
        machine_types=hypervisor.machine_types(await qmp.execute("query-machines")),
        cpu_models=models,
        cpu_model=model,
        cpu_features=tuple(feature for feature in features if feature not in off),
        cpu_features_most=await _features(qmp, "max"),
        drivers=tuple(sorted(names)),
    )


async def _features(qmp: Qmp, model: str) -> tuple[str, ...]:
    try:
        answer = await qmp.execute("query-cpu-model-expansion", {"type": "static", "model": {"name": model}})
    except QmpRefused as error:
        remedy = "set vm.cpu_model to one that it has: qemu-system-x86_64 -cpu help"
        raise Blocked(
            "this host cannot run sandboxes",
            [Blocker("vm.cpu_model", f"QEMU has no CPU model {model}: {error.reason}", remedy)],
        ) from error
    return hypervisor.cpu_features(answer)


def _base(vm: Vm, accelerator: str) -> list[str]:
    folders = [part for folder in vm.qemu_data_dirs for part in ("-L", folder)]
    return [vm.qemu, *folders, "-nodefaults", "-no-user-config", "-display", "none", "-accel", accelerator]


def _version(vm: Vm) -> tuple[int, int, int]:
    try:
        answer = subprocess.run(
            [vm.qemu, "--version"], capture_output=True, text=True, check=False, timeout=VERSION_S
        )
        return hypervisor.parse_version(answer.stdout + answer.stderr)
    except (OSError, subprocess.TimeoutExpired, SandshiftError) as error:
        blocker = Blocker("qemu", f"{vm.qemu} does not tell its version", "set vm.qemu to a QEMU for x86-64")
        raise Blocked("this host cannot run sandboxes", [blocker]) from error


def _identity(vm: Vm) -> str:
    """A name for this QEMU on this kernel and CPU: what answers depend on."""
    binary = Path(shutil.which(vm.qemu) or vm.qemu).resolve()
    status = binary.stat()
    cpu = "".join(
        line for line in CPUINFO.read_text().splitlines() if line.startswith(("model name", "flags"))
    )
    parts = [str(binary), status.st_size, status.st_mtime_ns, *vm.qemu_data_dirs, os.uname().release, cpu]
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:16]


class _Cache:
    """Small answers as files. What cannot be read or written is asked again."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder
        self._identity = identity

    def get(self, name: str, kind: type[T]) -> T | None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(self._path(name).read_bytes(), type=kind)
        return None

    def put(self, name: str, value: msgspec.Struct) -> None:
        path = self._path(name)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.new")
            temporary.write_bytes(msgspec.json.encode(value))
            temporary.rename(path)

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._identity}-{name.replace('/', '_')}.json"
