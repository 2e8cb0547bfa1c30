//! Does any path or pattern make the functions fail, and does a path that passes hide a dot segment?
#![no_main]

use kiro_core::authority;
use kiro_core::path::{PathPattern, screen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str)| {
    let (pattern, path) = input;
    if let Ok(screened) = screen(path) {
        assert!(path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic()));
        let decoded = decode(path);
        assert!(!decoded.contains(&0));
        for segment in decoded.split(|byte| matches!(byte, b'/' | b'\\')) {
            let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
            assert!(name != b"." && name != b"..", "{path}");
        }
        if !screened.ambiguous {
            // One reading: as many segments decoded as raw, none of them empty but the last.
            let slashes = |bytes: &[u8]| bytes.iter().filter(|byte| matches!(byte, b'/' | b'\\')).count();
            assert_eq!(slashes(&decoded), slashes(path.as_bytes()));
            assert!(!path.contains("//") && !path.contains([';', '\\']));
        }
    }
    if let Ok(pattern) = PathPattern::parse(pattern) {
        let _: bool = pattern.matches(path);
        let text = pattern.to_string();
        // What stands for nothing but itself fits itself.
        if !text.contains('*') {
            assert!(pattern.matches(&text));
        }
        assert_eq!(PathPattern::parse(&text).as_ref(), Ok(&pattern));
        if PathPattern::parse("/**").is_ok_and(|all| !all.matches(path)) {
            assert!(!pattern.matches(path));
        }
    }
    if let Ok(name) = authority::service_of(path) {
        assert_eq!(authority::service_of(&name).as_deref(), Ok(&*name));
        assert!(name.parse::<std::net::IpAddr>().is_err());
    }
});

/// Decodes every escape once.
fn decode(path: &str) -> Vec<u8> {
    let mut decoded = Vec::new();
    let mut rest = path.as_bytes();
    while let [byte, tail @ ..] = rest {
        let escape = (*byte == b'%').then(|| std::str::from_utf8(tail.get(..2)?).ok()).flatten();
        match escape.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                decoded.push(*byte);
                rest = tail;
            }
        }
    }
    decoded
}
