//! How does text from strangers get into a log line without ending it, or steering a terminal that shows it?

use std::fmt;

/// Appends `text` as a JSON string, quotes included.
pub(crate) fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    write_escaped(out, text);
    out.push(b'"');
}

/// Appends bytes that may not be UTF-8 as a JSON string; what is not becomes U+FFFD.
pub(crate) fn write_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    for chunk in bytes.utf8_chunks() {
        write_escaped(out, chunk.valid());
        if !chunk.invalid().is_empty() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
    out.push(b'"');
}

/// Appends the inside of a JSON string.
pub(crate) fn write_escaped(out: &mut Vec<u8>, text: &str) {
    // A fold without an early end, because the compiler turns it into vector instructions.
    if !text.bytes().fold(false, |found, byte| found | needs_care(byte)) {
        out.extend_from_slice(text.as_bytes());
        return;
    }
    for character in text.chars() {
        match character {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            other => write_visible(out, other),
        }
    }
}

/// Appends text for a person's terminal: only control characters are escaped.
pub(crate) fn write_plain(out: &mut Vec<u8>, text: &str) {
    for character in text.chars() {
        write_visible(out, character);
    }
}

/// JSON asks for escapes up to U+001F alone. DEL and U+0080 to U+009F are escaped as well, because a terminal may take
/// them for commands, and log lines are read on terminals.
fn write_visible(out: &mut Vec<u8>, character: char) {
    if character.is_control() {
        out.extend_from_slice(b"\\u00");
        write_hex(out, u64::from(u32::from(character)), 2);
    } else {
        out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
    }
}

/// True for each byte that can begin what `write_escaped` changes; 0xC2 begins U+0080 to U+00BF.
fn needs_care(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\' || byte == 0x7f || byte == 0xc2
}

/// Appends the lowest `digits` hexadecimal digits of `value`, which has no more than sixteen.
pub(crate) fn write_hex(out: &mut Vec<u8>, value: u64, digits: usize) {
    // All of them without a branch: the compiler turns it into vector instructions.
    let mut text = [0; 16];
    for (place, to) in text.iter_mut().rev().enumerate() {
        // Four bits, so it fits.
        let digit = (value >> (4 * place) & 0xf) as u8;
        *to = if digit < 10 { b'0' + digit } else { b'a' - 10 + digit };
    }
    out.extend_from_slice(text.get(text.len().saturating_sub(digits)..).unwrap_or_default());
}

/// Appends an integer.
pub(crate) fn write_integer(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Takes the output of `Display` and `Debug` into a JSON string without a `String` in between.
pub(crate) struct Escaping<'a>(pub(crate) &'a mut Vec<u8>);

impl fmt::Write for Escaping<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write_escaped(self.0, text);
        Ok(())
    }
}

/// The same for a person's terminal.
pub(crate) struct Plain<'a>(pub(crate) &'a mut Vec<u8>);

impl fmt::Write for Plain<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write_plain(self.0, text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn json(text: &str) -> String {
        let mut out = Vec::new();
        write_string(&mut out, text);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn every_character_of_the_first_planes_reads_back() {
        for character in (0..0x3_0000).filter_map(char::from_u32) {
            let text = format!("a{character}b");
            let line = json(&text);
            assert_eq!(serde_json::from_str::<String>(&line).unwrap(), text);
            assert!(!line.chars().any(char::is_control), "{line:?}");
        }
    }

    #[test]
    fn random_bytes_read_back_as_the_standard_library_repairs_them() {
        let mut rng = fastrand::Rng::with_seed(11);
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..rng.usize(0..24)).map(|_| rng.u8(..)).collect();
            let mut line = Vec::new();
            write_bytes(&mut line, &bytes);
            let read_back: String = serde_json::from_slice(&line).unwrap();
            assert_eq!(read_back, String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn plain_text_keeps_quotes_and_loses_terminal_commands() {
        let mut out = Vec::new();
        write_plain(&mut out, "say \"hi\" \u{1b}[31m\u{9b}x\n\u{7f}é");
        assert_eq!(String::from_utf8(out).unwrap(), "say \"hi\" \\u001b[31m\\u009bx\\u000a\\u007fé");
    }

    #[test]
    fn formatted_values_are_escaped_on_the_way() {
        let mut out = Vec::new();
        write!(Escaping(&mut out), "{:?}", "a\"b").unwrap();
        assert_eq!(out, br#"\"a\\\"b\""#);
    }

    #[test]
    fn hexadecimal() {
        let mut out = Vec::new();
        write_hex(&mut out, 0x0123_4567_89ab_cdef, 16);
        write_hex(&mut out, 0xfff, 2);
        assert_eq!(out, b"0123456789abcdefff");
    }
}
