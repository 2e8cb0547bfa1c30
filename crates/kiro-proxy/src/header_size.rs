//! How large may a header block be that travels on in HTTP/2?

use http::{HeaderMap, HeaderValue};

use crate::limits;
use crate::reject::{Refused, Reject};

/// Whether a header block can travel on in HTTP/2, on a connection that others share: what its receiver finds too large ends that
/// connection, and all that is on it. HPACK writes rare characters in up to four bytes (RFC 7541 appendix B).
pub(crate) fn check(headers: &HeaderMap, limit: usize) -> Result<(), Refused> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let fits = bytes <= limit && headers.len() <= limits::HEADER_FIELDS;
    // Where it would fit four times over nobody has to look at it.
    if fits && (bytes <= limit / 4 || headers.values().map(weight).sum::<usize>() <= limit + limit / 2) {
        return Ok(());
    }
    Err(Refused::new(Reject::HeadersTooLarge, format!("{} header fields of {bytes} bytes", headers.len())))
}

/// No less than the bytes that a value takes in HPACK.
fn weight(value: &HeaderValue) -> usize {
    let weight = |byte: &u8| match byte {
        b'&' | b'*' | b',' | b';' | b'X' | b'Z' => 1,
        b' ' | b'%' | b'-'..=b':' | b'=' | b'_' => 1,
        byte if byte.is_ascii_alphanumeric() => 1,
        b'\\' => 3,
        byte if byte.is_ascii_graphic() => 2,
        _ => 4,
    };
    value.as_bytes().iter().map(weight).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_measured_by_what_it_takes_in_http_2() {
        let fits = |byte: u8, bytes: usize| {
            let mut headers = HeaderMap::new();
            headers.insert("x", HeaderValue::from_bytes(&vec![byte; bytes]).unwrap());
            check(&headers, limits::HEADER_BYTES).is_ok()
        };
        assert!(fits(b'a', limits::HEADER_BYTES - 1));
        assert!(!fits(b'a', limits::HEADER_BYTES));
        // 30, 19 and 15 bits each (RFC 7541 appendix B).
        for (byte, bytes) in [(0xff, 24_000), (b'\\', 32_000), (b'<', 48_000)] {
            assert!(fits(byte, bytes), "{byte}");
            assert!(!fits(byte, bytes + 2_000), "{byte}");
        }
        assert!(fits(0xff, limits::HEADER_BYTES / 4 - 1));
    }
}
