from __future__ import annotations

import pytest

from sandshift.errors import PeerProtocolError, Rejected
from sandshift.vmm import transfer
from sandshift.vmm.machine import MigrationInfo, MigrationStatus, TransferSettings


def on(capabilities: list[transfer.Json]) -> set[object]:
    return {entry["capability"] for entry in capabilities if entry["state"]}


def test_the_source_always_hears_of_failures_and_stops_before_the_switchover() -> None:
    always = {"events", "return-path", "pause-before-switchover", "validate-uuid"}
    assert on(transfer.capabilities_out(TransferSettings(0, 20, throttling=False))) == always
    with_all = TransferSettings(0, 20, xbzrle_cache_bytes=1 << 26)
    assert on(transfer.capabilities_out(with_all)) == always | {"auto-converge", "xbzrle"}


def test_what_was_on_for_the_last_transfer_is_turned_off() -> None:
    named = {
        entry["capability"]: entry["state"]
        for entry in transfer.capabilities_out(TransferSettings(0, 20, throttling=False))
    }
    assert named["auto-converge"] is False
    assert named["xbzrle"] is False


def test_a_clone_may_have_another_uuid_than_its_template() -> None:
    assert on(transfer.capabilities_file()) == {"events"}


def test_no_limit_is_a_large_number_for_qemu() -> None:
    assert transfer.parameters(TransferSettings(0, 20))["max-bandwidth"] == 1 << 40
    assert transfer.parameters(TransferSettings(1 << 20, 20))["max-bandwidth"] == 1 << 20


def test_the_throttle_is_one_rung() -> None:
    none = transfer.parameters(TransferSettings(0, 20))
    assert (none["cpu-throttle-initial"], none["max-cpu-throttle"]) == (1, 1)
    some = transfer.parameters(TransferSettings(0, 20, throttle_percent=60))
    assert (some["cpu-throttle-initial"], some["max-cpu-throttle"]) == (60, 60)
    assert "max-cpu-throttle" not in transfer.parameters(TransferSettings(0, 20, throttling=False))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (TransferSettings(0, 0), "downtime limit of 0 ms"),
        (TransferSettings(0, 2_000_001), "downtime limit of 2000001 ms"),
        (TransferSettings(0, 20, throttle_percent=100), "throttle of 100 percent"),
        (TransferSettings(0, 20, throttle_percent=1, throttling=False), "may not throttle"),
        (TransferSettings(-1, 20), "bandwidth of -1 bytes per second"),
    ],
)
def test_what_qemu_cannot_do_is_refused_before_it_is_asked(settings: TransferSettings, words: str) -> None:
    with pytest.raises(Rejected, match=words):
        transfer.parameters(settings)


def test_an_answer_of_query_migrate_is_read_with_its_units() -> None:
    answer = {
        "status": "active",
        "total-time": 812,
        "expected-downtime": 300,
        "setup-time": 2,
        "cpu-throttle-percentage": 41,
        "ram": {
            "total": 1000,
            "transferred": 700,
            "remaining": 300,
            "dirty-pages-rate": 5,
            "page-size": 4096,
            "mbps": 8.0,
            "dirty-sync-count": 3,
        },
    }
    assert transfer.migration_info(answer) == MigrationInfo(
        status=MigrationStatus.ACTIVE,
        total_ms=812,
        setup_ms=2,
        expected_downtime_ms=300,
        ram_total_bytes=1000,
        ram_transferred_bytes=700,
        ram_remaining_bytes=300,
        dirty_bytes_per_s=20480,
        bytes_per_s=1_000_000,
        passes=3,
        throttle_percent=41,
    )


def test_a_vm_that_never_migrated_says_nothing() -> None:
    assert transfer.migration_info({}) == MigrationInfo(status=MigrationStatus.NONE)


def test_a_state_of_post_copy_is_not_taken_for_anything_else() -> None:
    with pytest.raises(PeerProtocolError, match="'postcopy-active', which a pre-copy never has"):
        transfer.migration_info({"status": "postcopy-active"})


@pytest.mark.parametrize(
    ("said", "words", "error"),
    [("a", "b", "a: b"), ("a", "", "a"), ("", "b", "b"), ("", "", "")],
)
def test_the_reason_is_joined_to_what_is_known(said: str, words: str, error: str) -> None:
    info = MigrationInfo(status=MigrationStatus.FAILED, error=said)
    assert transfer.with_error(info, words).error == error


def test_each_status_is_not_begun_under_way_or_ended() -> None:
    for status in MigrationStatus:
        ways = [transfer.is_under_way(status), transfer.has_ended(status), status is MigrationStatus.NONE]
        assert ways.count(True) == 1, status
