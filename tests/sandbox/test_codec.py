import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandshift.errors import Rejected
from sandshift.sandbox import codec
from sandshift.sandbox.model import Container, NetworkCard, Process, Route, Sandbox
from sandshift.sandbox.shape import Device, MachineShape
from sandshift.wire.sandshift import state_pb2

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = st.from_regex(r"\A[A-Za-z][A-Za-z0-9]{0,9}([_.-][A-Za-z0-9]{1,9})?\Z")
MACS = st.builds(
    lambda first, rest: ":".join(f"{byte:02x}" for byte in (first & 0xFE, *rest)),
    st.integers(0, 255),
    st.lists(st.integers(0, 255), min_size=5, max_size=5),
)
ADDRESSES = st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(lambda pair: f"{pair[0]}/{pair[1]}")
CARDS = st.builds(
    NetworkCard,
    id=NAMES,
    mac=st.just("") | MACS,
    addresses=st.lists(ADDRESSES, max_size=2).map(tuple),
    gateway=st.just("") | st.ip_addresses().map(str),
    mtu=st.just(0) | st.integers(68, 65535),
)
INT32 = st.integers(0, (1 << 31) - 1)
ARGS = st.lists(TEXT, max_size=3).map(tuple)
MAPS = st.dictionaries(TEXT, TEXT, max_size=3)


def processes(most):
    return st.lists(
        st.builds(Process, NAMES, INT32, ARGS), max_size=most, unique_by=lambda p: p.process_id
    ).map(tuple)


CONTAINERS = st.builds(Container, NAMES, NAMES, INT32, processes(2), MAPS)
SANDBOXES = st.builds(
    Sandbox,
    sandbox_id=NAMES,
    hostname=TEXT,
    network_cards=st.lists(CARDS, max_size=3, unique_by=lambda card: card.id).map(tuple),
    containers=st.lists(
        CONTAINERS, max_size=3, unique_by=(lambda one: one.container_id, lambda one: one.guest_id)
    ).map(tuple),
    annotations=MAPS,
    created_at_us=st.integers(0, 4_000_000_000_000_000),
    processes=processes(3),
)
PLAIN = st.text("abcxyz0189:.-", max_size=10)
DEVICES = st.builds(
    Device, NAMES, PLAIN, PLAIN, PLAIN, st.booleans(), st.integers(0, (1 << 63) - 1), PLAIN, PLAIN
)
WORDS = st.text("abc019-.", min_size=1, max_size=9)
SHAPES = st.builds(
    MachineShape,
    machine_type=WORDS,
    accelerator=st.sampled_from(["tcg", "kvm"]),
    cpu_model=WORDS,
    vcpus=st.integers(1, 64),
    memory_bytes=st.integers(1, 1 << 50),
    devices=st.lists(DEVICES, max_size=4, unique_by=lambda device: device.id).map(tuple),
    qemu_version=WORDS,
    kernel_command_line=TEXT,
    kernel_sha256=WORDS,
    initramfs_sha256=WORDS,
    uuid=WORDS,
    generation_id=WORDS,
    cpu_features=st.lists(WORDS, max_size=3).map(tuple),
    shared_memory=st.booleans(),
)


@given(SANDBOXES)
def test_a_sandbox_survives_the_wire(sandbox):
    wire = codec.sandbox_to_proto(sandbox).SerializeToString()
    assert codec.sandbox_from_proto(state_pb2.Sandbox.FromString(wire)) == sandbox


@given(SHAPES)
def test_a_machine_survives_the_wire(shape):
    wire = codec.shape_to_proto(shape).SerializeToString()
    assert codec.shape_from_proto(state_pb2.MachineShape.FromString(wire)) == shape


def test_a_mac_is_kept_in_lower_case():
    assert (
        codec.card_from_proto(state_pb2.NetworkCard(id="net0", mac="52:54:00:AB:CD:EF")).mac
        == "52:54:00:ab:cd:ef"
    )


