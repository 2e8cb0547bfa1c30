//! curl's bodies: uploads that are refused before they are sent, chunks, slow readers, trailers.

use std::sync::mpsc::channel;
use std::time::Duration;

use crate::curl::curl;
use crate::support::app::{App, Then};
use crate::support::process::{Client, PATIENCE, run, run_with};
use crate::support::world::{Spec, World};

/// Bytes that are no pattern, the same each time.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        // xorshift32
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn an_upload_that_is_refused_is_not_sent() {
    let world = World::start(&Spec::pair());
    let (tell, seen) = channel();
    let _app = App::start(world.ports("app").app, move |_, head, wire| {
        if !head.has("expect", "100-continue") {
            // What some versions of curl do after a 417.
            wire.body(head);
            wire.answer("200 OK", "", "taken");
            return Then::Keep;
        }
        wire.answer(&format!("{} Refused", &head.target[1..]), "Connection: close\r\n", "no, thank you");
        // The sidecar may close or keep the connection; it must not send the body.
        let _ = tell.send(wire.rest_within(Duration::from_millis(200)).len());
        Then::Close
    });
    let file = world.path("upload");
    std::fs::write(&file, noise(4 * 1024 * 1024)).unwrap();
    for address in [world.outbound(), world.ingress()] {
        for (status, expected) in [
            ("413", ["no, thank you 413 0"; 2]),
            // Some versions of curl take a 417 for a server that knows no Expect, and send once more without it (RFC 9110, 10.1.1).
            ("417", ["no, thank you 417 0", "taken 200 4194304"]),
        ] {
            let Some(mut curl) = curl() else { return };
            // With a body of this size curl asks by itself. It would wait a second for a word and then send; here it waits longer
            // than the test.
            curl.args(["--http1.1", "--header", "Host: app", "--expect100-timeout", "40", "--upload-file"]);
            curl.arg(&file).args(["--write-out", " %{http_code} %{size_upload}"]);
            let outcome = run(curl.arg(format!("http://{address}/{status}")));
            assert!(outcome.took < Duration::from_secs(20), "{} {}", outcome.text(), outcome.stderr);
            let text = outcome.success();
            assert!(expected.contains(&&*text), "{text} to {address}");
            assert_eq!(seen.recv().unwrap(), 0, "bytes of the body, after {status}");
        }
    }
}

#[test]
fn an_upload_goes_on_when_the_application_says_continue() {
    let world = World::start(&Spec::pair());
    let (tell, seen) = channel();
    let _app = App::start(world.ports("app").app, move |_, head, wire| {
        // Nothing of the body comes before the word does.
        let before = wire.rest_within(Duration::from_millis(200)).len();
        wire.send("HTTP/1.1 100 Continue\r\n\r\n");
        let (body, _) = wire.body(head);
        let _ = tell.send((before, body));
        wire.answer("201 Created", "", "stored");
        Then::Keep
    });
    let body = noise(3 * 1024 * 1024);
    let file = world.path("upload");
    std::fs::write(&file, &body).unwrap();
    for (version, address) in [
        ("--http1.1", world.outbound()),
        ("--http1.1", world.ingress()),
        ("--http2-prior-knowledge", world.outbound()),
    ] {
        let Some(mut curl) = curl() else { return };
        curl.args([version, "--header", "Host: app", "--header", "Expect: 100-continue"]);
        curl.args(["--expect100-timeout", "40", "--upload-file"]).arg(&file);
        curl.args(["--write-out", " %{http_code}"]).arg(format!("http://{address}/"));
        let outcome = run(&mut curl);
        assert!(outcome.took < Duration::from_secs(20), "{}", outcome.stderr);
        assert_eq!(outcome.success(), "stored 201");
        let (before, arrived) = seen.recv().unwrap();
        assert_eq!(before, 0, "bytes of the body before the application asked for them, by {version}");
        assert!(arrived == body, "{} bytes of {} arrived, or others", arrived.len(), body.len());
    }
}

#[test]
fn an_upload_of_unknown_length_arrives_whole() {
    let world = World::start(&Spec::pair());
    let (tell, seen) = channel();
    let _app = App::start(world.ports("app").app, move |_, head, wire| {
        let chunked = head.has("transfer-encoding", "chunked");
        let _ = tell.send((chunked, wire.body(head).0));
        wire.answer("200 OK", "", "");
        Then::Keep
    });
    let body = noise(1_500_000);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let Some(mut curl) = curl() else { return };
        curl.args([version, "--header", "Host: app", "--header", "Expect:", "--upload-file", "-"]);
        run_with(curl.arg(format!("http://{}/", world.outbound())), &body).success();
        let (chunked, arrived) = seen.recv().unwrap();
        assert!(chunked, "{version}");
        assert!(arrived == body, "{} bytes of {} arrived, or others", arrived.len(), body.len());
    }
}

