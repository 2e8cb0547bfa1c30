//! What comes before the answer: leave to send a body (100) end to end, hints (103) to whoever can read them, and no more of
//! either than is good.

use bytes::Bytes;
use h2::Reason;
use http::Method;
use tokio::net::TcpListener;
use tokio::time::{Duration, Instant};

use crate::client::Client;
use crate::h2_ends::{H2App, H2Client, answer, fields_of, read_all, request, send_all, soon};
use crate::support::{Spec, World};

/// `caller` and anybody outside may call `callee`, which is entered like this.
async fn world(callee: &'static str) -> World {
    World::start(Spec {
        top: "",
        services: vec![("caller", "app: { port: {port} }"), ("callee", callee)],
        allow: "  - { from: caller, to: callee }\n  - { from: ingress, to: callee }",
    })
    .await
}

const HTTP1: &str = "app: { port: {port} }, ingress: { port: {ingress} }";
const H2: &str = "app: { port: {port}, protocol: h2 }, ingress: { port: {ingress} }";

/// Where a client may come in.
fn doors(world: &World) -> [std::net::SocketAddr; 2] {
    [world.addresses("caller").outbound, world.addresses("callee").ingress.unwrap()]
}

/// The next connection to an application, and what it was asked: the head.
async fn asked(listener: &TcpListener) -> (Client, String) {
    let (stream, _) = soon("a connection", listener.accept()).await.unwrap();
    let mut app = Client::on(stream);
    let head = app.request_head().await;
    (app, head)
}

fn post(fields: &str) -> String {
    format!("POST /up HTTP/1.1\r\nHost: callee\r\nExpect: 100-continue\r\n{fields}\r\n")
}

const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";
const SHORT: &str = "Content-Length: 5\r\n";

