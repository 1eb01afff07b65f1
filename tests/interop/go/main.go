// Client is a grpc-go client that does what it is told, one JSON line at a time.
//
// In: commands on stdin, each about a group of streams that do the same. Out: for each command one line that says
// what came of it on all of them. Messages are bytes, in base64: no schema of ours or of Envoy's is needed here.
// Rules: every stream of a group is a goroutine's for one command, so that they really are concurrent; a call that
// fails is a result, not an error; the program fails only when it is told something senseless.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/encoding/gzip" // registers the compressor
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Command is one line of stdin.
type Command struct {
	Do    string `json:"do"`    // open, send, read, finish or cancel
	Group string `json:"group"` // which streams

	// Of open.
	Count    int               `json:"count"`
	Method   string            `json:"method"`
	Gzip     bool              `json:"gzip"`
	Deadline float64           `json:"deadline"` // seconds; 0: none
	Metadata map[string]string `json:"metadata"`

	// Of send.
	Message []byte `json:"message"`
}

// Outcome is what came of a command on some of the streams, the same on each.
type Outcome struct {
	Streams  int      `json:"streams"`
	Messages [][]byte `json:"messages"` // read, in order
	Code     string   `json:"code"`     // with which the stream ended; "": it goes on
	Detail   string   `json:"detail"`
}

// Bytes passes messages through as they are.
type Bytes struct{}

func (Bytes) Name() string { return "proto" }

func (Bytes) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (Bytes) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), data...) // the library reuses what it gives
	return nil
}

type stream struct {
	grpc.ClientStream
	cancel context.CancelFunc
	err    error // why it could not even be opened
}

type client struct {
	connection *grpc.ClientConn
	groups     map[string][]*stream
}

func main() {
	log.SetFlags(0)
	address := flag.String("address", "", "host:port of the server")
	secure := flag.Bool("tls", false, "speak TLS, and take any certificate")
	ping := flag.Duration("keepalive", 0, "PING after so long a silence; grpc-go takes 10s for less")
	flag.Parse()
	connection, err := grpc.NewClient("passthrough:///"+*address, options(*secure, *ping)...)
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	c := client{connection, map[string][]*stream{}}
	out := json.NewEncoder(os.Stdout)
	in := bufio.NewReader(os.Stdin) // not a Scanner, which has a longest line
	for {
		line, err := in.ReadBytes('\n')
		if err == io.EOF {
			return
		}
		var command Command
		if err := json.Unmarshal(line, &command); err != nil {
			log.Fatal(err)
		}
		result, err := c.do(command)
		if err != nil {
			log.Fatal(err)
		}
		if err := out.Encode(result); err != nil {
			log.Fatal(err)
		}
	}
}

func options(secure bool, ping time.Duration) []grpc.DialOption {
	const largest = 64 << 20
	chosen := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(Bytes{}), grpc.MaxCallRecvMsgSize(largest)),
	}
	if secure { // the certificate is one that the server made for itself
		tls := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})
		chosen = append(chosen, grpc.WithTransportCredentials(tls))
	}
	if ping > 0 {
		every := keepalive.ClientParameters{Time: ping, Timeout: 2 * time.Second, PermitWithoutStream: true}
		chosen = append(chosen, grpc.WithKeepaliveParams(every))
	}
	return chosen
}

func (c *client) do(command Command) ([]*Outcome, error) {
	streams := c.groups[command.Group]
	if (streams == nil) != (command.Do == "open") {
		return nil, fmt.Errorf("%s: there is no group %q, or there is one already", command.Do, command.Group)
	}
	switch command.Do {
	case "open":
		c.groups[command.Group] = c.open(command)
	case "send":
		each(streams, func(s *stream) { s.send(command.Message) })
	case "read":
		return outcomes(streams, (*stream).read), nil
	case "finish": // say no more, and read to the end
		each(streams, (*stream).half)
		delete(c.groups, command.Group)
		return outcomes(streams, (*stream).rest), nil
	case "cancel":
		each(streams, func(s *stream) { s.cancel() })
		delete(c.groups, command.Group)
	default:
		return nil, fmt.Errorf("%q is no command", command.Do)
	}
	return []*Outcome{}, nil
}

func (c *client) open(command Command) []*stream {
	streams := make([]*stream, command.Count)
	for at := range streams {
		streams[at] = &stream{}
	}
	chosen := []grpc.CallOption{}
	if command.Gzip {
		chosen = append(chosen, grpc.UseCompressor("gzip"))
	}
	shape := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	each(streams, func(s *stream) {
		ctx := metadata.NewOutgoingContext(context.Background(), metadata.New(command.Metadata))
		if command.Deadline > 0 {
			ctx, s.cancel = context.WithTimeout(ctx, time.Duration(command.Deadline*float64(time.Second)))
		} else {
			ctx, s.cancel = context.WithCancel(ctx)
		}
		s.ClientStream, s.err = c.connection.NewStream(ctx, shape, command.Method, chosen...)
	})
	return streams
}

// send drops the error: why a stream ended is told to who reads it.
func (s *stream) send(message []byte) {
	if s.err == nil {
		_ = s.SendMsg(&message)
	}
}

func (s *stream) half() {
	if s.err == nil {
		_ = s.CloseSend()
	}
}

// read takes one message, or the error that is the stream's end.
func (s *stream) read() ([][]byte, error) {
	if s.err != nil {
		return nil, s.err
	}
	var message []byte
	if err := s.RecvMsg(&message); err != nil {
		return nil, err
	}
	return [][]byte{message}, nil
}

func (s *stream) rest() ([][]byte, error) {
	var all [][]byte
	for {
		messages, err := s.read()
		if err != nil {
			return all, err
		}
		all = append(all, messages...)
	}
}

// outcomes reads from every stream.
func outcomes(streams []*stream, read func(*stream) ([][]byte, error)) []*Outcome {
	var lock sync.Mutex
	known := map[string]*Outcome{}
	each(streams, func(s *stream) {
		messages, err := read(s)
		code, detail := ending(err)
		key := fmt.Sprintf("%x %s %s", messages, code, detail)
		lock.Lock()
		defer lock.Unlock()
		if known[key] == nil {
			known[key] = &Outcome{Messages: messages, Code: code, Detail: detail}
		}
		known[key].Streams++
	})
	return slices.Collect(maps.Values(known))
}

func ending(err error) (code, detail string) {
	switch {
	case err == nil:
		return "", ""
	case err == io.EOF:
		return codes.OK.String(), ""
	}
	end := status.Convert(err)
	return end.Code().String(), end.Message()
}

func each(streams []*stream, do func(*stream)) {
	var all sync.WaitGroup
	for _, one := range streams {
		all.Add(1)
		go func() {
			defer all.Done()
			do(one)
		}()
	}
	all.Wait()
}
