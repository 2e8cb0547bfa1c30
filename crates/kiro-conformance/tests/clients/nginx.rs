//! nginx as the application: files, parts of them, what a cache asks, HTTP/2 without TLS, and TLS with certificates both ways.

use std::process::Command;

use crate::curl::curl;
use crate::curl_bodies::noise;
use crate::support::process::{Server, command, run};
use crate::support::tools;
use crate::support::world::{Spec, World};

/// nginx with a directory of files; what is said in capitals is filled in.
const CONFIGURATION: &str = "
daemon off;
user root;
worker_processes 1;
pid DIR/nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path DIR/body;
    proxy_temp_path DIR/proxy;
    fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi;
    scgi_temp_path DIR/scgi;
    types { text/plain txt; application/octet-stream bin; }
    gzip on;
    gzip_types text/plain;
    gzip_min_length 100;
    server {
        listen LISTEN;
        root DIR/files;
        client_max_body_size 1m;
        TLS
        location /who { return 200 \"$http_x_kiro_caller $server_protocol $ssl_client_s_dn\\n\"; }
    }
}
";

fn start(world: &World, listen: &str, tls: &str) -> Option<Server> {
    let nginx = tools::program("nginx", "nginx")?;
    let dir = world.path("nginx");
    std::fs::create_dir_all(dir.join("files")).unwrap();
    let port = world.ports("app").app;
    let text = CONFIGURATION
        .replace("LISTEN", &format!("127.0.0.1:{port} {listen}"))
        .replace("TLS", tls)
        .replace("DIR", &dir.display().to_string());
    let file = dir.join("nginx.conf");
    std::fs::write(&file, text).unwrap();
    let mut serve = command(nginx);
    let mut server =
        Server::start("nginx", &world.path(""), serve.arg("-e").arg("stderr").arg("-c").arg(file));
    server.ready(|| std::net::TcpStream::connect(crate::support::world::at(port)).ok());
    Some(server)
}

/// curl by the proxy.
fn proxied(world: &World) -> Option<Command> {
    let mut curl = curl()?;
    curl.args(["--proxy", &world.proxy()]);
    Some(curl)
}

#[test]
#[ignore = "make conformance: needs nginx"]
fn parts_of_a_file_make_the_whole() {
    let world = World::start(&Spec::pair());
    let Some(_nginx) = start(&world, "", "") else { return };
    let content = noise(20 * 1024 * 1024);
    std::fs::write(world.path("nginx/files/large.bin"), &content).unwrap();
    let Some(mut whole) = proxied(&world) else { return };
    let whole = run(whole.arg("http://app/large.bin"));
    assert!(whole.status.success() && whole.stdout == content, "{}", whole.stderr);
    // A download that goes on where it broke off.
    let part = world.path("part");
    std::fs::write(&part, &content[..7_000_000]).unwrap();
    let Some(mut rest) = proxied(&world) else { return };
    run(rest.args(["--continue-at", "-", "http://app/large.bin", "--output"]).arg(&part)).success();
    assert!(std::fs::read(&part).unwrap() == content, "the file is changed");
    // Several parts in one answer.
    let Some(mut several) = proxied(&world) else { return };
    let several = run(several.args(["--range", "0-9,100-109", "--include", "http://app/large.bin"]));
    let text = String::from_utf8_lossy(&several.stdout).to_lowercase();
    assert!(text.contains("206") && text.contains("multipart/byteranges; boundary="), "{text}");
    assert!(several.stdout.windows(10).any(|window| window == &content[100..110]), "{text}");
}

#[test]
#[ignore = "make conformance: needs nginx"]
fn a_cache_asks_and_is_told_that_nothing_has_changed() {
    let world = World::start(&Spec::pair());
    let Some(_nginx) = start(&world, "", "") else { return };
    std::fs::write(world.path("nginx/files/page.txt"), "a page\n".repeat(100)).unwrap();
    let (etag, date) = (world.path("etag"), world.path("copy"));
    let ask = |options: &[&str], file: &std::path::Path| {
        let mut curl = proxied(&world)?;
        curl.args(options).arg(file).args(["--write-out", "%{http_code} %{size_download}", "--output"]);
        Some(run(curl.arg(&date).args(["--remote-time", "http://app/page.txt"])).success())
    };
    assert_eq!(ask(&["--etag-save"], &etag).unwrap(), "200 700");
    assert_eq!(ask(&["--etag-compare"], &etag).unwrap(), "304 0");
    assert_eq!(ask(&["--time-cond"], &date).unwrap(), "304 0");
    std::fs::write(world.path("nginx/files/page.txt"), "another\n").unwrap();
    assert_eq!(ask(&["--etag-compare"], &etag).unwrap(), "200 8");
}

