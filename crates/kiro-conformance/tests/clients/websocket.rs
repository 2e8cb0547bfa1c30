//! Python's `websockets`, at both ends: through a proxy, by the service's name, and from outside.

use crate::support::process::{Server, run};
use crate::support::tools;
use crate::support::world::{Spec, World};

/// The application; none where there is no Python.
fn echo(world: &World) -> Option<Server> {
    let mut command = tools::python("websocket_app.py")?;
    let mut app = Server::start("echo", &world.path(""), command.arg(world.ports("app").app.to_string()));
    app.ready_when_it_says("ready");
    Some(app)
}

/// Runs one case of the client by each way.
fn check(case: &str) {
    let world = World::start(&Spec::pair());
    let Some(_app) = echo(&world) else { return };
    for way in [
        vec!["--proxy".to_owned(), world.proxy()],
        vec!["--address".to_owned(), world.outbound().to_string()],
        vec!["--address".to_owned(), world.ingress().to_string()],
    ] {
        let Some(mut client) = tools::python("websocket_client.py") else { return };
        let outcome = run(client.args(&way).arg(case));
        assert!(outcome.status.success(), "{way:?}: {}{}", outcome.text(), outcome.stderr);
        assert_eq!(outcome.text().trim(), format!("ok {case}"), "{way:?}");
    }
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn texts_and_bytes_come_back_unchanged() {
    check("echo");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn pings_are_answered_by_the_other_end() {
    check("ping");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn a_message_of_one_mebibyte_comes_back_unchanged() {
    check("large");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn fragments_stay_one_message() {
    check("fragments");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn compression_is_agreed_between_the_two_ends() {
    check("compressed");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn the_subprotocol_is_agreed_between_the_two_ends() {
    check("subprotocol");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn a_client_closes_with_its_code_and_reason() {
    check("client_closes");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn a_server_closes_with_its_code_and_reason() {
    check("server_closes");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn a_client_that_vanishes_is_seen_by_the_server_at_once() {
    check("vanish");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn a_handshake_that_the_server_refuses_is_refused_with_its_words() {
    check("refused");
}

#[test]
#[ignore = "make conformance: needs Python's websockets"]
fn many_connections_at_once() {
    check("many");
}
