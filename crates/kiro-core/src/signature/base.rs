//! What exactly is the MAC over? (RFC 9421 2.5)
//!
//! The base is a text of one line a component and a last line of the parameters. It is never built: its pieces go straight to
//! the MAC.

use hmac::Mac as _;
use http::HeaderMap;

use super::Form;
use super::key::{ConnectionKey, Mac};

/// One component of a signature and what it stands for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line<'h> {
    pub(super) name: &'h str,
    pub(super) value: Value<'h>,
}

/// A component's value as the base has it. Who makes one has seen to it that it is ASCII without line ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'h> {
    Text(&'h [u8]),
    /// A query; the base has it with its `?`.
    Query(&'h str),
    /// A field that may have several lines; the base has them joined.
    Field(&'h HeaderMap),
}

/// A MAC over the base of these components and parameters, neither finished nor compared.
pub(super) fn mac<'l, 'h: 'l>(
    key: &ConnectionKey,
    form: Form,
    lines: impl Iterator<Item = &'l Line<'h>>,
    parameters: &[u8],
) -> Mac {
    let mut mac = key.mac();
    for line in lines {
        mac.update(b"\"");
        mac.update(line.name.as_bytes());
        mac.update(match form {
            Form::Head => b"\": ",
            Form::Trailers => b"\";tr: ",
        });
        update_value(&mut mac, line);
        mac.update(b"\n");
    }
    mac.update(b"\"@signature-params\": ");
    mac.update(parameters);
    mac
}

fn update_value(mac: &mut Mac, line: &Line<'_>) {
    match line.value {
        Value::Text(text) => mac.update(text),
        Value::Query(query) => {
            mac.update(b"?");
            mac.update(query.as_bytes());
        }
        Value::Field(headers) => {
            let mut separator = &b""[..];
            for value in headers.get_all(line.name) {
                mac.update(separator);
                mac.update(value.as_bytes().trim_ascii());
                separator = b", ";
            }
        }
    }
}
