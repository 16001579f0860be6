import dataclasses

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from sandshift.config import Limits
from sandshift.errors import Blocked, Rejected
from sandshift.session import options as rules
from sandshift.session.options import Backend, Options
from sandshift.wire.migration import options_pb2 as pb

BACKEND = Backend.qemu("10.0.2", shared_memory=True)
PLAIN = Backend.qemu("10.0.2", shared_memory=False)
NOTHING = Backend("QEMU 1", memory_digest=False, compression_workers_max=0)


def message(params=None, **fields):
    built = pb.InitializeOptions(memory_transport=pb.MEMORY_TRANSPORT_TCP, **fields)
    if params is not None:
        built.memory_transfer_throttle_params.CopyFrom(pb.MemoryTransferThrottleParams(**params))
    return built


def refusal(built, backend=BACKEND, **more):
    with pytest.raises(Rejected) as caught:
        rules.parse(built, backend=backend, **more)
    return caught.value.message


def test_absent_options_are_the_defaults():
    assert rules.parse(None, backend=BACKEND) == Options()


def test_every_field_arrives():
    built = message(
        {
            "skip_throttling": True,
            "throttling_scale": 50.5,
            "minimum_throttle_percentage": 30,
            "target_number_of_brownout_transfer_passes": 5,
            "starting_brownout_pass_number_for_throttling": 2,
            "maximum_number_of_brownout_transfer_passes": 9,
            "target_blackout_transfer_time": 40,
            "blackout_time_threshold_for_cancelling_migration": 900,
        },
        compression_settings=pb.CompressionSettings(throttle_worker_count=1),
        checksum_verification=True,
        perf_tracing_enabled=True,
        cancel_if_blackout_threshold_exceeds=True,
        prepare_memory_transfer_mode=True,
    )
    assert rules.parse(built, backend=BACKEND) == Options(
        skip_throttling=True,
        throttling_scale_percent=50.5,
        minimum_throttle_percent=30,
        target_passes=5,
        throttling_from_pass=2,
        maximum_passes=9,
        target_blackout_ms=40,
        cancel_threshold_ms=900,
        compression=True,
        compression_workers=1,
        checksum_verification=True,
        perf_tracing=True,
        cancel_if_blackout_exceeds=True,
        prepare_mode=True,
    )


@pytest.mark.parametrize("value", [0, 2, 99])
def test_a_transport_that_is_not_tcp_is_refused(value):
    built = pb.InitializeOptions(memory_transport=value)
    assert (
        refusal(built) == f"init_options: memory_transport = {value} is not one of MEMORY_TRANSPORT_TCP (1)"
    )


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("throttling_scale", 0.99, "1 to 100"),
        ("throttling_scale", 100.5, "1 to 100"),
        ("throttling_scale", -5.0, "1 to 100"),
        ("throttling_scale", float("nan"), "1 to 100"),
        ("throttling_scale", float("inf"), "1 to 100"),
        ("minimum_throttle_percentage", 0, "1 to 99"),
        ("minimum_throttle_percentage", 100, "1 to 99"),
        ("minimum_throttle_percentage", 300, "1 to 99"),
        ("target_number_of_brownout_transfer_passes", 0, "1 to 4294967295"),
        ("starting_brownout_pass_number_for_throttling", 0, "1 to 4294967295"),
        ("maximum_number_of_brownout_transfer_passes", 0, "1 to 4294967295"),
        ("target_blackout_transfer_time", 0, "1 to 2000000"),
        ("target_blackout_transfer_time", 2_000_001, "1 to 2000000"),
        ("blackout_time_threshold_for_cancelling_migration", 0, "1 to 4294967295"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_value_and_range(field, value, allowed):
    number = f"{value:g}" if isinstance(value, float) else value
    assert refusal(message({field: value})) == (
        f"init_options: memory_transfer_throttle_params.{field} = {number} is outside {allowed}"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("throttling_scale", 1.0),
        ("throttling_scale", 100.0),
        ("minimum_throttle_percentage", 1),
        ("minimum_throttle_percentage", 99),
        ("target_blackout_transfer_time", 1),
        ("target_blackout_transfer_time", 2_000_000),
        ("maximum_number_of_brownout_transfer_passes", 1),
        ("maximum_number_of_brownout_transfer_passes", 4294967295),
    ],
)
def test_the_ends_of_a_range_are_in_it(field, value):
    assert rules.to_proto(rules.parse(message({field: value}), backend=BACKEND)) == message({field: value})


