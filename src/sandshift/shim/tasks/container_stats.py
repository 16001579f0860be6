"""A container's use of its guest, in the words of containerd's control group metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sandshift.wire.containerd import cgroup_metrics_pb2 as pb

if TYPE_CHECKING:
    from sandshift.guest.containers import ContainerStats
    from sandshift.shim.usage import Usage

UNLIMITED: Final = (1 << 64) - 1
"""How containerd says "max"."""


def metrics_of(stats: ContainerStats) -> pb.Metrics:
    return pb.Metrics(
        pids=pb.PidsStat(current=stats.pids_current, limit=stats.pids_limit),
        cpu=pb.CPUStat(
            usage_usec=stats.cpu_usage_us,
            user_usec=stats.cpu_user_us,
            system_usec=stats.cpu_system_us,
            nr_throttled=stats.cpu_throttled_periods,
            throttled_usec=stats.cpu_throttled_us,
        ),
        memory=pb.MemoryStat(
            anon=stats.memory_anon_bytes,
            file=stats.memory_file_bytes,
            usage=stats.memory_usage_bytes,
            usage_limit=stats.memory_limit_bytes or UNLIMITED,
            max_usage=stats.memory_peak_bytes,
        ),
        io=pb.IOStat(usage=[pb.IOEntry(rbytes=stats.io_read_bytes, wbytes=stats.io_write_bytes)]),
        memory_events=pb.MemoryEvents(oom_kill=stats.oom_kills),
    )


def machine_metrics(used: Usage, *, memory_limit_bytes: int) -> pb.Metrics:
    """A whole sandbox's: its VM process on the host. `memory_limit_bytes`: the guest's memory; 0: there is no machine."""
    return pb.Metrics(
        pids=pb.PidsStat(current=used.threads),
        cpu=pb.CPUStat(
            usage_usec=used.user_us + used.system_us, user_usec=used.user_us, system_usec=used.system_us
        ),
        memory=pb.MemoryStat(
            anon=used.resident_bytes, usage=used.resident_bytes, usage_limit=memory_limit_bytes or UNLIMITED
        ),
    )