#[tokio::test]
async fn a_body_waits_for_the_application_s_leave() {
    let world = world(HTTP1).await;
    let listener = world.listen("callee").await;
    for door in doors(&world) {
        for (framing, body) in [(SHORT, "hello"), (CHUNKED, "5\r\nhello\r\n0\r\n\r\n")] {
            let mut client = Client::open(door).await;
            client.send(post(framing)).await;
            let (mut app, head) = asked(&listener).await;
            assert!(head.contains("expect: 100-continue"), "{head}");
            assert!(client.is_silent().await, "nobody but the application gives leave");
            app.send("HTTP/1.1 100 Continue\r\n\r\n").await;
            assert_eq!(client.head().await.status, 100);
            assert!(app.is_silent().await, "the client has sent nothing yet");
            client.send(body).await;
            let came = app.bytes(body.len()).await;
            assert_eq!(String::from_utf8_lossy(&came), body);
            app.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone").await;
            let answer = client.answer().await;
            assert_eq!((answer.status, answer.body.as_str()), (200, "done"));
            // Both connections are as good as before.
            let again = client.exchange("GET /again HTTP/1.1\r\nHost: callee\r\n\r\n");
            let app = async {
                assert!(app.request_head().await.starts_with("GET /again"));
                app.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
            };
            assert_eq!(tokio::join!(again, app).0.status, 200);
        }
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_body_that_is_refused_is_never_sent() {
    let world = world(HTTP1).await;
    let listener = world.listen("callee").await;
    for door in doors(&world) {
        for (status, reason) in [(417, "Expectation Failed"), (413, "Content Too Large"), (200, "OK")] {
            for framing in [SHORT, CHUNKED] {
                let mut client = Client::open(door).await;
                client.send(post(framing)).await;
                let (mut app, _) = asked(&listener).await;
                app.send(format!("HTTP/1.1 {status} {reason}\r\nContent-Length: 2\r\n\r\nno")).await;
                let answer = client.answer().await;
                assert_eq!((answer.verdict(), answer.body.as_str()), ((status, None), "no"), "{answer:?}");
                // Nobody knows whether the body follows, so neither connection carries another request, and what a client sends all
                // the same goes nowhere.
                client.send("hello").await;
                assert_eq!(client.rest().await, "");
                assert_eq!(app.rest().await, "", "no byte of the body came");
            }
        }
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_that_knows_no_expectation_gets_the_body_after_a_while() {
    for (callee, h2_app) in [(HTTP1, false), (H2, true)] {
        let world = world(callee).await;
        let mut listener = Some(world.listen("callee").await);
        let _app = h2_app.then(|| {
            H2App::with(
                listener.take().unwrap(),
                h2::server::Builder::new(),
                |request, mut respond| async move {
                    let (body, _) = read_all(&mut request.into_body()).await.unwrap();
                    assert_eq!(body, "hello");
                    answer(&mut respond, 204, &[], true);
                },
            )
        });
        let begin = Instant::now();
        let both = doors(&world).map(|door| {
            async move {
                let mut client = Client::open(door).await;
                client.send(post(SHORT)).await;
                // Its client waits for leave, which it has from its own sidecar then.
                assert_eq!(client.head().await.status, 100);
                client.send("hello").await;
                assert_eq!(client.answer().await.status, 204);
            }
        });
        let apps = async {
            let Some(listener) = &listener else { return };
            for _ in 0..2 {
                let (mut app, _) = asked(listener).await;
                tokio::spawn(async move {
                    assert_eq!(app.bytes(5).await, b"hello");
                    app.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n").await;
                });
            }
        };
        let [outbound, ingress] = both;
        tokio::join!(outbound, ingress, apps);
        let waited = begin.elapsed();
        assert!(waited > Duration::from_millis(900) && waited < Duration::from_secs(4), "{waited:?}");
        assert!(world.stop().await);
    }
}

#[tokio::test]
async fn leave_passes_between_versions() {
    // A client of HTTP/2 and an application of HTTP/1, and the other way round.
    let http1 = world(HTTP1).await;
    let listener = http1.listen("callee").await;
    for door in doors(&http1) {
        let client = H2Client::open(door).await;
        let mut call = client
            .call(request(Method::POST, "http://callee/up", &[("expect", "100-continue")]), false)
            .await;
        let (mut app, head) = asked(&listener).await;
        assert!(head.contains("transfer-encoding: chunked"), "{head}");
        app.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        assert_eq!(call.interim().await.unwrap().status(), 100);
        assert!(app.is_silent().await);
        send_all(&mut call.send, Bytes::from_static(b"hello"), true).await.unwrap();
        assert_eq!(app.bytes(15).await, b"5\r\nhello\r\n0\r\n\r\n");
        app.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone").await;
        assert_eq!(call.whole().await.body, "done");
    }
    assert!(http1.stop().await);

    let http2 = world(H2).await;
    let _app = H2App::start(&http2, "callee", |request, mut respond| async move {
        let (head, mut recv) = request.into_parts();
        assert_eq!(head.headers["expect"], "100-continue");
        if head.uri.path() == "/refused" {
            answer(&mut respond, 417, &[], true);
            assert!(recv.data().await.is_none_or(|data| data.is_err()), "no byte of the body came");
            return;
        }
        let mut leave = http::Response::new(());
        *leave.status_mut() = http::StatusCode::CONTINUE;
        respond.send_informational(leave).unwrap();
        let (body, _) = read_all(&mut recv).await.unwrap();
        let mut send = answer(&mut respond, 200, &[("content-length", "5")], false);
        send_all(&mut send, body, true).await.unwrap();
    })
    .await;
    for door in doors(&http2) {
        let mut client = Client::open(door).await;
        client.send(post(CHUNKED)).await;
        assert_eq!(client.head().await.status, 100);
        client.send("5\r\nhello\r\n0\r\n\r\n").await;
        let answer = client.answer().await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "hello"));
        let mut client = Client::open(door).await;
        client.send(post(CHUNKED).replace("/up", "/refused")).await;
        assert_eq!(client.head().await.status, 417);
        client.send("5\r\nhello\r\n0\r\n\r\n").await;
        assert_eq!(client.rest().await, "");

        let client = H2Client::open(door).await;
        let expects = [("expect", "100-continue")];
        let refused = client.call(request(Method::POST, "http://callee/refused", &expects), false).await;
        assert_eq!(refused.whole().await.verdict(), (417, None));
        let mut call = client.call(request(Method::POST, "http://callee/up", &expects), false).await;
        assert_eq!(call.interim().await.unwrap().status(), 100);
        send_all(&mut call.send, Bytes::from_static(b"hello"), true).await.unwrap();
        assert_eq!(call.whole().await.body, "hello");
    }
    assert!(http2.stop().await);
}

const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nLink: </b.js>; rel=preload\r\n\
    x-kiro-reject: forged\r\nx-kiro-caller: forged\r\nConnection: x-hop\r\nx-hop: 1\r\nKeep-Alive: timeout=5\r\n\r\n";
const DONE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\ndone";

/// What has come of [`HINTS`].
fn check_hints(hints: &http::Response<()>) {
    assert_eq!(hints.status(), 103);
    let links: Vec<_> = hints.headers().get_all("link").iter().collect();
    assert_eq!(links, ["</a.css>; rel=preload", "</b.js>; rel=preload"]);
    let names: Vec<_> = hints.headers().keys().map(http::HeaderName::as_str).collect();
    assert_eq!(names, ["link"], "and nothing of a hop, and nothing of ours");
}

#[tokio::test]
async fn hints_reach_a_client_of_http_2() {
    let http1 = world(HTTP1).await;
    let listener = http1.listen("callee").await;
    for door in doors(&http1) {
        let client = H2Client::open(door).await;
        let mut call = client.call(request(Method::GET, "http://callee/page", &[]), true).await;
        let (mut app, head) = asked(&listener).await;
        assert!(!head.contains("x-kiro-interim"), "{head}");
        app.send(HINTS).await;
        // Before there is an answer.
        check_hints(&call.interim().await.unwrap());
        app.send(DONE).await;
        assert!(call.interim().await.is_none());
        assert_eq!(call.whole().await.body, "done");

        // Who speaks HTTP/1 gets the answer alone.
        let mut client = Client::open(door).await;
        client.send("GET /page HTTP/1.1\r\nHost: callee\r\nx-kiro-interim: 103\r\n\r\n").await;
        let (mut app, head) = asked(&listener).await;
        assert!(!head.contains("x-kiro-interim"), "{head}");
        app.send(format!("{HINTS}{DONE}")).await;
        let answer = client.answer().await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "done"));
    }
    assert!(http1.stop().await);

    let http2 = world(H2).await;
    let _app = H2App::start(&http2, "callee", |request, mut respond| async move {
        assert!(request.headers().keys().all(|name| !name.as_str().starts_with("x-kiro-interim")));
        let mut hints = http::Response::new(());
        *hints.status_mut() = http::StatusCode::EARLY_HINTS;
        *hints.headers_mut() = fields_of(&[
            ("link", "</a.css>; rel=preload"),
            ("link", "</b.js>; rel=preload"),
            ("x-kiro-reject", "forged"),
            ("x-kiro-caller", "forged"),
        ]);
        respond.send_informational(hints).unwrap();
        answer(&mut respond, 204, &[], true);
    })
    .await;
    for door in doors(&http2) {
        let client = H2Client::open(door).await;
        let mut call = client.call(request(Method::GET, "http://callee/page", &[]), true).await;
        check_hints(&call.interim().await.unwrap());
        assert_eq!(call.whole().await.verdict(), (204, None));
        let answer = Client::open(door).await.exchange("GET / HTTP/1.1\r\nHost: callee\r\n\r\n").await;
        assert_eq!(answer.status, 204);
    }
    assert!(http2.stop().await);
}

