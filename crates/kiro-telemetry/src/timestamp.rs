//! How does a moment look in a log line? RFC 3339 in UTC with microseconds, for a few nanoseconds a line.

use std::cell::Cell;
use std::time::{SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;

/// `YYYY-MM-DDTHH:MM:SS`.
type Second = [u8; 19];

/// The last second of the year 9999; RFC 3339 has four digits for a year, so later moments are shown as this one.
const SECONDS_MAX: u64 = 253_402_300_799;

const EPOCH: Second = *b"1970-01-01T00:00:00";

thread_local! {
    // Thousands of lines share a second: its calendar is worked out once a second and thread.
    static LAST_SECOND: Cell<(u64, Second)> = const { Cell::new((0, EPOCH)) };
}

/// Appends `2026-01-31T12:34:56.789012Z`. A moment before 1970 is shown as 1970.
pub(crate) fn write_rfc3339(out: &mut Vec<u8>, moment: SystemTime) {
    let since_epoch = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    out.extend_from_slice(&second(since_epoch.as_secs().min(SECONDS_MAX)));
    out.push(b'.');
    write_digits(out, since_epoch.subsec_micros(), 100_000);
    out.push(b'Z');
}

/// Appends `12:34:56.789`, for people who watch a terminal and know what day it is.
pub(crate) fn write_time_of_day(out: &mut Vec<u8>, moment: SystemTime) {
    let since_epoch = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    let second = second(since_epoch.as_secs().min(SECONDS_MAX));
    out.extend(second.iter().skip("1970-01-01T".len()));
    out.push(b'.');
    write_digits(out, since_epoch.subsec_millis(), 100);
}

fn second(seconds: u64) -> Second {
    LAST_SECOND.with(|last| {
        let (known, text) = last.get();
        if known == seconds {
            return text;
        }
        let text = calendar(seconds);
        last.set((seconds, text));
        text
    })
}

fn calendar(seconds: u64) -> Second {
    let moment = i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let mut text = Vec::with_capacity(EPOCH.len());
    write_digits(&mut text, u32::try_from(moment.year()).unwrap_or_default(), 1000);
    for (separator, value) in [
        (b'-', u8::from(moment.month())),
        (b'-', moment.day()),
        (b'T', moment.hour()),
        (b':', moment.minute()),
        (b':', moment.second()),
    ] {
        text.push(separator);
        write_digits(&mut text, u32::from(value), 10);
    }
    text.try_into().unwrap_or(EPOCH)
}

/// Decimal digits from the place `highest` (a power of ten) down, zeros included.
fn write_digits(out: &mut Vec<u8>, value: u32, highest: u32) {
    let mut place = highest;
    while place > 0 {
        // Less than ten, so it fits.
        out.push(b'0' + (value / place % 10) as u8);
        place /= 10;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use time::format_description::well_known::Rfc3339;

    use super::*;

    fn text(moment: SystemTime) -> String {
        let mut out = Vec::new();
        write_rfc3339(&mut out, moment);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn known_moments() {
        assert_eq!(text(UNIX_EPOCH), "1970-01-01T00:00:00.000000Z");
        assert_eq!(text(UNIX_EPOCH - Duration::from_secs(5)), "1970-01-01T00:00:00.000000Z");
        assert_eq!(text(UNIX_EPOCH + Duration::new(951_827_696, 7_000)), "2000-02-29T12:34:56.000007Z");
        assert_eq!(
            text(UNIX_EPOCH + Duration::new(1_618_884_473, 999_999_999)),
            "2021-04-20T02:07:53.999999Z"
        );
        assert_eq!(text(UNIX_EPOCH + Duration::from_secs(SECONDS_MAX)), "9999-12-31T23:59:59.000000Z");
        assert_eq!(text(UNIX_EPOCH + Duration::from_secs(SECONDS_MAX + 1)), "9999-12-31T23:59:59.000000Z");
    }

    #[test]
    fn agrees_with_a_library_that_did_not_write_it() {
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..10_000 {
            let moment = UNIX_EPOCH + Duration::new(rng.u64(0..=SECONDS_MAX), rng.u32(0..1_000_000) * 1_000);
            let read_back = OffsetDateTime::parse(&text(moment), &Rfc3339).unwrap();
            assert_eq!(SystemTime::from(read_back), moment);
        }
    }

    #[test]
    fn time_of_day_is_the_same_moment() {
        let mut out = Vec::new();
        write_time_of_day(&mut out, UNIX_EPOCH + Duration::new(951_827_696, 7_890_000));
        assert_eq!(out, b"12:34:56.007");
    }
}
