//! Which requests are well-formed, and which of their fields travel on?
//!
//! [`outbound`], [`inbound`] and [`ingress`] admit a request at the three listeners: one Host, a readable authority, a clean
//! path, no upgrade but `websocket`; they take out what concerns one hop alone and what only sidecars may say. The functions
//! below them dress an admitted request for the next hop.

use http::header::{
    self, CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{PathAndQuery, Scheme};
use http::{Method, Request, Uri, Version, request};
use kiro_core::identity::ServiceName;
use kiro_core::{authority, fields, path};

use crate::reject::{Refused, Reject};
use crate::websocket;
use crate::{header_size, limits};

/// What kind of exchange a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A request and its response.
    Plain,
    /// A WebSocket handshake: policy and log see GET with its path.
    WebSocket,
    /// CONNECT: bytes both ways.
    Tunnel,
}

/// A request whose head is well-formed.
#[derive(Debug)]
pub(crate) struct Admitted<B> {
    /// The head, without fields that concern one hop alone.
    pub(crate) head: request::Parts,
    /// The body, untouched.
    pub(crate) body: B,
    /// What it asks for.
    pub(crate) kind: Kind,
    /// Whether some servers read its path as another one.
    pub(crate) ambiguous: bool,
}

impl<B> Admitted<B> {
    /// The path as policy and signature see it.
    pub(crate) fn path(&self) -> &str {
        path_of(&self.head)
    }

    /// The method as policy and log see it.
    pub(crate) fn method(&self) -> &str {
        match self.kind {
            Kind::Plain | Kind::Tunnel => self.head.method.as_str(),
            Kind::WebSocket => Method::GET.as_str(),
        }
    }
}

/// The raw path of a head; a CONNECT without one has `/`.
pub(crate) fn path_of(head: &request::Parts) -> &str {
    match head.uri.path() {
        "" => "/",
        path => path,
    }
}

/// The authority that an application's request names, by the rules of RFC 9112 3.2: absolute form beats Host.
pub(crate) fn requested_authority(head: &request::Parts) -> Result<&str, Refused> {
    let host = single_host(&head.headers)?;
    if let Some(authority) = head.uri.authority() {
        // RFC 9112 3.2: a server answers 400 to an HTTP/1.1 request without Host, whatever its target's form.
        if host.is_none() && head.version == Version::HTTP_11 {
            return Err(Reject::HostMissing.into());
        }
        // RFC 9113 8.3.1: a Host that says something else than `:authority` makes the request malformed.
        if head.version == Version::HTTP_2
            && !host.is_none_or(|host| host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()))
        {
            return Err(Refused::new(Reject::AuthorityInvalid, "Host differs from :authority"));
        }
        // Host is not gone by here, and still an invalid one is 400 (RFC 9112 3.2). An empty one is valid.
        if let Some(host) = host.filter(|host| !host.is_empty()) {
            check_host(host.to_str().map_err(|_| Reject::AuthorityInvalid)?)?;
        }
        return Ok(authority.as_str());
    }
    let host = host.ok_or(Reject::HostMissing)?;
    host.to_str().map_err(|_| Reject::AuthorityInvalid.into())
}

fn check_host(host: &str) -> Result<(), Refused> {
    authority::check_host(host).map_err(|error| Refused::new(Reject::AuthorityInvalid, error.to_string()))
}

fn single_host(headers: &HeaderMap) -> Result<Option<&HeaderValue>, Refused> {
    let mut hosts = headers.get_all(HOST).iter();
    let first = hosts.next();
    if hosts.next().is_some() {
        return Err(Reject::HostDuplicate.into());
    }
    Ok(first)
}

/// Admits an application's request to its outbound proxy.
pub(crate) fn outbound<B>(request: Request<B>) -> Result<Admitted<B>, Refused> {
    let mut admitted = http1_or_2(request)?;
    // The one field of ours that an application may set (see `OWN_FIELDS`).
    retain(&mut admitted.head.headers, |name| !fields::is_own(name) || *name == fields::DEADLINE);
    Ok(admitted)
}

