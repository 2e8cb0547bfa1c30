//! How is a person told what is wrong in a mesh file, and what to write instead?

use std::fmt;

/// So many problems are told one by one: more than a person mends before asking again, and a bound on the memory that a file of
/// nothing but mistakes takes.
const PROBLEMS_MAX: usize = 100;

/// A value or key is shown up to this length.
const SHOWN_CHARACTERS_MAX: usize = 120;

/// A word that is meant for another one is at most so many letters away from it.
const DISTANCE_MAX: usize = 2;

/// Everything that is wrong in a mesh file; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1, in characters.
    pub column: usize,
    /// The keys that lead there, like `services.profile.app.port`; empty for the file as a whole.
    pub path: String,
    /// What stands there, shortened, without control characters; empty where something is missing.
    pub value: String,
    /// What is wrong with it.
    pub what: String,
    /// What to do.
    pub fix: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: ", self.line, self.column)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        if !self.value.is_empty() {
            write!(f, "`{}`: ", self.value)?;
        }
        write!(f, "{}\n  fix: {}", self.what, self.fix)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, problem) in self.0.iter().enumerate() {
            if place > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Place {
    /// Where a file begins.
    pub(super) const START: Place = Place { line: 1, column: 1 };
}

/// The keys that lead to a node. It lives on the reader's stack and becomes text only in a problem.
#[derive(Clone, Copy)]
pub(super) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Root,
    Key(&'a str),
    Index(usize),
}

impl<'a> Path<'a> {
    /// The file as a whole.
    pub(super) const ROOT: Path<'static> = Path { parent: None, step: Step::Root };

    /// The value of a key.
    pub(super) fn key<'b>(&'b self, key: &'b str) -> Path<'b> {
        Path { parent: Some(self), step: Step::Key(key) }
    }

    /// An item of a list, counted from 0.
    pub(super) fn index(&'a self, index: usize) -> Path<'a> {
        Path { parent: Some(self), step: Step::Index(index) }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Root => Ok(()),
            Step::Key(key) => {
                let first = self.parent.is_none_or(|parent| parent.parent.is_none());
                write!(f, "{}{}", if first { "" } else { "." }, shown(key))
            }
            Step::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// A text from the file, fit for a terminal: shortened, with control and formatting characters escaped.
pub(super) fn shown(text: &str) -> String {
    let mut shown = String::new();
    let mut rest = text.chars();
    for character in rest.by_ref().take(SHOWN_CHARACTERS_MAX) {
        match character {
            // `escape_debug` would double these two, which are harmless.
            '\\' | '"' | '\'' => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
    }
    if rest.next().is_some() {
        shown.push('…');
    }
    shown
}

/// The proof that a problem has been reported: whoever has nothing else to give has told why.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reported(());

/// What a reader gives: a value, or the word that its problem is told.
pub(super) type Read<T> = Result<T, Reported>;

/// The problems found so far.
#[derive(Debug, Default)]
pub(super) struct Found {
    problems: Vec<Problem>,
    left_out: usize,
}

impl Found {
    /// Reports a problem. `value` is the text as it stands in the file, empty where something is missing.
    pub(super) fn report(
        &mut self,
        at: Place,
        path: &Path<'_>,
        value: &str,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) -> Reported {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem {
                line: at.line,
                column: at.column,
                path: path.to_string(),
                value: shown(value),
                what: what.into(),
                fix: fix.into(),
            });
        } else {
            self.left_out += 1;
        }
        Reported(())
    }

    /// The candidate that was probably meant, if one is near: up to two letters added, lost or changed.
    ///
    /// Nobody is looked for when the problem won't be told: a file can have as many wrong words as right ones.
    pub(super) fn nearest<'c>(
        &self,
        word: &str,
        candidates: impl IntoIterator<Item = &'c str>,
    ) -> Option<&'c str> {
        if self.problems.len() >= PROBLEMS_MAX {
            return None;
        }
        candidates
            .into_iter()
            .filter_map(|candidate| {
                Some((distance(word.as_bytes(), candidate.as_bytes(), DISTANCE_MAX)?, candidate))
            })
            // A word of two letters is two changes away from every other one.
            .filter(|(distance, candidate)| *distance < candidate.len().min(word.len()))
            .min_by_key(|(distance, _)| *distance)
            .map(|(_, candidate)| candidate)
    }

    /// Whether nothing is wrong so far.
    pub(super) fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// All that was found, in the file's order.
    pub(super) fn into_problems(self) -> Problems {
        let mut problems = self.problems;
        problems.sort_by_key(|problem| (problem.line, problem.column));
        if let (1.., Some(last)) = (self.left_out, problems.last()) {
            problems.push(Problem {
                line: last.line,
                column: last.column,
                path: String::new(),
                value: String::new(),
                what: format!("{} more problems are left out", self.left_out),
                fix: "mend these first and check again".to_owned(),
            });
        }
        Problems(problems)
    }
}

/// The distance of two words, in bytes and without regard to case (Levenshtein's); none over `limit`. It branches at a difference
/// alone, so its cost is the words' length times `3^limit`, whatever they are.
fn distance(mut left: &[u8], mut right: &[u8], limit: usize) -> Option<usize> {
    loop {
        match (left.split_first(), right.split_first()) {
            (None, _) => return Some(right.len()).filter(|distance| *distance <= limit),
            (_, None) => return Some(left.len()).filter(|distance| *distance <= limit),
            (Some((l, after_left)), Some((r, after_right))) if l.eq_ignore_ascii_case(r) => {
                (left, right) = (after_left, after_right);
            }
            (Some((_, after_left)), Some((_, after_right))) => {
                let limit = limit.checked_sub(1)?;
                let changed = distance(after_left, after_right, limit);
                let lost = distance(after_left, right, limit);
                let added = distance(left, after_right, limit);
                return [changed, lost, added].into_iter().flatten().min().map(|rest| rest + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_found_and_far_ones_are_not() {
        let words = ["port", "tls_port", "names", "trust_forwarded"];
        for (word, expected) in [
            ("prot", Some("port")),
            ("Port", Some("port")),
            ("ports", Some("port")),
            ("tlsport", Some("tls_port")),
            ("name", Some("names")),
            ("trust_forwardd", Some("trust_forwarded")),
            ("retries", None),
            ("", None),
            ("po", None),
            ("xy", None),
        ] {
            assert_eq!(Found::default().nearest(word, words), expected, "{word}");
        }
    }

    #[test]
    fn the_distance_is_levenshteins() {
        for (left, right, expected) in [
            ("", "", Some(0)),
            ("a", "", Some(1)),
            ("abc", "abc", Some(0)),
            ("abc", "ABC", Some(0)),
            ("abc", "axc", Some(1)),
            ("abc", "bc", Some(1)),
            ("abc", "cab", Some(2)),
            ("kitten", "sitting", None),
            ("abcd", "dcba", None),
        ] {
            assert_eq!(distance(left.as_bytes(), right.as_bytes(), 2), expected, "{left} {right}");
            assert_eq!(distance(right.as_bytes(), left.as_bytes(), 2), expected, "{right} {left}");
        }
        assert_eq!(distance(b"kitten", b"sitting", 9), Some(3));
    }

    #[test]
    fn what_is_shown_of_the_file_is_short_and_harmless() {
        assert_eq!(shown("plain \"text\" \\d 'x'"), "plain \"text\" \\d 'x'");
        assert_eq!(shown("\u{1b}[31m\r\n\u{202e}x"), "\\u{1b}[31m\\r\\n\\u{202e}x");
        let long = shown(&"a".repeat(1000));
        assert_eq!(long.chars().count(), SHOWN_CHARACTERS_MAX + 1);
        assert!(long.ends_with('…'));
    }

    #[test]
    fn problems_are_bounded_and_the_rest_is_counted() {
        let mut found = Found::default();
        for line in (1..=250).rev() {
            let _: Reported = found.report(Place { line, column: 1 }, &Path::ROOT, "", "wrong", "mend it");
        }
        let Problems(problems) = found.into_problems();
        assert_eq!(problems.len(), PROBLEMS_MAX + 1);
        assert!(problems.is_sorted_by_key(|problem| problem.line));
        assert_eq!(problems.last().unwrap().what, "150 more problems are left out");
    }

    #[test]
    fn a_path_is_written_as_keys_and_places() {
        let (services, allow) = (Path::ROOT.key("services"), Path::ROOT.key("allow"));
        let line = allow.index(2);
        assert_eq!(services.key("a").to_string(), "services.a");
        assert_eq!(line.key("paths").index(0).to_string(), "allow[2].paths[0]");
        assert_eq!(Path::ROOT.to_string(), "");
    }
}
