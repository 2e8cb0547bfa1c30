//! `kiro call`: what is asked, what is shown, which code comes back.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;

use crate::sidecar::{Made, Plays, With, play};
use crate::support::{kiro, outcome};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-other: 1\r\ncontent-length: 12\r\n\r\n{\"ok\": true}";
const DENIED: &str = "HTTP/1.1 403 Forbidden\r\nx-kiro-reject: policy_path\r\ncontent-length: 0\r\n\r\n";

fn call(made: &Made, outbound: SocketAddr, line: &[&str]) -> Command {
    let mut command = kiro();
    command
        .arg("call")
        .args(line)
        .env("KIRO_SERVICE", "dashboard")
        .env("KIRO_IDENTITY_DIR", made.path("certs/dashboard"))
        .env("KIRO_MESH_DIR", made.path("docker/mesh"))
        .env("KIRO_OUTBOUND_ADDR", outbound.to_string());
    command
}

fn plain() -> Made {
    Made::new(&With { tls: "none", ..With::default() })
}

#[test]
fn a_request_is_made_in_absolute_form_and_its_answer_shown() {
    let made = plain();
    let (outbound, asked) = play(Plays::Plain(OK));
    let line = ["http://auth/verify?x=1", "-d", "{\"user\":\"alice\"}", "-H", "x-mine: 2"];
    let (code, out, _) = outcome(&mut call(&made, outbound, &line));
    assert_eq!(code, Some(0));
    assert_eq!(out, "HTTP/1.1 200 OK\ncontent-type: application/json\n\n{\"ok\": true}\n");
    let asked = asked.recv().unwrap();
    assert!(asked.starts_with("POST http://auth/verify?x=1 HTTP/1.1\r\n"), "{asked}");
    for part in ["host: auth\r\n", "x-mine: 2\r\n", "content-length: 16\r\n", "\r\n\r\n{\"user\":\"alice\"}"]
    {
        assert!(asked.contains(part), "{part}: {asked}");
    }
}

#[test]
fn a_person_may_see_all_fields_or_the_body_alone() {
    let made = plain();
    let (outbound, _asked) = play(Plays::Plain(OK));
    let (_, all, _) = outcome(&mut call(&made, outbound, &["auth/", "-i"]));
    assert!(all.contains("x-other: 1\n"), "{all}");
    let (_, body, _) = outcome(&mut call(&made, outbound, &["auth/", "-q"]));
    assert_eq!(body, "{\"ok\": true}");
}

#[test]
fn a_refusal_is_explained_and_has_its_own_code() {
    let made = plain();
    let (outbound, _asked) = play(Plays::Plain(DENIED));
    let (code, out, _) = outcome(&mut call(&made, outbound, &["profile/elsewhere"]));
    assert_eq!(code, Some(22));
    assert!(out.contains("HTTP/1.1 403 Forbidden\nx-kiro-reject: policy_path\n"), "{out}");
    assert!(out.contains("but not on this path: see `paths` in the allow line"), "{out}");

    let (outbound, _asked) = play(Plays::Plain("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"));
    let (code, out, _) = outcome(&mut call(&made, outbound, &["profile/profiles/nobody"]));
    assert_eq!(code, Some(22));
    assert!(out.contains("the application's own answer"), "{out}");
}

#[test]
fn where_the_mesh_says_mutual_the_sidecars_own_leaf_is_shown() {
    let made = Made::new(&With::default());
    let (outbound, asked) = play(Plays::Outbound(made.identity("dashboard"), OK));
    let (code, out, said) = outcome(&mut call(&made, outbound, &["http://profile/profiles/alice"]));
    assert_eq!(code, Some(0), "{said}");
    assert!(out.ends_with("{\"ok\": true}\n"), "{out}");
    let asked = asked.recv().unwrap();
    assert!(asked.starts_with("spiffe://kiro.mesh/dashboard GET http://profile/profiles/alice "), "{asked}");
}

#[test]
fn a_sidecar_of_another_service_is_not_believed() {
    let made = Made::new(&With::default());
    let (outbound, _asked) = play(Plays::Outbound(made.identity("profile"), OK));
    let (code, out, said) = outcome(&mut call(&made, outbound, &["http://profile/profiles/alice"]));
    assert_eq!((code, out.as_str()), (Some(35), ""));
    assert!(said.contains("tls_wrong_identity"), "{said}");
}

#[test]
fn what_is_missing_is_named_with_its_fix() {
    let made = Made::new(&With::default());
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (code, _, said) = outcome(&mut call(&made, free, &["auth/"]));
    assert_eq!(code, Some(7));
    assert!(said.contains(&format!("no sidecar listens at {free}")) && said.contains("exec"), "{said}");

    let (code, _, said) = outcome(call(&made, free, &["auth/"]).env_remove("KIRO_SERVICE"));
    assert_eq!(code, Some(78));
    assert!(said.contains("KIRO_SERVICE is not set"), "{said}");

    let (code, _, said) = outcome(call(&made, free, &["auth/"]).env("KIRO_SERVICE", "billing"));
    assert_eq!(code, Some(78));
    assert!(said.contains("no service `billing`") && said.contains("auth, dashboard, profile"), "{said}");

    let (outbound, _asked) = play(Plays::Silent);
    std::fs::remove_file(made.path("certs/dashboard/leaf.key")).unwrap();
    let (code, _, said) = outcome(&mut call(&made, outbound, &["auth/"]));
    assert_eq!(code, Some(78));
    assert!(said.contains("certs/dashboard/leaf.key"), "{said}");
}

#[test]
fn an_answer_that_does_not_come_or_breaks_off_ends_the_call() {
    let made = plain();
    let (outbound, _asked) = play(Plays::Silent);
    let (code, _, said) = outcome(&mut call(&made, outbound, &["auth/", "--timeout", "1"]));
    assert_eq!(code, Some(28), "{said}");

    let (outbound, _asked) = play(Plays::Plain("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhal"));
    let (code, out, said) = outcome(&mut call(&made, outbound, &["auth/"]));
    assert_eq!(code, Some(56), "{said}");
    assert!(out.ends_with("hal"), "{out}");
}
