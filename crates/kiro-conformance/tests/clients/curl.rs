//! curl, as people use it: every way to the proxy, every version of HTTP, and heads as they were written.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};

use crate::support::app::{App, Head, Then};
use crate::support::process::{command, run};
use crate::support::tools;
use crate::support::world::{Spec, World};

/// curl, without a configuration of the user's, that does not wait for ever and tells what goes wrong.
pub(crate) fn curl() -> Option<Command> {
    let mut command = command(tools::program("curl", "curl")?);
    command.args(["-q", "--silent", "--show-error", "--max-time", "50"]);
    Some(command)
}

/// An application that tells its name and the request's target, and hands over the heads that it saw.
fn greeter(world: &World) -> (App, Receiver<Head>) {
    let (tell, seen) = channel();
    let app = App::start(world.ports("app").app, move |_, head, wire| {
        let _ = tell.send(head.clone());
        wire.body(head);
        wire.answer("200 OK", "", format!("hello from app: {} {}\n", head.method, head.target));
        Then::Keep
    });
    (app, seen)
}

#[test]
fn http_proxy_is_all_that_an_application_sets() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let (_app, seen) = greeter(&world);
    let text = run(curl.env("http_proxy", world.proxy()).arg("http://app/hello?x=1&y=%2Fz")).success();
    assert_eq!(text, "hello from app: GET /hello?x=1&y=%2Fz\n");
    let head = seen.recv().unwrap();
    assert_eq!(head.values("host"), ["app"]);
    assert_eq!(head.values("x-kiro-caller"), ["caller"]);
    world.line("app", "the request", |line| line["caller"] == "caller" && line["path"] == "/hello");
}

#[test]
fn the_services_name_in_host_is_enough() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let (_app, _) = greeter(&world);
    let url = format!("http://{}/hello", world.outbound());
    assert_eq!(run(curl.args(["--header", "Host: app", &url])).success(), "hello from app: GET /hello\n");
}

#[test]
fn a_name_resolved_to_the_proxy_is_enough() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let (_app, seen) = greeter(&world);
    let port = world.outbound().port();
    let (resolve, url) = (format!("app:{port}:127.0.0.1"), format!("http://app:{port}/hello"));
    assert_eq!(run(curl.args(["--resolve", &resolve, &url])).success(), "hello from app: GET /hello\n");
    assert_eq!(seen.recv().unwrap().values("host"), [format!("app:{port}")]);
}

#[test]
fn a_connect_tunnel_carries_requests() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let (_app, _) = greeter(&world);
    curl.args(["--proxytunnel", "--proxy", &world.proxy(), "http://app/one", "http://app/two"]);
    assert_eq!(run(&mut curl).success(), "hello from app: GET /one\nhello from app: GET /two\n");
}

#[test]
fn connections_are_used_again() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let (tell, connections) = channel();
    let _app = App::start(world.ports("app").app, move |number, head, wire| {
        let _ = tell.send(number);
        wire.body(head);
        wire.answer("200 OK", "", "");
        Then::Keep
    });
    curl.args(["--proxy", &world.proxy(), "--write-out", "%{num_connects} %{http_version}\n"]);
    let text = run(curl.args(["http://app/1", "http://app/2", "http://app/3"])).success();
    assert_eq!(text, "1 1.1\n0 1.1\n0 1.1\n");
    assert_eq!(connections.try_iter().collect::<Vec<_>>(), [0, 0, 0], "towards the application");
}

#[test]
fn http_1_0_gets_an_answer_without_chunks() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, _, wire| {
        wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        for piece in ["in ", "three ", "pieces", ""] {
            wire.chunk(piece);
        }
        wire.send("\r\n");
        Then::Keep
    });
    let text = run(curl.args(["--http1.0", "--include", "--proxy", &world.proxy(), "http://app/"])).success();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(!head.to_lowercase().contains("transfer-encoding"), "{head}");
    assert_eq!(body, "in three pieces");
}

#[test]
fn an_application_of_http_1_0_may_end_its_answer_by_closing() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, _, wire| {
        wire.send("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n");
        for _ in 0..100 {
            wire.send([b'x'; 1000]);
        }
        Then::Close
    });
    curl.args(["--proxy", &world.proxy(), "--write-out", "%{http_code} %{size_download} %{num_connects}\n"]);
    let text = run(curl
        .args(["--output", "/dev/null", "http://app/1", "--output", "/dev/null"])
        .arg("http://app/2"))
    .success();
    assert_eq!(text, "200 100000 1\n200 100000 0\n", "the client's connection lives on");
}