/// Admits a request from outside the mesh.
pub(crate) fn ingress<B>(request: Request<B>) -> Result<Admitted<B>, Refused> {
    let mut admitted = http1_or_2(request)?;
    if admitted.kind == Kind::Tunnel {
        return Err(Refused::new(
            Reject::Denied(kiro_core::policy::Denial::TunnelRestricted),
            "an ingress carries no tunnels",
        ));
    }
    let authority = requested_authority(&admitted.head)?;
    // RFC 9112 3.2: what is no valid Host is 400, also where any name would do.
    check_host(authority)?;
    let host = HeaderValue::from_str(authority).map_err(|_| Reject::AuthorityInvalid)?;
    admitted.head.headers.insert(HOST, host);
    strip_own(&mut admitted.head.headers);
    Ok(admitted)
}

fn http1_or_2<B>(request: Request<B>) -> Result<Admitted<B>, Refused> {
    let (mut head, body) = request.into_parts();
    header_size::check(&head.headers, limits::HEADER_BYTES)?;
    single_host(&head.headers)?;
    let kind = kind_of(&head)?;
    check_form(&head, kind)?;
    no_body_with(kind, &head.headers)?;
    let ambiguous = if kind == Kind::Tunnel { false } else { screen_target(&head)? };
    if !one_coding(&head.headers) {
        return Err(Refused::new(Reject::HeaderInvalid, "a transfer coding other than one `chunked`"));
    }
    if let Some(name) = strip_hop_by_hop(&mut head.headers) {
        return Err(Refused::new(Reject::HeaderInvalid, format!("Connection names `{name}`")));
    }
    plain_length(&mut head.headers);
    if kind == Kind::WebSocket && head.version == Version::HTTP_2 {
        // In HTTP/2 there is none, and an application that speaks HTTP/1.1 wants one.
        websocket::ensure_key(&mut head.headers);
    }
    Ok(Admitted { head, body, kind, ambiguous })
}

/// Authority-form is CONNECT's and nobody else's, with a port (RFC 9112 3.2.3, RFC 9110 9.3.6), and what is asked for by another scheme
/// is not to be had by HTTP. The URI type takes each of them for what it needs.
fn check_form(head: &request::Parts, kind: Kind) -> Result<(), Refused> {
    let (scheme, authority) = (head.uri.scheme(), head.uri.authority());
    let wrong = match (kind, authority) {
        (Kind::Tunnel, Some(authority))
            if scheme.is_none() && head.uri.path_and_query().is_none() && authority.port().is_some() =>
        {
            return Ok(());
        }
        (Kind::Tunnel, _) => "CONNECT asks for `name:port`",
        (Kind::Plain | Kind::WebSocket, None) => return Ok(()),
        (Kind::Plain | Kind::WebSocket, Some(_)) => match scheme {
            Some(scheme) if [Scheme::HTTP, Scheme::HTTPS].iter().any(|http| is_scheme(scheme, http)) => {
                return Ok(());
            }
            Some(_) => "the target's scheme is neither http nor https",
            None => "a target that is an authority alone",
        },
    };
    Err(Refused::new(Reject::AuthorityInvalid, wrong))
}

/// A scheme has no case (RFC 3986 3.1).
fn is_scheme(scheme: &Scheme, known: &Scheme) -> bool {
    scheme.as_str().eq_ignore_ascii_case(known.as_str())
}

/// The one coding that is undone here is `chunked`. Any other before it would be lost with the field, which concerns one hop, and
/// the receiver would read coded bytes as they are; `chunked` twice is forbidden (RFC 9112 6.1).
fn one_coding(headers: &HeaderMap) -> bool {
    let mut codings = headers
        .get_all(TRANSFER_ENCODING)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|coding| !coding.is_empty());
    let chunked = match codings.next() {
        Some(coding) => coding.eq_ignore_ascii_case(b"chunked"),
        None => !headers.contains_key(TRANSFER_ENCODING),
    };
    chunked && codings.next().is_none()
}

