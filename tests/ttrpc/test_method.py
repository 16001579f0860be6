"""ttrpc.method: which method a Request means."""

from __future__ import annotations

import pytest
from google.protobuf.empty_pb2 import Empty

from ttrpc import Code, Method, Service, Shape, StatusError, unimplemented
from ttrpc.frames import NO_DATA, REMOTE_CLOSED, REMOTE_OPEN
from ttrpc.method import Route, Routes


def route(shape: Shape, name: str = "M") -> Route:
    return Route(Method("pkg.S", name, shape, Empty, Empty), lambda *_: None)


def test_a_name_in_two_shapes_is_told_apart_by_flags() -> None:
    routes = Routes()
    unary, stream = route(Shape.UNARY), route(Shape.SERVER_STREAM)
    routes.add(stream)
    routes.add(unary)
    assert routes.find("pkg.S", "M", 0) is unary
    assert routes.find("pkg.S", "M", REMOTE_CLOSED) is stream


def test_beside_them_a_client_streaming_shape_fits_too() -> None:
    routes = Routes()
    all_three = {shape: route(shape) for shape in (Shape.UNARY, Shape.SERVER_STREAM, Shape.BIDI)}
    for one in all_three.values():
        routes.add(one)
    found = [
        routes.find("pkg.S", "M", flags) for flags in (0, REMOTE_CLOSED, REMOTE_OPEN, REMOTE_OPEN | NO_DATA)
    ]
    assert found == [
        all_three[Shape.UNARY],
        all_three[Shape.SERVER_STREAM],
        all_three[Shape.BIDI],
        all_three[Shape.BIDI],
    ]


@pytest.mark.parametrize("shape", list(Shape))
@pytest.mark.parametrize("flags", [0, REMOTE_CLOSED, REMOTE_OPEN, REMOTE_OPEN | NO_DATA])
def test_the_only_shape_of_a_name_is_taken_whatever_the_flags_say(shape: Shape, flags: int) -> None:
    routes = Routes()
    routes.add(only := route(shape))
    assert routes.find("pkg.S", "M", flags) is only


@pytest.mark.parametrize(
    ("first", "second"),
    [(Shape.UNARY, Shape.UNARY), (Shape.BIDI, Shape.CLIENT_STREAM), (Shape.CLIENT_STREAM, Shape.BIDI)],
)
def test_shapes_that_flags_cannot_tell_apart_are_refused_and_change_nothing(
    first: Shape, second: Shape
) -> None:
    routes = Routes()
    routes.add(kept := route(first))
    with pytest.raises(ValueError, match=f"/pkg.S/M is registered already, as a {first.value} method"):
        routes.add(route(second))
    assert routes.find("pkg.S", "M", 0) is kept


def test_what_is_missing_is_named() -> None:
    routes = Routes()
    routes.add(route(Shape.UNARY))
    for service, name, message in (("pkg.T", "M", "service pkg.T"), ("pkg.S", "N", "method N")):
        with pytest.raises(StatusError) as caught:
            routes.find(service, name, 0)
        assert (caught.value.code, caught.value.message) == (Code.UNIMPLEMENTED, message)


def test_a_method_knows_its_names_and_a_service_its_methods() -> None:
    method = Method("pkg.S", "M", Shape.BIDI, Empty, Empty)
    assert (method.full_name, repr(method)) == ("/pkg.S/M", "<bidirectional stream /pkg.S/M>")
    assert Service.ttrpc_methods == ()
    assert unimplemented(method).message == "method M"


def test_shapes_know_who_streams() -> None:
    assert [(shape.client_streams, shape.server_streams) for shape in Shape] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
