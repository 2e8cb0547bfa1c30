//! The text format of the corpus.
//!
//! ```text
//! at: outbound ingress                  where the cases of a file go, unless they say otherwise
//!
//! # a comment
//! == lengths that differ                a case
//! why: RFC 9112 6.3 item 5; CL.CL       the rule, or the attack
//! note: …                               what is known and accepted
//! at: ingress                           another front than the file's
//! send: POST /a HTTP/1.1\r\nHost: callee\r\nContent-Length: {v}\r\n\r\n       bytes, `{v}` is the variant
//! then: end                             see `Step`
//! app: HTTP/1.1 204 No Content\r\n\r\n  what the application answers, in place of a 200
//! with: 5\r\nContent-Length: 6          a variant; what is expected of it follows
//! < 400 (library)                       what the client gets
//! < closed                              and what becomes of its connection
//! > POST /a | length 5: "hello"         what the application gets; no line, nothing
//! ```
//!
//! Escapes are `\r \n \t \0 \\ \xHH`, and `{a*100}` is a hundred times `a`. Where fronts differ, `<ingress` and `>ingress` begin
//! the lines of one of them.

use std::collections::BTreeMap;
use std::fmt;

/// Where a case's bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Front {
    /// HTTP/1 to an application's outbound proxy.
    Outbound,
    /// HTTP/1 to an ingress.
    Ingress,
    /// HTTP/2 to an application's outbound proxy.
    Outbound2,
    /// HTTP/2 to an ingress.
    Ingress2,
    /// HTTP/2 in TLS to a sidecar's inbound port, as another sidecar.
    Peer,
}

impl Front {
    /// All of them, with the words of the format.
    const ALL: [(Self, &'static str); 5] = [
        (Self::Outbound, "outbound"),
        (Self::Ingress, "ingress"),
        (Self::Outbound2, "outbound2"),
        (Self::Ingress2, "ingress2"),
        (Self::Peer, "peer"),
    ];

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, name)| *name == word).map(|(front, _)| front)
    }

    /// Whether HTTP/2 is spoken there.
    pub(crate) fn is_http2(self) -> bool {
        matches!(self, Self::Outbound2 | Self::Ingress2 | Self::Peer)
    }
}

impl fmt::Display for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, name) = Self::ALL.into_iter().find(|(front, _)| front == self).unwrap();
        f.write_str(name)
    }
}

/// What a client does, one after the other.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// `send:`: bytes; at an HTTP/2 front, a frame in the words of `http2::Frame`.
    Send(String),
    /// `then: end`: ends its half of the connection.
    End,
    /// `then: seen`: waits until the application has one more head.
    AwaitSeen,
    /// `then: answered`: waits for an answer.
    AwaitAnswer,
}

/// What the application does in place of answering 200.
#[derive(Debug, Clone, Default)]
pub(crate) struct AppScript {
    /// `app:`: the bytes of its answer.
    pub(crate) answer: Option<Vec<u8>>,
    /// `app-then: close`: closes afterwards.
    pub(crate) closes: bool,
    /// `app-then: break`: closes before its answer has ended. Whether the answer's head was on its way by then is a matter of luck, so
    /// all that is looked at is that the client gets no whole answer.
    pub(crate) breaks: bool,
    /// `app-when: head`: answers without having read the body.
    pub(crate) early: bool,
}

/// One case, or one variant of it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Its name, and its variant.
    pub(crate) name: String,
    /// `file:line`.
    pub(crate) place: String,
    pub(crate) at: Vec<Front>,
    pub(crate) steps: Vec<Step>,
    pub(crate) app: AppScript,
    /// What stands in the file.
    pub(crate) expected: BTreeMap<Front, Vec<String>>,
}

/// A file of cases: its text, cut at the places where expectations stand.
#[derive(Debug)]
pub(crate) struct Fixture {
    pub(crate) cases: Vec<Case>,
    /// For each line that is none of an expectation, itself and the case whose expectations follow it.
    lines: Vec<(String, Option<usize>)>,
}

/// What a line is.
enum Line<'a> {
    Blank,
    Expected(&'a str),
    Name(&'a str),
    Key(&'a str, &'a str),
}

fn classify(line: &str) -> Result<Line<'_>, String> {
    if line.is_empty() || line.starts_with('#') {
        return Ok(Line::Blank);
    }
    if line.starts_with(['<', '>']) {
        return Ok(Line::Expected(line));
    }
    if let Some(name) = line.strip_prefix("== ") {
        return Ok(Line::Name(name));
    }
    match line.split_once(':') {
        Some((key, value)) => Ok(Line::Key(key, value.strip_prefix(' ').unwrap_or(value))),
        None => Err(format!("`{line}` is neither `== name`, `key: value`, `< …`, `> …` nor a comment")),
    }
}

/// A case while its lines are read: `with` makes a case of each of its variants.
#[derive(Default)]
struct Draft {
    name: String,
    why: bool,
    at: Vec<Front>,
    steps: Vec<Step>,
    app: AppScript,
    app_text: Option<String>,
    varies: bool,
    /// The last case that it has given.
    given: Option<usize>,
}