/// Writes a length once and without leading zeros, of which the HTTP/2 library between sidecars takes few. What the HTTP/1 library has
/// taken for a length is a number, or in an answer a list of one and the same (RFC 9110 8.6).
fn plain_length(headers: &mut HeaderMap) {
    let Some(length) = headers.get(CONTENT_LENGTH).map(HeaderValue::as_bytes) else { return };
    let plain = !length.starts_with(b"0") && length.iter().all(u8::is_ascii_digit);
    if plain && headers.get_all(CONTENT_LENGTH).iter().nth(1).is_none() {
        return;
    }
    let first = length.split(|&byte| byte == b',').next().unwrap_or_default().trim_ascii();
    let number = std::str::from_utf8(first).ok().and_then(|first| first.parse::<u64>().ok());
    headers.remove(CONTENT_LENGTH);
    if let Some(number) = number {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(number));
    }
}

/// Frames the application's answer anew, by RFC 9112 6.3: chunks win over a length beside them, which the HTTP library has not gone
/// by and would pass on. An error says what can't be passed on.
pub(crate) fn frame_answer(headers: &mut HeaderMap) -> Result<(), &'static str> {
    if !one_coding(headers) {
        return Err("the application answered in a transfer coding other than one `chunked`");
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    plain_length(headers);
    Ok(())
}

/// Whether a 101 switches to the one protocol that was asked for (RFC 9110 7.8).
pub(crate) fn switches_to_websocket(headers: &HeaderMap) -> bool {
    let mut upgrades = headers.get_all(UPGRADE).iter();
    let websocket =
        upgrades.next().is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes()));
    websocket && upgrades.next().is_none()
}

/// Admits a request from another sidecar.
pub(crate) fn inbound<B>(request: Request<B>, me: &ServiceName) -> Result<Admitted<B>, Refused> {
    let (mut head, body) = request.into_parts();
    let authority = head.uri.authority().map(http::uri::Authority::as_str).unwrap_or_default();
    if authority != me.as_str() {
        return Err(Refused::new(
            Reject::Misdirected,
            format!("the request is for `{}`, this sidecar serves `{me}`", authority.escape_debug()),
        ));
    }
    if head.headers.contains_key(HOST) {
        return Err(Refused::new(Reject::HeaderInvalid, "a Host field between sidecars"));
    }
    let kind = kind_of(&head)?;
    no_body_with(kind, &head.headers)?;
    let marked = head.headers.get(&fields::UPGRADE).is_some_and(|value| value == WEBSOCKET);
    if marked != (kind == Kind::WebSocket) {
        return Err(Refused::new(Reject::HeaderInvalid, "x-kiro-upgrade does not fit :protocol"));
    }
    if let Some(host) = head.headers.get(&fields::HOST) {
        let named = host.to_str().ok().and_then(|host| authority::service_of(host).ok());
        if named.as_deref() != Some(me.as_str()) {
            return Err(Refused::new(Reject::Misdirected, "x-kiro-host names another service"));
        }
    }
    let ambiguous = if kind == Kind::Tunnel { false } else { screen_target(&head)? };
    strip_not_from_sidecars(&mut head.headers);
    Ok(Admitted { head, body, kind, ambiguous })
}

const WEBSOCKET: &str = "websocket";

fn kind_of(head: &request::Parts) -> Result<Kind, Refused> {
    if head.method == Method::CONNECT {
        return match head.extensions.get::<h2::ext::Protocol>() {
            None => Ok(Kind::Tunnel),
            Some(protocol) if protocol.as_str() == WEBSOCKET => Ok(Kind::WebSocket),
            Some(_) => Err(Refused::new(
                Reject::UpgradeUnsupported,
                "the one `:protocol` that is carried is `websocket`",
            )),
        };
    }
    let Some(upgrade) = head.headers.get(UPGRADE) else { return Ok(Kind::Plain) };
    let several = head.headers.get_all(UPGRADE).iter().nth(1).is_some();
    let asked = head.headers.get_all(CONNECTION).iter().any(|value| has_token(value, "upgrade"));
    let websocket = upgrade.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes());
    if several || !websocket || !asked || head.method != Method::GET || head.version != Version::HTTP_11 {
        return Err(Refused::new(
            Reject::UpgradeUnsupported,
            "the one upgrade that is carried is `websocket`, asked for by GET in HTTP/1.1 with `Connection: upgrade`",
        ));
    }
    Ok(Kind::WebSocket)
}