#[test]
fn an_upload_is_passed_on_as_it_comes() {
    let world = World::start(&Spec::pair());
    let (tell, seen) = channel();
    let _app = App::start(world.ports("app").app, move |_, _, wire| {
        wire.pieces(|piece| tell.send(String::from_utf8_lossy(piece).into_owned()).unwrap());
        wire.answer("200 OK", "", "");
        Then::Keep
    });
    for (version, address) in [
        ("--http1.1", world.outbound()),
        ("--http2-prior-knowledge", world.outbound()),
        ("--http1.1", world.ingress()),
    ] {
        let Some(mut curl) = curl() else { return };
        // `.` is a standard input that may wait.
        curl.args([version, "--header", "Host: app", "--header", "Expect:", "--upload-file", "."]);
        let mut client = Client::start(curl.arg(format!("http://{address}/")));
        for number in 0..5 {
            // The next line is written when the one before has been seen.
            let line = format!("line {number}\n");
            client.write(&line);
            assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), line, "{version} to {address}");
        }
        assert!(client.end().0.success());
    }
}

#[test]
fn a_form_with_a_file_arrives_as_it_was_sent() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let (tell, seen) = channel();
    let _app = App::start(world.ports("app").app, move |_, head, wire| {
        let _ = tell.send((head.clone(), wire.body(head).0));
        wire.answer("200 OK", "", "");
        Then::Keep
    });
    let content = noise(100_000);
    std::fs::write(world.path("file.bin"), &content).unwrap();
    curl.args(["--proxy", &world.proxy(), "--form", "name=Grüße", "--form"]);
    run(curl.arg(format!("file=@{}", world.path("file.bin").display())).arg("http://app/form")).success();
    let (head, body) = seen.recv().unwrap();
    assert!(head.has("content-type", "multipart/form-data; boundary="), "{head:?}");
    assert_eq!(head.values("content-length"), [body.len().to_string()]);
    assert!(body.windows(content.len()).any(|window| window == content), "the file is changed");
}

#[test]
fn a_slow_reader_gets_a_large_answer_whole() {
    let Some(mut curl) = curl() else { return };
    let world = World::start(&Spec::pair());
    let body = noise(8 * 1024 * 1024);
    let sent = body.clone();
    let _app = App::start(world.ports("app").app, move |_, _, wire| {
        wire.answer("200 OK", "", &sent);
        Then::Keep
    });
    // Two seconds long.
    curl.args(["--limit-rate", "4M", "--proxy", &world.proxy(), "http://app/"]);
    let outcome = run(&mut curl);
    assert!(outcome.status.success(), "{}", outcome.stderr);
    assert!(outcome.stdout == body, "{} bytes of {} arrived, or others", outcome.stdout.len(), body.len());
}

#[test]
fn trailers_that_the_application_announced_arrive() {
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, _, wire| {
        wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n");
        wire.chunk("the body");
        wire.chunk("");
        wire.send("X-Sum: 42\r\n\r\n");
        Then::Keep
    });
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let Some(mut curl) = curl() else { return };
        curl.args([version, "--header", "Host: app", "--header", "TE: trailers", "--dump-header", "-"]);
        let text = run(curl.arg(format!("http://{}/", world.outbound()))).success();
        let (before, after) = text.split_once("the body").unwrap();
        assert!(after.to_lowercase().contains("x-sum: 42"), "{version}: {text}");
        assert!(!before.to_lowercase().contains("x-sum: 42"), "{version}: {text}");
    }
}

#[test]
fn an_answer_that_breaks_off_is_seen_as_broken() {
    let world = World::start(&Spec::pair());
    let _app = App::start(world.ports("app").app, |_, head, wire| {
        match head.target.as_str() {
            "/length" => wire.send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this"),
            _ => {
                wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
                wire.chunk("only this");
            }
        }
        Then::Close
    });
    for version in ["--http1.1", "--http1.0", "--http2-prior-knowledge"] {
        for path in ["length", "chunks"] {
            let Some(mut curl) = curl() else { return };
            curl.args([version, "--header", "Host: app"]).arg(format!("http://{}/{path}", world.outbound()));
            let outcome = run(&mut curl);
            // HTTP/1.0 has no other end of an unmeasured answer than the connection's.
            if (version, path) != ("--http1.0", "chunks") {
                assert!(!outcome.status.success(), "{version} {path}: {}", outcome.text());
            }
        }
    }
}

#[test]
fn a_client_that_goes_away_is_seen_by_the_application_at_once() {
    let world = World::start(&Spec::pair());
    let (tell, seen) = channel();
    let _app = App::start(world.ports("app").app, move |_, _, wire| {
        let _ = tell.send("asked");
        // It neither answers nor has anything to say: only the connection tells.
        let _ = tell.send(if wire.gone() { "gone" } else { "more" });
        Then::Close
    });
    for (version, address) in [
        ("--http1.1", world.outbound()),
        ("--http2-prior-knowledge", world.outbound()),
        ("--http1.1", world.ingress()),
    ] {
        let Some(mut curl) = curl() else { return };
        let client =
            Client::start(curl.args([version, "--header", "Host: app"]).arg(format!("http://{address}/")));
        assert_eq!(seen.recv_timeout(Duration::from_secs(20)), Ok("asked"));
        client.kill();
        // Far below every timeout of the way.
        assert_eq!(seen.recv_timeout(Duration::from_secs(5)), Ok("gone"), "{version} to {address}");
    }
}
