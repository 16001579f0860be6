package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const limit = 4 << 20

// envelope is what a Response adds to a payload near the limit; request adds the names as well.
const responseOverhead, bytesOverhead = 5, 5

type checkFunc = func(context.Context, *ttrpc.Client) error

var checks = map[string]checkFunc{
	"unary":                           checkUnary,
	"empty messages":                  checkEmpty,
	"concurrent unary":                checkConcurrent,
	"metadata":                        checkMetadata,
	"deadline reaches the server":     checkDeadlineSent,
	"deadline passes":                 checkDeadlinePasses,
	"every code":                      checkCodes,
	"error details":                   checkDetails,
	"unknown names":                   checkUnknown,
	"server stream":                   checkServerStream,
	"server stream of nothing":        checkServerStreamEmpty,
	"server stream that fails":        checkServerStreamFails,
	"server stream of empty messages": checkEmptyMessages,
	"client stream":                   checkClientStream,
	"client stream of nothing":        checkClientStreamEmpty,
	"client stream that is refused":   checkRefused,
	"bidirectional":                   checkChat,
	"64 streams at a time":            check64,
	"request at the limit":            checkRequestLimit,
	"response at the limit":           checkResponseLimit,
	"response over the limit":         checkResponseOver,
	"stream messages at the limit":    checkStreamLimit,
	"cancellation":                    checkCancel,
	"two shapes of one name":          checkBoth,
	"unary method as a stream":        checkUnaryAsStream,
	"disconnected":                    checkDisconnected,
	"drained":                         checkDrained,
}

func echo(ctx context.Context, c *ttrpc.Client, data []byte) error {
	out := new(wrapperspb.BytesValue)
	if err := c.Call(ctx, service, "Echo", wrapperspb.Bytes(data), out); err != nil {
		return err
	}
	if !bytes.Equal(out.Value, data) {
		return fmt.Errorf("sent %d bytes, got %d others", len(data), len(out.Value))
	}
	return nil
}

func expect[T comparable](what string, got, want T) error {
	if got != want {
		return fmt.Errorf("%s: got %v, want %v", what, got, want)
	}
	return nil
}

func expectStatus(err error, code codes.Code, message string) error {
	got, ok := status.FromError(err)
	if !ok || err == nil {
		return fmt.Errorf("got %v, want a status", err)
	}
	if got.Code() != code || !strings.Contains(got.Message(), message) {
		return fmt.Errorf("got %v %q, want %v %q", got.Code(), got.Message(), code, message)
	}
	return nil
}

func checkUnary(ctx context.Context, c *ttrpc.Client) error { return echo(ctx, c, []byte("hello")) }

func checkEmpty(ctx context.Context, c *ttrpc.Client) error { return echo(ctx, c, nil) }

func checkConcurrent(ctx context.Context, c *ttrpc.Client) error {
	return parallel(64, func(i int) error {
		for n := 0; n < 50; n++ {
			if err := echo(ctx, c, []byte(fmt.Sprintf("%d of %d", n, i))); err != nil {
				return err
			}
		}
		return nil
	})
}

func parallel(n int, do func(int) error) error {
	failures := make(chan error, n)
	var group sync.WaitGroup
	for i := 0; i < n; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			failures <- do(i)
		}()
	}
	group.Wait()
	close(failures)
	for err := range failures {
		if err != nil {
			return err
		}
	}
	return nil
}

func checkMetadata(ctx context.Context, c *ttrpc.Client) error {
	md := ttrpc.MD{}
	md.Append("Containerd-Namespace-Ttrpc", "k8s.io", "second")
	ctx = ttrpc.WithMetadata(ctx, md)
	out := new(wrapperspb.StringValue)
	if err := c.Call(ctx, service, "Metadata", wrapperspb.String("containerd-namespace-ttrpc"), out); err != nil {
		return err
	}
	return expect("values", out.Value, "k8s.io|second")
}

