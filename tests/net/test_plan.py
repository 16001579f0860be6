"""Plans are data: what they say to `ip`, and how they are taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import Rejected
from sandshift.net.plan import INTERFACE_NAME_BYTES_MAX, Plan, Step, Tap, plan_taps, tap_name


def test_a_tap_on_a_bridge_is_made_attached_and_set_up_in_that_order():
    plan = plan_taps([Tap("ss0", owner_uid=7, bridge="br0", mtu_bytes=1400)])
    assert plan.batch().splitlines() == [
        "tuntap add dev ss0 mode tap vnet_hdr user 7",
        "link set dev ss0 master br0",
        "link set dev ss0 mtu 1400 up",
    ]


def test_a_tap_without_a_bridge_stays_unattached():
    assert "master" not in plan_taps([Tap("ss0")]).batch()


def test_undo_goes_backwards_and_only_over_what_was_applied():
    plan = Plan((Step("make a", "a", undo="drop a"), Step("tune a", "a"), Step("make b", "b", undo="drop b")))
    assert plan.undo_batch() == "drop b\ndrop a\n"
    assert plan.undo_batch(2) == "drop a\n"
    assert plan.undo_batch(0) == ""


def test_a_sandbox_finds_its_taps_again():
    assert tap_name("k8s.io", "pod-1", 0) == tap_name("k8s.io", "pod-1", 0)


def test_taps_of_other_cards_sandboxes_and_namespaces_have_other_names():
    names = {
        tap_name(*key) for key in [("a", "b", 0), ("a", "b", 1), ("a", "c", 0), ("b", "b", 0), ("ab", "", 0)]
    }
    assert len(names) == 5


@given(st.text(), st.text(), st.integers(0, 63))
def test_every_sandbox_id_gives_a_name_that_the_kernel_takes(namespace: str, sandbox_id: str, card: int):
    name = tap_name(namespace, sandbox_id, card)
    assert len(name.encode()) <= INTERFACE_NAME_BYTES_MAX
    assert Tap(name).name == name


@pytest.mark.parametrize("name", ["", "a" * 16, "tap 0", "tap0\nlink delete dev eth0", "-batch", "a/b"])
def test_a_name_that_could_be_more_than_a_name_is_refused(name: str):
    with pytest.raises(Rejected, match="is not an interface name"):
        Tap(name)
    if name:
        with pytest.raises(Rejected, match="bridge name"):
            Tap("ss0", bridge=name)


@pytest.mark.parametrize("mtu", [1, 575, 65522])
def test_an_mtu_out_of_range_is_refused_with_the_range(mtu: int):
    with pytest.raises(Rejected, match=f"mtu {mtu} is outside 576 to 65521 bytes"):
        Tap("ss0", mtu_bytes=mtu)
