"""ttrpc for asyncio: the protocol that containerd speaks with its shims, as Go speaks it.

    server = ttrpc.Server()
    server.register(MyGreeter())                 # a subclass of a generated service class
    await server.serve(ttrpc.listen("/run/greeter.sock"))

    async with await ttrpc.connect("/run/greeter.sock") as client:
        print(await GreeterClient(client).greet(GreetRequest(name="you"), timeout_s=5))

`protoc-gen-ttrpc-python` writes the classes. Under the asyncio shell (`ttrpc.aio`) is a pure core: `frames`, `server_calls`,
`client_calls`.
"""

from __future__ import annotations

from ttrpc.aio.addresses import listen, socket_path
from ttrpc.aio.client import Client, connect
from ttrpc.aio.context import CallContext, RequestStream
from ttrpc.aio.peers import Peer, PeerPolicy
from ttrpc.aio.server import Server, StreamInterceptor, StreamNext, UnaryInterceptor, UnaryNext
from ttrpc.aio.streams import BidiStream, ClientStream, ResponseStream
from ttrpc.aio.transport import StreamTransport, Transport
from ttrpc.codes import Code
from ttrpc.errors import ConnectionClosed, ProtocolViolation, StatusError
from ttrpc.frames import MESSAGE_BYTES_MAX
from ttrpc.inbox import InboxLimits
from ttrpc.metadata import Metadata
from ttrpc.method import Method, Service, Shape, unimplemented

__all__ = [
    "MESSAGE_BYTES_MAX",
    "BidiStream",
    "CallContext",
    "Client",
    "ClientStream",
    "Code",
    "ConnectionClosed",
    "InboxLimits",
    "Metadata",
    "Method",
    "Peer",
    "PeerPolicy",
    "ProtocolViolation",
    "RequestStream",
    "ResponseStream",
    "Server",
    "Service",
    "Shape",
    "StatusError",
    "StreamInterceptor",
    "StreamNext",
    "StreamTransport",
    "Transport",
    "UnaryInterceptor",
    "UnaryNext",
    "connect",
    "listen",
    "socket_path",
    "unimplemented",
]
