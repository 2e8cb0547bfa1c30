//! A page in a browser, from outside the mesh: Chromium without a window.

use crate::support::process::{Server, command, wait_for};
use crate::support::tools;
use crate::support::world::{Spec, World};

/// Lets Chromium open the page until it has told what it saw, and gives that. The protocol is what its WebSocket came by.
fn visit(url: impl Fn(&World) -> String, protocol: &str) -> Option<serde_json::Value> {
    let chromium = tools::program("chromium", "chromium")?;
    let mut serve = tools::python("browser_app.py")?;
    let world = World::start(&Spec::pair());
    let mut app = Server::start("page", &world.path(""), serve.arg(world.ports("app").app.to_string()));
    app.ready_when_it_says("ready");
    let mut browse = command(chromium);
    browse.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
    browse.args(["--no-first-run", "--no-proxy-server", "--disable-background-networking"]);
    // The ingress's certificate is of this mesh's own authority, which no browser knows.
    browse.arg("--ignore-certificate-errors");
    browse.arg(format!("--user-data-dir={}", world.path("profile").display())).arg(url(&world));
    let mut browser = Server::start("chromium", &world.path(""), &mut browse);
    let result = browser.ready(|| {
        let written = app.written();
        written.lines().find_map(|line| serde_json::from_str(line.strip_prefix("result ")?).ok())
    });
    // At once, and not when somebody next writes to it.
    browser.ready(|| app.written().contains("listener came").then_some(()));
    drop(browser);
    wait_for("the application sees that the browser went", || {
        app.written().contains("listener went").then_some(())
    });
    assert!(app.written().contains("socket closed with 4001"), "{}", app.written());
    let socket = world.line("app", "the WebSocket", |line| line["path"] == "/socket");
    assert_eq!(socket["protocol"], protocol, "{socket}");
    Some(result)
}

#[track_caller]
fn check(seen: &serde_json::Value, protocol: &str) {
    assert_eq!(seen["events"], serde_json::json!(["1", "2", "3", "4", "5", "6"]), "{seen}");
    assert_eq!(seen["lost"], serde_json::json!(["connects again"]), "{seen}");
    // The page closed with 4001, which the application saw; aiohttp's own answer to that is 1000.
    assert_eq!(seen["messages"], serde_json::json!(["Grüße", "100000 bytes", "1000  true"]), "{seen}");
    assert_eq!(seen["protocol"], protocol, "{seen}");
}

#[test]
#[ignore = "make conformance: needs Chromium and aiohttp"]
fn a_page_hears_events_and_talks_by_a_socket() {
    let Some(seen) = visit(|world| format!("http://{}/", world.ingress()), "HTTP/1.1") else { return };
    check(&seen, "http/1.1");
}

#[test]
#[ignore = "make conformance: needs Chromium and aiohttp"]
fn a_page_by_tls_and_http_2_does_so_too() {
    let Some(seen) =
        visit(|world| format!("https://localhost:{}/", world.ports("app").ingress_tls), "HTTP/2")
    else {
        return;
    };
    check(&seen, "h2");
}
