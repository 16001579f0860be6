from __future__ import annotations

import pytest

from sandshift.errors import PeerProtocolError
from sandshift.vmm import hypervisor
from sandshift.vmm.hypervisor import CpuModel


def test_only_versioned_machines_that_will_stay_are_named_the_newest_first() -> None:
    answer = [
        {"name": "q35", "deprecated": False},
        {"name": "pc-q35-9.2", "deprecated": False},
        {"name": "pc-q35-10.0", "deprecated": False, "alias": "q35"},
        {"name": "pc-q35-2.12", "deprecated": True},
        {"name": "pc-i440fx-10.0", "deprecated": False},
    ]
    assert hypervisor.machine_types(answer) == ("pc-q35-10.0", "pc-q35-9.2")


def test_cpu_models_have_concrete_names() -> None:
    answer = [
        {"name": "EPYC-v1", "unavailable-features": []},
        {"name": "EPYC", "alias-of": "EPYC-v1", "unavailable-features": []},
        {"name": "Haswell-v1", "unavailable-features": ["avx2"]},
        {"name": "max"},
    ]
    assert hypervisor.cpu_models(answer) == (
        CpuModel("EPYC-v1", "EPYC", complete=True),
        CpuModel("Haswell-v1", complete=False),
        CpuModel("max"),
    )


def test_under_kvm_a_sandbox_gets_the_best_named_model_that_the_host_has_whole() -> None:
    models = (
        CpuModel("EPYC-Milan-v1", "EPYC-Milan", complete=False),
        CpuModel("EPYC-v1", "EPYC", complete=True),
        CpuModel("Nehalem-v1", "Nehalem", complete=True),
        CpuModel("max"),
    )
    assert hypervisor.default_cpu_model("kvm", models) == "EPYC-v1"
    assert hypervisor.default_cpu_model("tcg", models) == "max"
    assert hypervisor.default_cpu_model("kvm", ()) == "qemu64"


def test_features_are_what_is_on() -> None:
    answer = {"model": {"name": "base", "props": {"sse2": True, "avx": False, "family": 6, "aes": True}}}
    assert hypervisor.cpu_features(answer) == ("aes", "sse2")
    with pytest.raises(PeerProtocolError, match="no properties"):
        hypervisor.cpu_features({})


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu vme svm_lock\n", False),
        ("flags\t\t: fpu vmx sse\n", True),
        ("flags\t\t: fpu svm\n", True),
        ("model name\t: vmx svm\nflags\t\t: fpu\n", False),
        ("", False),
    ],
)
def test_virtualisation_is_a_flag_of_the_cpu(cpuinfo: str, found: bool) -> None:
    assert hypervisor.has_virtualisation(cpuinfo) is found


def test_a_qemu_that_loses_memory_is_refused_with_what_to_install() -> None:
    (blocker,) = hypervisor.version_blockers((7, 2, 22), "tcg")
    assert str(blocker) == (
        "qemu.version: QEMU 7.2.22 without KVM silently loses guest memory when a sandbox moves; "
        "install QEMU 9.0 or newer (Debian 12: qemu-system-x86 from bookworm-backports)"
    )
    assert hypervisor.version_blockers((7, 2, 22), "kvm") == []
    assert hypervisor.version_blockers((9, 0, 0), "tcg") == []


def test_the_version_is_found_in_what_qemu_prints() -> None:
    assert hypervisor.parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds)") == (10, 0, 2)
    with pytest.raises(PeerProtocolError, match="does not print a QEMU version: 'true"):
        hypervisor.parse_version("true (GNU coreutils) 9.1")
