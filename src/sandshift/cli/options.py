"""InitializeOptions on the command line: one flag a field, and nothing sent for what was not said."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import click

PASSES_MAX: Final = (1 << 32) - 1
MILLISECONDS_MAX: Final = (1 << 32) - 1
DOWNTIME_MAX_MS: Final = 2_000_000
PERCENT_MAX: Final = 99
DEADLINE_MAX_S: Final = 86_400.0


class FiniteRange(click.FloatRange):
    """`click.FloatRange`, which lets "nan" through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


_PASSES: Final = click.IntRange(1, PASSES_MAX)

FLAGS: Final = (
    click.option("--no-throttle", "skip_throttling", is_flag=True, help="Never slow the guest down."),
    click.option(
        "--throttle-scale",
        "throttling_scale_percent",
        type=FiniteRange(1, 100),
        metavar="PERCENT",
        help="How much of what the throttle may take it takes at its peak.",
    ),
    click.option(
        "--throttle-min",
        "minimum_throttle_percent",
        type=click.IntRange(1, PERCENT_MAX),
        metavar="PERCENT",
        help="First step of the throttle.",
    ),
    click.option(
        "--throttle-from-pass",
        "throttling_from_pass",
        type=_PASSES,
        metavar="N",
        help="Slow the guest down from this pass on.",
    ),
    click.option(
        "--target-passes",
        "target_passes",
        type=_PASSES,
        metavar="N",
        help="From this pass on a longer blackout is accepted.",
    ),
    click.option(
        "--max-passes",
        "maximum_passes",
        type=_PASSES,
        metavar="N",
        help="At this pass the guest is brought over, however long its blackout gets.",
    ),
    click.option(
        "--target-blackout",
        "target_blackout_ms",
        type=click.IntRange(1, DOWNTIME_MAX_MS),
        metavar="MS",
        help="How long the guest may run nowhere [default: migration.downtime_limit_ms].",
    ),
    click.option(
        "--cancel-above-blackout",
        "cancel_threshold_ms",
        type=click.IntRange(1, MILLISECONDS_MAX),
        metavar="MS",
        help="Rather give up than let the guest run nowhere for longer.",
    ),
    click.option("--compress", "compression", is_flag=True, help="Send changed pages as differences."),
    click.option(
        "--checksum",
        "checksum_verification",
        is_flag=True,
        help="Hash the guest's memory on both hosts and compare; the blackout grows by that time.",
    ),
    click.option("--trace", "perf_tracing", is_flag=True, help="Put a timeline into the report."),
    click.option(
        "--prepare-mode", "prepare_mode", is_flag=True, help="Longer bounds, for slow preparations."
    ),
)


def migration_options(command: Callable[..., object]) -> Callable[..., object]:
    """Give a command the flags; `options_of` makes Options of what they got."""
    for flag in reversed(FLAGS):
        command = flag(command)
    return command


def options_of(given: dict[str, object]) -> object | None:
    """Options of what was said; None if nothing was.

    Raises:
        click.UsageError: two flags contradict each other.
    """
    from sandshift.session.options import Options  # noqa: PLC0415 - loads protobuf

    said = {name: value for name, value in given.items() if value not in (None, False)}
    if not said:
        return None
    target, most = given["target_passes"], given["maximum_passes"]
    if isinstance(target, int) and isinstance(most, int) and target > most:
        raise click.UsageError(
            f"--target-passes {target} is greater than --max-passes {most}: it would never be reached"
        )
    throttles = ("throttling_scale_percent", "minimum_throttle_percent", "throttling_from_pass")
    if "skip_throttling" in said and any(name in said for name in throttles):
        raise click.UsageError(
            "--no-throttle contradicts the other --throttle options: leave one of them out"
        )
    if "cancel_threshold_ms" in said:
        said["cancel_if_blackout_exceeds"] = True
    return Options(**said)  # type: ignore[arg-type]
