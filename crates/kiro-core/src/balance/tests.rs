use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::*;

fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 15006))
}

#[test]
fn an_empty_set_has_nobody() {
    let now = Instant::now();
    let replicas = Replicas::new(Settings::default(), now);
    assert!(choose(&replicas.snapshot(), now, 0, &[]).is_none());
    replicas.update(&[address(1)], now);
    let request = choose(&replicas.snapshot(), now, 0, &[]).unwrap();
    assert_eq!(request.end(now + Duration::from_millis(1), Outcome::Success), None);
}
