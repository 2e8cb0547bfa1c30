//! What an application may ask for, in which words, and what of it travels on.

use http::Version;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::client::{Client, Refusal, check_refused};
use crate::support::{Recorder, Spec, World};

/// `caller` may do anything to `callee`, and nothing to `other`.
async fn world() -> (World, Recorder) {
    let mut spec = Spec::pair();
    spec.services.push(("other", "app: { port: {port} }"));
    let mut world = World::start(spec).await;
    let recorder = world.recorder("callee").await;
    (world, recorder)
}

#[tokio::test]
async fn an_authority_that_names_no_service_is_refused() {
    let (world, recorder) = world().await;
    let cases = [
        ("user@callee", 400, "authority_invalid", "userinfo"),
        ("user:secret@callee", 400, "authority_invalid", "userinfo"),
        ("127.0.0.1", 400, "authority_invalid", "IP address"),
        ("127.0.0.1:80", 400, "authority_invalid", "IP address"),
        ("[::1]", 400, "authority_invalid", "IP address"),
        ("0x7f.1", 400, "authority_invalid", "IP address"),
        ("2130706433", 400, "authority_invalid", "IP address"),
        ("call_ee", 400, "authority_invalid", "not a DNS name"),
        ("callee..", 400, "authority_invalid", "not a DNS name"),
        ("callee:0", 400, "authority_invalid", "port"),
        ("nobody", 404, "service_unknown", "no such service"),
        ("ingress", 404, "service_unknown", "no such service"),
        ("localhost", 404, "service_unknown", "no such service"),
        ("caller", 404, "service_unknown", "does not call itself"),
        ("example.com", 403, "host_external", "outside the mesh"),
        ("callee.example.com", 403, "host_external", "outside the mesh"),
    ];
    for (authority, status, code, cause) in cases {
        let expected = Refusal { status, code, cause };
        let port = if authority.contains(":80") || authority.ends_with(":0") { "" } else { ":80" };
        for request in [
            format!("GET http://{authority}/a HTTP/1.1\r\nHost: {authority}\r\n\r\n"),
            format!("GET /a HTTP/1.1\r\nHost: {authority}\r\n\r\n"),
            format!("CONNECT {authority}{port} HTTP/1.1\r\nHost: {authority}\r\n\r\n"),
        ] {
            check_refused(&world, "caller", request, expected).await;
        }
    }
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_host_that_can_be_no_authority_is_refused() {
    let (world, recorder) = world().await;
    let expected = Refusal { status: 400, code: "authority_invalid", cause: "empty" };
    check_refused(&world, "caller", "GET /a HTTP/1.1\r\nHost: \r\n\r\n", expected).await;
    let expected = Refusal { status: 400, code: "authority_invalid", cause: "" };
    check_refused(&world, "caller", b"GET /a HTTP/1.1\r\nHost: caf\xc3\xa9\r\n\r\n", expected).await;
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn every_spelling_of_a_name_reaches_its_service() {
    let (world, recorder) = world().await;
    for authority in ["callee", "CALLEE", "callee.", "callee:8080", "Callee.:1"] {
        let answer = world.get("caller", &format!("http://{authority}/a")).await;
        assert_eq!(answer.status, 200, "{authority}: {answer:?}");
        assert_eq!(recorder.seen().last().unwrap().head.headers["host"], authority);
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_path_that_servers_would_resolve_is_refused() {
    let (world, recorder) = world().await;
    for (path, cause) in [
        ("/..", "dot segment"),
        ("/a/../b", "dot segment"),
        ("/a/./b", "dot segment"),
        ("/a/%2e%2E/b", "dot segment"),
        ("/a/.%2e", "dot segment"),
        ("/a/..?q", "dot segment"),
        ("/a%00b", "NUL"),
        ("/a%zz", "%"),
    ] {
        let expected = Refusal { status: 400, code: "path_invalid", cause };
        let request = format!("GET http://callee{path} HTTP/1.1\r\nHost: callee\r\n\r\n");
        check_refused(&world, "caller", request, expected).await;
        check_refused(&world, "caller", format!("GET {path} HTTP/1.1\r\nHost: callee\r\n\r\n"), expected)
            .await;
    }
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_can_not_speak_for_sidecars_or_to_the_next_hop() {
    let (world, recorder) = world().await;
    let request = "GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\
        X-Kiro-Caller: other\r\nx-kiro-caller: admin\r\nx-kiro-host: other\r\nx-kiro-body: stream\r\n\
        x-kiro-upgrade: websocket\r\nx-kiro-reject: policy_path\r\nx-kiro-anything: 1\r\n\
        Connection: x-kiro-caller, keep-alive, x-hop\r\nConnection: x-late\r\nx-hop: 1\r\nx-late: 1\r\n\
        Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic c2VjcmV0\r\n\
        HTTP2-Settings: AAMAAABk\r\nTE: gzip, trailers\r\nx-stays: 1\r\n\r\n";
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(request).await.status, 200);

    let seen = recorder.only();
    let mut names: Vec<_> =
        seen.head.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    names.retain(|(name, _)| !matches!(*name, "traceparent" | "tracestate"));
    names.sort_unstable();
    let expected = [
        ("connection", "te"),
        ("host", "callee"),
        ("te", "trailers"),
        ("x-kiro-caller", "caller"),
        ("x-stays", "1"),
    ];
    assert_eq!(names, expected);
    assert!(world.stop().await);
}

#[tokio::test]
async fn connection_can_not_take_a_field_away_that_has_to_travel() {
    let (world, recorder) = world().await;
    for name in ["Host", "Content-Length", "Authorization"] {
        let expected = Refusal { status: 400, code: "header_invalid", cause: "Connection names" };
        let request = format!(
            "POST http://callee/a HTTP/1.1\r\nHost: callee\r\nAuthorization: x\r\nConnection: {name}\r\nContent-Length: 0\r\n\r\n"
        );
        check_refused(&world, "caller", request, expected).await;
    }
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_answer_can_not_speak_for_sidecars_either() {
    let mut world = World::start(Spec::pair()).await;
    world
        .app("callee", |_| async {
            http::Response::builder()
                .status(403)
                .header("x-kiro-reject", "policy_path")
                .header("x-kiro-caller", "admin")
                .header("connection", "x-hop, keep-alive")
                .header("x-hop", "1")
                .header("x-stays", "1")
                .body("the application's own word".into())
                .unwrap()
        })
        .await;
    let answer = world.get("caller", "http://callee/a").await;
    assert_eq!((answer.status, answer.body.as_str()), (403, "the application's own word"));
    assert_eq!(answer.header("x-stays"), Some("1"));
    for name in ["x-kiro-reject", "x-kiro-caller", "x-hop"] {
        assert_eq!(answer.header(name), None, "{answer:?}");
    }
    for direction in ["outbound", "inbound"] {
        let line = world.logs.wait_for(direction, |line| line["direction"] == direction).await;
        assert_eq!((&line["status"], line.get("reject")), (&403.into(), None), "{line}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn absolute_form_beats_host_and_origin_form_goes_by_it() {
    let (world, recorder) = world().await;
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange("GET http://callee/a HTTP/1.1\r\nHost: other\r\n\r\n").await.status, 200);
    assert_eq!(client.exchange("GET /b?c HTTP/1.1\r\nHost: callee:99\r\n\r\n").await.status, 200);
    let denied = client.exchange("GET http://other/ HTTP/1.1\r\nHost: callee\r\n\r\n").await;
    assert_eq!(denied.verdict(), (403, Some("policy_no_edge")));

    let seen: Vec<_> = recorder
        .seen()
        .iter()
        .map(|seen| (seen.head.uri.to_string(), seen.head.headers["host"].to_str().unwrap().to_owned()))
        .collect();
    let expected = [("/a", "callee"), ("/b?c", "callee:99")];
    assert_eq!(seen, expected.map(|(target, host)| (target.to_owned(), host.to_owned())));
    assert!(world.stop().await);
}

#[tokio::test]
async fn http_1_0_is_served_and_closed() {
    let (world, recorder) = world().await;
    let mut client = Client::app_of(&world, "caller").await;
    client.send("GET http://callee/old HTTP/1.0\r\n\r\n").await;
    let text = client.rest().await;
    assert!(text.starts_with("HTTP/1.0 200"), "{text}");
    assert!(text.ends_with("recorded"), "{text}");
    let line = world.logs.wait_for("outbound", |line| line["direction"] == "outbound").await;
    assert_eq!(line["protocol"], "HTTP/1.0");
    assert_eq!(recorder.only().head.version, Version::HTTP_11);

    // Without Host and absolute form nobody can tell whom it is for.
    let expected = Refusal { status: 400, code: "host_missing", cause: "" };
    check_refused(&world, "caller", "GET /old HTTP/1.0\r\n\r\n", expected).await;
    recorder.only();
    assert!(world.stop().await);
}

#[tokio::test]
async fn http_2_is_spoken_with_prior_knowledge() {
    let (world, recorder) = world().await;
    let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let send = |uri: &str| {
        http::Request::get(uri).header("x-kiro-caller", "admin").body(Empty::<bytes::Bytes>::new()).unwrap()
    };
    let answer = sender.send_request(send("http://callee/two?x=1")).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "recorded");
    let denied = sender.send_request(send("http://other/")).await.unwrap();
    assert_eq!(
        (denied.status().as_u16(), &denied.headers()["x-kiro-reject"]),
        (403, &"policy_no_edge".parse().unwrap())
    );
    let dots = sender.send_request(send("http://callee/a/%2e%2e/b")).await.unwrap();
    assert_eq!(dots.headers()["x-kiro-reject"], "path_invalid");

    let seen = recorder.only();
    assert_eq!(seen.head.uri, "/two?x=1");
    assert_eq!(seen.head.headers["x-kiro-caller"], "caller");
    let line = world.logs.wait_for("outbound", |line| line["direction"] == "outbound").await;
    assert_eq!(line["protocol"], "HTTP/2");
    drop(sender);
    driver.await.unwrap().unwrap();
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_answer_to_head_has_no_body_and_ends() {
    let (world, recorder) = world().await;
    let mut client = Client::app_of(&world, "caller").await;
    client.send("HEAD http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n").await;
    let head = client.head().await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("8")), "{head:?}");
    // What comes next is the next answer's head, so nothing of a body was sent.
    let next = client.exchange("GET http://callee/b HTTP/1.1\r\nHost: callee\r\n\r\n").await;
    assert_eq!((next.status, next.body.as_str()), (200, "recorded"));
    let methods: Vec<_> = recorder.seen().iter().map(|seen| seen.head.method.to_string()).collect();
    assert_eq!(methods, ["HEAD", "GET"]);
    assert!(world.stop().await);
}