#[tokio::test]
async fn hints_without_end_are_bounded_and_the_answer_still_comes() {
    const PASSED: usize = 16;
    let http1 = world(HTTP1).await;
    let listener = http1.listen("callee").await;
    for door in doors(&http1) {
        let client = H2Client::open(door).await;
        let mut call = client.call(request(Method::GET, "http://callee/page", &[]), true).await;
        let (mut app, _) = asked(&listener).await;
        app.send(HINTS.repeat(500)).await;
        app.send(DONE).await;
        let mut passed = 0;
        while let Some(hints) = call.interim().await {
            check_hints(&hints);
            passed += 1;
        }
        assert!((1..=PASSED).contains(&passed), "{passed}");
        assert_eq!(call.whole().await.body, "done");
    }
    assert!(http1.stop().await);

    let http2 = world(H2).await;
    let _app = H2App::start(&http2, "callee", |_, mut respond| async move {
        for _ in 0..500 {
            let mut hints = http::Response::new(());
            *hints.status_mut() = http::StatusCode::EARLY_HINTS;
            respond.send_informational(hints).unwrap();
        }
        answer(&mut respond, 200, &[("x-last", "yes")], true);
    })
    .await;
    for door in doors(&http2) {
        let client = H2Client::open(door).await;
        let mut call = client.call(request(Method::GET, "http://callee/page", &[]), true).await;
        let mut passed = 0;
        while call.interim().await.is_some() {
            passed += 1;
        }
        assert!((1..=PASSED).contains(&passed), "{passed}");
        assert_eq!(call.whole().await.field("x-last"), Some("yes"));
    }
    assert!(http2.stop().await);
}

