//! How are attributes named? By OpenTelemetry's stable conventions for HTTP and resources, and a few of Kiro's own.

/// Resource: the service.
pub const SERVICE_NAME: &str = "service.name";
/// Resource: this process among replicas.
pub const SERVICE_INSTANCE_ID: &str = "service.instance.id";
/// Resource: the program's version.
pub const SERVICE_VERSION: &str = "service.version";
/// The method, or `_OTHER`.
pub const HTTP_REQUEST_METHOD: &str = "http.request.method";
/// The method as it came, where `http.request.method` is `_OTHER`.
pub const HTTP_REQUEST_METHOD_ORIGINAL: &str = "http.request.method_original";
/// How often the request was sent again.
pub const HTTP_REQUEST_RESEND_COUNT: &str = "http.request.resend_count";
/// The status.
pub const HTTP_RESPONSE_STATUS_CODE: &str = "http.response.status_code";
/// The pattern that matched the path.
pub const HTTP_ROUTE: &str = "http.route";
/// `1.1`, `2`, …
pub const NETWORK_PROTOCOL_VERSION: &str = "network.protocol.version";
/// The address of the other end of the connection.
pub const NETWORK_PEER_ADDRESS: &str = "network.peer.address";
/// And its port.
pub const NETWORK_PEER_PORT: &str = "network.peer.port";
/// The name that was asked for.
pub const SERVER_ADDRESS: &str = "server.address";
/// And its port.
pub const SERVER_PORT: &str = "server.port";
/// The caller's address.
pub const CLIENT_ADDRESS: &str = "client.address";
/// The path.
pub const URL_PATH: &str = "url.path";
/// `http` or `https`.
pub const URL_SCHEME: &str = "url.scheme";
/// The whole URL.
pub const URL_FULL: &str = "url.full";
/// The class of what went wrong: a status, or a code.
pub const ERROR_TYPE: &str = "error.type";

/// The method's value for [`HTTP_REQUEST_METHOD`], out of the closed set of the conventions; `None`: `_OTHER`.
pub fn known_method(method: &str) -> Option<&'static str> {
    const KNOWN: [&str; 10] =
        ["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "CONNECT", "TRACE", "QUERY"];
    KNOWN.into_iter().find(|known| *known == method)
}

/// The value for [`NETWORK_PROTOCOL_VERSION`].
pub fn protocol_version(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_09 => "0.9",
        http::Version::HTTP_10 => "1.0",
        http::Version::HTTP_2 => "2",
        http::Version::HTTP_3 => "3",
        _ => "1.1",
    }
}
