//! How does a context travel? By W3C Trace Context out, and W3C, then B3, in.
//!
//! What comes in is from strangers: a field that is not exactly as its specification says is as if it were absent.

use http::header::{HeaderMap, HeaderName, HeaderValue};

use super::TraceContext;
use crate::json;

/// What is kept of `tracestate`. The specification asks for 512 characters at least.
pub const TRACESTATE_BYTES_MAX: usize = 512;
/// More members make the whole field void, says the specification.
const TRACESTATE_MEMBERS_MAX: usize = 32;
/// Members longer than this go first where something has to, says the specification.
const TRACESTATE_LONG_MEMBER_BYTES: usize = 128;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");
/// A `static`, so that a look at it makes no names anew.
static OF_B3: [HeaderName; 6] = [B3, B3_TRACE_ID, B3_SPAN_ID, B3_PARENT_SPAN_ID, B3_SAMPLED, B3_FLAGS];

/// The context of another process's span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// The trace; not 0.
    pub trace_id: u128,
    /// The span; not 0.
    pub span_id: u64,
    /// Its decision; `None` where B3 leaves it to us.
    pub sampled: Option<bool>,
    /// `tracestate`, checked and within [`TRACESTATE_BYTES_MAX`].
    pub state: Option<HeaderValue>,
}

/// The context that came with a request.
pub fn extract(headers: &HeaderMap) -> Option<Remote> {
    extract_w3c(headers).or_else(|| extract_b3_single(headers)).or_else(|| extract_b3_multi(headers))
}

/// Writes `traceparent` in place of any context the fields held. `tracestate` stays where it belongs to this very trace.
pub fn inject(context: &TraceContext, headers: &mut HeaderMap) {
    if headers.contains_key(TRACESTATE) {
        let same_trace = single(headers, &TRACEPARENT)
            .and_then(parse_traceparent)
            .is_some_and(|(trace_id, ..)| trace_id == context.trace_id);
        match extract_state(headers).filter(|_| same_trace) {
            Some(state) => headers.insert(TRACESTATE, state),
            None => headers.remove(TRACESTATE),
        };
    }
    write(context, headers);
}

/// The same for a request that is made here under one that came with `state`.
pub fn inject_with_state(context: &TraceContext, state: Option<&HeaderValue>, headers: &mut HeaderMap) {
    match state {
        Some(state) => headers.insert(TRACESTATE, state.clone()),
        None => headers.remove(TRACESTATE),
    };
    write(context, headers);
}

fn write(context: &TraceContext, headers: &mut HeaderMap) {
    // To look at the names that are there costs less than to look each of these up, and hardly anybody sends one.
    while let Some(name) = headers.keys().find(|name| OF_B3.contains(name)).cloned() {
        headers.remove(name);
    }
    let mut text = Vec::with_capacity(55);
    text.extend_from_slice(b"00-");
    // The two halves; the casts keep the lowest 64 bits.
    json::write_hex(&mut text, (context.trace_id >> 64) as u64, 16);
    json::write_hex(&mut text, context.trace_id as u64, 16);
    text.push(b'-');
    json::write_hex(&mut text, context.span_id, 16);
    text.extend_from_slice(if context.sampled { b"-01" } else { b"-00" });
    // Hexadecimal digits and dashes are always a field value.
    if let Ok(mut value) = HeaderValue::try_from(text) {
        // Not for HTTP/2's compression table: it is met once.
        value.set_sensitive(true);
        headers.insert(TRACEPARENT, value);
    }
}

fn extract_w3c(headers: &HeaderMap) -> Option<Remote> {
    let (trace_id, span_id, sampled) = parse_traceparent(single(headers, &TRACEPARENT)?)?;
    Some(Remote { trace_id, span_id, sampled: Some(sampled), state: extract_state(headers) })
}

/// The field's value if there is exactly one line of it.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    values.next().is_none().then(|| value.as_bytes())
}

