//! Which service does an authority (`:authority`, `Host`, the target of CONNECT) mean?
//!
//! One function answers for every listener, so that two places can't read one authority as two services. It gives any DNS
//! name: whether the mesh has a service of that name is the caller's question.

use std::borrow::Cow;
use std::net::Ipv6Addr;

/// RFC 1035, 2.3.4, without the final dot: a name is at most 253 characters, a label 63.
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// A port has at most five digits.
const PORT_DIGITS_MAX: usize = 5;

/// Why an authority means no service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// No name in it.
    #[error("the authority is empty: name the service, like `http://profile/`")]
    Empty,
    /// `user@` before the name, which makes one authority look like another.
    #[error("the authority has userinfo: leave out the `@` and what is before it")]
    Userinfo,
    /// An address where a name must stand, in any spelling that a resolver takes.
    #[error("the authority is an IP address: call the service by its name")]
    IpAddress,
    /// The port is no number from 1 to 65535.
    #[error("the authority's port is not a number from 1 to 65535: mend it or leave it out with its colon")]
    BadPort,
    /// Not a DNS name.
    #[error(
        "the authority is not a DNS name: labels of letters, digits and hyphens, with single dots between"
    )]
    BadName,
}

/// The name in an authority, in lower case, without port and final dot. It allocates only to lower a letter.
///
/// # Errors
/// Says why the authority means no service.
pub fn service_of(authority: &str) -> Result<Cow<'_, str>, AuthorityError> {
    if authority.is_empty() {
        return Err(AuthorityError::Empty);
    }
    if authority.contains('@') {
        return Err(AuthorityError::Userinfo);
    }
    if authority.starts_with('[') || authority.parse::<Ipv6Addr>().is_ok() {
        return Err(AuthorityError::IpAddress);
    }
    let host = match authority.split_once(':') {
        None => authority,
        Some((host, port)) => {
            check_port(port)?;
            host
        }
    };
    let name = host.strip_suffix('.').unwrap_or(host);
    if name.is_empty() {
        return Err(AuthorityError::Empty);
    }
    check_name(name)?;
    Ok(if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(name.to_ascii_lowercase())
    } else {
        Cow::Borrowed(name)
    })
}

/// Whether an authority is one that an application may be told of as its own: a name or an address, and a port at most. An ingress
/// is reached by whatever name people gave it, so `_` passes, and addresses do; userinfo, and whatever a URI or a list would be made
/// of, does not.
///
/// # Errors
/// Says why the authority is none.
pub fn check_host(authority: &str) -> Result<(), AuthorityError> {
    if authority.contains('@') {
        return Err(AuthorityError::Userinfo);
    }
    let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            address.parse::<Ipv6Addr>().map_err(|_| AuthorityError::BadName)?;
            match port.strip_prefix(':') {
                None if port.is_empty() => return Ok(()),
                None => return Err(AuthorityError::BadName),
                Some(port) => return check_port(port),
            }
        }
        None => match authority.split_once(':') {
            None => (authority, None),
            Some((host, port)) => (host, Some(port)),
        },
    };
    port.map_or(Ok(()), check_port)?;
    let name = host.strip_suffix('.').unwrap_or(host);
    if name.is_empty() {
        return Err(AuthorityError::Empty);
    }
    let characters =
        |label: &str| label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    let labels =
        name.split('.').all(|label| (1..=LABEL_BYTES_MAX).contains(&label.len()) && characters(label));
    if labels && name.len() <= NAME_BYTES_MAX { Ok(()) } else { Err(AuthorityError::BadName) }
}

fn check_port(port: &str) -> Result<(), AuthorityError> {
    // `parse` alone would take a sign. An empty port is legal for RFC 3986 and pointless: no client sends it by itself.
    let digits = port.len() <= PORT_DIGITS_MAX && port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse::<u16>() {
        Ok(1..) if digits => Ok(()),
        Ok(_) | Err(_) => Err(AuthorityError::BadPort),
    }
}

/// Whether `name` (without final dot) is a DNS name and no address; upper case passes.
pub(crate) fn check_name(name: &str) -> Result<(), AuthorityError> {
    let mut last = "";
    for label in name.split('.') {
        let characters = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let hyphens = label.starts_with('-') || label.ends_with('-');
        if label.is_empty() || label.len() > LABEL_BYTES_MAX || hyphens || !characters {
            return Err(AuthorityError::BadName);
        }
        last = label;
    }
    // No top-level domain is a number (RFC 3696, 2), while inet_aton takes 127.1, 0x7f.1, 0177.0.0.1 and 2130706433: what ends
    // in a number is an address, as the URL standard has it too.
    if is_number(last) {
        return Err(AuthorityError::IpAddress);
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(AuthorityError::BadName);
    }
    Ok(())
}

