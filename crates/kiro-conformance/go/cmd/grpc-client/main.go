// Command grpc-client is a gRPC client that goes through a sidecar, a case a run: it prints `ok CASE`, or fails with what it saw.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

const (
	messageMax  = 32 << 20
	initialEcho = "x-grpc-test-echo-initial"
	trailerEcho = "x-grpc-test-echo-trailing-bin"
)

type caller struct {
	pb.TestServiceClient
	connection *grpc.ClientConn
}

var cases = map[string]func(context.Context, caller){
	"unary":                unary,
	"client_streaming":     clientStreaming,
	"server_streaming":     serverStreaming,
	"bidi_streaming":       bidiStreaming,
	"metadata":             customMetadata,
	"errors":               errorsWithDetails,
	"error_after_messages": errorAfterMessages,
	"deadline":             deadline,
	"deadline_exceeded":    deadlineExceeded,
	"cancel":               cancel,
	"large":                large,
	"gzip":                 compressed,
	"keepalive":            keptAlive,
	"parallel":             parallel,
	"denied":               denied,
	"unavailable":          unavailable,
	"dies":                 dies,
	"unimplemented":        unimplemented,
	"health":               healthCheck,
	"reflection":           reflected,
	"caller":               callerName,
}

func main() {
	log.SetFlags(0)
	target := flag.String("target", "", "HOST:PORT to connect to, or a service's name behind the proxy of the environment")
	authority := flag.String("authority", "", "the service's name, where the target is not")
	flag.Parse()
	name := flag.Arg(0)
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageMax), grpc.MaxCallSendMsgSize(messageMax)),
		// What fails should be seen, not be tried again.
		grpc.WithDisableRetry(),
	}
	if *authority != "" {
		options = append(options, grpc.WithAuthority(*authority))
	}
	if name == "keepalive" {
		options = append(options, grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 2 * time.Second}))
	}
	connection, err := grpc.NewClient(*target, options...)
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	ctx, done := context.WithTimeout(context.Background(), 30*time.Second)
	defer done()
	cases[name](ctx, caller{pb.NewTestServiceClient(connection), connection})
	fmt.Println("ok", name)
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func expect[T comparable](what string, found, wanted T) {
	if found != wanted {
		log.Fatalf("%s: %v instead of %v", what, found, wanted)
	}
}

func noise(size int) []byte {
	bytes := make([]byte, size)
	_, _ = rand.Read(bytes)
	return bytes
}

func unary(ctx context.Context, c caller) {
	_, err := c.EmptyCall(ctx, &pb.Empty{})
	must(err)
	for _, size := range []int{0, 1, 1000, 271828} {
		body := noise(size)
		answer, err := c.UnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: body}})
		must(err)
		expect("the echo is the same", bytes.Equal(answer.GetPayload().GetBody(), body), true)
	}
}

func clientStreaming(ctx context.Context, c caller) {
	stream, err := c.StreamingInputCall(ctx)
	must(err)
	sum := 0
	for _, size := range []int{27182, 8, 1828, 0, 45904} {
		sum += size
		must(stream.Send(&pb.StreamingInputCallRequest{Payload: &pb.Payload{Body: noise(size)}}))
	}
	answer, err := stream.CloseAndRecv()
	must(err)
	expect("the sum", int(answer.GetAggregatedPayloadSize()), sum)
}

func serverStreaming(ctx context.Context, c caller) {
	sizes := []int32{31415, 9, 2653, 58979}
	asked := &pb.StreamingOutputCallRequest{}
	for _, size := range sizes {
		asked.ResponseParameters = append(asked.ResponseParameters, &pb.ResponseParameters{Size: size})
	}
	stream, err := c.StreamingOutputCall(ctx, asked)
	must(err)
	for _, size := range sizes {
		answer, err := stream.Recv()
		must(err)
		expect("the size", len(answer.GetPayload().GetBody()), int(size))
	}
	_, err = stream.Recv()
	expect("the end", errors.Is(err, io.EOF), true)
}

func bidiStreaming(ctx context.Context, c caller) {
	stream, err := c.FullDuplexCall(ctx)
	must(err)
	// Each message waits for the answer to the one before: nothing may hold one back.
	for _, size := range []int32{31415, 9, 2653, 58979, 0} {
		must(stream.Send(&pb.StreamingOutputCallRequest{
			ResponseParameters: []*pb.ResponseParameters{{Size: size}},
			Payload:            &pb.Payload{Body: noise(1000)},
		}))
		answer, err := stream.Recv()
		must(err)
		expect("the size", len(answer.GetPayload().GetBody()), int(size))
	}
	must(stream.CloseSend())
	_, err = stream.Recv()
	expect("the end", errors.Is(err, io.EOF), true)
}

