//! What have two proxies agreed on? A ServerHello of TLS 1.3 says it in the clear (RFC 8446, 4.1.3).

use std::fmt;

/// Cipher suite and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agreed {
    suite: u16,
    /// The group of the key exchange.
    pub(crate) group: u16,
}

/// Curve25519 alone.
pub(crate) const X25519: u16 = 0x001d;
/// The hybrid with a post-quantum half.
pub(crate) const X25519_MLKEM768: u16 = 0x11ec;

const HANDSHAKE: u8 = 22;
const SERVER_HELLO: u8 = 2;
const KEY_SHARE: u16 = 51;
const SUPPORTED_VERSIONS: u16 = 43;
const TLS13: u16 = 0x0304;

impl fmt::Display for Agreed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.suite {
            0x1301 => f.write_str("TLS_AES_128_GCM_SHA256")?,
            0x1302 => f.write_str("TLS_AES_256_GCM_SHA384")?,
            0x1303 => f.write_str("TLS_CHACHA20_POLY1305_SHA256")?,
            other => write!(f, "cipher suite {other:#06x}")?,
        }
        match self.group {
            X25519 => f.write_str(" X25519"),
            X25519_MLKEM768 => f.write_str(" X25519MLKEM768"),
            other => write!(f, " group {other:#06x}"),
        }
    }
}

/// Takes bytes off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }
}

/// Reads what a server sent first; `None` where that is no whole ServerHello of TLS 1.3.
pub(crate) fn agreed(bytes: &[u8]) -> Option<Agreed> {
    let mut record = Reader(bytes);
    if record.u8()? != HANDSHAKE {
        return None;
    }
    record.take(2)?;
    let length = record.u16()?;
    let mut hello = Reader(record.take(length.into())?);
    if hello.u8()? != SERVER_HELLO {
        return None;
    }
    // Length, version of old, random.
    hello.take(3 + 2 + 32)?;
    let session = hello.u8()?;
    hello.take(session.into())?;
    let suite = hello.u16()?;
    hello.take(1)?;
    let length = hello.u16()?;
    let mut extensions = Reader(hello.take(length.into())?);
    let (mut group, mut version) = (None, None);
    while let Some(kind) = extensions.u16() {
        let length = extensions.u16()?;
        let mut content = Reader(extensions.take(length.into())?);
        match kind {
            KEY_SHARE => group = Some(content.u16()?),
            SUPPORTED_VERSIONS => version = Some(content.u16()?),
            _ => {}
        }
    }
    (version == Some(TLS13)).then_some(Agreed { suite, group: group? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(group: u16, version: u16) -> Vec<u8> {
        let mut extensions = vec![0, 51, 0, 8];
        extensions.extend(group.to_be_bytes());
        extensions.extend([0, 4, 1, 2, 3, 4, 0, 43, 0, 2]);
        extensions.extend(version.to_be_bytes());
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([2, 9, 9, 0x13, 0x02, 0]);
        body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
        body.extend(extensions);
        let mut bytes = vec![22, 3, 3];
        bytes.extend(u16::try_from(body.len() + 4).unwrap().to_be_bytes());
        bytes.extend([2, 0, 0, u8::try_from(body.len()).unwrap()]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn suite_and_group() {
        let told = agreed(&hello(X25519, TLS13)).unwrap();
        assert_eq!(told.to_string(), "TLS_AES_256_GCM_SHA384 X25519");
        assert_eq!(agreed(&hello(X25519_MLKEM768, TLS13)).unwrap().group, X25519_MLKEM768);
        assert_eq!(agreed(&hello(X25519, 0x0303)), None, "TLS 1.2");
    }

    #[test]
    fn anything_shorter_is_nothing() {
        let whole = hello(X25519, TLS13);
        for length in 0..whole.len() {
            assert_eq!(agreed(&whole[..length]), None);
        }
        assert_eq!(agreed(b"HTTP/1.1 400 Bad Request\r\n\r\n"), None);
    }
}
