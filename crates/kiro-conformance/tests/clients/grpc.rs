//! gRPC by grpc-go and by Python's grpcio: each client with each server, by each way to the mesh.

use std::process::Command;

use crate::support::process::{Server, run};
use crate::support::tools;
use crate::support::world::{Spec, World, at};

/// Two applications of the same service, in two languages.
const SERVERS: [&str; 2] = ["golang", "python"];

fn spec(allow: &'static str) -> Spec {
    Spec {
        services: vec![
            ("caller", "app: { port: {port} }"),
            ("golang", "app: { port: {port}, protocol: grpc }, ingress: { port: {ingress} }"),
            ("python", "app: { port: {port}, protocol: grpc }, ingress: { port: {ingress} }"),
        ],
        allow,
    }
}

const ALL: &str = "
  - { from: caller, to: golang }
  - { from: caller, to: python }
  - { from: ingress, to: golang }
  - { from: ingress, to: python }";

fn client(language: &str) -> Option<Command> {
    match language {
        "golang" => tools::go("grpc-client"),
        _ => tools::python("grpc_client.py"),
    }
}

fn server(world: &World, language: &str) -> Option<Server> {
    let mut command = match language {
        "golang" => tools::go("grpc-server")?,
        _ => tools::python("grpc_server.py")?,
    };
    command.arg(world.ports(language).app.to_string());
    let mut server = Server::start(&format!("{language}-server"), &world.path(""), &mut command);
    server.ready_when_it_says("ready");
    Some(server)
}

/// How a client finds a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Its sidecar's address as the target, the service's name as the authority.
    Authority,
    /// The service's name as the target, the sidecar as a proxy by CONNECT.
    Proxy,
    /// From outside the mesh.
    Ingress,
    /// Without Kiro: what fails here is not Kiro's fault.
    Direct,
}

impl Way {
    fn told_to(self, client: &mut Command, world: &World, server: &str) {
        let target = match self {
            Way::Authority => world.outbound().to_string(),
            // Go leaves the name to the proxy then.
            Way::Proxy => format!("dns:///{server}:50051"),
            Way::Ingress => at(world.ports(server).ingress).to_string(),
            Way::Direct => at(world.ports(server).app).to_string(),
        };
        client.args(["--target", &target]);
        match self {
            Way::Authority => _ = client.args(["--authority", server]),
            // grpc-go reads the one, grpcio the other.
            Way::Proxy => {
                _ = client.env("https_proxy", world.proxy()).env("http_proxy", world.proxy());
            }
            Way::Ingress | Way::Direct => {}
        }
    }
}

/// Runs one case with every pair of client and server.
fn check(case: &str, ways: &[Way]) {
    let world = World::start(&spec(ALL));
    let servers: Option<Vec<_>> = SERVERS.iter().map(|language| server(&world, language)).collect();
    let Some(_servers) = servers else { return };
    check_in(&world, case, ways);
}

fn check_in(world: &World, case: &str, ways: &[Way]) {
    let ask = |way: Way, language: &str, server: &str| {
        let mut client = client(language)?;
        way.told_to(&mut client, world, server);
        let outcome = run(client.arg(case));
        let told = format!("{}{}", outcome.text(), outcome.stderr);
        Some(if outcome.status.success() { Ok(()) } else { Err(told) })
    };
    let mut failures = Vec::new();
    for way in ways {
        for language in SERVERS {
            for server in SERVERS {
                let Some(outcome) = ask(*way, language, server) else { return };
                let Err(told) = outcome else { continue };
                let direct = ask(Way::Direct, language, server).map(|outcome| outcome.is_ok());
                let without = if direct == Some(true) { "works" } else { "fails as well" };
                failures.push(format!(
                    "{language} client to {server} server by {way:?} (without Kiro it {without}): {told}"
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{case}:\n{}", failures.join("\n"));
}

const MESH: [Way; 2] = [Way::Authority, Way::Proxy];
const EVERY: [Way; 3] = [Way::Authority, Way::Proxy, Way::Ingress];

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn a_unary_call() {
    check("unary", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn a_stream_of_requests() {
    check("client_streaming", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn a_stream_of_answers() {
    check("server_streaming", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn streams_both_ways_in_which_nothing_is_held_back() {
    check("bidi_streaming", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn metadata_and_trailers_also_in_bytes() {
    check("metadata", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn every_status_with_message_and_details() {
    check("errors", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn an_error_after_some_messages() {
    check("error_after_messages", &MESH);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn methods_that_are_not_there() {
    check("unimplemented", &MESH);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn the_clients_deadline_reaches_the_server() {
    check("deadline", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn a_deadline_that_passes_is_a_status() {
    check("deadline_exceeded", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn a_call_that_the_client_cancels_is_cancelled_at_the_server_at_once() {
    check("cancel", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn messages_of_eight_mebibytes() {
    check("large", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn compressed_messages() {
    check("gzip", &MESH);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn pings_are_answered_and_no_abuse() {
    check("keepalive", &[Way::Authority]);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn hundreds_of_streams_at_once() {
    check("parallel", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn health_checks() {
    check("health", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn reflection() {
    check("reflection", &MESH);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn the_server_is_told_who_calls() {
    let world = World::start(&spec(ALL));
    let servers: Option<Vec<_>> = SERVERS.iter().map(|language| server(&world, language)).collect();
    let Some(_servers) = servers else { return };
    check_in(&world, "caller", &MESH);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn a_call_that_the_policy_denies_is_permission_denied() {
    // By method, as people write policies for gRPC.
    let world = World::start(&spec(
        "
  - { from: caller, to: golang, paths: [/grpc.testing.TestService/EmptyCall] }
  - { from: caller, to: python, paths: [/grpc.testing.TestService/EmptyCall] }
  - { from: ingress, to: golang, paths: [/grpc.testing.TestService/EmptyCall] }
  - { from: ingress, to: python, paths: [/grpc.testing.TestService/EmptyCall] }",
    ));
    let servers: Option<Vec<_>> = SERVERS.iter().map(|language| server(&world, language)).collect();
    let Some(_servers) = servers else { return };
    check_in(&world, "denied", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn a_server_that_is_down_is_unavailable() {
    let world = World::start(&spec(ALL));
    check_in(&world, "unavailable", &EVERY);
}

#[test]
#[ignore = "make conformance: needs grpc-go and grpcio"]
fn a_server_that_dies_in_the_middle_is_unavailable() {
    let world = World::start(&spec(ALL));
    let mut failures = Vec::new();
    for way in EVERY {
        for (language, other) in [(SERVERS[0], SERVERS[1]), (SERVERS[1], SERVERS[0])] {
            // It dies of the call, so each call has one of its own.
            let Some(_server) = server(&world, other) else { return };
            let Some(mut client) = client(language) else { return };
            way.told_to(&mut client, &world, other);
            let outcome = run(client.arg("dies"));
            if !outcome.status.success() {
                failures.push(format!("{language} client to {other} server by {way:?}: {}", outcome.stderr));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
