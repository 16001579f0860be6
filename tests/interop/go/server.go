package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

var cancelled atomic.Int64

func description() *ttrpc.ServiceDesc {
	return &ttrpc.ServiceDesc{
		Methods: map[string]ttrpc.Method{
			"Echo":      unary(func(_ context.Context, in *wrapperspb.BytesValue) (any, error) { return in, nil }),
			"Fail":      unary(fail),
			"Metadata":  unary(metadata),
			"TimeLeft":  unary(timeLeft),
			"Sleep":     unary(sleep),
			"Cancelled": unary(func(context.Context, *emptypb.Empty) (any, error) { return wrapperspb.Int64(cancelled.Load()), nil }),
			"Sink":      unary(func(context.Context, *wrapperspb.BytesValue) (any, error) { return &emptypb.Empty{}, nil }),
			"Big": unary(func(_ context.Context, in *wrapperspb.Int64Value) (any, error) {
				return wrapperspb.Bytes(make([]byte, in.Value)), nil
			}),
		},
		Streams: map[string]ttrpc.Stream{
			"Count":     {Handler: count, StreamingServer: true},
			"CountFail": {Handler: countFail, StreamingServer: true},
			"Blast":     {Handler: blast, StreamingServer: true},
			"Forever":   {Handler: forever, StreamingServer: true},
			"Sum":       {Handler: sum, StreamingClient: true},
			"Refuse":    {Handler: refuse, StreamingClient: true},
			"Chat":      {Handler: chat, StreamingClient: true, StreamingServer: true},
		},
	}
}

func unary[T any](do func(context.Context, *T) (any, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		in := new(T)
		if err := unmarshal(in); err != nil {
			return nil, err
		}
		return do(ctx, in)
	}
}

func fail(_ context.Context, in *wrapperspb.Int32Value) (any, error) {
	answer := status.New(codes.Code(uint32(in.Value)), fmt.Sprintf("code %d", in.Value))
	if detailed, err := answer.WithDetails(wrapperspb.String("detail")); err == nil {
		answer = detailed
	}
	return nil, answer.Err()
}

func metadata(ctx context.Context, in *wrapperspb.StringValue) (any, error) {
	md, _ := ttrpc.GetMetadata(ctx)
	values, _ := md.Get(in.Value)
	return wrapperspb.String(strings.Join(values, "|")), nil
}

func timeLeft(ctx context.Context, _ *emptypb.Empty) (any, error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return wrapperspb.Int64(-1), nil
	}
	return wrapperspb.Int64(time.Until(deadline).Milliseconds()), nil
}

func sleep(ctx context.Context, in *wrapperspb.Int64Value) (any, error) {
	select {
	case <-time.After(time.Duration(in.Value) * time.Millisecond):
		return &emptypb.Empty{}, nil
	case <-ctx.Done():
		cancelled.Add(1)
		return nil, ctx.Err()
	}
}

func counting(ss ttrpc.StreamServer) error {
	in := new(wrapperspb.Int64Value)
	if err := ss.RecvMsg(in); err != nil {
		return err
	}
	for i := int64(0); i < in.Value; i++ {
		if err := ss.SendMsg(wrapperspb.Int64(i)); err != nil {
			return err
		}
	}
	return nil
}

func count(_ context.Context, ss ttrpc.StreamServer) (any, error) { return nil, counting(ss) }

func countFail(_ context.Context, ss ttrpc.StreamServer) (any, error) {
	if err := counting(ss); err != nil {
		return nil, err
	}
	return nil, status.Error(codes.Aborted, "after the last")
}

// blast sends Value>>32 messages of Value&0xffffffff bytes.
func blast(_ context.Context, ss ttrpc.StreamServer) (any, error) {
	in := new(wrapperspb.UInt64Value)
	if err := ss.RecvMsg(in); err != nil {
		return nil, err
	}
	message := wrapperspb.Bytes(make([]byte, in.Value&0xffffffff))
	for i := uint64(0); i < in.Value>>32; i++ {
		if err := ss.SendMsg(message); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func forever(ctx context.Context, ss ttrpc.StreamServer) (any, error) {
	if err := ss.RecvMsg(new(emptypb.Empty)); err != nil {
		return nil, err
	}
	for i := int64(0); ; i++ {
		if err := ss.SendMsg(wrapperspb.Int64(i)); err != nil {
			cancelled.Add(1)
			return nil, err
		}
		select {
		case <-ctx.Done():
			cancelled.Add(1)
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

func sum(_ context.Context, ss ttrpc.StreamServer) (any, error) {
	total := int64(0)
	for {
		in := new(wrapperspb.Int64Value)
		if err := ss.RecvMsg(in); errors.Is(err, io.EOF) {
			return wrapperspb.Int64(total), nil
		} else if err != nil {
			return nil, err
		}
		total += in.Value
	}
}

// refuse fails on the first message, while the client still sends.
func refuse(_ context.Context, ss ttrpc.StreamServer) (any, error) {
	if err := ss.RecvMsg(new(wrapperspb.Int64Value)); err != nil {
		return nil, err
	}
	return nil, status.Error(codes.FailedPrecondition, "enough")
}

func chat(_ context.Context, ss ttrpc.StreamServer) (any, error) {
	for {
		in := new(wrapperspb.BytesValue)
		if err := ss.RecvMsg(in); errors.Is(err, io.EOF) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		if err := ss.SendMsg(in); err != nil {
			return nil, err
		}
	}
}
