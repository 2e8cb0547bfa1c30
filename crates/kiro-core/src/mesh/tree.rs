//! How does YAML text become a tree that knows where each node stands?
//!
//! Events are pulled from the parser one by one, so that depth and size are bounded here, before anything recurses or grows
//! (ready-made loaders recurse as deep as the file says). Aliases and tags are refused: a file that decides who may call whom says
//! it in plain words. Words are not interpreted: whether `off` is a word or a truth value is for who reads the key to say.

use std::borrow::Cow;
use std::collections::BTreeMap;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span, StrInput};

use super::problem::{Found, Path, Place, Read, Reported};

/// A mesh file's largest size. A service with its lines takes about 300 bytes, so this is thousands of services.
pub(super) const FILE_BYTES_MAX: usize = 1 << 20;

/// The deepest node that a mesh file has, `services.<name>.ingress.names[0]`, is at depth 5; three more show where it went wrong.
const DEPTH_MAX: usize = 8;

/// A value with its place.
#[derive(Debug)]
pub(super) struct Node<'t> {
    pub(super) at: Place,
    pub(super) value: Value<'t>,
}

#[derive(Debug)]
pub(super) enum Value<'t> {
    /// Nothing, `~` or `null`.
    Empty,
    Word {
        text: Cow<'t, str>,
        quoted: bool,
    },
    List(Vec<Node<'t>>),
    Map(Vec<Entry<'t>>),
    /// Its problem is reported already.
    Broken(Reported),
}

/// A key and its value. Keys of one map differ.
#[derive(Debug)]
pub(super) struct Entry<'t> {
    pub(super) at: Place,
    pub(super) key: Cow<'t, str>,
    pub(super) node: Node<'t>,
}

/// Reads the one document of a file.
pub(super) fn read<'t>(text: &'t str, found: &mut Found) -> Read<Node<'t>> {
    check_text(text, found)?;
    let end = text
        .lines()
        .enumerate()
        .last()
        .map_or(Place::START, |(before, line)| Place { line: before + 1, column: line.chars().count() + 1 });
    let mut reader = Reader { text, end, events: Parser::new_from_str(text), found };
    reader.document()
}

fn check_text(text: &str, found: &mut Found) -> Read<()> {
    if text.len() > FILE_BYTES_MAX {
        return Err(found.report(
            Place::START,
            &Path::ROOT,
            "",
            format!("the file has {} bytes, more than {FILE_BYTES_MAX}", text.len()),
            "check that it is the mesh file, and split the mesh if it is",
        ));
    }
    // YAML allows none of them, and the parser would take NUL for the end of the file.
    let mut place = Place::START;
    for character in text.chars() {
        match character {
            '\n' => place = Place { line: place.line + 1, column: 0 },
            '\r' | '\t' => {}
            character if character.is_control() => {
                let value = character.to_string();
                let what = "a control character, which YAML does not allow";
                return Err(found.report(place, &Path::ROOT, &value, what, "take it out"));
            }
            _ => {}
        }
        place.column += 1;
    }
    Ok(())
}

struct Reader<'t, 'f> {
    text: &'t str,
    /// Just after the last character.
    end: Place,
    events: Parser<'t, StrInput<'t>>,
    found: &'f mut Found,
}