def test_all_that_is_wrong_is_named_at_once():
    built = message(
        {"throttling_scale": 0, "minimum_throttle_percentage": 300},
        compatibility_data=pb.CompatibilityInfo(data=b"x"),
    )
    built.memory_transport = 7
    said = refusal(built)
    for name in (
        "memory_transport = 7",
        "throttling_scale = 0",
        "minimum_throttle_percentage = 300",
        "compatibility_data = 1 bytes",
    ):
        assert name in said


def test_a_target_after_the_maximum_is_refused():
    params = {"target_number_of_brownout_transfer_passes": 6, "maximum_number_of_brownout_transfer_passes": 5}
    assert refusal(message(params)) == (
        "init_options: memory_transfer_throttle_params.target_number_of_brownout_transfer_passes = 6 is greater than "
        "maximum_number_of_brownout_transfer_passes = 5"
    )


def test_a_checksum_needs_memory_that_can_be_hashed():
    assert rules.parse(message(checksum_verification=True), backend=BACKEND).checksum_verification
    assert refusal(message(checksum_verification=True), PLAIN) == (
        "init_options: checksum_verification = true cannot be honoured: this QEMU 10.0.2 has its guest's memory where "
        "it cannot be hashed; start the sandbox with vm.shared_memory = true"
    )


def test_compression_over_one_socket_is_one_worker_or_refused():
    def settings(**fields):
        return message(compression_settings=pb.CompressionSettings(**fields))

    assert rules.parse(settings(), backend=BACKEND).compression
    assert rules.parse(settings(throttle_worker_count=1), backend=BACKEND).compression_workers == 1
    assert refusal(settings(throttle_worker_count=0)) == (
        "init_options: compression_settings.throttle_worker_count = 0 is outside 1 to 1"
    )
    assert refusal(settings(throttle_worker_count=4)) == (
        "init_options: compression_settings.throttle_worker_count = 4 is outside 1 to 1: over one socket QEMU 10.0.2 "
        "compresses with at most 1"
    )
    assert refusal(settings(), NOTHING) == (
        "init_options: compression_settings cannot be honoured: QEMU 1 cannot compress over one socket"
    )


def test_compatibility_data_is_the_blobs_own_or_empty():
    def built(data):
        return message(compatibility_data=pb.CompatibilityInfo(data=data))

    assert rules.parse(built(b""), backend=BACKEND) == Options()
    assert rules.parse(built(b"own"), backend=BACKEND, own_compatibility_data=(b"blob", b"own")) == Options()
    assert "compatibility_data = 5 bytes that are not" in refusal(
        built(b"other"), own_compatibility_data=(b"own",)
    )
    assert "compatibility_data = 3 bytes that are not" in refusal(built(b"own"))


def optional(strategy):
    return st.none() | strategy


PASSES = st.integers(1, rules.UINT32_MAX)