func customMetadata(ctx context.Context, c caller) {
	binary := string([]byte{0, 1, 0xab, 0xff, '\n', 0x80, ','})
	ctx = metadata.AppendToOutgoingContext(ctx, initialEcho, "one", initialEcho, "two", trailerEcho, binary)
	var header, trailer metadata.MD
	_, err := c.UnaryCall(ctx, &pb.SimpleRequest{}, grpc.Header(&header), grpc.Trailer(&trailer))
	must(err)
	check := func(header, trailer metadata.MD) {
		expect("initial metadata", fmt.Sprint(header.Get(initialEcho)), "[one two]")
		expect("trailing metadata", fmt.Sprintf("%q", trailer.Get(trailerEcho)), fmt.Sprintf("%q", []string{binary}))
	}
	check(header, trailer)
	stream, err := c.FullDuplexCall(ctx)
	must(err)
	header, err = stream.Header()
	must(err)
	must(stream.CloseSend())
	_, err = stream.Recv()
	expect("the end", errors.Is(err, io.EOF), true)
	check(header, stream.Trailer())
}

func errorsWithDetails(ctx context.Context, c caller) {
	// All that gRPC has, by trailers alone.
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		asked := &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: int32(code), Message: "as you wish"}}
		_, err := c.UnaryCall(ctx, asked)
		expect("the code", status.Code(err), code)
		expect("the message", status.Convert(err).Message(), "as you wish")
	}
	special := "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈, 100 %\t\n"
	asked := &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: 2, Message: special}}
	_, err := c.UnaryCall(ctx, asked)
	expect("the message", status.Convert(err).Message(), special)
	asked.ResponseStatus.Code = int32(codes.FailedPrecondition)
	_, err = c.UnaryCall(metadata.AppendToOutgoingContext(ctx, "x-with-details", "yes"), asked)
	details := status.Convert(err).Details()
	expect("how many details", len(details), 1)
	detail, ok := details[0].(*pb.EchoStatus)
	expect("the detail's kind", ok, true)
	expect("the detail", detail.GetMessage(), "in detail")
}

func errorAfterMessages(ctx context.Context, c caller) {
	stream, err := c.FullDuplexCall(ctx)
	must(err)
	must(stream.Send(&pb.StreamingOutputCallRequest{
		ResponseParameters: []*pb.ResponseParameters{{Size: 10}, {Size: 20}},
		ResponseStatus:     &pb.EchoStatus{Code: int32(codes.Aborted), Message: "half way"},
	}))
	for _, size := range []int{10, 20} {
		answer, err := stream.Recv()
		must(err)
		expect("the size", len(answer.GetPayload().GetBody()), size)
	}
	_, err = stream.Recv()
	expect("the code", status.Code(err), codes.Aborted)
	expect("the message", status.Convert(err).Message(), "half way")
}

func deadline(ctx context.Context, c caller) {
	ctx, done := context.WithTimeout(ctx, 7*time.Second)
	defer done()
	var trailer metadata.MD
	_, err := c.UnaryCall(ctx, &pb.SimpleRequest{}, grpc.Trailer(&trailer))
	must(err)
	expect("the server knows a deadline", len(trailer.Get("x-deadline-ms")), 1)
	left, err := strconv.Atoi(trailer.Get("x-deadline-ms")[0])
	must(err)
	expect(fmt.Sprintf("%d ms are left of 7000", left), left > 3000 && left <= 7000, true)
}

func deadlineExceeded(ctx context.Context, c caller) {
	ctx, done := context.WithTimeout(ctx, 300*time.Millisecond)
	defer done()
	begin := time.Now()
	_, err := c.UnaryCall(metadata.AppendToOutgoingContext(ctx, "x-ask", "sleep"), &pb.SimpleRequest{})
	expect("the code", status.Code(err), codes.DeadlineExceeded)
	expect("it took no longer", time.Since(begin) < 5*time.Second, true)
}

func cancel(ctx context.Context, c caller) {
	cancelled, abandon := context.WithCancel(ctx)
	stream, err := c.HalfDuplexCall(cancelled)
	must(err)
	_, err = stream.Recv()
	must(err)
	abandon()
	_, err = stream.Recv()
	expect("the code", status.Code(err), codes.Canceled)
	soon, done := context.WithTimeout(ctx, 5*time.Second)
	defer done()
	answer, err := c.UnaryCall(metadata.AppendToOutgoingContext(soon, "x-ask", "cancelled"), &pb.SimpleRequest{})
	must(err)
	expect("the server saw", answer.GetUsername(), "cancelled")
}

func large(ctx context.Context, c caller) {
	body := noise(8 << 20)
	answer, err := c.UnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: body}})
	must(err)
	expect("the echo is the same", bytes.Equal(answer.GetPayload().GetBody(), body), true)
}