impl<'t> Reader<'t, '_> {
    fn document(&mut self) -> Read<Node<'t>> {
        loop {
            match self.next()? {
                (Event::StreamStart | Event::Nothing, _) => {}
                (Event::DocumentStart(_), _) => break,
                (_, _) => return Err(self.empty()),
            }
        }
        let (event, span) = self.next()?;
        let root = self.node(event, span, &Path::ROOT, 1)?;
        if let Value::Empty = root.value {
            return Err(self.empty());
        }
        loop {
            match self.next()? {
                (Event::DocumentEnd | Event::Nothing, _) => {}
                (Event::StreamEnd, _) => return Ok(root),
                (_, span) => {
                    let what = "a second document in the file";
                    return Err(self.report(
                        span,
                        &Path::ROOT,
                        "---",
                        what,
                        "write one mesh into one document",
                    ));
                }
            }
        }
    }

    fn empty(&mut self) -> Reported {
        let fix = "start with `trust_domain: kiro.mesh` and a map `services:`";
        self.found.report(Place::START, &Path::ROOT, "", "the file is empty", fix)
    }

    fn next(&mut self) -> Read<(Event<'t>, Span)> {
        match self.events.next_event() {
            Some(Ok(next)) => Ok(next),
            Some(Err(error)) => Err(self.malformed(&error)),
            None => Err(self.malformed(&ScanError::new_str(Marker::default(), "the file ends too early"))),
        }
    }

    fn malformed(&mut self, error: &ScanError) -> Reported {
        let at = self.place(*error.marker());
        let line = self.text.lines().nth(at.line.saturating_sub(1)).unwrap_or_default();
        self.found.report(
            at,
            &Path::ROOT,
            line.trim(),
            format!("not YAML: {}", super::problem::shown(error.info())),
            "mend this line or the one before: indent with spaces, close quotes and brackets, write `key: value` with a space",
        )
    }

    /// A marker's place. The parser has some one line after the last, where it finds that something is missing.
    fn place(&self, marker: Marker) -> Place {
        Place { line: marker.line().max(1), column: marker.col() + 1 }.min(self.end)
    }

    fn report(&mut self, span: Span, path: &Path<'_>, value: &str, what: &str, fix: &str) -> Reported {
        self.found.report(self.place(span.start), path, value, what, fix)
    }

    fn node(&mut self, event: Event<'t>, span: Span, path: &Path<'_>, depth: usize) -> Read<Node<'t>> {
        if depth > DEPTH_MAX {
            return Err(self.report(
                span,
                path,
                "",
                "nested too deeply",
                "no key of a mesh file is so deep: check the indentation",
            ));
        }
        let at = self.place(span.start);
        let value = match event {
            Event::Scalar(_, _, _, Some(_)) => Value::Broken(self.tag(span, path)),
            Event::Scalar(text, ScalarStyle::Plain, _, None) if is_null(&text) => Value::Empty,
            Event::Scalar(text, style, _, None) => {
                Value::Word { text: fitted(text), quoted: style != ScalarStyle::Plain }
            }
            Event::Alias(_) => {
                let fix = "write the value out; put a value that starts with `*` in quotes";
                Value::Broken(self.report(span, path, "", "an alias (`*…`), which a mesh file has not", fix))
            }
            Event::SequenceStart(_, tag) => {
                let _told = tag.map(|_| self.tag(span, path));
                Value::List(self.list(path, depth)?)
            }
            Event::MappingStart(_, tag) => {
                let _told = tag.map(|_| self.tag(span, path));
                Value::Map(self.map(path, depth)?)
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::SequenceEnd
            | Event::MappingEnd => {
                return Err(self.malformed(&ScanError::new_str(span.start, "a value is missing")));
            }
        };
        Ok(Node { at, value })
    }

    fn tag(&mut self, span: Span, path: &Path<'_>) -> Reported {
        self.report(span, path, "", "a tag (`!…`), which a mesh file has not", "write the value without it")
    }

    fn list(&mut self, path: &Path<'_>, depth: usize) -> Read<Vec<Node<'t>>> {
        // Most lists and maps are small, and there are thousands of them: none keeps room for what does not come.
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                items.shrink_to_fit();
                return Ok(items);
            }
            items.push(self.node(event, span, &path.index(items.len()), depth + 1)?);
        }
    }

    fn map(&mut self, path: &Path<'_>, depth: usize) -> Read<Vec<Entry<'t>>> {
        let mut entries = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::MappingEnd {
                self.drop_duplicates(&mut entries, path);
                entries.shrink_to_fit();
                return Ok(entries);
            }
            let key = self.node(event, span, path, depth + 1)?;
            let name = match &key.value {
                Value::Word { text, .. } => text.clone(),
                Value::Empty | Value::List(_) | Value::Map(_) | Value::Broken(_) => Cow::Borrowed(""),
            };
            let (event, span) = self.next()?;
            let mut node = self.node(event, span, &path.key(&name), depth + 1)?;
            // The parser places a value that is not there at the next thing that is.
            if let Value::Empty = node.value {
                node.at = key.at;
            }
            match key.value {
                Value::Word { text, .. } => entries.push(Entry { at: key.at, key: text, node }),
                Value::Broken(_) => {}
                Value::Empty | Value::List(_) | Value::Map(_) => {
                    let what = "a key that is not a word";
                    self.found.report(
                        key.at,
                        path,
                        "",
                        what,
                        "write `key: value`, and quote a value that has braces or brackets",
                    );
                }
            }
        }
    }

    /// Reports keys that stand twice, and keeps the first of each.
    fn drop_duplicates(&mut self, entries: &mut Vec<Entry<'t>>, path: &Path<'_>) {
        let mut lines: BTreeMap<Cow<'t, str>, usize> = BTreeMap::new();
        entries.retain(|entry| {
            let Some(first) = lines.get(&entry.key) else {
                lines.insert(entry.key.clone(), entry.at.line);
                return true;
            };
            let what = format!("the key stands twice, first in line {first}");
            self.found.report(entry.at, &path.key(&entry.key), &entry.key, what, "keep one of the two");
            false
        });
    }
}

/// A word without the room that the parser has left behind it, a hundred bytes each: of the tens of thousands of words of a large mesh
/// file, that was half of all that reading it took.
fn fitted(text: Cow<'_, str>) -> Cow<'_, str> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(text),
        Cow::Owned(mut text) => {
            text.shrink_to_fit();
            Cow::Owned(text)
        }
    }
}

/// The words that YAML's core schema reads as nothing.
fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}
