//! Answers that take their time: server-sent events and long polls.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::curl::curl;
use crate::support::app::{App, Then, Wire};
use crate::support::process::{Client, PATIENCE};
use crate::support::world::{Spec, World};

const EVENTS: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Every way by which curl listens.
fn ways(world: &World) -> [(&'static str, SocketAddr); 4] {
    [
        ("--http1.1", world.outbound()),
        ("--http1.0", world.outbound()),
        ("--http2-prior-knowledge", world.outbound()),
        ("--http1.1", world.ingress()),
    ]
}

fn listen(version: &str, address: SocketAddr) -> Option<Client> {
    let mut curl = curl()?;
    curl.args([version, "--no-buffer", "--header", "Host: app", "--header", "Accept: text/event-stream"]);
    Some(Client::start(curl.arg(format!("http://{address}/events"))))
}

/// Sends each event when it is told to, until it is told to end.
fn send_events(said: &Mutex<Receiver<Option<String>>>, wire: &mut Wire) {
    wire.send(EVENTS);
    while let Ok(Some(event)) = said.lock().unwrap().recv_timeout(PATIENCE) {
        wire.chunk(format!("data: {event}\n\n"));
    }
    wire.chunk("");
    wire.send("\r\n");
}

#[test]
fn events_arrive_one_by_one_as_they_are_sent() {
    let world = World::start(&Spec::pair());
    let (say, said) = channel();
    let said = Mutex::new(said);
    let _app = App::start(world.ports("app").app, move |_, _, wire| {
        send_events(&said, wire);
        Then::Keep
    });
    for (version, address) in ways(&world) {
        let Some(mut client) = listen(version, address) else { return };
        for number in 0..5 {
            // The next one is sent when the one before has been seen: whatever held one back would stop the test.
            let event = format!("event {number} by {version}");
            say.send(Some(event.clone())).unwrap();
            assert_eq!(client.line(), format!("data: {event}"));
            assert_eq!(client.line(), "");
        }
        say.send(None).unwrap();
        let (status, rest, stderr) = client.end();
        assert!(status.success() && rest.is_empty(), "{version}: {stderr}");
    }
}

#[test]
fn a_listener_that_goes_away_is_seen_by_the_application_at_once() {
    let world = World::start(&Spec::pair());
    let (tell, seen) = channel();
    let _app = App::start(world.ports("app").app, move |_, _, wire| {
        wire.send(EVENTS);
        wire.chunk("data: first\n\n");
        let _ = tell.send(wire.gone());
        Then::Close
    });
    for (version, address) in ways(&world) {
        let Some(mut client) = listen(version, address) else { return };
        assert_eq!(client.line(), "data: first");
        client.kill();
        assert_eq!(seen.recv_timeout(Duration::from_secs(5)), Ok(true), "{version} to {address}");
    }
}

#[test]
fn a_long_poll_waits_as_long_as_the_application_does() {
    // The answer's head is what a timeout is about; who polls switches it off.
    let world = World::start(&Spec::pair_with(
        "app: { port: {port} }, ingress: { port: {ingress} }, traffic: { timeout: off }",
    ));
    let (say, said) = channel::<&str>();
    let (tell, seen) = channel();
    let (said, tell) = (Mutex::new(said), Mutex::new(tell));
    let _app = App::start(world.ports("app").app, move |_, head, wire| {
        tell.lock().unwrap().send(head.target.clone()).unwrap();
        let news = said.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        wire.answer("200 OK", "", format!("{news}\n"));
        Then::Keep
    });
    for (version, address) in ways(&world) {
        let Some(mut client) = listen(version, address) else { return };
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), "/events");
        say.send("news").unwrap();
        assert_eq!(client.line(), "news", "{version} to {address}");
        assert!(client.end().0.success());
    }
}