#[tokio::test]
async fn nothing_switches_protocols_unasked() {
    let world = world(HTTP1).await;
    let listener = world.listen("callee").await;
    for door in doors(&world) {
        let client = H2Client::open(door).await;
        let call = client.call(request(Method::GET, "http://callee/page", &[]), true).await;
        let (mut app, _) = asked(&listener).await;
        app.send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n").await;
        assert_eq!(call.whole().await.verdict(), (502, Some("app_reset")));
        assert_eq!(app.rest().await, "", "the connection is closed");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn whoever_goes_away_before_leave_was_given_leaves_nothing_behind() {
    let world = world(HTTP1).await;
    let listener = world.listen("callee").await;
    for door in doors(&world) {
        // A client of each version; the application has said nothing.
        let mut client = Client::open(door).await;
        client.send(post(CHUNKED)).await;
        let (mut app, _) = asked(&listener).await;
        drop(client);
        assert_eq!(app.rest().await, "");

        let client = H2Client::open(door).await;
        let expects = [("expect", "100-continue")];
        let mut call = client.call(request(Method::POST, "http://callee/up", &expects), false).await;
        let (mut app, _) = asked(&listener).await;
        call.send.send_reset(Reason::CANCEL);
        assert_eq!(app.rest().await, "");

        // The application goes instead.
        let call = client.call(request(Method::POST, "http://callee/up", &expects), false).await;
        let (app, _) = asked(&listener).await;
        drop(app);
        assert_eq!(call.whole().await.verdict(), (502, Some("app_reset")));

        // It answers without an end, and takes no body: the answer flows, and ends with its client.
        let call = client.call(request(Method::POST, "http://callee/up", &expects), false).await;
        let (mut app, _) = asked(&listener).await;
        app.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n").await;
        let (head, mut recv, mut send) = call.head().await;
        assert_eq!(head.status, 200);
        assert_eq!(soon("data", recv.data()).await.unwrap().unwrap(), "a");
        send.send_data(Bytes::from_static(b"all the same"), false).unwrap();
        send.send_reset(Reason::CANCEL);
        assert_eq!(app.rest().await, "");
    }
    let begin = Instant::now();
    assert!(world.stop().await, "nothing is under way any more");
    assert!(begin.elapsed() < Duration::from_secs(1), "and nobody had to be waited for");
}

#[tokio::test]
async fn leave_is_asked_for_again_with_the_next_attempt() {
    use crate::fake::{Fake, OBEDIENT, OnRequest, Script, place};
    use crate::hostile::{Leaf, MESH, server};
    let (listener, _, entry) = place();
    let world = World::start(Spec {
        services: vec![("caller", "app: { port: {port} }"), ("callee", entry)],
        ..Spec::pair()
    })
    .await;
    let config = server(&world, &Leaf::of(&world, "callee"), MESH);
    let script =
        Script { request: |place| if place == 0 { OnRequest::Refuse } else { OnRequest::Serve }, ..OBEDIENT };
    let fake = Fake::start(listener, Some(config), script);
    let mut client = Client::app_of(&world, "caller").await;
    client.send(post(SHORT)).await;
    // The peer that takes the second attempt knows no expectation, and gets the body after a while. Nothing of it was sent before.
    assert_eq!(client.head().await.status, 100);
    let answer = client.exchange("hello").await;
    assert_eq!((answer.status, answer.header("x-fake")), (200, Some("yes")), "{answer:?}");
    let arrived = fake.take();
    assert_eq!((fake.heads(), arrived.len(), &arrived[0].body[..]), (2, 1, &b"hello"[..]));
    assert!(arrived[0].trailers.as_ref().unwrap().contains_key("signature"), "its end is signed");
    assert!(world.stop().await);
}
