//! Redis by redis-cli.

use std::process::Command;

use super::world;
use crate::support::process::{Client, Server, command, run, run_with, wait_for};
use crate::support::tools;
use crate::support::world::World;

struct Redis {
    server: Server,
    world: World,
}

fn start() -> Option<Redis> {
    tools::program("redis-cli", "redis-tools")?;
    let program = tools::program("redis-server", "redis-server")?;
    let world = world();
    let mut serve = command(program);
    serve.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no", "--port"]);
    serve.arg(world.ports("app").app.to_string()).current_dir(world.path(""));
    let mut server = Server::start("redis", &world.path(""), &mut serve);
    server.ready_when_it_says("eady to accept connections");
    Some(Redis { server, world })
}

impl Redis {
    fn cli(&self) -> Command {
        let mut cli = command("redis-cli");
        cli.args(["-h", "127.0.0.1", "-p", &self.world.ports("app").local.to_string()]);
        cli
    }

    fn ask(&self, words: &[&str]) -> String {
        run(self.cli().args(words)).success().trim_end().to_owned()
    }
}

#[test]
#[ignore = "make conformance: needs Redis"]
fn what_was_set_is_got() {
    let Some(redis) = start() else { return };
    assert_eq!(redis.ask(&["SET", "greeting", "Grüße\r\n\u{1}"]), "OK");
    assert_eq!(run(redis.cli().args(["GET", "greeting"])).success(), "Grüße\r\n\u{1}\n");
}

#[test]
#[ignore = "make conformance: needs Redis"]
fn ten_thousand_commands_in_one_go() {
    let Some(redis) = start() else { return };
    let commands: String = (0..10_000).map(|number| format!("SET key:{number} {number}\r\n")).collect();
    let text = run_with(redis.cli().arg("--pipe"), commands.as_bytes()).success();
    assert!(text.contains("errors: 0, replies: 10000"), "{text}");
    assert_eq!(redis.ask(&["DBSIZE"]), "10000");
}

#[test]
#[ignore = "make conformance: needs Redis"]
fn a_subscriber_hears_of_each_message_as_it_comes() {
    let Some(redis) = start() else { return };
    let mut subscriber = Client::start(redis.cli().args(["SUBSCRIBE", "news"]));
    for expected in ["subscribe", "news", "1"] {
        assert_eq!(subscriber.line(), expected);
    }
    for number in 0..5 {
        assert_eq!(redis.ask(&["PUBLISH", "news", &format!("message {number}")]), "1");
        for expected in ["message", "news", &format!("message {number}")] {
            assert_eq!(subscriber.line(), expected);
        }
    }
    // One that goes away is gone.
    subscriber.kill();
    wait_for("the subscriber is gone", || {
        (redis.ask(&["PUBLISH", "news", "to nobody"]) == "0").then_some(())
    });
}

#[test]
#[ignore = "make conformance: needs Redis"]
fn a_server_that_closes_is_seen_by_the_client_at_once() {
    let Some(redis) = start() else { return };
    let mut client = Client::start(&mut redis.cli());
    client.write("CLIENT ID\n");
    let id = client.line();
    assert_eq!(redis.ask(&["CLIENT", "KILL", "ID", &id]), "1");
    client.write("PING\n");
    // redis-cli says so, or connects again by itself and is another client then.
    let (_, rest, stderr) = client.end();
    let rest = String::from_utf8_lossy(&rest).into_owned();
    assert!(rest.contains("PONG") || stderr.contains("closed"), "{rest}{stderr}");
    let subscriber = Client::start(redis.cli().args(["SUBSCRIBE", "news"]));
    wait_for("a subscriber", || (redis.ask(&["PUBSUB", "NUMSUB", "news"]).ends_with('1')).then_some(()));
    drop(redis.server);
    let (_, rest, stderr) = subscriber.end();
    let rest = String::from_utf8_lossy(&rest).into_owned();
    assert!((rest + &stderr).contains("closed"), "{stderr}");
}
