//! How is one node of the file read as what its key wants?
//!
//! Each reader gives a value that is right, or has told what is wrong, so that the sections in `schema` only say what they want.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::problem::{Found, Path, Place, Read, Reported};
use super::tree::{Entry, Node, Value};
use crate::shaping::Share;

/// Longer waits are what `off` is for.
const DURATION_MAX: Duration = Duration::from_hours(1);

/// A node with the keys that lead to it.
#[derive(Clone, Copy)]
pub(super) struct Spot<'n> {
    /// Its key's place, or its own in a list.
    pub(super) at: Place,
    pub(super) path: Path<'n>,
    node: &'n Node<'n>,
}

impl<'n> Spot<'n> {
    /// The file as a whole.
    pub(super) fn root(node: &'n Node<'n>) -> Self {
        Self { at: node.at, path: Path::ROOT, node }
    }

    /// Where the value stands.
    pub(super) fn value_at(&self) -> Place {
        self.node.at
    }

    /// Reports the value.
    pub(super) fn wrong(
        &self,
        what: impl Into<String>,
        fix: impl Into<String>,
        found: &mut Found,
    ) -> Reported {
        let (value, what) = match &self.node.value {
            Value::Broken(reported) => return *reported,
            Value::Empty => ("", "a value is missing".to_owned()),
            Value::Word { text, .. } => (&**text, what.into()),
            Value::List(items) if items.is_empty() => ("[]", what.into()),
            Value::List(_) => ("[…]", what.into()),
            Value::Map(entries) if entries.is_empty() => ("{}", what.into()),
            Value::Map(_) => ("{…}", what.into()),
        };
        found.report(self.node.at, &self.path, value, what, fix)
    }

    /// Reports the key, in a map whose keys are names.
    pub(super) fn wrong_key(
        &self,
        key: &str,
        what: impl Into<String>,
        fix: impl Into<String>,
        found: &mut Found,
    ) -> Reported {
        found.report(self.at, &self.path, key, what, fix)
    }

