"""InitializeOptions: how one side wants its part of a migration done.

Parsed and checked once, at the edge. A value that is out of range, or that this VM cannot honour, is refused by name:
never wrapped, never clamped, never ignored (contract 4.14). docs/reference/options.md tells what each field does on
QEMU; `session/precopy.py` does most of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from google.protobuf.duration_pb2 import Duration

from sandshift.config import Limits
from sandshift.errors import Blocked, Blocker, Rejected
from sandshift.wire.migration import options_pb2

TRANSPORT_TCP: Final = options_pb2.MEMORY_TRANSPORT_TCP
THROTTLE_PERCENT_MAX: Final = 99
"""QEMU leaves the guest at least 1 % of its time. Source: qapi/migration.json, max-cpu-throttle."""
DOWNTIME_LIMIT_MS_MAX: Final = 2_000_000
"""Source: qapi/migration.json, downtime-limit."""
UINT32_MAX: Final = (1 << 32) - 1
BLACKOUT_THRESHOLD_DEFAULT_MS: Final = 2_000
"""Where cancel_if_blackout_threshold_exceeds is set and the threshold is not."""
PREPARE_MODE_FACTOR: Final = 4
"""How much longer the bounds are with prepare_memory_transfer_mode."""
DURATION_S_MAX: Final = 315_576_000_000
"""Source: google/protobuf/duration.proto."""
NANOS_MAX: Final = 999_999_999


@dataclass(frozen=True, slots=True)
class Backend:
    """What the VM of this sandbox can do for a migration over one handed socket."""

    name: str
    """For messages: "QEMU 10.0.2"."""
    memory_digest: bool
    """The guest's memory can be hashed from outside: it lies in a memfd (config `vm.shared_memory`)."""
    compression_workers_max: int = 1
    """0: cannot compress. 1: xbzrle, which works in the migration's own thread."""

    @classmethod
    def qemu(cls, version: str, *, shared_memory: bool) -> Backend:
        """Any QEMU that we support, over `fd:`.

        Worker threads need multifd, and multifd needs several connections: 10.0 says "Migration requires
        multi-channel URIs (e.g. tcp)", 7.2 fails at once (both measured). 7.2's `compress` would work over one socket
        but is gone in 10.0, and one mechanism is enough. What is left in every version is xbzrle.
        """
        return cls(name=f"QEMU {version}", memory_digest=shared_memory)


ANY_BACKEND: Final = Backend("a peer's VM", memory_digest=True, compression_workers_max=UINT32_MAX)
"""For reading the other side's options: what it can honour is its own business."""


