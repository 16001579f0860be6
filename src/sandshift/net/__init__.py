"""The sandbox's network on a host: a pure plan, applied in one batch; and work in a network namespace."""

from sandshift.net.batch import apply, remove
from sandshift.net.namespace import (
    accept_tcp,
    connect_tcp,
    enter,
    listen_tcp,
    make_socket,
    namespace_path,
    run_in,
)
from sandshift.net.plan import Plan, Step, Tap, plan_taps, tap_name

__all__ = [
    "Plan",
    "Step",
    "Tap",
    "accept_tcp",
    "apply",
    "connect_tcp",
    "enter",
    "listen_tcp",
    "make_socket",
    "namespace_path",
    "plan_taps",
    "remove",
    "run_in",
    "tap_name",
]
