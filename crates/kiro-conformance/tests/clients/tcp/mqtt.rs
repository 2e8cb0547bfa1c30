//! MQTT by mosquitto and its clients.

use std::process::Command;

use super::world;
use crate::support::process::{Client, Server, command, run, run_with};
use crate::support::tools;
use crate::support::world::World;

fn start() -> Option<(Server, World)> {
    tools::program("mosquitto_sub", "mosquitto-clients")?;
    let program = tools::program("mosquitto", "mosquitto")?;
    let world = world();
    let configuration = world.path("mosquitto.conf");
    let port = world.ports("app").app;
    let text = format!("listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n");
    std::fs::write(&configuration, text).unwrap();
    let mut serve = command(program);
    serve.arg("-v").arg("-c").arg(configuration);
    let mut server = Server::start("mosquitto", &world.path(""), &mut serve);
    server.ready_when_it_says("running");
    Some((server, world))
}

fn client(world: &World, program: &str) -> Command {
    let mut client = command(program);
    let port = world.ports("app").local.to_string();
    client.args(["-h", "127.0.0.1", "-p", &port, "-t", "house/kitchen", "-q", "1"]);
    client
}

#[test]
#[ignore = "make conformance: needs mosquitto"]
fn messages_reach_a_subscriber_as_they_come() {
    let Some((server, world)) = start() else { return };
    let mut subscriber = Client::start(&mut client(&world, "mosquitto_sub"));
    let mut server = server;
    server.ready_when_it_says("house/kitchen (QoS 1)");
    for number in 0..3 {
        run(client(&world, "mosquitto_pub").args(["-m", &format!("{number} degrees")])).success();
        assert_eq!(subscriber.line(), format!("{number} degrees"));
    }
    let large = "x".repeat(1024 * 1024);
    run_with(client(&world, "mosquitto_pub").arg("-s"), large.as_bytes()).success();
    assert_eq!(subscriber.line().len(), large.len());
}