    /// A map with these keys; others are reported and passed over.
    pub(super) fn fields(&self, known: &[&'static str], fix: &str, found: &mut Found) -> Read<Fields<'n>> {
        let entries = self.entries(fix, found)?;
        for entry in entries {
            if known.contains(&&*entry.key) {
                continue;
            }
            let fix = match found.nearest(&entry.key, known.iter().copied()) {
                Some(meant) => format!("write `{meant}` if that was meant, or take the key out"),
                None => format!("take it out; the keys here are {}", listed(known)),
            };
            found.report(entry.at, &self.path.key(&entry.key), &entry.key, "an unknown key", fix);
        }
        Ok(Fields { at: self.at, path: self.path, entries })
    }

    /// A map whose keys are names.
    pub(super) fn entries(&self, fix: &str, found: &mut Found) -> Read<&'n [Entry<'n>]> {
        match &self.node.value {
            Value::Map(entries) => Ok(entries),
            Value::Empty | Value::Word { .. } | Value::List(_) | Value::Broken(_) => {
                Err(self.wrong("a map of keys and values is wanted here", fix, found))
            }
        }
    }

    /// The value of an entry of this map.
    pub(super) fn entry<'s>(&'s self, entry: &'s Entry<'s>) -> Spot<'s> {
        Spot { at: entry.at, path: self.path.key(&entry.key), node: &entry.node }
    }

    /// Reads each item of a list that has one at least.
    pub(super) fn filled_list<T>(
        &self,
        fix: &str,
        found: &mut Found,
        read: impl FnMut(Spot<'_>, &mut Found) -> Read<T>,
    ) -> Read<Vec<T>> {
        match &self.node.value {
            Value::List(items) if items.is_empty() => Err(self.wrong("the list is empty", fix, found)),
            Value::Empty | Value::Word { .. } | Value::List(_) | Value::Map(_) | Value::Broken(_) => {
                self.list(fix, found, read)
            }
        }
    }

    /// Reads each item of a list; every item that is wrong is told.
    pub(super) fn list<T>(
        &self,
        fix: &str,
        found: &mut Found,
        mut read: impl FnMut(Spot<'_>, &mut Found) -> Read<T>,
    ) -> Read<Vec<T>> {
        let items = match &self.node.value {
            Value::List(items) => items,
            Value::Empty | Value::Word { .. } | Value::Map(_) | Value::Broken(_) => {
                return Err(self.wrong("a list is wanted here", fix, found));
            }
        };
        let read_all: Vec<Read<T>> = items
            .iter()
            .enumerate()
            .map(|(place, node)| read(Spot { at: node.at, path: self.path.index(place), node }, found))
            .collect();
        read_all.into_iter().collect()
    }

    /// Text, in quotes or not.
    pub(super) fn word(&self, fix: &str, found: &mut Found) -> Read<&'n str> {
        match &self.node.value {
            Value::Word { text, .. } => Ok(text),
            Value::Empty | Value::List(_) | Value::Map(_) | Value::Broken(_) => {
                Err(self.wrong("a word is wanted here", fix, found))
            }
        }
    }

    /// What must not be in quotes: in YAML those make a number or a truth value a text.
    fn plain(&self, wanted: &str, fix: &str, found: &mut Found) -> Read<&'n str> {
        match &self.node.value {
            Value::Word { text, quoted: false } => Ok(text),
            Value::Word { quoted: true, .. } => Err(self.wrong(
                format!("a text where {wanted} is wanted"),
                format!("{fix}, without quotes"),
                found,
            )),
            Value::Empty | Value::List(_) | Value::Map(_) | Value::Broken(_) => {
                Err(self.wrong(format!("{wanted} is wanted here"), fix, found))
            }
        }
    }

    /// One of a few words.
    pub(super) fn one_of<T: Copy>(&self, words: &[(&'static str, T)], found: &mut Found) -> Read<T> {
        let known: Vec<&'static str> = words.iter().map(|(word, _)| *word).collect();
        let all = listed(&known);
        let text = self.word(&format!("write one of {all}"), found)?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Ok(*value);
        }
        let fix = match found.nearest(text, known) {
            Some(meant) => format!("write `{meant}`"),
            None => format!("write one of {all}"),
        };
        Err(self.wrong(format!("not one of {all}"), fix, found))
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self, found: &mut Found) -> Read<bool> {
        const FIX: &str = "write true or false";
        match self.plain("true or false", FIX, found)? {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(self.wrong("neither true nor false", FIX, found)),
        }
    }

    /// Whether the value is a word, and not a list or a map.
    pub(super) fn is_word(&self) -> bool {
        matches!(self.node.value, Value::Word { .. })
    }

    /// Text, without a word if this is none.
    pub(super) fn word_if_right(&self) -> Option<&'n str> {
        let Value::Word { text, .. } = &self.node.value else { return None };
        Some(text)
    }

    /// A whole number within bounds.
    pub(super) fn number(&self, bounds: RangeInclusive<u32>, found: &mut Found) -> Read<u32> {
        let (least, most) = (bounds.start(), bounds.end());
        let fix = format!("write a whole number from {least} to {most}");
        let text = self.plain("a number", &fix, found)?;
        let parsed = digits(text).filter(|number| bounds.contains(number));
        parsed.ok_or_else(|| self.wrong(format!("not a number from {least} to {most}"), fix, found))
    }

    /// So many requests in so much time, `100/s`.
    pub(super) fn rate(&self, found: &mut Found) -> Read<(u32, Duration)> {
        const FIX: &str = "write requests and a time, like `100/s`, `600/m` or `1000/h`";
        let text = self.word(FIX, found)?;
        let read = text.split_once('/').and_then(|(number, unit)| {
            let seconds = match unit {
                "s" => 1,
                "m" => 60,
                "h" => 3600,
                _ => return None,
            };
            Some((digits(number)?, Duration::from_secs(seconds)))
        });
        match read {
            None => Err(self.wrong("not a rate", FIX, found)),
            Some((0, _)) => {
                let fix = "write 1 at least; what is not to pass at all has no line in `allow`";
                Err(self.wrong("a rate that lets nothing pass", fix, found))
            }
            Some(rate) => Ok(rate),
        }
    }

    /// A share in percent.
    pub(super) fn percent(&self, found: &mut Found) -> Read<u8> {
        const FIX: &str = "write a whole number from 1 to 100 with `%` behind it, like `50%`";
        let text = self.word(FIX, found)?;
        let number = text.strip_suffix('%').and_then(digits).and_then(|number| u8::try_from(number).ok());
        let share = number.filter(|share| (1..=100).contains(share));
        share.ok_or_else(|| self.wrong("not a share from 1% to 100%", FIX, found))
    }

    /// A share of all requests, as a number in percent: to the hundredth, and never none.
    pub(super) fn share(&self, found: &mut Found) -> Read<Share> {
        const FIX: &str = "write a number from 0.01 to 100, like `5`";
        let text = self.plain("a percentage", FIX, found)?;
        let (whole, hundredths) = match text.split_once('.') {
            None => (text, Some(0)),
            Some((whole, tenths @ ("1" | "2" | "3" | "4" | "5" | "6" | "7" | "8" | "9"))) => {
                (whole, digits(tenths).map(|tenths| tenths * 10))
            }
            Some((whole, part)) => (whole, digits(part.trim_start_matches('0')).filter(|_| part.len() == 2)),
        };
        let parts = digits(whole)
            .filter(|whole| *whole <= 100)
            .and_then(|whole| Some(whole * 100 + hundredths?))
            .filter(|parts| *parts > 0);
        let share = parts.and_then(|parts| Share::new(parts).ok());
        share.ok_or_else(|| self.wrong("not a percentage from 0.01 to 100", FIX, found))
    }

    /// A port.
    pub(super) fn port(&self, found: &mut Found) -> Read<u16> {
        const FIX: &str = "write a number from 1 to 65535";
        self.plain("a port", FIX, found)?;
        self.port_if_right().ok_or_else(|| self.wrong("not a port", FIX, found))
    }

    /// A port, without a word if it is none.
    pub(super) fn port_if_right(&self) -> Option<u16> {
        let Value::Word { text, quoted: false } = &self.node.value else { return None };
        // `parse` alone would take a sign; leading zeros are octal to some readers.
        let canonical = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
        text.parse().ok().filter(|port| canonical && *port > 0)
    }

    /// The value of a key, without a word if this is no map.
    pub(super) fn get<'s>(&'s self, key: &'s str) -> Option<Spot<'s>> {
        let Value::Map(entries) = &self.node.value else { return None };
        entries.iter().find(|entry| entry.key == key).map(|entry| self.entry(entry))
    }

    /// A number of milliseconds, seconds or minutes; none for `off`.
    pub(super) fn duration(&self, found: &mut Found) -> Read<Option<Duration>> {
        const FIX: &str =
            "write a whole number with `ms`, `s` or `m` behind it, like `2s`, from 1ms to 60m; or `off`";
        let text = self.word(FIX, found)?;
        if text == "off" {
            return Ok(None);
        }
        let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
        let number = text.strip_suffix(unit).and_then(|digits| digits.parse::<u64>().ok());
        let milliseconds = match unit {
            "ms" => Some(1),
            "s" => Some(1000),
            "m" => Some(60_000),
            _ => None,
        };
        let (Some(number), Some(milliseconds)) = (number, milliseconds) else {
            return Err(self.wrong("not a duration", FIX, found));
        };
        let duration = Duration::from_millis(number.saturating_mul(milliseconds));
        if duration.is_zero() {
            return Err(self.wrong("no time at all", FIX, found));
        }
        if duration > DURATION_MAX {
            return Err(self.wrong("longer than an hour", FIX, found));
        }
        Ok(Some(duration))
    }
}