/// `version-traceid-parentid-flags`. Later versions may add fields after a dash, and are read as version 0.
fn parse_traceparent(text: &[u8]) -> Option<(u128, u64, bool)> {
    let (version, rest) = hex(text, 2)?;
    let (trace_id, rest) = hex(dash(rest)?, 32)?;
    let (span_id, rest) = hex(dash(rest)?, 16)?;
    let (flags, rest) = hex(dash(rest)?, 2)?;
    let ends_well = match version {
        0 => rest.is_empty(),
        0xff => false,
        _ => rest.first().is_none_or(|byte| *byte == b'-'),
    };
    let valid = ends_well && trace_id != 0 && span_id != 0;
    valid.then_some((trace_id, u64::try_from(span_id).ok()?, flags & 1 == 1))
}

/// All lines together, if each member is well formed and they are not too many; cut as the specification says.
fn extract_state(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut members = Vec::new();
    for line in headers.get_all(TRACESTATE) {
        for member in line.to_str().ok()?.split(',') {
            let member = member.trim_matches([' ', '\t']);
            if member.is_empty() {
                continue;
            }
            if members.len() == TRACESTATE_MEMBERS_MAX || !is_state_member(member) {
                return None;
            }
            members.push(member);
        }
    }
    let length = |members: &[&str]| members.iter().map(|member| member.len() + 1).sum::<usize>();
    while length(&members) > TRACESTATE_BYTES_MAX + 1 {
        let long = members.iter().rposition(|member| member.len() > TRACESTATE_LONG_MEMBER_BYTES);
        members.remove(long.unwrap_or(members.len() - 1));
    }
    if members.is_empty() { None } else { HeaderValue::try_from(members.join(",")).ok() }
}

/// `key=value`: the key of lower-case letters, digits and `_-*/@`, the value of printable ASCII without `,` and `=`.
fn is_state_member(member: &str) -> bool {
    let Some((key, value)) = member.split_once('=') else { return false };
    let first = key.bytes().next();
    let key_fits = key.len() <= 256
        && first.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        && key
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-*/@".contains(&byte));
    let value_fits = (1..=256).contains(&value.len())
        && value.bytes().all(|byte| (0x20..0x7f).contains(&byte) && byte != b'=');
    key_fits && value_fits
}

/// `b3: traceid-spanid[-sampled[-parentid]]`; a decision alone carries no context.
fn extract_b3_single(headers: &HeaderMap) -> Option<Remote> {
    let mut parts = single(headers, &B3)?.split(|byte| *byte == b'-');
    let trace_id = b3_trace_id(parts.next()?)?;
    let span_id = b3_span_id(parts.next()?)?;
    let sampled = match parts.next() {
        None => None,
        Some(decision) => Some(b3_decision(decision)?),
    };
    if let Some(parent) = parts.next() {
        b3_span_id(parent)?;
    }
    parts.next().is_none().then_some(Remote { trace_id, span_id, sampled, state: None })
}

fn extract_b3_multi(headers: &HeaderMap) -> Option<Remote> {
    let trace_id = b3_trace_id(single(headers, &B3_TRACE_ID)?)?;
    let span_id = b3_span_id(single(headers, &B3_SPAN_ID)?)?;
    let sampled = if single(headers, &B3_FLAGS) == Some(b"1") {
        Some(true)
    } else if headers.contains_key(B3_SAMPLED) {
        Some(b3_decision(single(headers, &B3_SAMPLED)?)?)
    } else {
        None
    };
    Some(Remote { trace_id, span_id, sampled, state: None })
}

fn b3_trace_id(text: &[u8]) -> Option<u128> {
    let (trace_id, rest) = hex(text, if text.len() == 16 { 16 } else { 32 })?;
    (rest.is_empty() && trace_id != 0).then_some(trace_id)
}