@st.composite
def valid_options(draw):
    compression = draw(st.booleans())
    maximum = draw(optional(PASSES))
    return Options(
        skip_throttling=draw(optional(st.booleans())),
        throttling_scale_percent=draw(optional(st.floats(1, 100))),
        minimum_throttle_percent=draw(optional(st.integers(1, 99))),
        target_passes=draw(optional(st.integers(1, maximum or rules.UINT32_MAX))),
        throttling_from_pass=draw(optional(PASSES)),
        maximum_passes=maximum,
        target_blackout_ms=draw(optional(st.integers(1, 2_000_000))),
        cancel_threshold_ms=draw(optional(PASSES)),
        compression=compression,
        compression_workers=draw(st.sampled_from([None, 1])) if compression else None,
        checksum_verification=draw(st.booleans()),
        perf_tracing=draw(st.booleans()),
        cancel_if_blackout_exceeds=draw(st.booleans()),
        prepare_mode=draw(st.booleans()),
    )


@given(valid_options())
def test_options_survive_the_wire(options):
    wire = rules.to_proto(options).SerializeToString()
    assert rules.parse(pb.InitializeOptions.FromString(wire), backend=BACKEND) == options


@given(
    st.builds(
        pb.MemoryTransferThrottleParams,
        throttling_scale=optional(st.floats()),
        minimum_throttle_percentage=optional(st.integers(0, rules.UINT32_MAX)),
        target_blackout_transfer_time=optional(st.integers(0, rules.UINT32_MAX)),
    )
)
def test_whatever_is_accepted_is_kept_unchanged(params):
    built = message()
    built.memory_transfer_throttle_params.CopyFrom(params)
    try:
        taken = rules.parse(built, backend=BACKEND)
    except Rejected:
        return
    assert rules.to_proto(taken).memory_transfer_throttle_params == params


def test_options_agree_unless_one_side_only_wants_the_checksum():
    rules.agree(Options(perf_tracing=True), Options(prepare_mode=True))
    rules.agree(Options(checksum_verification=True), Options(checksum_verification=True))
    with pytest.raises(Blocked) as caught:
        rules.agree(Options(checksum_verification=True), Options())
    assert caught.value.message == (
        "the options of the two sides disagree: options.checksum_verification: the source has true, the destination "
        "has false; give both sides the same value"
    )
    assert len(rules.disagreements(Options(), Options(checksum_verification=True))) == 1


def test_the_threshold_is_in_force_only_with_its_switch_and_has_a_default():
    assert Options(cancel_threshold_ms=5).blackout_threshold_ms is None
    assert Options(cancel_threshold_ms=5, cancel_if_blackout_exceeds=True).blackout_threshold_ms == 5
    assert Options(cancel_if_blackout_exceeds=True).blackout_threshold_ms == 2_000


def test_prepare_mode_makes_the_bounds_of_preparation_longer_and_no_others():
    configured = Limits()
    usual = dataclasses.asdict(rules.limits(Options(), configured))
    longer = dataclasses.asdict(rules.limits(Options(prepare_mode=True), configured))
    assert usual == {name: getattr(configured, name) for name in usual}
    unchanged = {"cancel_s", "handover_frame_s"}
    assert {name for name in usual if longer[name] == usual[name]} == unchanged
    assert all(longer[name] == usual[name] * 4 for name in set(usual) - unchanged)


def test_a_duration_is_seconds_and_what_is_not_positive_means_the_default():
    assert rules.duration_s("timeout", None, default_s=600) == 600
    assert rules.duration_s("timeout", Duration(), default_s=600) == 600
    assert rules.duration_s("timeout", Duration(seconds=-1, nanos=-5), default_s=600) == 600
    assert rules.duration_s("timeout", Duration(nanos=1_000_000), default_s=600) == 0.001
    assert rules.duration_s("timeout", Duration(seconds=2, nanos=500_000_000), default_s=600) == 2.5


@pytest.mark.parametrize(("seconds", "nanos"), [(0, 1_000_000_000), (1, -1), (-1, 1), (315_576_000_001, 0)])
def test_an_impossible_duration_is_refused(seconds, nanos):
    with pytest.raises(Rejected, match=f"deadline = {seconds} s and {nanos} ns is not a valid duration"):
        rules.duration_s("deadline", Duration(seconds=seconds, nanos=nanos), default_s=1)