func compressed(ctx context.Context, c caller) {
	body := bytes.Repeat([]byte("again and "), 30_000)
	answer, err := c.UnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: body}}, grpc.UseCompressor(gzip.Name))
	must(err)
	expect("the echo is the same", bytes.Equal(answer.GetPayload().GetBody(), body), true)
}

func keptAlive(ctx context.Context, c caller) {
	// Longer than a ping's turn. A proxy that counts pings as abuse, or does not answer them, ends the connection.
	asked := &pb.StreamingOutputCallRequest{ResponseParameters: []*pb.ResponseParameters{{Size: 1}, {Size: 1, IntervalUs: 13_000_000}}}
	stream, err := c.StreamingOutputCall(ctx, asked)
	must(err)
	for range 2 {
		_, err := stream.Recv()
		must(err)
	}
	_, err = stream.Recv()
	expect("the end", errors.Is(err, io.EOF), true)
}

func parallel(ctx context.Context, c caller) {
	var all sync.WaitGroup
	for number := range 200 {
		all.Go(func() {
			stream, err := c.FullDuplexCall(ctx)
			must(err)
			for turn := range 5 {
				size := int32(number + turn)
				must(stream.Send(&pb.StreamingOutputCallRequest{ResponseParameters: []*pb.ResponseParameters{{Size: size}}}))
				answer, err := stream.Recv()
				must(err)
				expect("the size", len(answer.GetPayload().GetBody()), int(size))
			}
			must(stream.CloseSend())
			_, err = stream.Recv()
			expect("the end", errors.Is(err, io.EOF), true)
		})
	}
	all.Wait()
}

func denied(ctx context.Context, c caller) {
	_, err := c.UnaryCall(ctx, &pb.SimpleRequest{})
	expect("the code of a call", status.Code(err), codes.PermissionDenied)
	stream, err := c.FullDuplexCall(ctx)
	must(err)
	_, err = stream.Recv()
	expect("the code of a stream", status.Code(err), codes.PermissionDenied)
	_, err = c.EmptyCall(ctx, &pb.Empty{})
	must(err)
}

func unavailable(ctx context.Context, c caller) {
	_, err := c.EmptyCall(ctx, &pb.Empty{})
	expect("the code", status.Code(err), codes.Unavailable)
}

func dies(ctx context.Context, c caller) {
	stream, err := c.FullDuplexCall(metadata.AppendToOutgoingContext(ctx, "x-ask", "die"))
	must(err)
	must(stream.Send(&pb.StreamingOutputCallRequest{ResponseParameters: []*pb.ResponseParameters{{Size: 1}}}))
	for err == nil {
		_, err = stream.Recv()
	}
	expect(err.Error(), status.Code(err), codes.Unavailable)
}

func unimplemented(ctx context.Context, c caller) {
	_, err := c.UnimplementedCall(ctx, &pb.Empty{})
	expect("the code", status.Code(err), codes.Unimplemented)
	_, err = pb.NewUnimplementedServiceClient(c.connection).UnimplementedCall(ctx, &pb.Empty{})
	expect("the code", status.Code(err), codes.Unimplemented)
}

func healthCheck(ctx context.Context, c caller) {
	client := healthpb.NewHealthClient(c.connection)
	answer, err := client.Check(ctx, &healthpb.HealthCheckRequest{})
	must(err)
	expect("the health", answer.GetStatus(), healthpb.HealthCheckResponse_SERVING)
	watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
	must(err)
	answer, err = watch.Recv()
	must(err)
	expect("the health", answer.GetStatus(), healthpb.HealthCheckResponse_SERVING)
}

func reflected(ctx context.Context, c caller) {
	// Python's server knows the older name of this service alone; the messages are the same.
	for _, method := range []string{
		reflectionpb.ServerReflection_ServerReflectionInfo_FullMethodName,
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
	} {
		stream, err := c.connection.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		must(err)
		must(stream.SendMsg(&reflectionpb.ServerReflectionRequest{
			MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
		}))
		answer := &reflectionpb.ServerReflectionResponse{}
		err = stream.RecvMsg(answer)
		if status.Code(err) == codes.Unimplemented {
			continue
		}
		must(err)
		for _, service := range answer.GetListServicesResponse().GetService() {
			if service.GetName() == "grpc.testing.TestService" {
				return
			}
		}
		log.Fatalf("no TestService in %v", answer)
	}
	log.Fatal("no reflection")
}

func callerName(ctx context.Context, c caller) {
	answer, err := c.UnaryCall(metadata.AppendToOutgoingContext(ctx, "x-ask", "caller"), &pb.SimpleRequest{})
	must(err)
	expect("the caller that the server was told", answer.GetUsername(), "caller")
}