impl Draft {
    fn key(&mut self, key: &str, value: &str) -> Result<(), String> {
        if self.varies {
            return Err(format!("`{key}:` has to stand before the first `with:`"));
        }
        match (key, value) {
            ("why", _) => self.why = true,
            ("note", _) => {}
            ("at", _) => self.at = fronts(value)?,
            ("send", _) => self.steps.push(Step::Send(value.to_owned())),
            ("then", "end") => self.steps.push(Step::End),
            ("then", "seen") => self.steps.push(Step::AwaitSeen),
            ("then", "answered") => self.steps.push(Step::AwaitAnswer),
            ("app", _) => self.app_text.get_or_insert_default().push_str(value),
            ("app-then", "close") => self.app.closes = true,
            ("app-then", "break") => (self.app.closes, self.app.breaks) = (true, true),
            ("app-when", "head") => self.app.early = true,
            ("then" | "app-then" | "app-when", _) => {
                return Err(format!("`{key}: {value}`: see `Step` and `AppScript` for what there is"));
            }
            _ => return Err(format!("`{key}:` is no key of the format")),
        }
        Ok(())
    }

    fn case(&self, variant: Option<&str>, place: String) -> Result<Case, String> {
        if !self.why {
            return Err(format!("`{}` has no `why:`, the rule or the attack", self.name));
        }
        if self.at.is_empty() || self.steps.is_empty() {
            return Err(format!("`{}` has no `at:` or no `send:`", self.name));
        }
        let fill =
            |text: &str| variant.map_or_else(|| text.to_owned(), |variant| text.replace("{v}", variant));
        let steps = self.steps.iter().map(|step| match step {
            Step::Send(text) => Step::Send(fill(text)),
            Step::End | Step::AwaitSeen | Step::AwaitAnswer => step.clone(),
        });
        let answer = self.app_text.as_deref().map(|text| unescape(&fill(text))).transpose()?;
        let name = variant.map_or_else(|| self.name.clone(), |variant| format!("{} [{variant}]", self.name));
        Ok(Case {
            name,
            place,
            at: self.at.clone(),
            steps: steps.collect(),
            app: AppScript { answer, ..self.app.clone() },
            expected: BTreeMap::new(),
        })
    }
}

fn fronts(value: &str) -> Result<Vec<Front>, String> {
    let parse = |word| Front::parse(word).ok_or_else(|| format!("`{word}` is no front"));
    value.split_whitespace().map(parse).collect()
}

impl Fixture {
    /// Reads a file.
    pub(crate) fn parse(file: &str, text: &str) -> Result<Self, String> {
        let mut fixture = Self { cases: Vec::new(), lines: Vec::new() };
        let mut at = Vec::new();
        let mut draft: Option<Draft> = None;
        for (number, line) in text.lines().enumerate() {
            let place = format!("{file}:{}", number + 1);
            fixture.line(line, &place, &mut at, &mut draft).map_err(|error| format!("{place}: {error}"))?;
        }
        fixture.close(draft.as_mut(), &format!("{file}: at its end"))?;
        Ok(fixture)
    }

    fn line(
        &mut self,
        line: &str,
        place: &str,
        at: &mut Vec<Front>,
        draft: &mut Option<Draft>,
    ) -> Result<(), String> {
        match (classify(line)?, draft.as_mut()) {
            (Line::Expected(line), Some(draft)) => {
                self.close(Some(draft), place)?;
                return self.expect(line, draft);
            }
            (Line::Expected(_), None) => return Err("an expectation before the first case".to_owned()),
            (Line::Blank, _) => {}
            (Line::Name(name), before) => {
                self.close(before, place)?;
                *draft = Some(Draft { name: name.to_owned(), at: at.clone(), ..Draft::default() });
            }
            (Line::Key("at", value), None) => *at = fronts(value)?,
            (Line::Key(key, _), None) => return Err(format!("`{key}:` before the first case")),
            (Line::Key("with", value), Some(draft)) => {
                draft.varies = true;
                draft.given = Some(self.cases.len());
                self.cases.push(draft.case(Some(value), place.to_owned())?);
                self.lines.push((line.to_owned(), draft.given));
                return Ok(());
            }
            (Line::Key(key, value), Some(draft)) => draft.key(key, value)?,
        }
        self.lines.push((line.to_owned(), None));
        Ok(())
    }

    /// Makes a case of a draft that has no variants, and has given none yet.
    fn close(&mut self, draft: Option<&mut Draft>, place: &str) -> Result<(), String> {
        let Some(draft) = draft else { return Ok(()) };
        if draft.given.is_none() {
            draft.given = Some(self.cases.len());
            self.cases.push(draft.case(None, place.to_owned())?);
            // Blank lines and comments before the next case stay behind what is expected.
            let last = self.lines.iter().rposition(|(line, _)| !matches!(classify(line), Ok(Line::Blank)));
            if let Some((_, slot)) = last.and_then(|last| self.lines.get_mut(last)) {
                *slot = draft.given;
            }
        }
        Ok(())
    }

