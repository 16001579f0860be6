package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// bench measures for a while and prints one JSON object, as bench/ttrpc's Python clients do.
func bench(path, kind string, args []string) error {
	seconds := 1.0
	if len(args) > 0 {
		parsed, err := strconv.ParseFloat(args[0], 64)
		if err != nil {
			return err
		}
		seconds = parsed
	}
	connection, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(connection)
	defer client.Close()
	result := map[string]float64{}
	switch kind {
	case "sequential":
		err = sequential(client, seconds, result)
	case "concurrent64":
		err = concurrent(client, seconds, result)
	case "stream64":
		err = stream(client, seconds, 64, result)
	case "stream64k":
		err = stream(client, seconds, 64<<10, result)
	default:
		err = fmt.Errorf("no such measurement: %s", kind)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

func sequential(client *ttrpc.Client, seconds float64, result map[string]float64) error {
	request := wrapperspb.Bytes(make([]byte, 64))
	took := []float64{}
	warm := time.Now().Add(100 * time.Millisecond)
	end := warm.Add(time.Duration(seconds * float64(time.Second)))
	for {
		start := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		err := client.Call(ctx, service, "Echo", request, new(wrapperspb.BytesValue))
		cancel()
		if err != nil {
			return err
		}
		if start.After(end) {
			break
		}
		if start.After(warm) {
			took = append(took, float64(time.Since(start).Nanoseconds())/1000)
		}
	}
	sort.Float64s(took)
	result["p50_us"] = took[len(took)/2]
	result["p99_us"] = took[len(took)*99/100]
	result["per_s"] = float64(len(took)) / seconds
	return nil
}

func concurrent(client *ttrpc.Client, seconds float64, result map[string]float64) error {
	var group sync.WaitGroup
	counts := make([]int, 64)
	failures := make([]error, 64)
	warm := time.Now().Add(100 * time.Millisecond)
	end := warm.Add(time.Duration(seconds * float64(time.Second)))
	for i := range counts {
		group.Add(1)
		go func() {
			defer group.Done()
			request := wrapperspb.Bytes(make([]byte, 64))
			for now := time.Now(); now.Before(end); now = time.Now() {
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				err := client.Call(ctx, service, "Echo", request, new(wrapperspb.BytesValue))
				cancel()
				if err != nil {
					failures[i] = err
					return
				}
				if now.After(warm) {
					counts[i]++
				}
			}
		}()
	}
	group.Wait()
	total := 0
	for _, n := range counts {
		total += n
	}
	result["per_s"] = float64(total) / seconds
	return errors.Join(failures...)
}

func stream(client *ttrpc.Client, seconds float64, size uint64, result map[string]float64) error {
	round := uint64(20000)
	if size > 1024 {
		round = 500
	}
	messages := uint64(0)
	start := time.Now()
	warm := start.Add(100 * time.Millisecond)
	var first time.Time
	for {
		now := time.Now()
		if now.After(warm) && first.IsZero() {
			first, messages = now, 0
		}
		if !first.IsZero() && now.Sub(first).Seconds() > seconds {
			result["per_s"] = float64(messages) / now.Sub(first).Seconds()
			return nil
		}
		ss, err := client.NewStream(context.Background(), serverStreaming, service, "Blast", wrapperspb.UInt64(round<<32|size))
		if err != nil {
			return err
		}
		for {
			if err := ss.RecvMsg(new(wrapperspb.BytesValue)); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return err
			}
			messages++
		}
	}
}