func checkDeadlineSent(ctx context.Context, c *ttrpc.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 7*time.Second)
	defer cancel()
	out := new(wrapperspb.Int64Value)
	if err := c.Call(ctx, service, "TimeLeft", &emptypb.Empty{}, out); err != nil {
		return err
	}
	if out.Value < 5000 || out.Value > 7000 {
		return fmt.Errorf("the server has %d ms of 7000", out.Value)
	}
	return nil
}

func cancelledCount(ctx context.Context, c *ttrpc.Client) (int64, error) {
	out := new(wrapperspb.Int64Value)
	err := c.Call(ctx, service, "Cancelled", &emptypb.Empty{}, out)
	return out.Value, err
}

func awaitCancelled(ctx context.Context, c *ttrpc.Client, want int64) error {
	for {
		got, err := cancelledCount(ctx, c)
		if err != nil || got >= want {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d handlers were cancelled, not %d", got, want)
		case <-time.After(time.Millisecond):
		}
	}
}

func checkDeadlinePasses(ctx context.Context, c *ttrpc.Client) error {
	before, err := cancelledCount(ctx, c)
	if err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond) // long enough to be sent
	defer cancel()
	err = c.Call(short, service, "Sleep", wrapperspb.Int64(10_000), &emptypb.Empty{})
	if !errors.Is(err, context.DeadlineExceeded) && status.Code(err) != codes.DeadlineExceeded {
		return fmt.Errorf("got %v", err)
	}
	return awaitCancelled(ctx, c, before+1)
}

func checkCodes(ctx context.Context, c *ttrpc.Client) error {
	for _, number := range []int32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 42, -1} {
		err := c.Call(ctx, service, "Fail", wrapperspb.Int32(number), &emptypb.Empty{})
		if err := expectStatus(err, codes.Code(uint32(number)), fmt.Sprintf("code %d", number)); err != nil {
			return err
		}
	}
	return nil
}

func checkDetails(ctx context.Context, c *ttrpc.Client) error {
	err := c.Call(ctx, service, "Fail", wrapperspb.Int32(5), &emptypb.Empty{})
	details := status.Convert(err).Details()
	if len(details) != 1 {
		return fmt.Errorf("%d details", len(details))
	}
	detail, ok := details[0].(*wrapperspb.StringValue)
	if !ok {
		return fmt.Errorf("the detail is a %T", details[0])
	}
	return expect("detail", detail.Value, "detail")
}

func checkUnknown(ctx context.Context, c *ttrpc.Client) error {
	err := c.Call(ctx, "interop.Nothing", "Echo", &emptypb.Empty{}, &emptypb.Empty{})
	if err := expectStatus(err, codes.Unimplemented, "service interop.Nothing"); err != nil {
		return err
	}
	err = c.Call(ctx, service, "Nothing", &emptypb.Empty{}, &emptypb.Empty{})
	return expectStatus(err, codes.Unimplemented, "method Nothing")
}

var serverStreaming = &ttrpc.StreamDesc{StreamingServer: true}
var clientStreaming = &ttrpc.StreamDesc{StreamingClient: true}
var bothStreaming = &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}

func counts(ctx context.Context, c *ttrpc.Client, method string, n int64) error {
	stream, err := c.NewStream(ctx, serverStreaming, service, method, wrapperspb.Int64(n))
	if err != nil {
		return err
	}
	for i := int64(0); i < n; i++ {
		out := new(wrapperspb.Int64Value)
		if err := stream.RecvMsg(out); err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
		if err := expect("message", out.Value, i); err != nil {
			return err
		}
	}
	return stream.RecvMsg(new(wrapperspb.Int64Value))
}

func checkServerStream(ctx context.Context, c *ttrpc.Client) error {
	return expect("end", counts(ctx, c, "Count", 500), io.EOF)
}

func checkServerStreamEmpty(ctx context.Context, c *ttrpc.Client) error {
	return expect("end", counts(ctx, c, "Count", 0), io.EOF)
}

func checkServerStreamFails(ctx context.Context, c *ttrpc.Client) error {
	return expectStatus(counts(ctx, c, "CountFail", 3), codes.Aborted, "after the last")
}

