"""docs/reference/options.md and report.md are held against the code."""

import re
from pathlib import Path

import pytest

from sandshift.session import options, precopy
from sandshift.session.blackout import Method, Split
from sandshift.session.phases import Outcome
from sandshift.session.precopy import Rule
from sandshift.session.report import PassReport, Report
from sandshift.wire.migration import options_pb2

REFERENCE = Path(__file__).parents[2] / "docs/reference"
OPTIONS = (REFERENCE / "options.md").read_text()
REPORT = (REFERENCE / "report.md").read_text()


def rows(page):
    """First cell -> the others, of every table row."""
    cells = (line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `"))
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def fields(message, prefix=""):
    return {prefix + field.name for field in message.DESCRIPTOR.fields}


def test_every_field_of_the_options_has_its_row():
    top = fields(options_pb2.InitializeOptions) - {"memory_transfer_throttle_params"}
    nested = fields(options_pb2.MemoryTransferThrottleParams, "throttle.")
    workers = fields(options_pb2.CompressionSettings, "compression_settings.")
    documented = {name.strip("`") for name in rows(OPTIONS)} - {rule.value for rule in Rule}
    assert documented == top | nested | workers


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("throttle.minimum_throttle_percentage", f"{precopy.MINIMUM_THROTTLE_PERCENT_DEFAULT}"),
        ("throttle.minimum_throttle_percentage", f"1 to {options.THROTTLE_PERCENT_MAX} %"),
        (
            "throttle.starting_brownout_pass_number_for_throttling",
            f"{precopy.THROTTLING_FROM_PASS_DEFAULT}, and",
        ),
        ("throttle.target_number_of_brownout_transfer_passes", f"{precopy.TARGET_PASSES_DEFAULT}"),
        (
            "throttle.target_number_of_brownout_transfer_passes",
            f"{precopy.RELAXED_BLACKOUT_MS_MAX // 1000} s",
        ),
        ("throttle.maximum_number_of_brownout_transfer_passes", f"{precopy.MAXIMUM_PASSES_DEFAULT}"),
        (
            "throttle.maximum_number_of_brownout_transfer_passes",
            f"{precopy.FORCED_BLACKOUT_MS_DEFAULT // 1000} s only",
        ),
        ("throttle.target_blackout_transfer_time", f"1 to {options.DOWNTIME_LIMIT_MS_MAX:,} ms"),
        (
            "throttle.blackout_time_threshold_for_cancelling_migration",
            f"{options.BLACKOUT_THRESHOLD_DEFAULT_MS:,} ms",
        ),
        ("compression_settings", f"1 to {precopy.XBZRLE_CACHE_BYTES_MAX >> 20} MiB"),
    ],
)
def test_a_row_names_the_range_and_the_default_that_are_in_force(field, text):
    assert any(text in cell for cell in rows(OPTIONS)[f"`{field}`"])


def test_prepare_mode_is_as_long_as_the_page_says():
    assert options.PREPARE_MODE_FACTOR == 4
    assert "bounds four times as long" in OPTIONS


def test_every_rule_has_its_row():
    assert {f"`{rule.value}`" for rule in Rule if rule is not Rule.NONE} <= rows(OPTIONS).keys()


def test_every_field_of_the_report_is_described():
    described = set(re.findall(r"`([a-z_]+)`", REPORT))
    named = (
        set(Report.__struct_fields__) | set(PassReport.__struct_fields__) | set(Split.__dataclass_fields__)
    )
    assert named <= described


def test_every_outcome_and_method_is_listed():
    cell = rows(REPORT)["`outcome`"][0]
    assert set(re.findall(r"`([a-z-]+)`", cell)) == {outcome.value for outcome in Outcome} | {"none"}
    assert all(f"* `{method.value}`" in REPORT for method in Method)