/// What follows CONNECT or a WebSocket handshake is no body (RFC 9110 9.3.6, RFC 6455 4.1). A length that is passed on without one
/// would have the application take the next request on its connection for it.
fn no_body_with(kind: Kind, headers: &HeaderMap) -> Result<(), Refused> {
    let framed = [CONTENT_LENGTH, TRANSFER_ENCODING].into_iter().find(|name| headers.contains_key(name));
    match (kind, framed) {
        (Kind::WebSocket | Kind::Tunnel, Some(name)) => {
            Err(Refused::new(Reject::HeaderInvalid, format!("`{name}` on a request that has no body")))
        }
        (Kind::Plain, _) | (_, None) => Ok(()),
    }
}

fn has_token(value: &HeaderValue, token: &str) -> bool {
    value
        .as_bytes()
        .split(|&byte| byte == b',')
        .any(|part| part.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

fn screen_target(head: &request::Parts) -> Result<bool, Refused> {
    // `OPTIONS *` concerns a server as a whole, and there is no such server here.
    let screened =
        path::screen(path_of(head)).map_err(|error| Refused::new(Reject::PathInvalid, error.to_string()))?;
    if head.uri.query().is_some_and(|query| !query.bytes().all(|byte| byte.is_ascii_graphic())) {
        return Err(Refused::new(Reject::PathInvalid, "the query holds bytes outside visible ASCII"));
    }
    Ok(screened.ambiguous)
}

pub(crate) const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
pub(crate) const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
pub(crate) const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// Beside `Connection`, all that it names, and `TE` (RFC 9110 7.6.1, 11.7.2).
static OF_ONE_HOP: [HeaderName; 6] =
    [KEEP_ALIVE, PROXY_CONNECTION, HTTP2_SETTINGS, UPGRADE, TRANSFER_ENCODING, header::PROXY_AUTHORIZATION];
static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Takes out what concerns one hop alone: `Connection`, all that it names, and the fields of RFC 9110 7.6.1.
///
/// A `Connection` that names a field which has to travel (Host, a length, credentials) is an attack on the next hop: that field stays,
/// and is given for the refusal. Ours are taken out in any case.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) -> Option<HeaderName> {
    let mut has_to_travel = None;
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
            .filter_map(|token| HeaderName::from_bytes(token.trim_ascii()).ok())
            .collect();
        headers.remove(CONNECTION);
        for name in named {
            if name == HOST || name == CONTENT_LENGTH || name == header::AUTHORIZATION {
                has_to_travel = Some(name);
            } else if name != TE && name != TRAILER {
                // The body's framing is read from these by the HTTP library, before this point.
                headers.remove(name);
            }
        }
    }
    retain(headers, |name| !OF_ONE_HOP.contains(name));
    if headers.contains_key(TE) {
        let trailers = headers.get_all(TE).iter().any(|te| has_token(te, "trailers"));
        headers.remove(TE);
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
    has_to_travel
}

/// Takes out all of our own fields: what no application and nobody outside may say.
pub(crate) fn strip_own(headers: &mut HeaderMap) {
    retain(headers, |name| !fields::is_own(name));
}

/// Takes out those of our own fields that a calling sidecar may not set.
fn strip_not_from_sidecars(headers: &mut HeaderMap) {
    retain(headers, |name| !fields::is_own(name) || fields::is_covered(name));
}

/// `HeaderMap` has no `retain`; the list of names to go is empty nearly always and allocates nothing then. To look at the few names that
/// are there costs less than to look each name up that could be.
pub(crate) fn retain(headers: &mut HeaderMap, keep: impl Fn(&HeaderName) -> bool) {
    let gone: Vec<HeaderName> = headers.keys().filter(|name| !keep(name)).cloned().collect();
    for name in gone {
        headers.remove(name);
    }
}

/// Dresses an application's request for the peer sidecar: the service's bare name is the authority, the original Host goes in a
/// field of ours where it differs.
pub(crate) fn for_peer(head: &mut request::Parts, peer: &ServiceName, kind: Kind) -> Result<(), Refused> {
    let host = head.headers.remove(HOST);
    let original = match head.uri.authority() {
        Some(authority) if authority.as_str() == peer.as_str() => None,
        Some(authority) => {
            Some(HeaderValue::from_str(authority.as_str()).map_err(|_| Reject::AuthorityInvalid)?)
        }
        None => host.filter(|host| host.as_bytes() != peer.as_str().as_bytes()),
    };
    if let Some(original) = original
        && kind != Kind::Tunnel
    {
        head.headers.insert(fields::HOST.clone(), original);
    }
    if kind == Kind::WebSocket {
        head.headers.insert(fields::UPGRADE.clone(), HeaderValue::from_static(WEBSOCKET));
    }
    Ok(())
}

/// Dresses a trusted request for the application, which speaks HTTP/1.1.
pub(crate) fn for_app(head: &mut request::Parts, kind: Kind, caller: &HeaderValue, me: &HeaderValue) {
    let host = head.headers.remove(&fields::HOST);
    if !head.headers.contains_key(HOST) {
        head.headers.insert(HOST, host.unwrap_or_else(|| me.clone()));
    }
    only_caller(&mut head.headers, caller);
    // HTTP/2 allows a cookie in several fields, HTTP/1.1 wants one (RFC 9113 8.2.3).
    join_cookies(&mut head.headers);
    if kind == Kind::WebSocket {
        head.method = Method::GET;
        head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(UPGRADE, HeaderValue::from_static(WEBSOCKET));
    } else if head.headers.contains_key(TE) {
        head.headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    let origin_form = head.uri.path_and_query().cloned();
    head.uri = origin_form.map_or_else(|| http::Uri::from_static("/"), http::Uri::from);
    head.version = Version::HTTP_11;
    head.extensions.clear();
}

/// Dresses a trusted request for an application that speaks HTTP/2.
pub(crate) fn for_h2_app(
    head: &mut request::Parts,
    kind: Kind,
    caller: &HeaderValue,
    me: &ServiceName,
    tls: bool,
) -> Result<(), Refused> {
    let original = head.headers.remove(&fields::HOST);
    let original = head.headers.remove(HOST).or(original);
    let mut uri = http::uri::Parts::default();
    uri.scheme = Some(if tls { Scheme::HTTPS } else { Scheme::HTTP });
    uri.authority = Some(
        original
            .as_ref()
            .map_or(me.as_str().as_bytes(), HeaderValue::as_bytes)
            .try_into()
            .map_err(|_| Reject::AuthorityInvalid)?,
    );
    uri.path_and_query =
        Some(head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")));
    head.uri = Uri::from_parts(uri).map_err(|error| Refused::new(Reject::PathInvalid, error.to_string()))?;
    only_caller(&mut head.headers, caller);
    head.version = Version::HTTP_2;
    head.extensions.clear();
    if kind == Kind::WebSocket {
        head.method = Method::CONNECT;
        head.extensions.insert(h2::ext::Protocol::from_static(WEBSOCKET));
        head.headers.remove(header::SEC_WEBSOCKET_KEY);
    }
    Ok(())
}

/// Of our own fields an application sees who called, and no other.
fn only_caller(headers: &mut HeaderMap, caller: &HeaderValue) {
    retain(headers, |name| !fields::is_covered(name));
    headers.insert(fields::CALLER.clone(), caller.clone());
}

/// Whether an answer is a stream of server-sent events.
pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    const TYPE: &[u8] = b"text/event-stream";
    let value = headers.get(http::header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    value.and_then(|value| value.get(..TYPE.len())).is_some_and(|start| start.eq_ignore_ascii_case(TYPE))
}

/// Whether a head is one of gRPC, by its content type, which may name an encoding: `application/grpc+proto`. gRPC-Web is another
/// protocol.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(rest) = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
    else {
        return false;
    };
    matches!(rest.first(), None | Some(b'+' | b';'))
}

/// Whether a request's body waits for leave to be sent (RFC 9110 10.1.1).
pub(crate) fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let parts: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&parts.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Replaces what an outside client claims about the way it came by what the ingress saw.
pub(crate) fn forwarded(headers: &mut HeaderMap, remote: std::net::IpAddr, tls: bool) {
    retain(headers, |name| !fields::has_prefix(name, "x-forwarded-"));
    headers.remove(header::FORWARDED);
    if let Ok(value) = HeaderValue::from_str(&remote.to_string()) {
        headers.insert(X_FORWARDED_FOR.clone(), value);
    }
    headers.insert(X_FORWARDED_PROTO.clone(), HeaderValue::from_static(if tls { "https" } else { "http" }));
    if let Some(host) = headers.get(HOST).cloned() {
        headers.insert(X_FORWARDED_HOST.clone(), host);
    }
}

/// Cleans a response on its way back; `from_sidecar` keeps the one field of ours that a peer may set.
pub(crate) fn response(headers: &mut HeaderMap, from_sidecar: bool) {
    // A response whose Connection names a field that must stay is a broken application; the field stays.
    let _ = strip_hop_by_hop(headers);
    retain(headers, |name| !fields::is_own(name) || (from_sidecar && *name == fields::REJECT));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request<()> {
        let mut lines = text.trim().lines().map(str::trim);
        let mut first = lines.next().unwrap().split(' ');
        let mut builder = Request::builder().method(first.next().unwrap()).uri(first.next().unwrap());
        for line in lines {
            let (name, value) = line.split_once(": ").unwrap();
            builder = builder.header(name, value);
        }
        builder.body(()).unwrap()
    }

    fn check_outbound(text: &str, expected: Result<(Kind, &str), &str>) {
        let outcome = outbound(request(text));
        let got = match &outcome {
            Ok(admitted) => requested_authority(&admitted.head).map(|authority| (admitted.kind, authority)),
            Err(refused) => Err(Refused::from(refused.reject)),
        };
        match (got, expected) {
            (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{text}"),
            (Err(refused), Err(code)) => assert_eq!(refused.reject.code(), code, "{text}"),
            (got, expected) => panic!("{text}: {got:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn the_authority_is_found_by_rfc_9112() {
        check_outbound("GET /a\nHost: profile", Ok((Kind::Plain, "profile")));
        check_outbound("GET http://auth/a\nHost: profile", Ok((Kind::Plain, "auth")));
        check_outbound("GET http://auth/a", Err("host_missing"));
        check_outbound("GET /a", Err("host_missing"));
        check_outbound("GET /a\nHost: a\nHost: b", Err("host_duplicate"));
        check_outbound("CONNECT db:5432\nHost: db:5432", Ok((Kind::Tunnel, "db:5432")));
    }

    #[test]
    fn the_one_upgrade_is_websocket() {
        let websocket = "GET /chat\nHost: profile\nConnection: keep-alive, Upgrade\nUpgrade: WebSocket";
        check_outbound(websocket, Ok((Kind::WebSocket, "profile")));
        check_outbound("GET /\nHost: p\nConnection: upgrade\nUpgrade: h2c", Err("upgrade_unsupported"));
        check_outbound(
            "POST /\nHost: p\nConnection: upgrade\nUpgrade: websocket",
            Err("upgrade_unsupported"),
        );
        check_outbound("GET /\nHost: p\nUpgrade: websocket", Err("upgrade_unsupported"));
        check_outbound(
            "GET /\nHost: p\nConnection: upgrade\nUpgrade: websocket, h2c",
            Err("upgrade_unsupported"),
        );
    }

    #[test]
    fn what_has_no_body_has_no_length() {
        let websocket = "GET /chat\nHost: profile\nConnection: Upgrade\nUpgrade: websocket";
        check_outbound(&format!("{websocket}\nContent-Length: 5"), Err("header_invalid"));
        check_outbound(&format!("{websocket}\nTransfer-Encoding: chunked"), Err("header_invalid"));
        check_outbound("CONNECT db:5432\nHost: db:5432\nContent-Length: 5", Err("header_invalid"));
    }

    #[test]
    fn dot_segments_are_refused() {
        check_outbound("GET /a/../b\nHost: profile", Err("path_invalid"));
        check_outbound("GET /a/%2E%2e/b\nHost: profile", Err("path_invalid"));
    }

    #[test]
    fn fields_of_one_hop_stay_behind() {
        let text = "GET /a\nHost: profile\nConnection: x-one, keep-alive\nx-one: 1\nx-two: 2\nKeep-Alive: 5\nTE: gzip, trailers\nProxy-Authorization: s";
        let admitted = outbound(request(text)).unwrap();
        let names: Vec<&str> = admitted.head.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["host", "x-two", "te"]);
        assert_eq!(admitted.head.headers.get(TE).unwrap(), "trailers");
    }

    #[test]
    fn connection_cannot_take_host_away() {
        check_outbound("GET /a\nHost: profile\nConnection: host", Err("header_invalid"));
        check_outbound("GET /a\nHost: profile\nConnection: content-length", Err("header_invalid"));
    }

    #[test]
    fn applications_cannot_speak_for_sidecars() {
        let text = "GET /a\nHost: profile\nx-kiro-caller: admin\nx-kiro-host: auth\nx-kiro-whatever: 1\nX_Kiro_Caller: a";
        let admitted = outbound(request(text)).unwrap();
        let names: Vec<&str> = admitted.head.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["host"]);
    }

    fn check_inbound(text: &str, expected: Result<(), &str>) {
        let me = ServiceName::parse("profile").unwrap();
        let got = inbound(request(text), &me).map(|_| ()).map_err(|refused| refused.reject.code());
        assert_eq!(got, expected, "{text}");
    }

    #[test]
    fn an_inbound_answers_for_its_own_name_alone() {
        check_inbound("GET http://profile/a", Ok(()));
        check_inbound("GET http://auth/a", Err("misdirected"));
        check_inbound("GET http://profile:80/a", Err("misdirected"));
        check_inbound("GET http://Profile/a", Err("misdirected"));
        check_inbound("GET /a", Err("misdirected"));
        check_inbound("GET http://profile/a\nHost: profile", Err("header_invalid"));
        check_inbound("GET http://profile/a\nx-kiro-host: profile:8002", Ok(()));
        check_inbound("GET http://profile/a\nx-kiro-host: auth", Err("misdirected"));
        check_inbound("GET http://profile/a\nx-kiro-upgrade: websocket", Err("header_invalid"));
    }

    #[test]
    fn a_peer_may_set_the_covered_fields_alone() {
        let me = ServiceName::parse("profile").unwrap();
        let text = "GET http://profile/a\nx-kiro-caller: admin\nx-kiro-reject: no\nx-kiro-body: stream";
        let admitted = inbound(request(text), &me).unwrap();
        let names: Vec<&str> = admitted.head.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-kiro-body"]);
    }

    #[test]
    fn what_the_way_was_is_the_ingress_s_word() {
        let mut headers = HeaderMap::new();
        headers.insert("x-forwarded-for", HeaderValue::from_static("10.9.9.9"));
        headers.insert("x-forwarded-port", HeaderValue::from_static("1"));
        headers.insert("x_forwarded_for", HeaderValue::from_static("10.9.9.9"));
        headers.insert("forwarded", HeaderValue::from_static("for=1"));
        headers.insert(HOST, HeaderValue::from_static("shop.example"));
        forwarded(&mut headers, "127.0.0.1".parse().unwrap(), true);
        assert_eq!(headers.get("x-forwarded-for").unwrap(), "127.0.0.1");
        assert_eq!(headers.get("x-forwarded-proto").unwrap(), "https");
        assert_eq!(headers.get("x-forwarded-host").unwrap(), "shop.example");
        assert!(!headers.contains_key("forwarded") && !headers.contains_key("x-forwarded-port"));
        assert!(!headers.contains_key("x_forwarded_for"), "CGI reads it as x-forwarded-for");
    }

    #[test]
    fn cookies_are_joined_for_http_1() {
        let mut headers = HeaderMap::new();
        headers.append("cookie", HeaderValue::from_static("a=1"));
        headers.append("cookie", HeaderValue::from_static("b=2"));
        join_cookies(&mut headers);
        assert_eq!(headers.get("cookie").unwrap(), "a=1; b=2");
    }
}
