use super::*;

/// RFC 9110's example: Sun, 06 Nov 1994 08:49:37 GMT.
const EXAMPLE: u64 = 784_111_777;

fn seconds(value: &str, now: u64) -> Option<u64> {
    parse_retry_after(value.as_bytes(), now).map(|wait| wait.as_secs())
}

#[test]
fn seconds_and_all_three_forms_of_a_date_are_read() {
    for (value, want) in [
        ("0", 0),
        ("120", 120),
        (" 7\t", 7),
        ("86401", 86_400),
        ("99999999999999999999999999", 86_400),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 90),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 90),
        ("Sun Nov  6 08:49:37 1994", 90),
        ("Mon, 07 Nov 1994 08:48:07 GMT", 86_400),
        ("Tue, 06 Nov 2094 08:49:37 GMT", 86_400),
        // What has passed is now.
        ("Sun, 06 Nov 1994 08:48:06 GMT", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 01 Jan 0001 00:00:00 GMT", 0),
    ] {
        assert_eq!(seconds(value, EXAMPLE - 90), Some(want), "{value}");
    }
}

#[test]
fn what_is_neither_is_as_good_as_absent() {
    for value in [
        "",
        " ",
        "-1",
        "+1",
        "1.5",
        "1s",
        "1, 2",
        "soon",
        "Sun, 06 Nov 1994 08:49:37",
        "Sun, 06 Nov 1994 08:49:37 UTC",
        "Sun, 06 Nov 1994 08:49:37 +0000",
        "Sun, 6 Nov 1994 08:49:37 GMT",
        "Sun, 06 nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 94 08:49:37 GMT",
        "Sun, 06  Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 24:00:00 GMT",
        "Sun, 06 Nov 1994 08:60:00 GMT",
        "Sun, 06 Nov 1994 08:49:61 GMT",
        "Sun, 06 Nov 1994 8:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37:00 GMT",
        "Sun, 00 Nov 1994 08:49:37 GMT",
        "Sun, 31 Nov 1994 08:49:37 GMT",
        "Wed, 29 Feb 1900 08:49:37 GMT",
        "Xyz, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06 Nov 1994 08:49:37 GMT",
        "Sun, 06-Nov-94 08:49:37 GMT",
        "Sunday, 06-Nov-1994 08:49:37 GMT",
        "Sunday, 06-Nov-94-1 08:49:37 GMT",
        "Sun Nov 6 08:49:37 1994",
        "Sun Nov  6 08:49:37 94",
        "Sun Nov \u{fc} 08:49:37 1994",
        "\u{fc}",
    ] {
        assert_eq!(seconds(value, EXAMPLE), None, "{value:?}");
    }
    assert_eq!(parse_retry_after(b"\xff", EXAMPLE), None);
}

#[test]
fn years_of_two_digits_are_within_fifty_years_ahead() {
    // 2024-01-15 12:00:00
    let now = 1_705_320_000;
    assert_eq!(seconds("Monday, 15-Jan-24 12:00:30 GMT", now), Some(30));
    assert_eq!(seconds("Monday, 15-Jan-74 12:00:30 GMT", now), Some(86_400));
    assert_eq!(seconds("Wednesday, 15-Jan-75 12:00:30 GMT", now), Some(0));
}

#[test]
fn dates_agree_with_a_calendar_that_counts_days_one_by_one() {
    let (mut year, mut month, mut day) = (1970_i64, 1_i64, 1_i64);
    for days in 0..60_000_i64 {
        assert_eq!(days_from_civil(year, month, day), days, "{year}-{month}-{day}");
        day += 1;
        if day > days_of_month(year, month) {
            (month, day) = (month + 1, 1);
        }
        if month > 12 {
            (year, month) = (year + 1, 1);
        }
    }
    assert_eq!((year, month, day), (2134, 4, 11));
    assert_eq!(days_of_month(2000, 2), 29);
    assert_eq!(days_of_month(1900, 2), 28);
}

#[test]
fn nothing_that_a_peer_sends_panics() {
    let mut state = 1_u64;
    let alphabet = b"0123456789 ,-:SunNovGMTFeb\xfc\0";
    for _ in 0..50_000 {
        let mut value = b"Sun, 06 Nov 1994 08:49:37 GMT".to_vec();
        for _ in 0..=state % 4 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (state >> 33) as usize % value.len();
            value[at] = alphabet[(state >> 45) as usize % alphabet.len()];
        }
        for now in [0, EXAMPLE, u64::MAX] {
            let _ = parse_retry_after(&value, now);
        }
    }
}
