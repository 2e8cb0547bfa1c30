//! Can a path be read in more than one way, and does it fit a pattern of the mesh file?
//!
//! The policy decides on a path that another program will read: the application, with a URL parser of its own. [`screen`] finds
//! what parsers disagree about. Paths with dot segments or NUL are refused for everybody. Others, which some applications need
//! and some read differently, are marked ambiguous, and the policy refuses them where it would have to decide by the path.
//! Nothing is rewritten: what is forwarded and signed is the raw target.

use std::borrow::Cow;
use std::fmt;

/// What [`screen`] found in a path that it let pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Screened {
    /// Whether servers differ in where this path's segments end: it has `//`, `%2F`, `%5C`, `\` or `;`.
    pub ambiguous: bool,
}

/// Why a path is refused whatever the policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Not `/…`.
    #[error("the path does not start with `/`")]
    NotAbsolute,
    /// A segment that is `.` or `..` for some server.
    #[error("the path has a dot segment (`.` or `..` in some spelling): send it resolved")]
    DotSegment,
    /// `%00`.
    #[error("the path has NUL (`%00`): take it out")]
    Nul,
    /// `%` without two hexadecimal digits.
    #[error("the path has `%` without two hexadecimal digits after it: write a percent sign as `%25`")]
    BadEscape,
    /// A byte that no request target may have as it is.
    #[error("the path has a byte outside visible ASCII: percent-encode it")]
    NotAscii,
    /// `?` or `#`, with which a path ends.
    #[error("the path has `?` or `#`: a path ends before its query or fragment")]
    Delimiter,
}

/// What of a segment has been seen, as far as it matters to whether it is a dot segment.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Nothing,
    OneDot,
    TwoDots,
    Other,
}

impl Seen {
    fn then(self, byte: u8) -> Self {
        match (self, byte) {
            (Seen::Nothing, b'.') => Seen::OneDot,
            (Seen::OneDot, b'.') => Seen::TwoDots,
            (Seen::Nothing | Seen::OneDot | Seen::TwoDots | Seen::Other, _) => Seen::Other,
        }
    }

    fn check(self) -> Result<(), PathError> {
        match self {
            Seen::OneDot | Seen::TwoDots => Err(PathError::DotSegment),
            Seen::Nothing | Seen::Other => Ok(()),
        }
    }
}

/// Looks at the raw path of a request, without its query.
///
/// A dot segment counts as one after escapes are decoded once, between all that some server takes for a separator (`/`, `\`,
/// `%2F`, `%5C`), and with path parameters (`..;x`), which some servers cut off before they resolve.
///
/// # Errors
/// What is never forwarded: dot segments, NUL, bad escapes, bytes outside visible ASCII.
pub fn screen(raw_path: &str) -> Result<Screened, PathError> {
    if !raw_path.starts_with('/') {
        return Err(PathError::NotAbsolute);
    }
    let mut ambiguous = false;
    let mut seen = Seen::Nothing;
    let mut in_parameters = false;
    let mut after_slash = false;
    let mut bytes = raw_path.bytes();
    while let Some(raw) = bytes.next() {
        let byte = match raw {
            b'%' => unescape(bytes.next(), bytes.next()).ok_or(PathError::BadEscape)?,
            b'?' | b'#' => return Err(PathError::Delimiter),
            0x21..=0x7e => raw,
            _ => return Err(PathError::NotAscii),
        };
        match byte {
            0 => return Err(PathError::Nul),
            b'/' | b'\\' => {
                ambiguous |= raw != b'/' || after_slash;
                seen.check()?;
                seen = Seen::Nothing;
                in_parameters = false;
            }
            b';' => {
                ambiguous |= raw == b';';
                in_parameters = true;
            }
            _ if in_parameters => {}
            _ => seen = seen.then(byte),
        }
        after_slash = raw == b'/';
    }
    seen.check()?;
    Ok(Screened { ambiguous })
}

fn unescape(high: Option<u8>, low: Option<u8>) -> Option<u8> {
    Some(hexadecimal(high?)? << 4 | hexadecimal(low?)?)
}

