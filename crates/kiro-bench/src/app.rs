//! What stands behind every pair? One nginx for HTTP/1.1, and servers of this program for gRPC and TCP.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;

use crate::child::{Child, Output};
use crate::load::h1;
use crate::ports;
use crate::tools::Tools;

/// The HTTP application.
#[derive(Debug)]
pub(crate) struct App {
    child: Child,
    /// Where it listens.
    pub(crate) address: SocketAddr,
}

impl App {
    /// Starts it and waits until it answers.
    pub(crate) fn start(tools: &Tools, dir: &Path) -> anyhow::Result<Self> {
        let address = ports::free()?;
        let home = dir.join("app");
        fs::create_dir_all(home.join("www")).with_context(|| format!("cannot create {}", home.display()))?;
        for (name, size) in [("1k", 1_usize << 10), ("16k", 1 << 14), ("1m", 1 << 20)] {
            fs::write(home.join("www").join(name), vec![b'x'; size])
                .context("cannot write the app's files")?;
        }
        let file = home.join("nginx.conf");
        fs::write(&file, configuration(&home, address))
            .with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = Command::new(&tools.nginx);
        command.arg("-c").arg(&file).arg("-e").arg("stderr");
        let mut child = Child::start("app", &mut command, Output::Null, dir)?;
        h1::wait_for_answer(address, "app", "/", Duration::from_secs(10), &mut || child.alive())?;
        Ok(Self { child, address })
    }

    /// An error if it has died.
    pub(crate) fn alive(&mut self) -> anyhow::Result<()> {
        self.child.alive()
    }
}

/// Bodies of requests are read whole before the answer, as applications do: nginx does that before it asks another server, here
/// itself on a unix socket, which gets no body.
fn configuration(home: &Path, address: SocketAddr) -> String {
    let home = home.display();
    format!(
        r#"worker_processes 1;
daemon off;
pid {home}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  keepalive_timeout 600s;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  upstream sink {{ server unix:{home}/sink.sock; keepalive 512; keepalive_requests 100000000; }}
  server {{
    listen {address} reuseport backlog=4096;
    root {home}/www;
    default_type text/plain;
    client_max_body_size 16m;
    client_body_buffer_size 2m;
    location = / {{ return 200 "hello world\n"; }}
    location = /post {{
      proxy_pass http://sink;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Content-Length "";
      proxy_pass_request_body off;
    }}
  }}
  server {{
    listen unix:{home}/sink.sock;
    location / {{ return 200 "read\n"; }}
  }}
}}
"#
    )
}
