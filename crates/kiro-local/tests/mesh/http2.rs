//! HTTP/2 that is no gRPC, towards clients and applications: framing, fields, and what has no body.

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::{Method, Request};

use crate::client::Client;
use crate::h2_ends::{Answerer, H2App, H2Client, answer, read_all, request, reset, send_all, soon};
use crate::hostile::{Body, Draft, Peer, secrets};
use crate::support::{Spec, World};

const H2: &str = "app: { port: {port}, protocol: h2 }, ingress: { port: {ingress} }";
const HTTP1: &str = "app: { port: {port} }, ingress: { port: {ingress} }";

/// `caller` and anybody outside may call `callee`, which is entered like this.
async fn world(callee: &'static str) -> World {
    World::start(Spec {
        top: "",
        services: vec![("caller", "app: { port: {port} }"), ("callee", callee), ("other", H2)],
        allow: "  - { from: caller, to: callee }\n  - { from: ingress, to: callee, paths: [/**] }\n  - { from: ingress, to: other, methods: [PUT] }",
    })
    .await
}

fn doors(world: &World) -> [std::net::SocketAddr; 2] {
    [world.addresses("caller").outbound, world.addresses("callee").ingress.unwrap()]
}

/// An application that says in its answer what it was asked, field by field, and how much of a body came.
async fn mirror(request: Request<RecvStream>, mut respond: Answerer) {
    let (head, mut recv) = request.into_parts();
    let ended = recv.is_end_stream();
    let fields: String = head
        .headers
        .iter()
        .filter(|(name, _)| *name != "traceparent" && *name != "tracestate")
        .map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap()))
        .collect();
    let Ok((body, trailers)) = read_all(&mut recv).await else { return };
    let text = format!(
        "{} {}\n{fields}\n{} {ended} {:?}",
        head.method,
        head.uri,
        body.len(),
        trailers.map(|trailers| trailers.len())
    );
    let mut send = answer(&mut respond, 200, &[("set-cookie", "a=1"), ("set-cookie", "b=2")], false);
    send_all(&mut send, text.into(), true).await.unwrap();
}