@dataclass(frozen=True, slots=True)
class Options:
    """InitializeOptions as asked for; None where nothing was said, and then the defaults of precopy.py hold.

    Equal options are the same request: that is what a repeated PrepareAndExportSandbox is compared by.
    """

    skip_throttling: bool | None = None
    throttling_scale_percent: float | None = None
    """1 to 100: how much of what the throttle may take it takes at its peak."""
    minimum_throttle_percent: int | None = None
    """1 to 99: the throttle's first step."""
    target_passes: int | None = None
    """From this pass on a longer blackout is accepted; the throttle peaks here."""
    throttling_from_pass: int | None = None
    maximum_passes: int | None = None
    """At this pass the switchover is forced."""
    target_blackout_ms: int | None = None
    cancel_threshold_ms: int | None = None
    """In force only with `cancel_if_blackout_exceeds`."""
    compression: bool = False
    compression_workers: int | None = None
    checksum_verification: bool = False
    perf_tracing: bool = False
    cancel_if_blackout_exceeds: bool = False
    prepare_mode: bool = False

    @property
    def blackout_threshold_ms(self) -> int | None:
        """The expected blackout above which a transfer is cancelled; None: no such rule."""
        if not self.cancel_if_blackout_exceeds:
            return None
        return BLACKOUT_THRESHOLD_DEFAULT_MS if self.cancel_threshold_ms is None else self.cancel_threshold_ms


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits in force for one session, seconds (contract 5)."""

    socket_wait_s: float
    transfer_deadline_s: float
    stall_s: float
    orphan_s: float
    cancel_s: float
    qmp_command_s: float
    agent_reply_s: float
    handover_frame_s: float


def parse(
    message: options_pb2.InitializeOptions | None,
    *,
    backend: Backend,
    own_compatibility_data: tuple[bytes, ...] = (),
) -> Options:
    """Check a request's init_options whole. None (absent): the defaults.

    Args:
        message: as it came; None if the field was not there.
        backend: what the VM can honour.
        own_compatibility_data: what `compatibility_data` may hold: the blob that was imported, or its machine.
            Empty on the source, which has imported nothing.

    Raises:
        Rejected: names every field that is wrong, with its value and what is allowed.
    """
    if message is None:
        return Options()
    problems = [*_transport_problems(message), *_range_problems(message.memory_transfer_throttle_params)]
    problems += [
        *_order_problems(message.memory_transfer_throttle_params),
        *_backend_problems(message, backend),
    ]
    sent_back = message.compatibility_data.data
    if sent_back and sent_back not in own_compatibility_data:
        problems.append(
            f"compatibility_data = {len(sent_back)} bytes that are not this saved state's own: send back what the "
            "source exported, or leave it out"
        )
    if problems:
        raise Rejected("init_options: " + "; ".join(problems))
    return _options(message)


def to_proto(options: Options) -> options_pb2.InitializeOptions:
    """The message that `parse` makes these options of. Absent stays absent."""
    message = options_pb2.InitializeOptions(
        memory_transport=TRANSPORT_TCP,
        checksum_verification=options.checksum_verification,
        perf_tracing_enabled=options.perf_tracing,
        cancel_if_blackout_threshold_exceeds=options.cancel_if_blackout_exceeds,
        prepare_memory_transfer_mode=options.prepare_mode,
    )
    params = options_pb2.MemoryTransferThrottleParams(
        skip_throttling=options.skip_throttling,
        throttling_scale=options.throttling_scale_percent,
        minimum_throttle_percentage=options.minimum_throttle_percent,
        target_number_of_brownout_transfer_passes=options.target_passes,
        starting_brownout_pass_number_for_throttling=options.throttling_from_pass,
        maximum_number_of_brownout_transfer_passes=options.maximum_passes,
        target_blackout_transfer_time=options.target_blackout_ms,
        blackout_time_threshold_for_cancelling_migration=options.cancel_threshold_ms,
    )
    if params.ListFields():
        message.memory_transfer_throttle_params.CopyFrom(params)
    if options.compression:
        message.compression_settings.SetInParent()
    if options.compression_workers is not None:
        message.compression_settings.throttle_worker_count = options.compression_workers
    return message


def disagreements(source: Options, destination: Options) -> list[Blocker]:
    """What both sides must want alike and do not. Only the checksum needs both: each hashes its own memory."""
    if source.checksum_verification == destination.checksum_verification:
        return []
    problem = (
        f"the source has {_switch(source.checksum_verification)}, the destination has "
        f"{_switch(destination.checksum_verification)}"
    )
    return [Blocker("options.checksum_verification", problem, "give both sides the same value")]


def agree(source: Options, destination: Options) -> None:
    """Hold the destination's options against the source's, which came with the saved state.

    Raises:
        Blocked: they disagree; names both.
    """
    if found := disagreements(source, destination):
        raise Blocked("the options of the two sides disagree", found)


def limits(options: Options, configured: Limits) -> Bounds:
    """The bounds of a session: the host's, and longer ones with prepare_memory_transfer_mode.

    Longer are those that wait for somebody who prepares or for memory. Cancel and the handover's frames are not:
    they are promises to the caller and part of the blackout.
    """
    factor = PREPARE_MODE_FACTOR if options.prepare_mode else 1
    return Bounds(
        socket_wait_s=configured.socket_wait_s * factor,
        transfer_deadline_s=configured.transfer_deadline_s * factor,
        stall_s=configured.stall_s * factor,
        orphan_s=configured.orphan_s * factor,
        cancel_s=configured.cancel_s,
        qmp_command_s=configured.qmp_command_s * factor,
        agent_reply_s=configured.agent_reply_s * factor,
        handover_frame_s=configured.handover_frame_s,
    )


def duration_s(field: str, message: Duration | None, *, default_s: float) -> float:
    """A bound that came with a request, in seconds. Absent, zero or negative means the default, as upstream has it.

    Raises:
        Rejected: it is no valid Duration (fraction out of range, or of the other sign).
    """
    if message is None:
        return default_s
    seconds, nanos = message.seconds, message.nanos
    if abs(nanos) > NANOS_MAX or abs(seconds) > DURATION_S_MAX or seconds * nanos < 0:
        raise Rejected(f"{field} = {seconds} s and {nanos} ns is not a valid duration")
    value_s = seconds + nanos / 1e9
    return value_s if value_s > 0 else default_s


_RANGES: Final = (
    ("minimum_throttle_percentage", 1, THROTTLE_PERCENT_MAX),
    ("target_number_of_brownout_transfer_passes", 1, UINT32_MAX),
    ("starting_brownout_pass_number_for_throttling", 1, UINT32_MAX),
    ("maximum_number_of_brownout_transfer_passes", 1, UINT32_MAX),
    ("target_blackout_transfer_time", 1, DOWNTIME_LIMIT_MS_MAX),
    ("blackout_time_threshold_for_cancelling_migration", 1, UINT32_MAX),
)


def _transport_problems(message: options_pb2.InitializeOptions) -> Iterator[str]:
    if message.memory_transport != TRANSPORT_TCP:
        yield f"memory_transport = {message.memory_transport} is not one of MEMORY_TRANSPORT_TCP (1)"


def _range_problems(params: options_pb2.MemoryTransferThrottleParams) -> Iterator[str]:
    where = "memory_transfer_throttle_params"
    scale = params.throttling_scale
    if params.HasField("throttling_scale") and not (math.isfinite(scale) and 1 <= scale <= 100):
        yield f"{where}.throttling_scale = {scale:g} is outside 1 to 100"
    present = {descriptor.name for descriptor, _ in params.ListFields()}
    for name, low, high in _RANGES:
        if name in present and not low <= (value := getattr(params, name)) <= high:
            yield f"{where}.{name} = {value} is outside {low} to {high}"


def _order_problems(params: options_pb2.MemoryTransferThrottleParams) -> Iterator[str]:
    """A target after the maximum is never reached: it would be ignored."""
    target, maximum = (
        "target_number_of_brownout_transfer_passes",
        "maximum_number_of_brownout_transfer_passes",
    )
    aimed, most = getattr(params, target), getattr(params, maximum)
    if most and aimed > most:
        yield f"memory_transfer_throttle_params.{target} = {aimed} is greater than {maximum} = {most}"


def _backend_problems(message: options_pb2.InitializeOptions, backend: Backend) -> Iterator[str]:
    if message.checksum_verification and not backend.memory_digest:
        yield (
            f"checksum_verification = true cannot be honoured: this {backend.name} has its guest's memory where it "
            "cannot be hashed; start the sandbox with vm.shared_memory = true"
        )
    if not message.HasField("compression_settings"):
        return
    settings = message.compression_settings
    name = "compression_settings.throttle_worker_count"
    if backend.compression_workers_max == 0:
        yield f"compression_settings cannot be honoured: {backend.name} cannot compress over one socket"
    elif settings.HasField("throttle_worker_count"):
        workers, most = settings.throttle_worker_count, backend.compression_workers_max
        if workers == 0:
            yield f"{name} = 0 is outside 1 to {most}"
        elif workers > most:
            yield (
                f"{name} = {workers} is outside 1 to {most}: over one socket {backend.name} compresses with "
                f"at most {most}"
            )


def _options(message: options_pb2.InitializeOptions) -> Options:
    params, settings = message.memory_transfer_throttle_params, message.compression_settings

    def given(name: str) -> int | None:
        return getattr(params, name) if params.HasField(name) else None  # type: ignore[arg-type]

    return Options(
        skip_throttling=params.skip_throttling if params.HasField("skip_throttling") else None,
        throttling_scale_percent=params.throttling_scale if params.HasField("throttling_scale") else None,
        minimum_throttle_percent=given("minimum_throttle_percentage"),
        target_passes=given("target_number_of_brownout_transfer_passes"),
        throttling_from_pass=given("starting_brownout_pass_number_for_throttling"),
        maximum_passes=given("maximum_number_of_brownout_transfer_passes"),
        target_blackout_ms=given("target_blackout_transfer_time"),
        cancel_threshold_ms=given("blackout_time_threshold_for_cancelling_migration"),
        compression=message.HasField("compression_settings"),
        compression_workers=settings.throttle_worker_count
        if settings.HasField("throttle_worker_count")
        else None,
        checksum_verification=message.checksum_verification,
        perf_tracing=message.perf_tracing_enabled,
        cancel_if_blackout_exceeds=message.cancel_if_blackout_threshold_exceeds,
        prepare_mode=message.prepare_memory_transfer_mode,
    )


def _switch(value: bool) -> str:  # noqa: FBT001
    return "true" if value else "false"
