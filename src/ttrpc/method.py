"""What a method is, and which of a server's methods a Request means. Pure."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar, cast

from google.protobuf.message import Message

from ttrpc.codes import Code
from ttrpc.errors import StatusError
from ttrpc.frames import REMOTE_CLOSED, REMOTE_OPEN, Bytes
from ttrpc.wire.ttrpc_pb2 import Request

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class Shape(enum.Enum):
    """How many messages go each way."""

    UNARY = "unary"
    SERVER_STREAM = "server stream"
    CLIENT_STREAM = "client stream"
    BIDI = "bidirectional stream"

    @property
    def client_streams(self) -> bool:
        return self in (Shape.CLIENT_STREAM, Shape.BIDI)

    @property
    def server_streams(self) -> bool:
        return self in (Shape.SERVER_STREAM, Shape.BIDI)


class Method(Generic[RequestT, ResponseT]):
    """One method of a service. Generated code makes these; make one by hand to call what has no stub."""

    __slots__ = (
        "decode_request",
        "decode_response",
        "name",
        "prefix",
        "request_type",
        "response_type",
        "service",
        "shape",
    )

    def __init__(
        self,
        service: str,
        name: str,
        shape: Shape,
        request_type: type[RequestT],
        response_type: type[ResponseT],
    ) -> None:
        self.service = service
        """The full proto name of the service."""
        self.name = name
        """The bare name."""
        self.shape = shape
        self.request_type = request_type
        self.response_type = response_type
        self.decode_request = cast("Callable[[Bytes], RequestT]", request_type.FromString)
        self.decode_response = cast("Callable[[Bytes], ResponseT]", response_type.FromString)
        self.prefix = Request(service=service, method=name).SerializeToString()
        """What every Request for it begins with."""

    @property
    def full_name(self) -> str:
        return f"/{self.service}/{self.name}"

    def __repr__(self) -> str:
        return f"<{self.shape.value} {self.full_name}>"


class Service:
    """Base of the generated service classes: what is not overridden answers UNIMPLEMENTED."""

    __slots__ = ()
    ttrpc_methods: ClassVar[Sequence[tuple[Method[Any, Any], str]]] = ()
    """Each method with the name of the attribute that handles it."""


def unimplemented(method: Method[Any, Any]) -> StatusError:
    """What a method that a service does not override raises."""
    return StatusError(Code.UNIMPLEMENTED, f"method {method.name}")


Handler = Callable[..., Any]
"""UNARY: async (request, context) -> response. SERVER_STREAM: (request, context) -> async iterator of responses.
CLIENT_STREAM: async (requests, context) -> response. BIDI: (requests, context) -> async iterator of responses."""

UnaryHandler = Callable[[Any, Any], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class Route:
    """A method and what serves it, interceptors included."""

    method: Method[Any, Any]
    handler: Handler


_PREFERENCES: Final[tuple[tuple[Shape, ...], ...]] = (
    (Shape.UNARY, Shape.SERVER_STREAM, Shape.CLIENT_STREAM, Shape.BIDI),
    (Shape.SERVER_STREAM, Shape.UNARY, Shape.CLIENT_STREAM, Shape.BIDI),
    (Shape.BIDI, Shape.CLIENT_STREAM, Shape.SERVER_STREAM, Shape.UNARY),
)
"""By what the flags of a Request say: nothing, remote closed, remote open."""


class Routes:
    """The methods of a server.

    One name may stand for a unary and a server-streaming method at once: clients say by the Request's flags which one
    they mean. Where only one is there it is taken whatever the flags say, as Go's server does: clients of ttrpc 1.0
    and 1.1 know no flags.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, dict[str, tuple[Route, Route, Route]]] = {}
        self._shapes: dict[tuple[str, str], dict[Shape, Route]] = {}

    def add(self, route: Route) -> None:
        """Serve one more method.

        Raises:
            ValueError: the name is taken by a method of the same shape, or by one that flags cannot tell from it.
        """
        method = route.method
        shapes = dict(self._shapes.get((method.service, method.name), {}))
        for other in shapes:
            if other is method.shape or (other.client_streams and method.shape.client_streams):
                raise ValueError(f"{method.full_name} is registered already, as a {other.value} method")
        shapes[method.shape] = route
        self._shapes[method.service, method.name] = shapes
        ranked = [next(shapes[shape] for shape in order if shape in shapes) for order in _PREFERENCES]
        self._by_name.setdefault(method.service, {})[method.name] = (ranked[0], ranked[1], ranked[2])

    def find(self, service: str, name: str, flags: int) -> Route:
        """The method that a Request means.

        Raises:
            StatusError: UNIMPLEMENTED, naming what is missing.
        """
        methods = self._by_name.get(service)
        if methods is None:
            raise StatusError(Code.UNIMPLEMENTED, f"service {service}")
        routes = methods.get(name)
        if routes is None:
            raise StatusError(Code.UNIMPLEMENTED, f"method {name}")
        if flags & REMOTE_OPEN:
            return routes[2]
        return routes[1] if flags & REMOTE_CLOSED else routes[0]