#[tokio::test]
async fn fields_are_the_client_s_but_for_those_of_hops_and_ours() {
    let world = world(H2).await;
    let _app = H2App::start(&world, "callee", mirror).await;
    let [outbound, ingress] = doors(&world);
    let sent = [
        ("cookie", "a=1"),
        ("cookie", "b=2"),
        ("te", "trailers"),
        ("x-kiro-caller", "other"),
        ("x-kiro-interim", "103"),
        ("x-kiro-body", "stream"),
        ("x-kiro-host", "other"),
        ("x_kiro_caller", "other"),
        ("x-own", "1"),
        ("x-own", "2"),
    ];
    for (door, caller) in [(outbound, "caller"), (ingress, "ingress")] {
        let client = H2Client::open(door).await;
        let said = client.exchange(request(Method::GET, "http://callee/a?b=%20c", &sent), b"").await;
        let text = String::from_utf8(said.body.to_vec()).unwrap();
        let expected = format!(
            "GET http://callee/a?b=%20c\ncookie: a=1\ncookie: b=2\nte: trailers\nx-own: 1\nx-own: 2\nx-kiro-caller: {caller}\n"
        );
        for line in expected.lines() {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        assert_eq!(text.matches("x-kiro").count() + text.matches("x_kiro").count(), 1, "{text}");
        let cookies: Vec<_> = said.head.headers.get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a=1", "b=2"], "in order, and apart");

        // From HTTP/1, where a hop has more to say.
        let head = "GET /a HTTP/1.1\r\nHost: callee\r\nCookie: a=1; b=2\r\nTE: gzip\r\nConnection: te, x-hop, close\r\nx-hop: 1\r\n\
            Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nX-Kiro-Interim: 103\r\n\r\n";
        let mut client = Client::open(door).await;
        client.send(head).await;
        let text = client.rest().await.to_ascii_lowercase();
        assert!(text.contains("\ncookie: a=1; b=2\n"), "{text}");
        for gone in
            ["te: ", "x-hop", "keep-alive: ", "proxy-connection", "x-kiro-interim", "\nconnection: te"]
        {
            assert!(!text.contains(&format!("\n{gone}")), "{gone}: {text}");
        }
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_cookie_in_pieces_is_one_to_http_1() {
    let mut world = world(HTTP1).await;
    let recorder = world.recorder("callee").await;
    for door in doors(&world) {
        let client = H2Client::open(door).await;
        let fields =
            [("cookie", "a=1"), ("cookie", "b=2"), ("te", "trailers"), ("x-own", "1"), ("x-own", "2")];
        assert_eq!(
            client.exchange(request(Method::GET, "http://callee/a", &fields), b"").await.body,
            "recorded"
        );
        let seen = recorder.seen().pop().unwrap().head.headers;
        for (name, values) in [
            ("cookie", &["a=1; b=2"][..]),
            ("x-own", &["1", "2"]),
            ("te", &["trailers"]),
            ("connection", &["te"]),
        ] {
            assert_eq!(seen.get_all(name).iter().collect::<Vec<_>>(), values, "{name}");
        }
    }
    assert!(world.stop().await);
}

type Fields = &'static [(&'static str, &'static str)];

#[tokio::test]
async fn a_length_that_is_told_holds_and_none_is_made_up() {
    let world = world(H2).await;
    let _app = H2App::start(&world, "callee", mirror).await;
    for door in doors(&world) {
        let client = H2Client::open(door).await;
        let cases: [(Fields, &'static [u8], &str, &str); 4] = [
            (&[], b"", "", "0 true None"),
            (&[], b"hello", "", "5 false None"),
            (&[("content-length", "5")], b"hello", "content-length: 5\n", "5 false None"),
            (&[("content-length", "0")], b"", "content-length: 0\n", "0 true None"),
        ];
        for (fields, body, length, came) in cases {
            let head = request(Method::POST, "http://callee/a", fields);
            let said = client.exchange(head, body).await;
            let text = String::from_utf8(said.body.to_vec()).unwrap();
            assert!(text.contains(length) && text.ends_with(came), "{length} {came}: {text}");
            assert_eq!(text.contains("content-length"), !length.is_empty(), "{text}");
            assert!(!text.contains("transfer-encoding"), "{text}");
        }
        let chunked = "POST /a HTTP/1.1\r\nHost: callee\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n\
            5\r\nhello\r\n0\r\n\r\n";
        let mut client = Client::open(door).await;
        client.send(chunked).await;
        let text = client.rest().await;
        assert!(text.contains("5 false None") && !text.contains("\ntransfer-encoding: chunked\n"), "{text}");

        // A client that lies about its length is cut off, whichever way it lies.
        for (length, body) in [("4", "hello"), ("6", "hello")] {
            let client = H2Client::open(door).await;
            let head = request(Method::POST, "http://callee/a", &[("content-length", length)]);
            let mut call = client.call(head, false).await;
            let _ = send_all(&mut call.send, Bytes::from(body), true).await;
            let outcome = soon("an end", call.answer).await;
            assert!(
                outcome.as_ref().is_err_and(h2::Error::is_remote)
                    || outcome.is_ok_and(|head| !head.status().is_success()),
                "{length}"
            );
        }
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_has_no_body_has_none() {
    for callee in [HTTP1, H2] {
        let mut world = world(callee).await;
        let mut h2_app = None;
        if callee == H2 {
            h2_app = Some(
                H2App::start(&world, "callee", |request, mut respond| async move {
                    let status = request.uri().path()[1..].parse().unwrap();
                    let length = [("content-length", "5")];
                    // A 204 with a body is none.
                    let fields = if status == 204 { &[][..] } else { &length };
                    let mut send = answer(&mut respond, status, fields, status != 204);
                    if status == 204 {
                        send.send_data("hello".into(), true).unwrap();
                    }
                })
                .await,
            );
        } else {
            world
                .app("callee", |request| async move {
                    let status: u16 = request.uri().path()[1..].parse().unwrap();
                    let mut response = http::Response::new(http_body_util::Full::from(match status {
                        200 => "hello",
                        _ => "",
                    }));
                    *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
                    response
                })
                .await;
        }
        for door in doors(&world) {
            let client = H2Client::open(door).await;
            for (method, status, length) in [
                (Method::HEAD, 200, Some("5")),
                (Method::GET, 204, None),
                (Method::GET, 304, Some("5")),
                (Method::HEAD, 304, Some("5")),
            ] {
                // The HTTP library under this application takes the length out of a 304.
                let length = length.filter(|_| callee == H2 || status != 304);
                let uri = format!("http://callee/{status}");
                let said = client.exchange(request(method.clone(), &uri, &[]), b"").await;
                assert_eq!(said.verdict(), (status, None), "{method} {callee}");
                assert_eq!(
                    (said.field("content-length"), said.body.len()),
                    (length, 0),
                    "{method} {status} {callee}"
                );
                let mut client = Client::open(door).await;
                client.send(format!("{method} /{status} HTTP/1.1\r\nHost: callee\r\n\r\n")).await;
                let said = client.head().await;
                assert_eq!(said.status, status, "{method} {callee}");
                // With a 304 hyper takes the length for one method and leaves it for the other.
                assert!(status == 304 || said.header("content-length") == length, "{method} {said:?}");
                assert!(client.is_silent().await, "{method} {status}");
            }
        }
        drop(h2_app);
        assert!(world.stop().await);
    }
}

#[tokio::test]
async fn a_refused_head_has_no_body_either() {
    let world = world(H2).await;
    let client = H2Client::app_of(&world, "caller").await;
    let front = H2Client::open(world.addresses("other").ingress.unwrap()).await;
    // Refused by its own sidecar, by the peer's, and at an ingress.
    for (client, uri, status, code) in [
        (&client, "http://other/a", 403, "policy_no_edge"),
        (&client, "http://callee/a", 502, "app_connect"),
        (&front, "http://other/a", 403, "policy_method"),
    ] {
        let refused = client.exchange(request(Method::HEAD, uri, &[]), b"").await;
        assert_eq!(refused.verdict(), (status, Some(code)));
        assert_eq!((refused.body.len(), refused.trailers), (0, None));
    }
    let mut client = Client::app_of(&world, "caller").await;
    client.send("HEAD http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n").await;
    assert_eq!(client.head().await.verdict(), (502, Some("app_connect")));
    assert!(client.is_silent().await);
    // Between sidecars as well, where a body after HEAD would be an error of the stream.
    let peer = Peer::of(&world, "caller", "callee").await;
    let mut draft = Draft::new(Method::HEAD, "callee", "/a");
    draft.sign(&mut peer.signer(&secrets(&world, "caller"), "callee"));
    let reply = peer.send(draft.request(), Body::None).await.unwrap();
    assert_eq!((reply.verdict(), reply.body.len()), ((502, Some("app_connect")), 0));
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_no_end() {
    let world = world(H2).await;
    let _app = H2App::start(&world, "callee", |request, mut respond| async move {
        let mut send = answer(&mut respond, 200, &[], false);
        send_all(&mut send, "first".into(), false).await.unwrap();
        let _ = request.into_body().data().await;
        send.send_reset(Reason::NO_ERROR);
    })
    .await;
    for door in doors(&world) {
        let client = H2Client::open(door).await;
        let call = client.call(request(Method::POST, "http://callee/a", &[]), false).await;
        let (_, mut recv, mut send) = call.head().await;
        assert_eq!(soon("data", recv.data()).await.unwrap().unwrap(), "first");
        send_all(&mut send, "go".into(), false).await.unwrap();
        let error = soon("an end", recv.data()).await.expect("no clean end").unwrap_err();
        assert_ne!(error.reason(), Some(Reason::NO_ERROR));
        assert_ne!(reset(&mut send).await, Reason::NO_ERROR);
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_old_application_gets_names_in_title_case() {
    let world = world("app: { port: {port}, header_case: title }, ingress: { port: {ingress} }").await;
    let listener = world.listen("callee").await;
    for door in doors(&world) {
        let mut client = Client::open(door).await;
        client.send("GET /a HTTP/1.1\r\nhost: callee\r\nx-own-field: 1\r\n\r\n").await;
        let (stream, _) = soon("a connection", listener.accept()).await.unwrap();
        let mut app = Client::on(stream);
        let head = app.request_head().await;
        for name in ["Host: ", "X-Own-Field: 1", "X-Kiro-Caller: "] {
            assert!(head.contains(name), "{name}: {head}");
        }
        app.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n").await;
        assert_eq!(client.head().await.status, 204);
    }
    assert!(world.stop().await);
}
