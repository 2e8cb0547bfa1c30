//! What speaks no HTTP: PostgreSQL, Redis and MQTT, by their own clients, at a port of the caller's loopback.

mod mqtt;
mod postgres;
mod redis;

use crate::support::world::{Spec, World};

/// `app` is a server of some protocol; `caller` finds it at a port of its own loopback.
fn world() -> World {
    World::start(&Spec {
        services: vec![
            ("caller", "app: { port: {port} }"),
            ("app", "app: { port: {port}, protocol: tcp }, local_port: {local}"),
        ],
        allow: "  - { from: caller, to: app }",
    })
}
