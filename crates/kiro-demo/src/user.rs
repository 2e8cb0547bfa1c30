//! Which user names does a service take?
//!
//! A name is part of a path when one service asks another. It is therefore checked where it comes in, and what is left
//! needs no escaping in a path, in JSON or in a log line.

use serde::{Deserialize, Serialize};

/// Longest user name, in bytes: longer than any user of the demonstration, short enough for a log line.
const NAME_BYTES_MAX: usize = 32;

/// A well-formed user name. It says nothing of whether such a user exists: that is Auth's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct UserName(String);

/// Why a user name was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a user name is 1 to {NAME_BYTES_MAX} of a to z, 0 to 9, '.', '_' and '-', and begins with a letter or digit"
)]
pub(crate) struct BadUserName;

impl UserName {
    /// Checks length and characters. A first character that is a letter or digit leaves no `.` or `..`.
    pub(crate) fn parse(name: &str) -> Result<Self, BadUserName> {
        let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let begins_well = name.as_bytes().first().is_some_and(alphanumeric);
        let plain = name.bytes().all(|byte| alphanumeric(&byte) || matches!(byte, b'.' | b'_' | b'-'));
        if begins_well && plain && name.len() <= NAME_BYTES_MAX {
            Ok(Self(name.to_owned()))
        } else {
            Err(BadUserName)
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for UserName {
    type Error = BadUserName;

    fn try_from(name: String) -> Result<Self, BadUserName> {
        Self::parse(&name)
    }
}

impl From<UserName> for String {
    fn from(name: UserName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_plain_names() {
        for name in ["alice", "b", "0day", "mary-ann", "j.r_tolkien", &"a".repeat(NAME_BYTES_MAX)] {
            assert_eq!(UserName::parse(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn refuses_everything_else() {
        let long = "a".repeat(NAME_BYTES_MAX + 1);
        for name in [
            "", ".", "..", "-a", "_a", "Alice", "al ice", "a/b", "a?b", "a%2fb", "älice", "a\0", "a\n",
            "a\"", &long,
        ] {
            assert_eq!(UserName::parse(name), Err(BadUserName), "{name:?}");
        }
    }
}