fn b3_span_id(text: &[u8]) -> Option<u64> {
    let (span_id, rest) = hex(text, 16)?;
    if rest.is_empty() && span_id != 0 { u64::try_from(span_id).ok() } else { None }
}

/// `true` and `false` are how the first libraries wrote it; `d` is debug, which samples.
fn b3_decision(text: &[u8]) -> Option<bool> {
    match text {
        b"1" | b"d" | b"true" => Some(true),
        b"0" | b"false" => Some(false),
        _ => None,
    }
}

/// The number of exactly `digits` lower-case hexadecimal digits, and what follows.
fn hex(text: &[u8], digits: usize) -> Option<(u128, &[u8])> {
    let (digits, rest) = text.split_at_checked(digits)?;
    let mut value = 0;
    for digit in digits {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        value = value << 4 | u128::from(digit);
    }
    Some((value, rest))
}

fn dash(text: &[u8]) -> Option<&[u8]> {
    text.strip_prefix(b"-")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: u128 = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c;
    const SPAN: u64 = 0xb7ad_6b71_6920_3331;
    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn from(fields: &[(&'static str, &str)]) -> Option<Remote> {
        extract(&headers(fields))
    }

    fn remote(sampled: Option<bool>) -> Option<Remote> {
        Some(Remote { trace_id: TRACE, span_id: SPAN, sampled, state: None })
    }

    #[test]
    fn traceparent_by_the_specification() {
        let id = "0af7651916cd43dd8448eb211c80319c";
        let span = "b7ad6b7169203331";
        let accepted = [
            (format!("00-{id}-{span}-01"), true),
            (format!("00-{id}-{span}-00"), false),
            // Flags that we do not know are no reason to refuse.
            (format!("00-{id}-{span}-ff"), true),
            (format!("00-{id}-{span}-02"), false),
            // Later versions may be longer, after a dash.
            (format!("01-{id}-{span}-01"), true),
            (format!("cc-{id}-{span}-01-what-the-future-brings"), true),
            (format!("fe-{id}-{span}-00-"), false),
        ];
        for (text, sampled) in accepted {
            assert_eq!(from(&[("traceparent", &text)]), remote(Some(sampled)), "{text}");
        }
        let refused = [
            String::new(),
            format!("ff-{id}-{span}-01"),
            format!("00-{id}-{span}-01-"),
            format!("00-{id}-{span}-01-more"),
            format!("01-{id}-{span}-01.more"),
            format!("cc-{id}-{span}-012"),
            format!("00-{}-{span}-01", "0".repeat(32)),
            format!("00-{id}-{}-01", "0".repeat(16)),
            format!("00-{}-{span}-01", id.to_uppercase()),
            format!("00-{id}-{}-01", span.to_uppercase()),
            format!("0A-{id}-{span}-01"),
            format!("00-{id}-{span}-0A"),
            format!("00-{id}-{span}-1"),
            format!("00-{id}-{span}"),
            format!("0-{id}-{span}-01"),
            format!("00-{}-{span}-01", &id[1..]),
            format!("00-{id}-{}-01", &span[1..]),
            format!("00-{id}0-{span}-01"),
            format!("00_{id}_{span}_01"),
            format!(" 00-{id}-{span}-01"),
            format!("00-{id}-{span}-01 "),
            format!("00-{}g-{span}-01", &id[1..]),
            format!("00-{id}-{span}-01,00-{id}-{span}-01"),
        ];
        for text in refused {
            assert_eq!(from(&[("traceparent", &text)]), None, "{text:?}");
        }
    }

    #[test]
    fn two_traceparents_are_none() {
        assert_eq!(from(&[("traceparent", VALID), ("traceparent", VALID)]), None);
    }

    #[test]
    fn nothing_that_is_one_byte_off_is_read_as_something_else() {
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..50_000 {
            let mut text = VALID.as_bytes().to_vec();
            let at = rng.usize(0..text.len());
            text[at] = rng.u8(0x20..0x7f);
            let Some((trace_id, span_id, sampled)) = parse_traceparent(&text) else { continue };
            let mut written = HeaderMap::new();
            inject(&TraceContext { trace_id, span_id, parent_span_id: None, sampled }, &mut written);
            let again = parse_traceparent(written[TRACEPARENT].as_bytes()).unwrap();
            assert_eq!(again, (trace_id, span_id, sampled));
            // The ids are the very digits that came.
            assert_eq!(written[TRACEPARENT].as_bytes()[3..52], text[3..52]);
        }
    }

    fn state(lines: &[&str]) -> Option<String> {
        let mut fields = vec![("traceparent", VALID)];
        fields.extend(lines.iter().map(|line| ("tracestate", *line)));
        from(&fields).unwrap().state.map(|state| state.to_str().unwrap().to_owned())
    }

    #[test]
    fn tracestate_is_kept() {
        assert_eq!(state(&["congo=t61rcWkgMzE"]).unwrap(), "congo=t61rcWkgMzE");
        assert_eq!(state(&["a=1,b=2", "c@d=3 x"]).unwrap(), "a=1,b=2,c@d=3 x");
        assert_eq!(state(&["a=1 ,\t, b=2,"]).unwrap(), "a=1,b=2");
        assert_eq!(state(&[]), None);
        assert_eq!(state(&[""]), None);
    }

    #[test]
    fn tracestate_that_is_not_well_formed_is_void_and_the_trace_goes_on() {
        let long_key = format!("{}=1", "k".repeat(257));
        let long_value = format!("k={}", "v".repeat(257));
        for line in ["novalue", "a=1,=2", "A=1", "a=b=c", "a=\u{e9}", "a=", &long_key, &long_value] {
            assert_eq!(state(&[line]), None, "{line}");
        }
        let members: Vec<String> = (0..33).map(|number| format!("k{number}=v")).collect();
        assert_eq!(state(&[&members.join(",")]), None);
        assert_eq!(state(&[&members[..32].join(",")]).unwrap(), members[..32].join(","));
    }

    #[test]
    fn tracestate_is_cut_at_whole_members_long_ones_first() {
        let short: Vec<String> = (0..5).map(|number| format!("k{number}={}", "v".repeat(96))).collect();
        let long = format!("long={}", "v".repeat(130));
        // Five of 99 bytes fit into 512, the long one goes though it is the first.
        let all = format!("{long},{}", short.join(","));
        assert_eq!(state(&[&all]).unwrap(), short.join(","));
        let six: Vec<String> = (0..6).map(|number| format!("k{number}={}", "v".repeat(96))).collect();
        assert_eq!(state(&[&six.join(",")]).unwrap(), six[..5].join(","));
        // Exactly the bound is kept.
        let exact = format!(
            "a={},b={},c={}",
            "x".repeat(200),
            "y".repeat(200),
            "z".repeat(512 - 2 - 200 - 3 - 200 - 3)
        );
        assert_eq!(exact.len(), TRACESTATE_BYTES_MAX);
        assert_eq!(state(&[&exact]).unwrap(), exact);
    }

    #[test]
    fn b3_in_one_field() {
        let id = "0af7651916cd43dd8448eb211c80319c";
        let span = "b7ad6b7169203331";
        for (tail, sampled) in [
            ("", None),
            ("-1", Some(true)),
            ("-0", Some(false)),
            ("-d", Some(true)),
            ("-1-05e3ac9a4f6e3b90", Some(true)),
        ] {
            assert_eq!(from(&[("b3", &format!("{id}-{span}{tail}"))]), remote(sampled), "{tail}");
        }
        let short = from(&[("b3", &format!("8448eb211c80319c-{span}-1"))]).unwrap();
        assert_eq!(short.trace_id, 0x8448_eb21_1c80_319c);
        for text in [
            "0",
            "1",
            "d",
            "",
            id,
            &format!("{id}-{span}-2"),
            &format!("{id}-{span}-1-xyz"),
            &format!("{id}-{span}-1-{span}-1"),
            &format!("{id}-{}", "0".repeat(16)),
            &format!("{}-{span}", "0".repeat(32)),
            &format!("{}-{span}", &id[1..]),
            &format!("{}-{span}", id.to_uppercase()),
        ] {
            assert_eq!(from(&[("b3", text)]), None, "{text}");
        }
    }

    #[test]
    fn b3_in_many_fields() {
        let ids = [("x-b3-traceid", "0af7651916cd43dd8448eb211c80319c"), ("x-b3-spanid", "b7ad6b7169203331")];
        let with = |more: &[(&'static str, &'static str)]| from(&[&ids[..], more].concat());
        assert_eq!(with(&[]), remote(None));
        assert_eq!(with(&[("x-b3-sampled", "1")]), remote(Some(true)));
        assert_eq!(with(&[("x-b3-sampled", "0")]), remote(Some(false)));
        assert_eq!(with(&[("x-b3-sampled", "true")]), remote(Some(true)));
        assert_eq!(with(&[("x-b3-flags", "1")]), remote(Some(true)));
        assert_eq!(with(&[("x-b3-sampled", "maybe")]), None);
        assert_eq!(with(&[("x-b3-sampled", "1"), ("x-b3-sampled", "0")]), None);
        assert_eq!(with(&[("x-b3-traceid", "0af7651916cd43dd8448eb211c80319c")]), None);
        assert_eq!(from(&ids[..1]), None);
        assert_eq!(from(&ids[1..]), None);
    }

    #[test]
    fn w3c_comes_before_b3() {
        let b3 = ("b3", "11111111111111111111111111111111-2222222222222222-0");
        assert_eq!(from(&[b3, ("traceparent", VALID)]), remote(Some(true)));
        assert_eq!(from(&[b3, ("traceparent", "broken")]).unwrap().span_id, 0x2222_2222_2222_2222);
    }

    #[test]
    fn what_goes_out_is_w3c_alone() {
        let mut fields = headers(&[
            ("traceparent", VALID),
            ("traceparent", VALID),
            ("b3", "0"),
            ("x-b3-traceid", "1"),
            ("x-b3-spanid", "1"),
            ("x-b3-parentspanid", "1"),
            ("x-b3-sampled", "1"),
            ("x-b3-flags", "1"),
            ("accept", "*/*"),
        ]);
        let context = TraceContext { trace_id: 1, span_id: 2, parent_span_id: None, sampled: false };
        inject(&context, &mut fields);
        let expected = headers(&[
            ("traceparent", "00-00000000000000000000000000000001-0000000000000002-00"),
            ("accept", "*/*"),
        ]);
        assert_eq!(fields, expected);
    }

    #[test]
    fn tracestate_goes_out_with_its_own_trace_only() {
        let ours = TraceContext { trace_id: TRACE, span_id: 9, parent_span_id: Some(SPAN), sampled: true };
        let other = TraceContext { trace_id: 5, ..ours };
        let sent = |context: &TraceContext, fields: &[(&'static str, &str)]| {
            let mut fields = headers(fields);
            inject(context, &mut fields);
            fields.get(TRACESTATE).map(|state| state.to_str().unwrap().to_owned())
        };
        let came = [("traceparent", VALID), ("tracestate", "a=1"), ("tracestate", "b=2")];
        assert_eq!(sent(&ours, &came).as_deref(), Some("a=1,b=2"));
        assert_eq!(sent(&other, &came), None);
        assert_eq!(sent(&ours, &came[1..]), None);
        assert_eq!(sent(&ours, &[came[0], came[0], came[1]]), None);
        assert_eq!(sent(&ours, &[came[0], ("tracestate", "broken")]), None);
    }
}
