"""Plans applied to the real kernel, each test in a network namespace of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess

import pytest

from sandshift import net
from sandshift.errors import AlreadyThere, NotFound, NotSupported
from tests.needs import needs_root

pytestmark = needs_root


@pytest.fixture
def namespace():
    name = f"sstest-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "add", "br0", "type", "bridge"], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


def links(namespace: str) -> dict[str, dict]:
    shown = subprocess.run(
        ["ip", "-n", namespace, "-json", "-details", "link"], check=True, capture_output=True
    ).stdout
    return {link["ifname"]: link for link in json.loads(shown)}


async def test_a_tap_is_there_with_its_header_owner_and_bridge_and_goes_without_a_trace(namespace):
    before = set(links(namespace))
    plan = net.plan_taps([net.Tap("ss0", owner_uid=0, bridge="br0", mtu_bytes=1400), net.Tap("ss1")])
    await net.apply(plan, network_namespace=namespace)
    made = links(namespace)
    tap = made["ss0"]
    assert (tap["master"], tap["mtu"]) == ("br0", 1400)
    assert tap["linkinfo"]["info_data"]["vnet_hdr"] is True
    assert "UP" in tap["flags"]
    assert "master" not in made["ss1"]
    await net.remove(plan, network_namespace=namespace)
    assert set(links(namespace)) == before


async def test_removing_what_is_gone_or_in_a_namespace_that_is_gone_is_no_error(namespace):
    plan, before = net.plan_taps([net.Tap("ss0")]), set(links(namespace))
    await net.remove(plan, network_namespace=namespace)
    assert set(links(namespace)) == before
    await net.remove(plan, network_namespace="sstest-nowhere")


async def test_a_taken_name_is_refused_and_left_alone_while_ours_go_back(namespace):
    await net.apply(net.plan_taps([net.Tap("ss1")]), network_namespace=namespace)
    with pytest.raises(AlreadyThere, match="tap ss1 exists already"):
        await net.apply(
            net.plan_taps([net.Tap("ss0", bridge="br0"), net.Tap("ss1")]), network_namespace=namespace
        )
    assert "ss0" not in links(namespace)
    assert "ss1" in links(namespace)


async def test_a_missing_bridge_is_named_and_nothing_is_left(namespace):
    with pytest.raises(NotFound, match="bridge br9 does not exist"):
        await net.apply(net.plan_taps([net.Tap("ss0", bridge="br9")]), network_namespace=namespace)
    assert "ss0" not in links(namespace)


async def test_a_missing_namespace_is_named():
    with pytest.raises(NotFound, match="network namespace sstest-nowhere does not exist"):
        await net.apply(net.plan_taps([net.Tap("ss0")]), network_namespace="sstest-nowhere")


async def test_a_cancelled_application_leaves_nothing(namespace):
    task = asyncio.create_task(
        net.apply(net.plan_taps([net.Tap("ss0", bridge="br0")]), network_namespace=namespace)
    )
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "ss0" not in links(namespace)


async def test_without_ip_installed_the_package_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(NotSupported, match="apt-get install iproute2"):
        await net.apply(net.plan_taps([net.Tap("ss0")]))


async def test_without_privilege_the_error_says_so(namespace):
    """A child that has given its privileges up asks the same."""
    script = (
        "import asyncio, os\n"
        "from sandshift import net\n"
        "from sandshift.errors import Rejected\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    asyncio.run(net.apply(net.plan_taps([net.Tap('ssnobody0')])))\n"
        "except Rejected as error:\n"
        "    print(error)\n"
    )
    process = await asyncio.create_subprocess_exec(
        os.sys.executable,
        "-c",
        script,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert said.decode().strip() == (
        "tap ssnobody0: making network devices needs root (CAP_NET_ADMIN); run it as root"
    )
