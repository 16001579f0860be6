"""A client's side of streaming calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from google.protobuf.message import DecodeError, Message

from ttrpc.aio.waiter import Waiter
from ttrpc.client_calls import ClientCall
from ttrpc.codes import Code
from ttrpc.errors import StatusError
from ttrpc.frames import Bytes
from ttrpc.method import Method

if TYPE_CHECKING:
    from ttrpc.aio.client import ClientConnection

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class Pending:
    """The shell's side of one call of a client."""

    __slots__ = ("bucket", "waiter")

    def __init__(self) -> None:
        self.waiter: Waiter | None = None
        self.bucket: int | None = None


class _Stream(Generic[RequestT, ResponseT]):
    """What all streaming calls share. As a context manager it cancels what has not ended by the end of the block."""

    def __init__(
        self, connection: ClientConnection, call: ClientCall, method: Method[RequestT, ResponseT]
    ) -> None:
        self._connection = connection
        self._call = call
        self._method = method

    def cancel(self) -> None:
        """End the call on this side. ttrpc cannot tell the server: its handler runs on until the connection ends.

        Other calls of the connection are not touched. Calling it again, or after the end, does nothing.
        """
        self._connection.cancel(
            self._call, StatusError(Code.CANCELLED, "the call was cancelled by its caller")
        )

    def __del__(self) -> None:
        if not self._call.done:
            self._connection.drop_soon(self._call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        self.cancel()


class _Sending(_Stream[RequestT, ResponseT]):
    async def send(self, message: RequestT) -> None:
        """Send one message; waits while the server does not keep up.

        Raises:
            StatusError: what the call ended with, if it has ended with an error; RESOURCE_EXHAUSTED, the message is
                above the limit (the call lives on); FAILED_PRECONDITION, `end_sending` was called.
        """
        call, connection = self._call, self._connection
        if call.done:
            raise call.error or StatusError(Code.FAILED_PRECONDITION, "the server has ended the call")
        data = message.SerializeToString()
        connection.calls.send(call, data)
        if connection.added(len(data)):
            await connection.turn()

    def end_sending(self) -> None:
        """Tell the server that nothing more comes. Calling it again does nothing."""
        self._connection.calls.end_sending(self._call)
        self._connection.flush_soon(alone=False)


class _Receiving(_Stream[RequestT, ResponseT], AsyncIterator[ResponseT]):
    async def __anext__(self) -> ResponseT:
        call = self._call
        inbox = call.inbox
        assert inbox is not None
        while not inbox.messages:
            if call.done:
                self._connection.ended(call)
                if call.error is not None:
                    raise call.error
                raise StopAsyncIteration
            await self._connection.wait(call)
        was_overfull = inbox.overfull
        data = inbox.take()
        if was_overfull and not inbox.overfull:
            self._connection.relieve(call)
        return decode_response(self._method, data)


class ResponseStream(_Receiving[Message, ResponseT], Generic[ResponseT]):
    """The messages of a server stream, by `async for`. What came before an error is given before it is raised."""


class ClientStream(_Sending[RequestT, ResponseT]):
    """A call with many requests and one response."""

    async def response(self) -> ResponseT:
        """End sending and wait for the response.

        Raises:
            StatusError: the call ended with an error.
        """
        self.end_sending()
        call = self._call
        try:
            while not call.done:
                await self._connection.wait(call)
        except BaseException:
            self.cancel()
            raise
        if call.error is not None:
            raise call.error
        return decode_response(self._method, call.payload)


class BidiStream(_Sending[RequestT, ResponseT], _Receiving[RequestT, ResponseT]):
    """A call with messages both ways: `send`, `end_sending`, and `async for` over what comes."""


def decode_response(method: Method[Any, ResponseT], data: Bytes) -> ResponseT:
    """A response from its bytes.

    Raises:
        StatusError: INTERNAL, these are not the bytes of such a message.
    """
    try:
        return method.decode_response(data)
    except DecodeError as error:
        raise StatusError(
            Code.INTERNAL, f"the response of {method.full_name} cannot be read: {error}"
        ) from error