func checkEmptyMessages(ctx context.Context, c *ttrpc.Client) error {
	stream, err := c.NewStream(ctx, serverStreaming, service, "Blast", wrapperspb.UInt64(3<<32))
	if err != nil {
		return err
	}
	for i := 0; i < 3; i++ {
		out := wrapperspb.Bytes([]byte("not empty"))
		if err := stream.RecvMsg(out); err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
		if len(out.Value) != 0 {
			return fmt.Errorf("message %d has %d bytes", i, len(out.Value))
		}
	}
	return expect("end", stream.RecvMsg(new(wrapperspb.BytesValue)), io.EOF)
}

func sums(ctx context.Context, c *ttrpc.Client, n int64) error {
	stream, err := c.NewStream(ctx, clientStreaming, service, "Sum", nil)
	if err != nil {
		return err
	}
	for i := int64(1); i <= n; i++ {
		if err := stream.SendMsg(wrapperspb.Int64(i)); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	out := new(wrapperspb.Int64Value)
	if err := stream.RecvMsg(out); err != nil {
		return err
	}
	return expect("sum", out.Value, n*(n+1)/2)
}

func checkClientStream(ctx context.Context, c *ttrpc.Client) error { return sums(ctx, c, 300) }

func checkClientStreamEmpty(ctx context.Context, c *ttrpc.Client) error { return sums(ctx, c, 0) }

// checkRefused goes on sending after the server has failed the stream. A server that answers each of these frames
// blocks this connection for good (Go up to 1.2.8).
func checkRefused(ctx context.Context, c *ttrpc.Client) error {
	stream, err := c.NewStream(ctx, clientStreaming, service, "Refuse", nil)
	if err != nil {
		return err
	}
	for i := int64(0); i < 200; i++ {
		if err := stream.SendMsg(wrapperspb.Int64(i)); err != nil {
			return err
		}
		if i == 1 {
			time.Sleep(20 * time.Millisecond)
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return expectStatus(stream.RecvMsg(new(wrapperspb.Int64Value)), codes.FailedPrecondition, "enough")
}

func chats(ctx context.Context, c *ttrpc.Client, n int, size int) error {
	stream, err := c.NewStream(ctx, bothStreaming, service, "Chat", nil)
	if err != nil {
		return err
	}
	for i := 0; i < n; i++ {
		data := bytes.Repeat([]byte{byte(i)}, size)
		if err := stream.SendMsg(wrapperspb.Bytes(data)); err != nil {
			return err
		}
		out := new(wrapperspb.BytesValue)
		if err := stream.RecvMsg(out); err != nil {
			return err
		}
		if !bytes.Equal(out.Value, data) {
			return fmt.Errorf("message %d came back changed", i)
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return expect("end", stream.RecvMsg(new(wrapperspb.BytesValue)), io.EOF)
}

func checkChat(ctx context.Context, c *ttrpc.Client) error { return chats(ctx, c, 100, 10) }

func check64(ctx context.Context, c *ttrpc.Client) error {
	return parallel(64, func(i int) error { return chats(ctx, c, 20, i) })
}

func checkRequestLimit(ctx context.Context, c *ttrpc.Client) error {
	// The largest whose envelope is exactly the limit, found by asking what the envelope would be.
	size := limit - 64
	for envelopeSize(size) < limit {
		size += limit - envelopeSize(size)
	}
	if err := expect("envelope", envelopeSize(size), limit); err != nil {
		return err
	}
	if err := c.Call(ctx, service, "Sink", wrapperspb.Bytes(make([]byte, size)), &emptypb.Empty{}); err != nil {
		return err
	}
	err := c.Call(ctx, service, "Sink", wrapperspb.Bytes(make([]byte, size+1)), &emptypb.Empty{})
	return expectStatus(err, codes.ResourceExhausted, "")
}

func envelopeSize(size int) int {
	payload, _ := proto.Marshal(wrapperspb.Bytes(make([]byte, size)))
	return proto.Size(&ttrpc.Request{Service: service, Method: "Sink", Payload: payload, TimeoutNano: int64(20 * time.Second)})
}

func checkResponseLimit(ctx context.Context, c *ttrpc.Client) error {
	out := new(wrapperspb.BytesValue)
	size := int64(limit - responseOverhead - bytesOverhead)
	if err := c.Call(ctx, service, "Big", wrapperspb.Int64(size), out); err != nil {
		return err
	}
	return expect("bytes", int64(len(out.Value)), size)
}

func checkResponseOver(ctx context.Context, c *ttrpc.Client) error {
	size := int64(limit - responseOverhead - bytesOverhead + 1)
	err := c.Call(ctx, service, "Big", wrapperspb.Int64(size), new(wrapperspb.BytesValue))
	return expectStatus(err, codes.ResourceExhausted, "message length 4194305 exceed maximum message size of 4194304")
}

func checkStreamLimit(ctx context.Context, c *ttrpc.Client) error {
	return chats(ctx, c, 2, limit-bytesOverhead)
}

func checkCancel(ctx context.Context, c *ttrpc.Client) error {
	cancellable, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.Call(cancellable, service, "Sleep", wrapperspb.Int64(15_000), &emptypb.Empty{}) }()
	if err := echo(ctx, c, []byte("beside it")); err != nil {
		return err
	}
	cancel()
	return expect("error", <-done, context.Canceled)
}

func checkBoth(ctx context.Context, c *ttrpc.Client) error {
	out := new(wrapperspb.StringValue)
	if err := c.Call(ctx, service, "Both", &emptypb.Empty{}, out); err != nil {
		return err
	}
	if err := expect("as unary", out.Value, "unary"); err != nil {
		return err
	}
	stream, err := c.NewStream(ctx, serverStreaming, service, "Both", &emptypb.Empty{})
	if err != nil {
		return err
	}
	for _, want := range []string{"stream", "of two"} {
		if err := stream.RecvMsg(out); err != nil {
			return err
		}
		if err := expect("as a stream", out.Value, want); err != nil {
			return err
		}
	}
	return expect("end", stream.RecvMsg(out), io.EOF)
}

func checkUnaryAsStream(ctx context.Context, c *ttrpc.Client) error {
	stream, err := c.NewStream(ctx, serverStreaming, service, "Echo", wrapperspb.Bytes([]byte("one")))
	if err != nil {
		return err
	}
	out := new(wrapperspb.BytesValue)
	if err := stream.RecvMsg(out); err != nil {
		return err
	}
	if err := expect("message", string(out.Value), "one"); err != nil {
		return err
	}
	return expect("end", stream.RecvMsg(out), io.EOF)
}

// checkDisconnected: the server is told to cut every connection while a call and a stream are open.
func checkDisconnected(ctx context.Context, c *ttrpc.Client) error {
	stream, err := c.NewStream(ctx, serverStreaming, service, "Forever", &emptypb.Empty{})
	if err != nil {
		return err
	}
	if err := stream.RecvMsg(new(wrapperspb.Int64Value)); err != nil {
		return err
	}
	// Read all the while: Go's client takes nothing from its connection, not even its end, while a stream's message waits.
	ended := make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			err = stream.RecvMsg(new(wrapperspb.Int64Value))
		}
		ended <- err
	}()
	if err := c.Call(ctx, service, "Cut", &emptypb.Empty{}, &emptypb.Empty{}); !errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("the call ended with %v", err)
	}
	if err := <-ended; !errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("the stream ended with %v", err)
	}
	return nil
}

// checkDrained: the server begins to shut down while this lone call is in flight, and must answer it.
func checkDrained(ctx context.Context, c *ttrpc.Client) error {
	other := c.Call(ctx, service, "ShutDown", &emptypb.Empty{}, &emptypb.Empty{})
	if other != nil {
		return other
	}
	fmt.Println("ok")
	return exitNow{}
}

// exitNow ends the program well: the server is gone, so nothing can be asked afterwards.
type exitNow struct{}

func (exitNow) Error() string { return "" }