#[test]
fn http_2_by_prior_knowledge() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let (_app, seen) = greeter(&world);
    let url = format!("http://{}/hello", world.outbound());
    curl.args(["--http2-prior-knowledge", "--header", "Host: app", "--write-out", "%{http_version}\n"]);
    assert_eq!(run(curl.arg(&url)).success(), "hello from app: GET /hello\n2\n");
    assert_eq!(seen.recv().unwrap().values("host"), ["app"]);
}

#[test]
fn fifty_requests_at_once_on_one_http_2_connection() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let (_app, _) = greeter(&world);
    // By TLS: with prior knowledge, some versions of curl fail at a second stream whoever the server is.
    curl.arg("--cacert").arg(world.path("certs/ca/ca.pem"));
    curl.args(["--http2", "--parallel", "--parallel-max", "50", "--write-out", "%{num_connects}\n"]);
    let text =
        run(curl.arg(format!("https://localhost:{}/[1-50]", world.ports("app").ingress_tls))).success();
    let lines: BTreeSet<_> = text.lines().collect();
    for number in 1..=50 {
        assert!(lines.contains(&*format!("hello from app: GET /{number}")), "{number} of {text}");
    }
    let connections: usize = text.lines().filter_map(|line| line.parse::<usize>().ok()).sum();
    assert_eq!(connections, 1, "{text}");
}

#[test]
fn the_ingress_speaks_tls_with_either_version() {
    let world = World::start(&Spec::pair());
    let (_app, _) = greeter(&world);
    let ca = world.path("certs/ca/ca.pem");
    for (option, version) in [("--http1.1", "1.1"), ("--http2", "2"), ("--http1.0", "1")] {
        let Some(mut curl) = curl() else { return };
        let url = format!("https://localhost:{}/hello", world.ports("app").ingress_tls);
        curl.arg("--cacert").arg(&ca).args([option, "--write-out", "%{http_version}\n", &url]);
        assert_eq!(run(&mut curl).success(), format!("hello from app: GET /hello\n{version}\n"), "{option}");
    }
}

#[test]
fn head_has_the_length_and_no_body() {
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, head, wire| {
        assert_eq!(head.method, "HEAD");
        wire.send("HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nX-Seen: yes\r\n\r\n");
        Then::Keep
    });
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let Some(mut curl) = curl() else { return };
        let url = format!("http://{}/", world.outbound());
        let text = run(curl.args([version, "--head", "--header", "Host: app", &url])).success();
        let head = text.to_lowercase();
        assert!(head.contains("content-length: 12345\r\n") && head.contains("x-seen: yes\r\n"), "{text}");
    }
}

#[test]
fn answers_without_a_body_have_none() {
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, head, wire| {
        let fresh = head.values("if-none-match") == ["\"v1\""];
        match (head.target.as_str(), fresh) {
            ("/none", _) => wire.send("HTTP/1.1 204 No Content\r\n\r\n"),
            ("/cached", true) => wire.send("HTTP/1.1 304 Not Modified\r\nETag: \"v1\"\r\n\r\n"),
            _ => wire.answer("200 OK", "ETag: \"v1\"\r\n", "version 1"),
        }
        Then::Keep
    });
    let etag = world.path("etag");
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let _ = std::fs::remove_file(&etag);
        let ask = |path: &str| {
            let mut curl = curl()?;
            curl.args([version, "--header", "Host: app", "--write-out", " %{http_code}"]);
            curl.arg("--etag-save").arg(&etag).arg("--etag-compare").arg(&etag);
            Some(run(curl.arg(format!("http://{}{path}", world.outbound()))).success())
        };
        let Some(first) = ask("/cached") else { return };
        assert_eq!(first, "version 1 200");
        assert_eq!(ask("/cached").unwrap(), " 304");
        assert_eq!(ask("/none").unwrap(), " 204");
        // The connection to the application is still in step.
        assert_eq!(ask("/other").unwrap(), "version 1 200");
    }
}

#[test]
fn a_range_is_answered_in_part() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, head, wire| {
        assert_eq!(head.values("range"), ["bytes=3-6"]);
        wire.answer("206 Partial Content", "Content-Range: bytes 3-6/10\r\n", "3456");
        Then::Keep
    });
    curl.args(["--proxy", &world.proxy(), "--range", "3-6", "--write-out", " %{http_code}"]);
    curl.arg("http://app/").args(["--dump-header", "-"]);
    let text = run(&mut curl).success();
    assert!(text.ends_with("3456 206"), "{text}");
    assert!(text.to_lowercase().contains("content-range: bytes 3-6/10\r\n"), "{text}");
}