fn hexadecimal(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// A pattern of an allow line's `paths`.
///
/// `*` alone in a segment is one segment that is not empty; `**`, last alone, is the rest, empty or not: `/a/**` fits `/a/` and
/// `/a/b/c`, and not `/a`. All else is compared byte by byte, upper and lower case different, a final slash too. Escapes of
/// unreserved characters are decoded for the comparison, other escapes stay what they are, whatever the case of their digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PathPattern {
    text: Box<str>,
    segments: Box<[Segment]>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Segment {
    /// Normalised: no escapes of unreserved characters, escapes in upper case.
    Literal(Box<[u8]>),
    One,
    Rest,
}

/// Why a text is not a path pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Not `/…`.
    #[error("the pattern does not start with `/`: put one before it")]
    NotAbsolute,
    /// `**` somewhere else than at the end.
    #[error("`**` is not the last segment: use `*` for one segment, or end the pattern there")]
    RestNotLast,
    /// `a*`, `***` or the like.
    #[error("a `*` has other characters beside it: it stands for a whole segment, as in `/profiles/*`")]
    PartialStar,
    /// `?` or `#`.
    #[error("the pattern has `?` or `#`: patterns are about the path alone, end it before")]
    Delimiter,
    /// `//`, `\`, `;`, `%2F`, `%5C`: no request with these passes a line with `paths`.
    #[error(
        "the pattern has `//`, `\\`, `;`, `%2F` or `%5C`, with which a path is always refused here: leave it out"
    )]
    Ambiguous,
    /// What no request may have.
    #[error("no request fits the pattern: {0}")]
    Refused(PathError),
}

impl PathPattern {
    /// Reads a pattern. One that no request could fit is an error, not a line that never holds.
    ///
    /// # Errors
    /// Says what is wrong and what to write.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let Screened { ambiguous } = screen(text).map_err(|error| match error {
            PathError::NotAbsolute => PatternError::NotAbsolute,
            PathError::Delimiter => PatternError::Delimiter,
            PathError::DotSegment | PathError::Nul | PathError::BadEscape | PathError::NotAscii => {
                PatternError::Refused(error)
            }
        })?;
        if ambiguous {
            return Err(PatternError::Ambiguous);
        }
        let parts: Vec<&str> = text.split('/').skip(1).collect();
        let last = parts.len().saturating_sub(1);
        let segment = |(place, part): (usize, &&str)| match *part {
            "*" => Ok(Segment::One),
            "**" if place == last => Ok(Segment::Rest),
            "**" => Err(PatternError::RestNotLast),
            part if part.contains('*') => Err(PatternError::PartialStar),
            part => Ok(Segment::Literal(Normalised::of(part.as_bytes()).collect())),
        };
        let segments = parts.iter().enumerate().map(segment).collect::<Result<_, _>>()?;
        Ok(Self { text: text.into(), segments })
    }

    /// Whether a raw path fits. It must have passed [`screen`]; of one that has not, this says something all the same.
    #[must_use]
    pub fn matches(&self, raw_path: &str) -> bool {
        let Some(path) = raw_path.as_bytes().strip_prefix(b"/") else { return false };
        // By bytes: most patterns differ in the first part, which is short, and a search for a `char` sets out for a long way.
        let mut parts = path.split(|byte| *byte == b'/');
        for segment in &self.segments {
            let fits = match (segment, parts.next()) {
                (Segment::Rest, rest) => return rest.is_some(),
                (Segment::One, Some(part)) => !part.is_empty(),
                // A literal is normalised, so what is spelled like it needs no more; and only escapes have another spelling.
                (Segment::Literal(literal), Some(part)) => {
                    *part == **literal
                        || (part.contains(&b'%') && Normalised::of(part).eq(literal.iter().copied()))
                }
                (Segment::One | Segment::Literal(_), None) => false,
            };
            if !fits {
                return false;
            }
        }
        parts.next().is_none()
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A raw path as it is compared: all that means the same is spelled the same, as far as RFC 3986, 6.2.2 goes.
#[must_use]
pub fn normalised(raw_path: &str) -> Cow<'_, [u8]> {
    match raw_path.contains('%') {
        false => Cow::Borrowed(raw_path.as_bytes()),
        true => Cow::Owned(Normalised::of(raw_path.as_bytes()).collect()),
    }
}

/// The bytes of a segment as they are compared (RFC 3986, 6.2.2): unreserved characters decoded, other escapes in upper case.
struct Normalised<'a> {
    raw: std::slice::Iter<'a, u8>,
    /// The rest of an escape that stays one, last byte first.
    pending: [Option<u8>; 2],
}