/// The entries of a map whose keys are known.
pub(super) struct Fields<'n> {
    at: Place,
    path: Path<'n>,
    entries: &'n [Entry<'n>],
}

impl Fields<'_> {
    /// The value of a key.
    pub(super) fn get<'s>(&'s self, key: &'s str) -> Option<Spot<'s>> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        Some(Spot { at: entry.at, path: self.path.key(key), node: &entry.node })
    }

    /// Reads the value of a key that may be left out.
    pub(super) fn optional<T>(
        &self,
        key: &str,
        found: &mut Found,
        read: impl FnOnce(Spot<'_>, &mut Found) -> Read<T>,
    ) -> Read<Option<T>> {
        self.get(key).map(|spot| read(spot, found)).transpose()
    }

    /// Reads the value of a key that must be there.
    pub(super) fn required<T>(
        &self,
        key: &str,
        fix: &str,
        found: &mut Found,
        read: impl FnOnce(Spot<'_>, &mut Found) -> Read<T>,
    ) -> Read<T> {
        match self.get(key) {
            Some(spot) => read(spot, found),
            None => Err(self.lacks(&format!("the key `{key}` is missing"), fix, found)),
        }
    }

    /// Reports that something is not there.
    pub(super) fn lacks(&self, what: &str, fix: &str, found: &mut Found) -> Reported {
        found.report(self.at, &self.path, "", what, fix)
    }
}

/// A number that is written in one way alone: no sign, and no leading zeros, which are octal to some readers.
fn digits(text: &str) -> Option<u32> {
    let canonical = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| canonical)
}

/// Words for a sentence: `a`, `b`, `c`.
fn listed(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    quoted.join(", ")
}
