// Command grpc-server is a gRPC server behind a sidecar. It speaks grpc.testing.TestService, health and reflection, and does what
// its Python twin does.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
)

const (
	messageMax  = 32 << 20
	initialEcho = "x-grpc-test-echo-initial"
	trailerEcho = "x-grpc-test-echo-trailing-bin"
)

type server struct {
	pb.UnimplementedTestServiceServer
	// Calls that were cancelled, for whoever asks.
	cancelled chan struct{}
}

func (s *server) EmptyCall(context.Context, *pb.Empty) (*pb.Empty, error) {
	return &pb.Empty{}, nil
}

func (s *server) UnaryCall(ctx context.Context, in *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	echoMetadata(ctx, func(md metadata.MD) error { return grpc.SetHeader(ctx, md) },
		func(md metadata.MD) { _ = grpc.SetTrailer(ctx, md) })
	given, _ := metadata.FromIncomingContext(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		_ = grpc.SetTrailer(ctx, metadata.Pairs("x-deadline-ms", strconv.FormatInt(time.Until(deadline).Milliseconds(), 10)))
	}
	switch first(given["x-ask"]) {
	case "cancelled":
		select {
		case <-s.cancelled:
			return &pb.SimpleResponse{Username: "cancelled"}, nil
		case <-ctx.Done():
			return nil, status.Error(codes.DeadlineExceeded, "no call was cancelled")
		}
	case "caller":
		return &pb.SimpleResponse{Username: first(given["x-kiro-caller"])}, nil
	case "sleep":
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if asked := in.GetResponseStatus(); asked.GetCode() != 0 {
		failure := status.New(codes.Code(asked.GetCode()), asked.GetMessage())
		if first(given["x-with-details"]) != "" {
			failure, _ = failure.WithDetails(&pb.EchoStatus{Code: 42, Message: "in detail"})
		}
		return nil, failure.Err()
	}
	body := in.GetPayload().GetBody()
	if in.GetResponseSize() > 0 {
		body = make([]byte, in.GetResponseSize())
	}
	return &pb.SimpleResponse{Payload: &pb.Payload{Body: body}}, nil
}

func (s *server) StreamingInputCall(stream pb.TestService_StreamingInputCallServer) error {
	sum := 0
	for {
		in, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&pb.StreamingInputCallResponse{AggregatedPayloadSize: int32(sum)})
		}
		if err != nil {
			return err
		}
		sum += len(in.GetPayload().GetBody())
	}
}

func (s *server) StreamingOutputCall(in *pb.StreamingOutputCallRequest, stream pb.TestService_StreamingOutputCallServer) error {
	return outputs(in, stream.Context(), stream.Send)
}

func (s *server) FullDuplexCall(stream pb.TestService_FullDuplexCallServer) error {
	echoMetadata(stream.Context(), stream.SendHeader, stream.SetTrailer)
	for {
		in, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := outputs(in, stream.Context(), stream.Send); err != nil {
			return err
		}
		if given, _ := metadata.FromIncomingContext(stream.Context()); first(given["x-ask"]) == "die" {
			os.Exit(1)
		}
		if asked := in.GetResponseStatus(); asked.GetCode() != 0 {
			return status.Error(codes.Code(asked.GetCode()), asked.GetMessage())
		}
	}
}

// HalfDuplexCall answers once and then waits for the call's end.
func (s *server) HalfDuplexCall(stream pb.TestService_HalfDuplexCallServer) error {
	// The end may come while the answer is being sent.
	_ = stream.Send(&pb.StreamingOutputCallResponse{})
	<-stream.Context().Done()
	s.cancelled <- struct{}{}
	return stream.Context().Err()
}

func outputs(in *pb.StreamingOutputCallRequest, ctx context.Context, send func(*pb.StreamingOutputCallResponse) error) error {
	for _, asked := range in.GetResponseParameters() {
		if asked.GetIntervalUs() > 0 {
			select {
			case <-time.After(time.Duration(asked.GetIntervalUs()) * time.Microsecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		answer := &pb.StreamingOutputCallResponse{Payload: &pb.Payload{Body: make([]byte, asked.GetSize())}}
		if err := send(answer); err != nil {
			return err
		}
	}
	return nil
}

func echoMetadata(ctx context.Context, header func(metadata.MD) error, trailer func(metadata.MD)) {
	given, _ := metadata.FromIncomingContext(ctx)
	if values := given[initialEcho]; len(values) > 0 {
		_ = header(metadata.MD{initialEcho: values})
	}
	if values := given[trailerEcho]; len(values) > 0 {
		trailer(metadata.MD{trailerEcho: values})
	}
}

func first(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[0]
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	served := grpc.NewServer(
		grpc.MaxRecvMsgSize(messageMax), grpc.MaxSendMsgSize(messageMax),
		// The pings that come here are the sidecar's.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	pb.RegisterTestServiceServer(served, &server{cancelled: make(chan struct{}, 100)})
	healthpb.RegisterHealthServer(served, health.NewServer())
	reflection.Register(served)
	fmt.Println("ready")
	log.Fatal(served.Serve(listener))
}