    fn expect(&mut self, line: &str, draft: &Draft) -> Result<(), String> {
        let case = draft.given.and_then(|given| self.cases.get_mut(given)).ok_or("no case")?;
        let (sign, rest) = line.split_at(1);
        let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let fronts = if word.is_empty() { case.at.clone() } else { fronts(word)? };
        for front in fronts {
            case.expected.entry(front).or_default().push(format!("{sign} {rest}"));
        }
        Ok(())
    }

    /// The text with other expectations.
    pub(crate) fn render(&self, got: &[BTreeMap<Front, Vec<String>>]) -> String {
        let mut text = String::new();
        for (line, case) in &self.lines {
            text.push_str(line);
            text.push('\n');
            let Some(got) = case.and_then(|case| got.get(case)) else { continue };
            let same = got.values().collect::<std::collections::BTreeSet<_>>().len() <= 1;
            for (front, lines) in got.iter().take(if same { 1 } else { got.len() }) {
                for line in lines {
                    let (sign, rest) = line.split_at(1);
                    let word = if same { String::new() } else { front.to_string() };
                    text.push_str(&format!("{sign}{word}{rest}\n"));
                }
            }
        }
        text
    }
}

/// The bytes that a text of the format stands for.
pub(crate) fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        rest = &rest[next.len_utf8()..];
        match next {
            '\\' => rest = escape(rest, &mut bytes)?,
            '{' if rest.contains('}') => {
                let (inside, after) = rest.split_once('}').unwrap();
                let (what, count) = inside
                    .rsplit_once('*')
                    .ok_or_else(|| format!("`{{{inside}}}` is no `{{text*count}}`"))?;
                let count = count.parse().map_err(|_| format!("`{count}` in `{{{inside}}}` is no number"))?;
                bytes.extend(unescape(what)?.repeat(count));
                rest = after;
            }
            _ => bytes.extend_from_slice(next.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Ok(bytes)
}

fn escape<'a>(rest: &'a str, bytes: &mut Vec<u8>) -> Result<&'a str, String> {
    let plain = [('r', b'\r'), ('n', b'\n'), ('t', b'\t'), ('0', 0), ('\\', b'\\')];
    let letter = rest.chars().next().ok_or("a `\\` at the end")?;
    if let Some((_, byte)) = plain.iter().find(|(known, _)| *known == letter) {
        bytes.push(*byte);
        return Ok(&rest[1..]);
    }
    let hex = rest.strip_prefix('x').and_then(|rest| rest.get(..2));
    let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
    bytes.push(byte.ok_or_else(|| format!("`\\{letter}…` is no escape: \\r \\n \\t \\0 \\\\ \\xHH"))?);
    Ok(&rest[3..])
}

/// Bytes as the format has them; long ones as their count.
pub(crate) fn show(bytes: &[u8]) -> String {
    if bytes.len() > 200 { format!("{} bytes", bytes.len()) } else { format!("\"{}\"", bytes.escape_ascii()) }
}

#[test]
fn the_format_says_what_is_wrong_and_where() {
    let check = |text: &str, expected: &str| {
        assert_eq!(Fixture::parse("a.txt", text).unwrap_err(), expected);
    };
    check("== a\nsend: b\n< 200\n", "a.txt:3: `a` has no `why:`, the rule or the attack");
    check("< 200\n", "a.txt:1: an expectation before the first case");
    check("at: inbound\n", "a.txt:1: `inbound` is no front");
    check("== a\nhello\n", "a.txt:2: `hello` is neither `== name`, `key: value`, `< …`, `> …` nor a comment");
    check("== a\nsned: b\n", "a.txt:2: `sned:` is no key of the format");
    assert_eq!(unescape("a\\r\\x00{b*3}\\\\").unwrap(), b"a\r\0bbb\\");
    assert!(unescape("\\q").unwrap_err().contains("no escape"));
    assert!(unescape("{a*x}").unwrap_err().contains("no number"));
}

#[test]
fn a_file_is_written_as_it_was_but_for_what_is_expected() {
    let text = "at: outbound ingress\n\n# first\n== a\nwhy: b\nsend: c\n< 200\n<ingress open\n\n== d\nwhy: e\nsend: {v}\nwith: 1\n< old\nwith: 2\n";
    let fixture = Fixture::parse("a.txt", text).unwrap();
    let names: Vec<_> = fixture.cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names, ["a", "d [1]", "d [2]"]);
    assert_eq!(fixture.cases[0].expected[&Front::Outbound], ["< 200"]);
    assert_eq!(fixture.cases[0].expected[&Front::Ingress], ["< 200", "< open"]);
    let got = |outbound: &str, ingress: &str| {
        let lines = |text: &str| vec![text.to_owned()];
        BTreeMap::from([(Front::Outbound, lines(outbound)), (Front::Ingress, lines(ingress))])
    };
    let rendered = fixture.render(&[got("< 1", "< 1"), got("< 2", "> 3"), got("< 4", "< 4")]);
    let expected = "at: outbound ingress\n\n# first\n== a\nwhy: b\nsend: c\n< 1\n\n== d\nwhy: e\nsend: {v}\nwith: 1\n<outbound 2\n>ingress 3\nwith: 2\n< 4\n";
    assert_eq!(rendered, expected);
}