impl<'a> Normalised<'a> {
    fn of(segment: &'a [u8]) -> Self {
        Self { raw: segment.iter(), pending: [None, None] }
    }
}

impl Iterator for Normalised<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let [last, first] = &mut self.pending;
        if let Some(byte) = first.take().or_else(|| last.take()) {
            return Some(byte);
        }
        let byte = *self.raw.next()?;
        let &[high, low, ..] = self.raw.as_slice() else { return Some(byte) };
        let decoded = if byte == b'%' { unescape(Some(high), Some(low)) } else { None };
        let Some(decoded) = decoded else { return Some(byte) };
        self.raw.next();
        self.raw.next();
        if decoded.is_ascii_alphanumeric() || matches!(decoded, b'-' | b'.' | b'_' | b'~') {
            return Some(decoded);
        }
        self.pending = [Some(low.to_ascii_uppercase()), Some(high.to_ascii_uppercase())];
        Some(b'%')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_the_same_is_spelled_the_same() {
        for (raw, same) in [("/a/b", "/a/b"), ("/%61/b", "/a/b"), ("/%c3%A4", "/%C3%A4"), ("/A", "/A")] {
            assert_eq!(&*normalised(raw), same.as_bytes(), "{raw}");
        }
    }

    #[test]
    fn plain_paths_pass() {
        for path in [
            "/",
            "/a",
            "/a/",
            "/a/b.c",
            "/...",
            "/a/...",
            "/.a",
            "/a.",
            "/..a",
            "/a..",
            "/%2ea",
            "/%61",
            "/%20",
            "/%c3%a9",
            "/a%3bb",
            "/*",
            "/a:b@c!$&'()+,=~",
            // Encoded twice: decoded once it is `%2e%2e`, which is a name.
            "/%252e%252e/a",
            "/%2500",
        ] {
            assert_eq!(screen(path), Ok(Screened { ambiguous: false }), "{path}");
        }
    }

    #[test]
    fn paths_that_servers_read_differently_are_marked() {
        for path in [
            "//", "/a//b", "/a//", "/a%2fb", "/a%2Fb", "/%2F", "/a%5cb", "/a%5Cb", "/a\\b", "/a;b",
            "/a;v=1/b", "/;", "/a;.", "/a/;..",
        ] {
            assert_eq!(screen(path), Ok(Screened { ambiguous: true }), "{path}");
        }
    }

    #[test]
    fn paths_that_nobody_should_send_are_refused() {
        use PathError::{BadEscape, Delimiter, DotSegment, NotAbsolute, NotAscii, Nul};
        let cases = [
            ("", NotAbsolute),
            ("*", NotAbsolute),
            ("a/b", NotAbsolute),
            ("%2fa", NotAbsolute),
            ("http://profile/", NotAbsolute),
            ("/.", DotSegment),
            ("/..", DotSegment),
            ("/./", DotSegment),
            ("/../", DotSegment),
            ("/a/.", DotSegment),
            ("/a/..", DotSegment),
            ("/a/./b", DotSegment),
            ("/a/../b", DotSegment),
            ("/%2e", DotSegment),
            ("/%2E%2e", DotSegment),
            ("/.%2e/", DotSegment),
            ("/%2E./a", DotSegment),
            ("/a/%2e/b", DotSegment),
            ("/a\\..\\b", DotSegment),
            ("/..\\b", DotSegment),
            ("/a%2f..%2fb", DotSegment),
            ("/a%2F%2e%2E%2Fb", DotSegment),
            ("/a%5c..", DotSegment),
            ("/..%2f", DotSegment),
            ("/..;/admin", DotSegment),
            ("/..;a=b/admin", DotSegment),
            ("/%2e%2e;/admin", DotSegment),
            ("/..%3b/admin", DotSegment),
            ("/.;", DotSegment),
            ("/%00", Nul),
            ("/a%00b", Nul),
            ("/%", BadEscape),
            ("/%2", BadEscape),
            ("/%2g", BadEscape),
            ("/%g2", BadEscape),
            ("/%u002e", BadEscape),
            ("/%%32e", BadEscape),
            ("/%+1", BadEscape),
            ("/a b", NotAscii),
            ("/a\0", NotAscii),
            ("/a\r\n", NotAscii),
            ("/a\u{7f}", NotAscii),
            ("/caf\u{e9}", NotAscii),
            ("/\u{ff0e}\u{ff0e}/", NotAscii),
            ("/a?b", Delimiter),
            ("/a#b", Delimiter),
        ];
        for (path, error) in cases {
            assert_eq!(screen(path), Err(error), "{path:?}");
        }
    }

    fn check(pattern: &str, fitting: &[&str], others: &[&str]) {
        let pattern = PathPattern::parse(pattern).unwrap();
        for path in fitting {
            assert!(pattern.matches(path), "{pattern} should fit {path}");
        }
        for path in others {
            assert!(!pattern.matches(path), "{pattern} should not fit {path}");
        }
    }

    #[test]
    fn literals_fit_themselves() {
        check("/", &["/"], &["", "//", "/a", "*"]);
        check(
            "/verify",
            &["/verify", "/%76erify", "/verif%79"],
            &["/verify/", "/Verify", "/verif", "/verifyy", "/a/verify", "verify"],
        );
        check("/a/", &["/a/"], &["/a", "/a/b", "/a//"]);
    }

    #[test]
    fn a_star_is_one_segment() {
        check(
            "/profiles/*",
            &["/profiles/alice", "/profiles/%61", "/profiles/*", "/profiles/a%2fb"],
            &["/profiles", "/profiles/", "/profiles/a/", "/profiles/a/b", "/profile/a"],
        );
        check("/a/*/c", &["/a/b/c"], &["/a/c", "/a//c", "/a/b/b/c"]);
        check("/*", &["/a"], &["/", "/a/"]);
    }

    #[test]
    fn two_stars_are_the_rest() {
        check("/**", &["/", "/a", "/a/", "/a/b/c"], &["", "a"]);
        check("/a/**", &["/a/", "/a/b", "/a/b/", "/a/b/c"], &["/a", "/ab", "/b/a"]);
        check("/*/b/**", &["/a/b/", "/x/b/c/d"], &["/a/b", "//b/c"]);
    }

    #[test]
    fn unreserved_escapes_are_decoded_and_others_are_not() {
        check("/a%2Db", &["/a-b", "/a%2db"], &["/a%2Eb"]);
        check("/%7euser", &["/~user", "/%7Euser"], &[]);
        check("/a%3ab", &["/a%3Ab", "/a%3ab"], &["/a:b"]);
        check("/a:b", &["/a:b"], &["/a%3Ab"]);
        check("/a%2Ab", &["/a%2ab"], &["/a*b"]);
        check("/%25", &["/%25"], &["/%2525", "/%"]);
        check("/caf%c3%a9", &["/caf%C3%A9"], &["/caf\u{e9}"]);
        // An escaped slash does not become a break between segments.
        check("/a/b", &["/%61/%62"], &["/a%2fb"]);
    }

    #[test]
    fn patterns_that_no_request_fits_are_refused() {
        use PatternError::{Ambiguous, Delimiter, NotAbsolute, PartialStar, Refused, RestNotLast};
        let cases = [
            ("", NotAbsolute),
            ("*", NotAbsolute),
            ("profiles/*", NotAbsolute),
            ("/**/a", RestNotLast),
            ("/**/", RestNotLast),
            ("/**/**", RestNotLast),
            ("/a*", PartialStar),
            ("/*.json", PartialStar),
            ("/a/***", PartialStar),
            ("/a?b=c", Delimiter),
            ("/a#b", Delimiter),
            ("/a//b", Ambiguous),
            ("/a;b", Ambiguous),
            ("/a\\b", Ambiguous),
            ("/a%2fb", Ambiguous),
            ("/a%5Cb", Ambiguous),
            ("/../a", Refused(PathError::DotSegment)),
            ("/%2e/a", Refused(PathError::DotSegment)),
            ("/%00", Refused(PathError::Nul)),
            ("/100%", Refused(PathError::BadEscape)),
            ("/caf\u{e9}", Refused(PathError::NotAscii)),
            ("/a b", Refused(PathError::NotAscii)),
        ];
        for (text, error) in cases {
            assert_eq!(PathPattern::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_pattern_is_shown_as_it_was_written() {
        assert_eq!(PathPattern::parse("/%61/*/**").unwrap().to_string(), "/%61/*/**");
    }
}
