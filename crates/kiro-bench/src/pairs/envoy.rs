//! Envoy at its best: no access log, no request ids, no limits that the load could meet.
//!
//! Its TLS library chooses the cipher suite of TLS 1.3 by itself.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::Context as _;

use super::{Group, Order, Running, write};
use crate::child::{Child, Output};
use crate::identity::CALLEE;
use crate::plan::Mode;

const TYPE: &str = "\"@type\": type.googleapis.com/envoy.extensions";

/// Starts the pair.
pub(super) fn start(order: &Order<'_>, entry: SocketAddr) -> anyhow::Result<Running> {
    let program = order.tools.envoy.as_ref().context("Envoy is missing")?;
    let one = |name: &str, text: String| -> anyhow::Result<Child> {
        let file = write(order, &format!("{name}.yaml"), &text)?;
        let mut command = Command::new(program);
        command.arg("-c").arg(file).args(["--concurrency", &order.workers.to_string()]);
        command.args(["--disable-hot-restart", "--log-level", "error"]);
        Child::start(name, &mut command, Output::Null, order.dir)
    };
    let caller = bootstrap(order, entry, order.dial, Side::Caller);
    let callee = bootstrap(order, order.inbound, order.app, Side::Callee);
    Ok(Running {
        children: vec![one("envoy-caller", caller)?, one("envoy-callee", callee)?],
        entry,
        watch: None,
        probes: 0,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Caller,
    Callee,
}

/// The two differ in which end of them speaks TLS.
fn bootstrap(order: &Order<'_>, listen: SocketAddr, to: SocketAddr, side: Side) -> String {
    let (server_tls, client_tls) = match side {
        Side::Caller => (String::new(), tls(order, side)),
        Side::Callee => (tls(order, side), String::new()),
    };
    // Between the two it is always HTTP/2; towards the application what that speaks.
    let upstream = if side == Side::Caller || order.mode == Mode::Grpc {
        "http2_protocol_options: { initial_stream_window_size: 1048576, initial_connection_window_size: 16777216 }"
    } else {
        "http_protocol_options: {}"
    };
    let filter = if order.mode == Mode::Tcp { tcp_filter() } else { http_filter() };
    format!(
        r#"static_resources:
  listeners:
  - address: {{ socket_address: {{ address: {listen_ip}, port_value: {listen_port} }} }}
    tcp_backlog_size: 4096
    filter_chains:
    - filters:
{filter}
{server_tls}
  clusters:
  - name: next
    connect_timeout: 5s
    type: STATIC
    circuit_breakers: {{ thresholds: [{{ max_connections: 100000, max_pending_requests: 100000, max_requests: 100000 }}] }}
    load_assignment:
      cluster_name: next
      endpoints:
      - lb_endpoints:
        - endpoint: {{ address: {{ socket_address: {{ address: {to_ip}, port_value: {to_port} }} }} }}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        {TYPE}.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{ {upstream} }}
{client_tls}
"#,
        listen_ip = listen.ip(),
        listen_port = listen.port(),
        to_ip = to.ip(),
        to_port = to.port(),
    )
}

fn http_filter() -> String {
    format!(
        r#"      - name: envoy.filters.network.http_connection_manager
        typed_config:
          {TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          codec_type: AUTO
          generate_request_id: false
          http2_protocol_options: {{ initial_stream_window_size: 1048576, initial_connection_window_size: 16777216 }}
          stream_idle_timeout: 0s
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{ match: {{ prefix: "/" }}, route: {{ cluster: next, timeout: 0s }} }}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              {TYPE}.filters.http.router.v3.Router
              dynamic_stats: false
              suppress_envoy_headers: true"#
    )
}

fn tcp_filter() -> String {
    format!(
        r"      - name: envoy.filters.network.tcp_proxy
        typed_config:
          {TYPE}.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tcp
          cluster: next"
    )
}

fn tls(order: &Order<'_>, side: Side) -> String {
    let group = match order.group {
        Group::X25519 => "X25519",
        Group::X25519MlKem768 => "X25519MLKEM768",
    };
    let (indent, kind, own, home, expected) = match side {
        Side::Caller => (
            "    ",
            "Upstream",
            format!("sni: {CALLEE}, max_session_keys: 0"),
            order.identities.caller.display(),
            format!(", match_typed_subject_alt_names: [{{ san_type: DNS, matcher: {{ exact: {CALLEE} }} }}]"),
        ),
        Side::Callee => (
            "      ",
            "Downstream",
            "require_client_certificate: true, disable_stateless_session_resumption: true, \
             disable_stateful_session_resumption: true"
                .to_owned(),
            order.identities.callee.display(),
            String::new(),
        ),
    };
    let alpn = if order.mode == Mode::Tcp { String::new() } else { "alpn_protocols: [h2], ".to_owned() };
    format!(
        "{indent}transport_socket:
{indent}  name: envoy.transport_sockets.tls
{indent}  typed_config: {{ {TYPE}.transport_sockets.tls.v3.{kind}TlsContext, {own}, common_tls_context: {{ {alpn}\
tls_params: {{ tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3, ecdh_curves: [{group}] }}, \
tls_certificates: [{{ certificate_chain: {{ filename: \"{home}/leaf.pem\" }}, private_key: {{ filename: \"{home}/leaf.key\" }} }}], \
validation_context: {{ trusted_ca: {{ filename: \"{home}/ca.pem\" }}{expected} }} }} }}"
    )
}
