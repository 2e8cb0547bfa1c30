//! nginx at its best: upstream connections are kept, bodies stream, nothing is logged.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::Context as _;

use super::{CIPHER_SUITE, Order, Running, write};
use crate::child::{Child, Output};
use crate::identity::CALLEE;
use crate::plan::Mode;

/// Starts the pair.
pub(super) fn start(order: &Order<'_>, entry: SocketAddr) -> anyhow::Result<Running> {
    let (caller, callee) = match order.mode {
        Mode::Tcp => {
            let module = order.tools.nginx_stream.as_ref().context("nginx has no stream module")?;
            (tcp_caller(order, entry, module), tcp_callee(order, module))
        }
        Mode::Http | Mode::Grpc => (caller(order, entry), callee(order)),
    };
    let children = vec![one(order, "nginx-caller", &caller)?, one(order, "nginx-callee", &callee)?];
    Ok(Running { children, entry, watch: None, probes: 0 })
}

fn one(order: &Order<'_>, name: &str, text: &str) -> anyhow::Result<Child> {
    let file = write(order, &format!("{name}.conf"), text)?;
    let mut command = Command::new(&order.tools.nginx);
    command.arg("-c").arg(file).arg("-e").arg("stderr");
    Child::start(name, &mut command, Output::Null, order.dir)
}

fn head(order: &Order<'_>, name: &str) -> String {
    let dir = order.dir.display();
    format!(
        "worker_processes {workers};
daemon off;
pid {dir}/{name}.pid;
error_log stderr crit;
worker_rlimit_nofile 20000;
events {{ worker_connections 16384; }}
",
        workers = order.workers,
    )
}

fn http_head(order: &Order<'_>, name: &str) -> String {
    let dir = order.dir.display();
    format!(
        "  access_log off;
  keepalive_requests 100000000;
  keepalive_timeout 600s;
  client_max_body_size 16m;
  client_body_temp_path {dir}/{name}-body;
  proxy_temp_path {dir}/{name}-proxy;
  fastcgi_temp_path {dir}/{name}-fastcgi;
  uwsgi_temp_path {dir}/{name}-uwsgi;
  scgi_temp_path {dir}/{name}-scgi;
  proxy_http_version 1.1;
  proxy_set_header Connection \"\";
  proxy_set_header Host $http_host;
  proxy_request_buffering off;
  proxy_max_temp_file_size 0;
"
    )
}

fn tls_client(order: &Order<'_>) -> String {
    let home = order.identities.caller.display();
    format!(
        "proxy_ssl_certificate {home}/leaf.pem;
  proxy_ssl_certificate_key {home}/leaf.key;
  proxy_ssl_trusted_certificate {home}/ca.pem;
  proxy_ssl_verify on;
  proxy_ssl_verify_depth 2;
  proxy_ssl_name {CALLEE};
  proxy_ssl_server_name on;
  proxy_ssl_protocols TLSv1.3;
  proxy_ssl_conf_command Ciphersuites {CIPHER_SUITE};
  proxy_ssl_session_reuse off;"
    )
}

fn tls_server(order: &Order<'_>) -> String {
    let home = order.identities.callee.display();
    format!(
        "ssl_certificate {home}/leaf.pem;
  ssl_certificate_key {home}/leaf.key;
  ssl_client_certificate {home}/ca.pem;
  ssl_verify_client on;
  ssl_verify_depth 2;
  ssl_protocols TLSv1.3;
  ssl_conf_command Ciphersuites {CIPHER_SUITE};
  ssl_ecdh_curve X25519;
  ssl_session_cache off;
  ssl_session_tickets off;"
    )
}

fn caller(order: &Order<'_>, entry: SocketAddr) -> String {
    format!(
        "{head}http {{
{http}  {tls}
  upstream peer {{ server {dial}; keepalive 512; keepalive_requests 100000000; keepalive_timeout 600s; }}
  server {{
    listen {entry} reuseport backlog=4096;
    location / {{ proxy_pass https://peer; }}
  }}
}}
",
        head = head(order, "caller"),
        http = http_head(order, "caller"),
        tls = tls_client(order),
        dial = order.dial,
    )
}

fn callee(order: &Order<'_>) -> String {
    format!(
        "{head}http {{
{http}  {tls}
  upstream app {{ server {app}; keepalive 512; keepalive_requests 100000000; keepalive_timeout 600s; }}
  server {{
    listen {inbound} ssl reuseport backlog=4096;
    location / {{ proxy_pass http://app; }}
  }}
}}
",
        head = head(order, "callee"),
        http = http_head(order, "callee"),
        tls = tls_server(order),
        app = order.app,
        inbound = order.inbound,
    )
}

fn tcp_caller(order: &Order<'_>, entry: SocketAddr, module: &str) -> String {
    format!(
        "{module}
{head}stream {{
  {tls}
  proxy_ssl on;
  server {{ listen {entry} reuseport backlog=4096; proxy_pass {dial}; }}
}}
",
        head = head(order, "caller"),
        tls = tls_client(order),
        dial = order.dial,
    )
}

fn tcp_callee(order: &Order<'_>, module: &str) -> String {
    format!(
        "{module}
{head}stream {{
  {tls}
  server {{ listen {inbound} ssl reuseport backlog=4096; proxy_pass {app}; }}
}}
",
        head = head(order, "callee"),
        tls = tls_server(order),
        inbound = order.inbound,
        app = order.app,
    )
}
