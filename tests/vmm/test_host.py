from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sandshift.config import Vm
from sandshift.errors import Blocked
from sandshift.vmm import host
from tests.vmm import guest

needs_qemu = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")


async def test_without_qemu_the_error_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(
        Blocked, match=r"qemu: /no/qemu is not installed; install qemu-system-x86 9\.0 or newer"
    ):
        await host.survey(Vm(qemu="/no/qemu"), tmp_path)


async def test_something_that_is_not_qemu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Blocked, match=r"/bin/true does not tell its version; set vm\.qemu"):
        await host.survey(Vm(qemu="/bin/true", accelerator="tcg"), tmp_path)


async def test_an_old_qemu_without_kvm_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "qemu"
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)'\n")
    old.chmod(0o755)
    with pytest.raises(Blocked, match=r"QEMU 7\.2\.22 without KVM silently loses guest memory"):
        await host.survey(Vm(qemu=str(old), accelerator="tcg"), tmp_path)


async def test_kvm_asked_for_where_the_cpu_has_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu sse2\n")
    monkeypatch.setattr(host, "CPUINFO", cpuinfo)
    with pytest.raises(Blocked, match="accelerator: the CPU shows neither vmx nor svm"):
        await host.survey(Vm(qemu="/bin/true", accelerator="kvm"), tmp_path)


@needs_qemu
async def test_a_kvm_that_boots_no_kernel_is_not_used_and_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the software KVM that we met: the CPU looks right, the device opens, and no stock kernel gets anywhere."""
    cpuinfo, kernel = tmp_path / "cpuinfo", tmp_path / "kernel"
    cpuinfo.write_text("flags : fpu vmx\n")
    kernel.write_bytes(b"a kernel")
    tried: list[str] = []

    async def boots(vm: Vm, accelerator: str, kernel: Path) -> bool:
        tried.append(accelerator)
        return False

    monkeypatch.setattr(host, "CPUINFO", cpuinfo)
    monkeypatch.setattr(host, "KVM_DEVICE", kernel)
    monkeypatch.setattr(host, "kernel_boots", boots)
    for _ in range(2):
        assert (await host.survey(Vm(), tmp_path, kernel)).accelerator == "tcg"
    assert tried == ["kvm"]
    with pytest.raises(Blocked, match=r"a stock kernel does not boot with .*: it may be a software KVM"):
        await host.survey(Vm(accelerator="kvm"), tmp_path, kernel)


@needs_qemu
async def test_the_survey_is_kept_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await host.survey(Vm(accelerator="tcg"), tmp_path)
    assert found.accelerator == "tcg"
    assert found.machine_types[0].startswith("pc-q35-")
    assert found.cpu_model == "max"
    assert "sse2" in found.cpu_features
    assert set(found.cpu_features) <= set(found.cpu_features_most)
    assert {"virtio-net-pci", "scsi-hd", "vmgenid", "virtserialport"} <= set(found.drivers)
    assert {"max", "qemu64", "EPYC", "EPYC-v1"} <= found.cpu_model_names

    async def ask(vm: Vm, accelerator: str) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(host, "_ask", ask)
    assert await host.survey(Vm(accelerator="tcg"), tmp_path) == found
    with pytest.raises(AssertionError, match="asked again"):
        await host.survey(Vm(accelerator="tcg", cpu_model="qemu64"), tmp_path)
    next((tmp_path / "hypervisor").iterdir()).write_text("not JSON")
    with pytest.raises(AssertionError, match="asked again"):
        await host.survey(Vm(accelerator="tcg"), tmp_path)


@needs_qemu
async def test_a_cpu_model_that_qemu_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Blocked, match=r"vm\.cpu_model: QEMU has no CPU model nonsense"):
        await host.survey(Vm(accelerator="tcg", cpu_model="nonsense"), tmp_path)


@needs_qemu
@pytest.mark.vm
@pytest.mark.skipif(bool(guest.missing()), reason=guest.missing())
async def test_a_stock_kernel_boots_and_rubbish_does_not(tmp_path: Path) -> None:
    assert await host.kernel_boots(Vm(), "tcg", guest.build().kernel)
    (tmp_path / "rubbish").write_bytes(bytes(4096))
    assert not await host.kernel_boots(Vm(), "tcg", tmp_path / "rubbish", deadline_s=2.0)