def test_the_routes_of_a_card_travel_whole():
    routes = (
        Route("10.22.0.1/32", source="10.22.0.5"),
        Route("0.0.0.0/0", gateway="10.22.0.1", on_link=True),
    )
    card = NetworkCard("net0", mac="52:54:00:ab:cd:ef", addresses=("10.22.0.5/24",), routes=routes)
    assert codec.card_from_proto(codec.card_to_proto(card)) == card


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": ""}, "network card '': its id must begin with a letter and have at most 64 characters"),
        ({"id": "a,b"}, "network card 'a,b': its id must begin"),
        ({"mac": "52:54:00"}, "network card net0: mac '52:54:00' is not like 52:54:00:12:34:56"),
        ({"mac": "01:00:5e:00:00:01"}, "network card net0: mac '01:00:5e:00:00:01' is a multicast address"),
        ({"addresses": ["10.9.0.50"]}, "network card net0: address '10.9.0.50' has no prefix length"),
        ({"addresses": ["10.9.0/24"]}, "network card net0: address '10.9.0/24' is not like 10.9.0.50/24"),
        ({"gateway": "gw"}, "network card net0: gateway 'gw' is not an IP address"),
        ({"mtu": 67}, "network card net0: mtu 67 is outside 68 to 65535"),
        ({"mtu": 65536}, "network card net0: mtu 65536 is outside 68 to 65535"),
        (
            {"routes": [{"destination": "10.0.0.1/8"}]},
            "network card net0: route to '10.0.0.1/8': 10.0.0.1/8 has host",
        ),
        (
            {"routes": [{"destination": "0.0.0.0/0", "gateway": "x"}]},
            "network card net0: gateway 'x' is not an IP address",
        ),
        (
            {"routes": [{"destination": "0.0.0.0/0", "source": "y"}]},
            "network card net0: source 'y' is not an IP address",
        ),
    ],
)
def test_a_wrong_card_is_refused_by_name(fields, message):
    with pytest.raises(Rejected) as caught:
        codec.card_from_proto(state_pb2.NetworkCard(**{"id": "net0", **fields}))
    assert caught.value.message.startswith(message)


def one(**fields):
    return state_pb2.Container(**{"guest_id": "g1", "container_id": "c1", **fields})


@pytest.mark.parametrize(
    ("sandbox", "message"),
    [
        (
            {"containers": [one(), one(guest_id="g2")]},
            "saved state: container id c1 stands there more than once",
        ),
        (
            {"containers": [one(), one(container_id="c2")]},
            "saved state: guest id of a container g1 stands there more",
        ),
        ({"containers": [one(container_id="")]}, "saved state: container id is empty"),
        (
            {"network_cards": [state_pb2.NetworkCard(id="net0")] * 2},
            "saved state: network card net0 stands there",
        ),
        ({"processes": [state_pb2.Process(process_id="p")] * 2}, "saved state: process id p stands there"),
    ],
)
def test_an_id_that_stands_twice_or_is_missing_is_refused(sandbox, message):
    with pytest.raises(Rejected) as caught:
        codec.sandbox_from_proto(state_pb2.Sandbox(**sandbox))
    assert caught.value.message.startswith(message)


SHAPE = {
    "machine_type": "pc-q35-10.0",
    "accelerator": "tcg",
    "cpu_model": "max",
    "vcpus": 1,
    "memory_bytes": 1 << 28,
    "qemu_version": "10.0.2",
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accelerator": "xen"}, "machine: accelerator 'xen' is not one of tcg, kvm"),
        ({"machine_type": ""}, "machine: machine_type is empty"),
        ({"cpu_model": ""}, "machine: cpu_model is empty"),
        ({"qemu_version": ""}, "machine: qemu_version is empty"),
        ({"vcpus": 0}, "machine: 0 vCPUs and 268435456 bytes of memory make no machine"),
        ({"memory_bytes": 0}, "machine: 1 vCPUs and 0 bytes of memory make no machine"),
        ({"devices": [state_pb2.Device(id="a b")]}, "machine: device id 'a b' is not one that QEMU takes"),
        ({"devices": [state_pb2.Device(id="d", bus="x,y")]}, "machine: device d has bus 'x,y'"),
        ({"devices": [state_pb2.Device(id="d", driver="a=b")]}, "machine: device d has driver 'a=b'"),
        ({"devices": [state_pb2.Device(id="d", address="0\n")]}, "machine: device d has address '0\\n'"),
        ({"devices": [state_pb2.Device(id="d")] * 2}, "saved state: device d stands there more than once"),
    ],
)
def test_what_makes_no_machine_is_refused_by_name(fields, message):
    with pytest.raises(Rejected) as caught:
        codec.shape_from_proto(state_pb2.MachineShape(**{**SHAPE, **fields}))
    assert caught.value.message == message
