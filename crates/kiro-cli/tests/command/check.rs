//! `kiro check`: on a host and in a pod, each problem with its fix and an exit code.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use time::{Duration, OffsetDateTime};

use crate::sidecar::{Made, Plays, With, play};
use crate::support::{kiro, outcome};

fn host(made: &Made) -> Command {
    let mut command = kiro();
    command.arg("check").current_dir(made.dir.path());
    command
}

#[track_caller]
fn check(command: &mut Command, code: i32, parts: &[&str]) -> String {
    let (found, out, said) = outcome(command);
    assert_eq!(found, Some(code), "{out}{said}");
    for part in parts {
        assert!(out.contains(part), "{part}:\n{out}");
    }
    out
}

#[test]
fn a_mesh_that_is_ready_to_start() {
    let made = Made::new(&With::default());
    let out = check(
        &mut host(&made),
        0,
        &[
            "mesh.yaml: 3 services, 2 allow lines",
            "certs/auth: spiffe://kiro.mesh/auth, until ",
            "certs/dashboard-app: spiffe://kiro.mesh/dashboard/app, until ",
            "certs/dashboard/ingress.pem: ingress, until ",
            "all is well",
        ],
    );
    assert!(!out.contains("profile-app"), "profile's application speaks no TLS: {out}");
}

#[test]
fn all_problems_of_the_mesh_file_are_told() {
    let made = Made::new(&With::default());
    std::fs::write(made.path("docker/mesh/mesh.yaml"), "trust_domain: kiro.mesh\nservice: {}\n").unwrap();
    check(&mut host(&made), 1, &["PROBLEM  docker/mesh/mesh.yaml has problems", "`services`", "1 to mend"]);
    std::fs::remove_file(made.path("docker/mesh/mesh.yaml")).unwrap();
    check(&mut host(&made), 1, &["docker/mesh/mesh.yaml can't be read", "--mesh"]);
}

#[test]
fn missing_certificates_and_ids_ask_for_make_certs() {
    let made = Made::new(&With::default());
    std::fs::remove_file(made.path(".env")).unwrap();
    check(&mut host(&made), 1, &[".env: does not say as whom containers run", "make certs"]);
    std::fs::remove_dir_all(made.path("certs")).unwrap();
    check(&mut host(&made), 1, &["certs: there are no certificates yet", "make certs"]);
}