/// Whether `inet_aton` reads this label as a number: decimal or octal digits, or hexadecimal ones after `0x`.
pub(crate) fn is_number(label: &str) -> bool {
    let digits = label.bytes().all(|byte| byte.is_ascii_digit());
    let hexadecimal = label
        .strip_prefix("0x")
        .or_else(|| label.strip_prefix("0X"))
        .is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()));
    digits || hexadecimal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_name_gives_the_same_service() {
        for authority in [
            "profile",
            "profile.",
            "profile:80",
            "profile.:80",
            "PROFILE",
            "Profile.:65535",
            "profile:1",
            "profile:00080",
        ] {
            assert_eq!(service_of(authority).as_deref(), Ok("profile"), "{authority}");
        }
        for name in [
            "www.example.com",
            "7-zip",
            "1e3",
            "127.0.0.1.example",
            "0xyz",
            "a.0x7g",
            "1.2.3.4a",
            "xn--bcher-kva",
        ] {
            assert_eq!(service_of(name).as_deref(), Ok(name));
        }
    }

    #[test]
    fn an_ingress_has_any_name_but_none_that_is_something_else() {
        for authority in
            ["localhost", "LOCALHOST:8080", "my_shop.example.", "127.0.0.1:80", "[::1]", "[::1]:80"]
        {
            assert_eq!(check_host(authority), Ok(()), "{authority}");
        }
        for (authority, error) in [
            ("", AuthorityError::Empty),
            (".", AuthorityError::Empty),
            (":80", AuthorityError::Empty),
            ("a@b", AuthorityError::Userinfo),
            ("a:", AuthorityError::BadPort),
            ("a:80:80", AuthorityError::BadPort),
            ("[::1]:x", AuthorityError::BadPort),
            ("[::1]80", AuthorityError::BadName),
            ("[a]", AuthorityError::BadName),
            ("::1", AuthorityError::BadPort),
            ("a..b", AuthorityError::BadName),
            ("a, b", AuthorityError::BadName),
            ("a/b", AuthorityError::BadName),
        ] {
            assert_eq!(check_host(authority), Err(error), "{authority}");
        }
    }

    #[test]
    fn a_canonical_name_is_not_copied() {
        assert!(matches!(service_of("profile:8080"), Ok(Cow::Borrowed("profile"))));
        assert!(matches!(service_of("profile."), Ok(Cow::Borrowed("profile"))));
        assert!(matches!(service_of("Profile"), Ok(Cow::Owned(_))));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        use AuthorityError::{BadName, BadPort, Empty, IpAddress, Userinfo};
        let long_label = "a".repeat(64);
        let long_name = ["a".repeat(63).as_str(); 4].join(".");
        let cases = [
            ("", Empty),
            (".", Empty),
            (":80", Empty),
            (".:80", Empty),
            ("profile@auth", Userinfo),
            ("profile@", Userinfo),
            ("@auth", Userinfo),
            ("profile:80@auth", Userinfo),
            ("profile@auth@dashboard", Userinfo),
            ("127.0.0.1", IpAddress),
            ("127.0.0.1.", IpAddress),
            ("127.0.0.1:80", IpAddress),
            ("127.1", IpAddress),
            ("0x7f.1", IpAddress),
            ("0X7F.1", IpAddress),
            ("0177.0.0.1", IpAddress),
            ("2130706433", IpAddress),
            ("2130706433.:80", IpAddress),
            ("0x7f000001", IpAddress),
            ("0x", IpAddress),
            ("0", IpAddress),
            ("256.256.256.256", IpAddress),
            ("99999999999999999999", IpAddress),
            ("profile.1", IpAddress),
            ("[::1]", IpAddress),
            ("[::1]:80", IpAddress),
            ("[fe80::1%25eth0]", IpAddress),
            ("[", IpAddress),
            ("::1", IpAddress),
            ("::ffff:127.0.0.1", IpAddress),
            ("profile:", BadPort),
            ("profile:0", BadPort),
            ("profile:00", BadPort),
            ("profile:65536", BadPort),
            ("profile:000080", BadPort),
            ("profile:18446744073709551697", BadPort),
            ("profile:+80", BadPort),
            ("profile:-80", BadPort),
            ("profile:8o", BadPort),
            ("profile: 80", BadPort),
            ("profile:80:80", BadPort),
            ("profile::80", BadPort),
            ("profile..", BadName),
            ("profile...", BadName),
            (".profile", BadName),
            ("a..b", BadName),
            ("..", BadName),
            ("pro file", BadName),
            (" profile", BadName),
            ("profile\t", BadName),
            ("profile\0", BadName),
            ("profile/", BadName),
            ("profile?", BadName),
            ("profile#", BadName),
            ("profile\\", BadName),
            ("profile,auth", BadName),
            ("%70rofile", BadName),
            ("pro_file", BadName),
            ("-profile", BadName),
            ("profile-", BadName),
            ("profil\u{e9}", BadName),
            // FULLWIDTH DIGIT ONE and IDEOGRAPHIC FULL STOP, which IDNA maps to a digit and a dot.
            ("\u{ff11}27.0.0.1", BadName),
            ("profile\u{3002}", BadName),
            (long_label.as_str(), BadName),
            (long_name.as_str(), BadName),
        ];
        for (authority, error) in cases {
            assert_eq!(service_of(authority), Err(error), "{authority:?}");
        }
    }

    #[test]
    fn the_longest_name_passes() {
        let name = format!("{}.{}", ["a".repeat(63).as_str(); 3].join("."), "b".repeat(61));
        assert_eq!(name.len(), NAME_BYTES_MAX);
        assert_eq!(service_of(&format!("{name}.:443")).as_deref(), Ok(name.as_str()));
    }

    #[test]
    fn what_it_gives_it_takes_again() {
        for authority in ["Profile.:80", "A.B.C", "xn--a", "1e3:1"] {
            let name = service_of(authority).unwrap();
            assert_eq!(service_of(&name).unwrap(), name);
        }
    }
}
