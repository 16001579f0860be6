// The Go side of tests/interop and bench/ttrpc: containerd's own ttrpc, as server and as client.
//
//	interop serve SOCKET            serves interop.Echo until SIGTERM, then shuts down in good order
//	interop check SOCKET NAME       runs one check against a server of interop.Echo
//	interop checks                  names them
//	interop hang SOCKET             opens a call and a stream that never end, and waits to be killed
//	interop bench SOCKET KIND ...   measures a server of interop.Echo
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sort"
	"syscall"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const service = "interop.Echo"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		return serve(args[1])
	case len(args) == 3 && args[0] == "check":
		return check(args[1], args[2])
	case len(args) == 1 && args[0] == "checks":
		names := make([]string, 0, len(checks))
		for name := range checks {
			names = append(names, name)
		}
		sort.Strings(names)
		for _, name := range names {
			fmt.Println(name)
		}
		return nil
	case len(args) == 2 && args[0] == "hang":
		return hang(args[1])
	case len(args) >= 3 && args[0] == "bench":
		return bench(args[1], args[2], args[3:])
	}
	return fmt.Errorf("usage: interop serve SOCKET | check SOCKET NAME | checks | hang SOCKET | bench SOCKET KIND SECONDS")
}

func serve(path string) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	server.RegisterService(service, description())
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	go func() {
		<-signals
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(ctx)
		os.Exit(0)
	}()
	fmt.Println("listening")
	return server.Serve(context.Background(), listener)
}

func hang(path string) error {
	connection, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(connection)
	ctx := context.Background()
	stream, err := client.NewStream(ctx, serverStreaming, service, "Forever", &emptypb.Empty{})
	if err != nil {
		return err
	}
	go func() { _ = client.Call(ctx, service, "Sleep", wrapperspb.Int64(3600_000), &emptypb.Empty{}) }()
	for i := 0; ; i++ {
		if err := stream.RecvMsg(new(wrapperspb.Int64Value)); err != nil {
			return err
		}
		if i == 20 {
			fmt.Println("hanging")
		}
	}
}

func check(path, name string) error {
	do, ok := checks[name]
	if !ok {
		return fmt.Errorf("there is no check %q", name)
	}
	connection, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(connection)
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := do(ctx, client); errors.Is(err, exitNow{}) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	// Whatever the check did, the connection must be as good as new.
	if name != "disconnected" {
		if err := echo(ctx, client, []byte("still here")); err != nil {
			return fmt.Errorf("%s: afterwards: %w", name, err)
		}
	}
	fmt.Println("ok")
	return nil
}