#[test]
fn what_is_wrong_with_a_key_is_told_by_its_file() {
    let made = Made::new(&With::default());
    let mode = |path: &str, mode| {
        std::fs::set_permissions(made.path(path), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode("certs/auth/leaf.key", 0o644);
    std::fs::copy(made.path("certs/auth/leaf.key"), made.path("certs/profile/leaf.key")).unwrap();
    mode("certs/profile/leaf.key", 0o600);
    std::fs::remove_file(made.path("certs/dashboard/ingress.pem")).unwrap();
    std::fs::remove_file(made.path("certs/dashboard/ingress.key")).unwrap();
    check(
        &mut host(&made),
        1,
        &[
            "certs/auth/leaf.key: its mode 0644",
            "PROBLEM  certs/profile/leaf.key",
            "certs/dashboard: no ingress.pem, and the mesh file opens a TLS ingress",
            "3 to mend",
        ],
    );
}

#[test]
fn a_container_that_could_not_read_its_files_is_seen_from_outside() {
    let made = Made::new(&With::default());
    std::fs::write(made.path(".env"), "KIRO_SIDECAR_UID=12345\nKIRO_APP_UID=12346\nKIRO_GID=12345\n")
        .unwrap();
    check(
        &mut host(&made),
        1,
        &[
            "certs/auth/leaf.key: its container runs as 12345:12345 and can't read it",
            "certs/dashboard-app/leaf.key: its container runs as 12346:12345",
        ],
    );
}

#[test]
fn an_edge_without_a_secret_is_named() {
    let made = Made::new(&With::default());
    std::fs::write(made.path("certs/dashboard/edges.json"), "{\"version\":1,\"edges\":[]}").unwrap();
    check(
        &mut host(&made),
        1,
        &["certs/dashboard: no secret for the edge dashboard → profile", "make certs"],
    );
    std::fs::write(made.path("certs/profile/edges.json"), "{\"version\":1,\"edges\":[]}").unwrap();
    check(&mut host(&made), 1, &["certs/profile: no secret for the edge dashboard → profile"]);
}

#[test]
fn a_certificate_that_ends_soon_is_a_warning_and_one_that_has_ended_a_problem() {
    let now = OffsetDateTime::now_utc();
    let soon = Made::new(&With { now: now - Duration::days(80), ..With::default() });
    check(
        &mut host(&soon),
        0,
        &["warning  certs/auth: spiffe://kiro.mesh/auth", "9 days left", "nothing is wrong yet"],
    );
    let over = Made::new(&With { now: now - Duration::days(91), ..With::default() });
    check(&mut host(&over), 1, &["PROBLEM  certs/auth/leaf.pem"]);
}

#[test]
fn a_published_port_that_is_taken_is_named_with_its_variable() {
    let made = Made::new(&With::default());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (first, second) =
        (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let ports = [port(&taken), port(&first), port(&second)];
    drop((first, second));
    std::fs::write(made.path("docker-compose.yml"), "name: nothing\nservices: {}\n").unwrap();
    let env = std::fs::read_to_string(made.path(".env")).unwrap();
    let mine = format!("{env}KIRO_HTTP_PORT={}\nKIRO_HTTPS_PORT={}\n", ports[0], ports[1]);
    std::fs::write(made.path(".env"), mine).unwrap();

    // What Compose says of what runs, by a program that stands in for it; or nothing, where there is none.
    let bin = made.path("bin");
    std::fs::create_dir(&bin).unwrap();
    let look = |compose: Option<&str>| {
        if let Some(running) = compose {
            std::fs::write(bin.join("docker"), format!("#!/bin/sh\necho {running}\n")).unwrap();
            std::fs::set_permissions(bin.join("docker"), std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut command = host(&made);
        command.env("PATH", &bin).env("KIRO_JAEGER_PORT", ports[2].to_string());
        command
    };
    let cannot = format!("127.0.0.1:{}, for dashboard-pod, can't be had", ports[0]);
    check(&mut look(None), 0, &[&format!("warning  {cannot}"), "unless that is this mesh"]);
    check(
        &mut look(Some("jaeger")),
        1,
        &[
            &format!("PROBLEM  {cannot}"),
            "set KIRO_HTTP_PORT to a free port",
            &format!("127.0.0.1:{}: free for dashboard-pod", ports[1]),
            &format!("127.0.0.1:{}: free for jaeger", ports[2]),
        ],
    );
    let runs = format!("ok       127.0.0.1:{}: dashboard-pod runs and is published there", ports[0]);
    check(&mut look(Some("dashboard-pod")), 0, &[&runs]);
}

const READY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nready\n";

fn pod(made: &Made, admin: SocketAddr) -> Command {
    let mut command = kiro();
    command
        .arg("check")
        .current_dir(made.dir.path())
        .env("KIRO_SERVICE", "dashboard")
        .env("KIRO_IDENTITY_DIR", made.path("certs/dashboard"))
        .env("KIRO_MESH_DIR", made.path("docker/mesh"))
        .env("KIRO_ADMIN_ADDR", admin.to_string())
        .env("KIRO_OUTBOUND_ADDR", admin.to_string());
    command
}

#[test]
fn a_pod_that_does_its_work() {
    let app = TcpListener::bind("127.0.0.1:0").unwrap();
    let made = Made::new(&With { app: app.local_addr().unwrap().port(), ..With::default() });
    let (callee, seen) = play(Plays::Inbound(made.identity("profile")));
    made.callee_moves_to(callee);
    let (admin, _asked) = play(Plays::Plain(READY));
    check(
        &mut pod(&made, admin),
        0,
        &[
            "mesh file: dashboard is one of 3 services",
            "identity: spiffe://kiro.mesh/dashboard, until ",
            &format!("admin {admin}: ready"),
            "application: ",
            &format!("profile at {callee}: mutual TLS with spiffe://kiro.mesh/profile, X25519MLKEM768"),
            "all is well",
        ],
    );
    assert_eq!(seen.recv().unwrap(), "spiffe://kiro.mesh/dashboard");
}

#[test]
fn a_pod_whose_parts_are_missing() {
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (callee, app) = (free(), free());
    let made = Made::new(&With { app: app.port(), callee, ..With::default() });
    let admin = free();
    check(
        &mut pod(&made, admin),
        1,
        &[
            &format!("PROBLEM  no sidecar answers at {admin}"),
            "docker compose logs dashboard-proxy",
            &format!("PROBLEM  application: nobody answers at {app}"),
            &format!("PROBLEM  profile at {callee}: nobody accepts connections"),
            "4 to mend",
        ],
    );
}

#[test]
fn a_callee_that_is_somebody_else_is_named() {
    let made = Made::new(&With::default());
    let (callee, _seen) = play(Plays::Inbound(made.identity("auth")));
    made.callee_moves_to(callee);
    let (admin, _asked) = play(Plays::Plain(READY));
    check(
        &mut pod(&made, admin),
        1,
        &[&format!("PROBLEM  profile at {callee}: "), "(tls_wrong_identity)", "auth"],
    );
}

/// `dashboard` may reach two services without HTTP.
fn with_tcp_services(made: &Made) {
    let file = made.path("docker/mesh/mesh.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    let services = "  db: { app: { port: 5432, protocol: tcp } }\n  \
        cache: { app: { port: 6379, protocol: tcp }, local_port: 16379 }\n  \
        queue: { app: { port: 5672, protocol: tcp } }\nallow:\n  \
        - { from: dashboard, to: db }\n  - { from: dashboard, to: cache }\n  - { from: dashboard, to: queue }\n";
    std::fs::write(&file, text.replace("allow:\n", services)).unwrap();
}

#[test]
fn where_tcp_services_are_found_is_told_before_the_start() {
    let made = Made::new(&With::default());
    with_tcp_services(&made);
    let parts = [
        "ok       dashboard finds db at 127.0.0.1:5432 of its pod",
        "ok       dashboard finds cache at 127.0.0.1:16379 of its pod",
    ];
    // There are no certificates for them yet.
    check(&mut host(&made), 1, &parts);
}

#[test]
fn local_ports_are_asked_of_the_sidecar() {
    const CONFIG: &str = "HTTP/1.1 200 OK\r\n\r\n{ \"local_ports\": { \
        \"db\": { \"port\": 5432, \"address\": \"127.0.0.1:5432\" }, \
        \"cache\": { \"port\": 16379, \"error\": \"Address already in use\" } } }";
    let made = Made::new(&With::default());
    with_tcp_services(&made);
    let (admin, _asked) = play(Plays::Plain(CONFIG));
    check(
        &mut pod(&made, admin),
        1,
        &[
            "ok       db: the application finds it at 127.0.0.1:5432",
            "PROBLEM  cache: the application can't reach it at port 16379: Address already in use",
            "give `services.cache` another `local_port`",
            "PROBLEM  queue: the sidecar does not listen at port 5672 for it",
        ],
    );
}