#[test]
fn fields_that_come_twice_stay_two_and_in_order() {
    let world = World::start(&Spec::pair());
    let (tell, seen) = channel();
    let _app = App::start(world.ports("app").app, move |_, head, wire| {
        let _ = tell.send(head.clone());
        let cookies = "Set-Cookie: a=1; Path=/\r\nSet-Cookie: b=2; Expires=Thu, 01 Jan 2037 00:00:00 GMT\r\n";
        wire.answer("200 OK", &format!("{cookies}X-Many: one\r\nX-Many: two, three\r\nX-Many:\r\n"), "");
        Then::Keep
    });
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let Some(mut curl) = curl() else { return };
        curl.args([version, "--include", "--header", "Host: app", "--header", "X-Many: 1"]);
        curl.args(["--header", "X-Many: 2", "--header", "X-Empty;", "--cookie", "sid=abc; theme=dark"]);
        let text = run(curl.arg(format!("http://{}/", world.outbound()))).success();
        let values = |name: &str| -> Vec<String> {
            let lines = text.lines().filter_map(|line| line.split_once(':'));
            let same = lines.filter(|(found, _)| found.eq_ignore_ascii_case(name));
            same.map(|(_, value)| value.trim().to_owned()).collect()
        };
        let cookies = ["a=1; Path=/", "b=2; Expires=Thu, 01 Jan 2037 00:00:00 GMT"];
        assert_eq!(values("set-cookie"), cookies, "{version}");
        assert_eq!(values("x-many"), ["one", "two, three", ""], "{version}");
        let head = seen.recv().unwrap();
        assert_eq!(head.values("x-many"), ["1", "2"], "{version}");
        assert_eq!(head.values("x-empty"), [""], "{version}");
        // HTTP/2 may split cookies; an application of HTTP/1 gets them in one field (RFC 9113, 8.2.3).
        assert_eq!(head.values("cookie"), ["sid=abc; theme=dark"], "{version}");
    }
}

#[test]
fn a_redirect_is_followed_through_the_mesh() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, head, wire| {
        match head.target.as_str() {
            "/old" => wire.answer("302 Found", "Location: http://app/new\r\n", "moved"),
            _ => wire.answer("200 OK", "", "here"),
        }
        Then::Keep
    });
    let text = run(curl.args(["--location", "--proxy", &world.proxy(), "http://app/old"])).success();
    assert_eq!(text, "here");
}

#[test]
fn early_hints_reach_clients_of_http_2_before_the_answer() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, _, wire| {
        wire.send("HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n");
        wire.answer("200 OK", "", "the page");
        Then::Keep
    });
    curl.args(["--http2-prior-knowledge", "--include", "--header", "Host: app"]);
    let text = run(curl.arg(format!("http://{}/", world.outbound()))).success();
    assert!(text.ends_with("the page"), "{text}");
    let hints = text.split_once("HTTP/2 103").map(|(_, hints)| hints.split("\r\n\r\n").next().unwrap());
    assert!(hints.is_some_and(|hints| hints.contains("link: </style.css>; rel=preload")), "{text}");
}

#[test]
fn a_refusal_says_why() {
    let world = World::start(&Spec {
        services: vec![("caller", "app: { port: {port} }"), ("app", "app: { port: {port} }")],
        allow: "  - { from: caller, to: app, methods: [GET], paths: [/open/*] }",
    });
    let (_app, seen) = greeter(&world);
    for (options, url, status, code) in [
        (&["--request", "DELETE"][..], "http://app/open/x", 403, "policy_method"),
        (&[], "http://app/closed", 403, "policy_path"),
        (&[], "http://nobody/", 404, "service_unknown"),
        (&[], "http://example.com/", 403, "host_external"),
        (&["--proxytunnel"], "http://app/closed", 403, "policy_path"),
    ] {
        let Some(mut curl) = curl() else { return };
        curl.args(options).args(["--proxy", &world.proxy(), "--output", "/dev/null"]);
        curl.args(["--write-out", "%{http_code} %header{x-kiro-reject}", url]);
        assert_eq!(run(&mut curl).success(), format!("{status} {code}"), "{url}");
    }
    assert!(seen.try_recv().is_err(), "the application saw a request that is not allowed");
}
