"""`sandshift run`: a sandbox, and a process in it."""

from __future__ import annotations

import secrets
import time
from typing import Final

import click

from sandshift.cli import network
from sandshift.cli.frame import Frame, checked_name, framed
from sandshift.cli.frame import run as run_async
from sandshift.cli.sizes import MIB, Size
from sandshift.fleet.launch import INIT_PROCESS, Card, Wish, launch, run_process, stop

MEMORY_MIN_BYTES: Final = 96 * MIB
"""Less does not boot the guest's kernel. As config `vm.memory_mib`."""
MEMORY_MAX_BYTES: Final = 1 << 40
VCPUS_MAX: Final = 64
_ID_BYTES: Final = 3


def environment_of(
    _context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """--env KEY=VALUE, each."""
    found: dict[str, str] = {}
    for value in values:
        name, has_value, content = value.partition("=")
        if not name or not has_value:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", param=parameter)
        found[name] = content
    return found


@click.command(
    context_settings={"allow_interspersed_args": False},
    short_help="Start a sandbox, and a process in it.",
)
@click.option("--id", "sandbox_id", metavar="NAME", help="Id of the sandbox [default: a fresh one].")
@click.option(
    "--memory",
    "memory_bytes",
    type=Size(MEMORY_MIN_BYTES, MEMORY_MAX_BYTES),
    metavar="SIZE",
    help="Guest memory: 512M, 1G; without a unit MiB [default: vm.memory_mib of the configuration].",
)
@click.option("--vcpus", type=click.IntRange(1, VCPUS_MAX), help="Virtual CPUs [default: vm.vcpus].")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    callback=network.address,
    metavar="ADDRESS/PREFIX",
    help="Address of the sandbox's network card; may be repeated. Without it the sandbox has no card.",
)
@click.option("--gateway", default="", metavar="ADDRESS", help="Default gateway of the sandbox.")
@click.option(
    "--mac", callback=network.mac, metavar="MAC", help="MAC of the network card [default: a fresh one]."
)
@click.option("--mtu", type=click.IntRange(network.MTU_MIN, network.MTU_MAX), help="MTU of the network card.")
@click.option("--hostname", default="", metavar="NAME", help="Hostname of the sandbox [default: its id].")
@click.option("--cold", is_flag=True, help="Boot, even where a template fits.")
@click.option(
    "--env",
    "environment",
    multiple=True,
    callback=environment_of,
    metavar="NAME=VALUE",
    help="For the process.",
)
@click.option("--cwd", default="", metavar="DIR", help="Working directory of the process [default: /].")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@framed
def run(
    frame: Frame,
    *,
    sandbox_id: str | None,
    memory_bytes: int | None,
    vcpus: int | None,
    addresses: tuple[str, ...],
    gateway: str,
    mac: str,
    mtu: int | None,
    hostname: str,
    cold: bool,
    environment: dict[str, str],
    cwd: str,
    arguments: tuple[str, ...],
) -> None:
    """Start a sandbox, and COMMAND in it.

    The command returns once the sandbox and its process run; see what it writes with 'sandshift logs'.
    """
    if not addresses and (mac or mtu):
        raise click.UsageError("--mac and --mtu need --address: without an address the sandbox has no card")
    if not arguments and (environment or cwd):
        raise click.UsageError("--env and --cwd are for the process: give its command after --")
    gateway = network.check_gateway(gateway, addresses)
    card = Card(addresses, gateway, mac, mtu or 0) if addresses else None
    wish = Wish(
        sandbox_id=checked_name("--id", sandbox_id) if sandbox_id is not None else fresh_id(),
        namespace=frame.namespace,
        memory_bytes=memory_bytes or 0,
        vcpus=vcpus or 0,
        hostname=checked_name("--hostname", hostname) if hostname else "",
        card=card,
        cold=cold,
    )
    run_async(_run(frame, wish, arguments, environment, cwd))


def fresh_id() -> str:
    return f"s-{secrets.token_hex(_ID_BYTES)}"


async def _run(
    frame: Frame, wish: Wish, arguments: tuple[str, ...], environment: dict[str, str], cwd: str
) -> None:
    host = frame.host()
    began_s = time.monotonic()
    shim = await launch(host, wish)
    try:
        pid = None
        if arguments:
            pid = await run_process(shim, arguments, environment=environment, cwd=cwd)
        status = await shim.status()
    except BaseException:  # Also when interrupted: its id has not been told, nobody would stop it.
        await stop(host, wish.namespace, wish.sandbox_id)
        raise
    finally:
        await shim.close()
    took_ms = round((time.monotonic() - began_s) * 1e3, 1)
    frame.emit(
        {
            "id": wish.sandbox_id,
            "namespace": wish.namespace,
            "host": host.name,
            "state": status.vm_state,
            "started_from": status.started_from,
            "started_ms": took_ms,
            "memory_bytes": status.memory_bytes,
            "accelerator": status.accelerator,
            "qemu_version": status.qemu_version,
            "boot_id": status.boot_id,
            "addresses": [address for card in status.network_cards for address in card.addresses],
            "process": {"id": INIT_PROCESS, "pid": pid} if pid is not None else None,
        },
        wish.sandbox_id,
    )
    frame.say(f"started from {status.started_from or 'nothing'} in {took_ms:.0f} ms on host {host.name}")
