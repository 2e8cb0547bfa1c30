//! How is HTTP/2 written by hand? Frames and header blocks byte by byte, wrong ones too: a library would not send those.

/// DATA.
pub const DATA: u8 = 0;
/// HEADERS.
pub const HEADERS: u8 = 1;
/// PRIORITY.
pub const PRIORITY: u8 = 2;
/// `RST_STREAM`.
pub const RST_STREAM: u8 = 3;
/// SETTINGS.
pub const SETTINGS: u8 = 4;
/// `PUSH_PROMISE`.
pub const PUSH_PROMISE: u8 = 5;
/// PING.
pub const PING: u8 = 6;
/// GOAWAY.
pub const GOAWAY: u8 = 7;
/// `WINDOW_UPDATE`.
pub const WINDOW_UPDATE: u8 = 8;
/// CONTINUATION.
pub const CONTINUATION: u8 = 9;
/// The flag that ends a stream's half.
pub const END_STREAM: u8 = 1;
/// The flag that ends a header block.
pub const END_HEADERS: u8 = 4;

/// Bytes of a frame before its payload.
const HEAD_BYTES: usize = 9;

/// A frame. Its payload's length is written in three bytes, as the wire has it; what is longer is a mistake of the caller's.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + payload.len());
    let [.., a, b, c] = (payload.len() as u64).to_be_bytes();
    bytes.extend([a, b, c, kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// How many frames stand in these bytes, which begin with one.
#[must_use]
pub fn count(mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while let Some(&[a, b, c]) = bytes.first_chunk::<3>() {
        count += 1;
        let payload = u32::from_be_bytes([0, a, b, c]) as usize;
        bytes = bytes.get(HEAD_BYTES + payload..).unwrap_or_default();
    }
    count
}

/// What a client begins with.
#[must_use]
pub fn preface() -> Vec<u8> {
    preface_with(&[])
}

/// The same with settings: each is two bytes of a name and four of a value.
#[must_use]
pub fn preface_with(settings: &[u8]) -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, settings));
    bytes
}

/// A string as HPACK has it, without Huffman.
#[must_use]
pub fn string(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    if text.len() < 127 {
        bytes.push(text.len() as u8);
    } else {
        bytes.push(127);
        let mut rest = text.len() - 127;
        while rest >= 128 {
            bytes.push((rest % 128) as u8 | 128);
            rest /= 128;
        }
        bytes.push(rest as u8);
    }
    bytes.extend(text);
    bytes
}

/// A field that goes into no table.
#[must_use]
pub fn field(name: &str, value: &[u8]) -> Vec<u8> {
    [&[0x10][..], &string(name.as_bytes()), &string(value)].concat()
}

/// `:method`, `:scheme`, `:path` and `:authority` of a GET or a POST for `/`.
#[must_use]
pub fn request(method: &str, authority: &str) -> Vec<u8> {
    request_for(method, authority, "/")
}

/// The same for any path.
#[must_use]
pub fn request_for(method: &str, authority: &str, path: &str) -> Vec<u8> {
    let method = if method == "GET" { 0x82 } else { 0x83 };
    let path = if path == "/" { vec![0x84] } else { [&[0x04][..], &string(path.as_bytes())].concat() };
    [&[method, 0x86][..], &path, &[0x01], &string(authority.as_bytes())].concat()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests say what they expect")]

    use super::*;

    #[test]
    fn a_frame_is_its_head_and_its_payload() {
        assert_eq!(frame(PING, 1, 5, b"ab"), [0, 0, 2, 6, 1, 0, 0, 0, 5, b'a', b'b']);
        assert_eq!(frame(DATA, 0, 1, &[0; 0x01_02_03]).get(..3).unwrap(), [1, 2, 3]);
    }

    #[test]
    fn frames_are_counted() {
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&frame(PING, 0, 0, &[0; 8]).repeat(50)), 50);
        // A piece may end within one.
        assert_eq!(count(&[frame(DATA, 0, 1, b"abc"), vec![0, 0, 8, 6]].concat()), 2);
    }

    #[test]
    fn long_strings_have_long_lengths() {
        assert_eq!(string(b"ab"), [2, b'a', b'b']);
        assert_eq!(string(&[b'a'; 127]).get(..2).unwrap(), [127, 0]);
        // RFC 7541, C.1.2 has 1337 in five bits; in seven it is 127 + 1210.
        assert_eq!(string(&[b'a'; 1337]).get(..3).unwrap(), [127, 0xba, 9]);
    }

    #[test]
    fn requests_name_what_they_ask_for() {
        assert_eq!(request("GET", "b"), [0x82, 0x86, 0x84, 0x01, 1, b'b']);
        assert_eq!(request_for("POST", "b", "/p"), [0x83, 0x86, 0x04, 2, b'/', b'p', 0x01, 1, b'b']);
    }
}