#[test]
#[ignore = "make conformance: needs nginx"]
fn what_the_application_compresses_stays_so() {
    let world = World::start(&Spec::pair());
    let Some(_nginx) = start(&world, "", "") else { return };
    let text = "again and again\n".repeat(10_000);
    std::fs::write(world.path("nginx/files/page.txt"), &text).unwrap();
    let Some(mut curl) = proxied(&world) else { return };
    curl.args(["--compressed", "--write-out", "%{stderr}%{size_download} %header{content-encoding}"]);
    let outcome = run(curl.arg("http://app/page.txt"));
    assert!(outcome.text() == text, "{}", outcome.stderr);
    let (size, encoding) = outcome.stderr.split_once(' ').unwrap();
    assert!(size.parse::<usize>().unwrap() < 10_000 && encoding == "gzip", "{}", outcome.stderr);
}

#[test]
#[ignore = "make conformance: needs nginx"]
fn an_upload_over_the_applications_limit_is_told_so() {
    let world = World::start(&Spec::pair());
    let Some(_nginx) = start(&world, "", "") else { return };
    let file = world.path("upload");
    std::fs::write(&file, noise(8 * 1024 * 1024)).unwrap();
    // With leave asked for, and by a client that just sends.
    for expect in ["Expect: 100-continue", "Expect:"] {
        let Some(mut curl) = proxied(&world) else { return };
        curl.args(["--header", expect, "--write-out", "%{http_code}", "--output", "/dev/null"]);
        let outcome = run(curl.arg("--upload-file").arg(&file).arg("http://app/upload"));
        assert_eq!(outcome.text(), "413", "{expect} {}", outcome.stderr);
    }
}

#[test]
#[ignore = "make conformance: needs nginx"]
fn an_application_of_http_2_is_spoken_to_in_http_2() {
    let spec = Spec::pair_with("app: { port: {port}, protocol: h2 }, ingress: { port: {ingress} }");
    let world = World::start(&spec);
    let Some(_nginx) = start(&world, "http2", "") else { return };
    let content = noise(5 * 1024 * 1024);
    std::fs::write(world.path("nginx/files/large.bin"), &content).unwrap();
    for (version, address) in [
        ("--http1.1", world.outbound()),
        ("--http2-prior-knowledge", world.outbound()),
        ("--http1.1", world.ingress()),
    ] {
        for _ in 0..2 {
            let Some(mut curl) = curl() else { return };
            curl.args([version, "--header", "Host: app"]);
            let caller = if address == world.ingress() { "ingress" } else { "caller" };
            let text = run(curl.arg(format!("http://{address}/who"))).success();
            assert_eq!(text.trim_end(), format!("{caller} HTTP/2.0"), "{version} to {address}");
        }
        let Some(mut curl) = curl() else { return };
        curl.args([version, "--header", "Host: app"]);
        let outcome = run(curl.arg(format!("http://{address}/large.bin")));
        assert!(outcome.status.success() && outcome.stdout == content, "{version} {}", outcome.stderr);
    }
}

#[test]
#[ignore = "make conformance: needs nginx"]
fn both_applications_have_certificates() {
    let world = World::start(&Spec {
        services: vec![
            ("caller", "app: { port: {port}, tls: mutual }"),
            ("app", "app: { port: {port}, tls: mutual }"),
        ],
        allow: "  - { from: caller, to: app }",
    });
    let certs = world.path("certs/app-app");
    let tls = format!(
        "ssl_certificate {0}/leaf.pem; ssl_certificate_key {0}/leaf.key; ssl_client_certificate {0}/ca.pem;
         ssl_verify_client on; ssl_protocols TLSv1.3;",
        certs.display()
    );
    let Some(_nginx) = start(&world, "ssl", &tls) else { return };
    let own = world.path("certs/caller-app");
    let port = world.outbound().port();
    let with_certificate = |certificate: bool| {
        let mut curl = curl()?;
        curl.args([
            "--resolve",
            &format!("caller:{port}:127.0.0.1"),
            "--proxy",
            &format!("https://caller:{port}"),
        ]);
        curl.arg("--proxy-cacert").arg(own.join("ca.pem"));
        if certificate {
            curl.arg("--proxy-cert").arg(own.join("leaf.pem")).arg("--proxy-key").arg(own.join("leaf.key"));
        }
        Some(run(curl.arg("http://app/who")))
    };
    let Some(known) = with_certificate(true) else { return };
    assert!(known.text().starts_with("caller HTTP/1.1"), "{} {}", known.text(), known.stderr);
    let unknown = with_certificate(false).unwrap();
    assert!(!unknown.status.success(), "a client without a certificate was served: {}", unknown.text());
    let Some(mut plain) = curl() else { return };
    let plain = run(plain.args(["--proxy", &world.proxy(), "http://app/who"]));
    assert!(!plain.text().starts_with("caller"), "a client without TLS was served: {}", plain.text());
}
