use super::*;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn grpc_timeouts_are_read_as_the_specification_has_them() {
    for (text, want) in [
        ("1H", Duration::from_hours(1)),
        ("2M", Duration::from_mins(2)),
        ("3S", Duration::from_secs(3)),
        ("4m", ms(4)),
        ("5u", Duration::from_micros(5)),
        ("6n", Duration::from_nanos(6)),
        ("007S", Duration::from_secs(7)),
        ("0n", Duration::ZERO),
        ("99999999n", Duration::from_nanos(99_999_999)),
        ("99999999u", Duration::from_micros(99_999_999)),
        ("99999999m", ms(99_999_999)),
        ("99999999H", Duration::from_secs(99_999_999 * 3600)),
    ] {
        assert_eq!(parse_grpc_timeout(text.as_bytes()), Ok(want), "{text}");
    }
}

#[test]
fn what_is_no_grpc_timeout_is_an_error() {
    use DeadlineError::{NoNumber, NoUnit, NotDigits, TooManyDigits};
    for (text, want) in [
        ("", NoNumber),
        ("S", NoNumber),
        ("1", NoUnit),
        ("1s", NoUnit),
        ("1h", NoUnit),
        ("1N", NoUnit),
        ("1S ", NoUnit),
        ("100000000n", TooManyDigits { max: 8 }),
        ("000000001S", TooManyDigits { max: 8 }),
        ("+1S", NotDigits),
        ("-1S", NotDigits),
        (" 1S", NotDigits),
        ("1.5S", NotDigits),
        ("1 S", NotDigits),
        ("1SS", NotDigits),
        ("1S, 2S", NotDigits),
        ("\u{661}S", NotDigits),
    ] {
        assert_eq!(parse_grpc_timeout(text.as_bytes()), Err(want), "{text:?}");
    }
    assert_eq!(parse_grpc_timeout(b"\xff\xff"), Err(NoUnit));
}

#[test]
fn grpc_timeouts_are_written_in_the_finest_unit_that_holds_them() {
    for (left, want) in [
        (Duration::ZERO, "1n"),
        (Duration::from_nanos(1), "1n"),
        (Duration::from_nanos(99_999_999), "99999999n"),
        (ms(100), "100000u"),
        (Duration::from_secs(15), "15000000u"),
        (Duration::from_nanos(15_000_000_999), "15000000u"),
        (Duration::from_secs(100), "100000m"),
        (Duration::from_hours(1), "3600000m"),
        (Duration::from_hours(10_000), "36000000S"),
        (Duration::from_secs(99_999_999 * 3600), "99999999H"),
        (Duration::MAX, "99999999H"),
    ] {
        assert_eq!(format_grpc_timeout(left), want, "{left:?}");
    }
}

#[test]
fn a_grpc_timeout_that_travels_only_ever_shrinks_and_by_little() {
    let mut nanos: u128 = 1;
    while nanos < Duration::from_hours(99_999_999).as_nanos() {
        let left = Duration::from_nanos_u128(nanos);
        let read = parse_grpc_timeout(format_grpc_timeout(left).as_bytes()).unwrap();
        assert!(read <= left, "{left:?} became {read:?}");
        let lost = (left - read).as_nanos();
        // A unit is a thousand times the one before it, which leaves at least six of the eight digits.
        assert!(lost * 100_000 <= nanos, "{left:?} lost {lost} ns");
        assert_eq!(parse_grpc_timeout(format_grpc_timeout(read).as_bytes()), Ok(read), "{read:?}");
        nanos = nanos * 13 / 9 + 1;
    }
}

#[test]
fn our_own_field_has_one_spelling_for_each_time() {
    use DeadlineError::{LeadingZero, NoNumber, NotDigits, TooLong, TooManyDigits};
    for (text, want) in [
        ("0", Ok(ms(0))),
        ("1", Ok(ms(1))),
        ("15000", Ok(ms(15_000))),
        ("3600000", Ok(Duration::from_hours(1))),
        ("3600001", Err(TooLong)),
        ("9999999", Err(TooLong)),
        ("10000000", Err(TooManyDigits { max: 7 })),
        ("18446744073709551616", Err(TooManyDigits { max: 7 })),
        ("00", Err(LeadingZero)),
        ("01", Err(LeadingZero)),
        ("", Err(NoNumber)),
        ("-1", Err(NotDigits)),
        ("+1", Err(NotDigits)),
        ("1 ", Err(NotDigits)),
        ("1e3", Err(NotDigits)),
        ("1,2", Err(NotDigits)),
    ] {
        assert_eq!(parse_field(text.as_bytes()), want, "{text:?}");
    }
}

#[test]
fn what_goes_on_is_what_is_left_rounded_down() {
    let now = Instant::now();
    let deadline = Deadline::of_timeout(now, ms(1500));
    for (passed, left) in [
        (Duration::ZERO, "1500"),
        (Duration::from_nanos(1), "1499"),
        (ms(1499), "1"),
        (Duration::from_micros(1_499_001), "0"),
        (ms(1500), "0"),
        (Duration::from_hours(1), "0"),
    ] {
        let field = deadline.field(now + passed).unwrap();
        assert_eq!(field, left, "after {passed:?}");
        assert!(parse_field(field.as_bytes()).unwrap() <= deadline.left(now + passed));
    }
    assert!(!deadline.is_over(now + ms(1499)));
    assert!(deadline.is_over(now + ms(1500)));
    assert_eq!(deadline.grpc_timeout(now), "1500000u");

    assert_eq!(Deadline::of_timeout(now, LEFT_MAX).field(now).unwrap(), "3600000");
    assert_eq!(Deadline::of_timeout(now, LEFT_MAX + Duration::from_nanos(1)).field(now), None);
}

#[test]
fn nobodys_word_lengthens_anothers() {
    let now = Instant::now();
    let choices = [None, Some(ms(0)), Some(ms(10)), Some(ms(500)), Some(Duration::from_hours(2))];
    for route in choices {
        for peer in choices {
            for grpc in choices {
                let deadline = Budget { route, peer, grpc }.deadline(now);
                let words: Vec<Duration> = [route, peer, grpc].into_iter().flatten().collect();
                let left = deadline.map(|deadline| deadline.left(now));
                assert!(
                    words.iter().all(|word| left.is_some_and(|left| left <= *word)),
                    "{words:?} {left:?}"
                );
                assert!(left.is_none_or(|left| words.contains(&left)), "{words:?} {left:?}");
                assert_eq!(left.is_none(), words.is_empty());
            }
        }
    }
}

#[test]
fn an_attempts_deadline_is_within_its_requests() {
    let now = Instant::now();
    let deadline = Deadline::of_timeout(now, ms(100));
    assert_eq!(deadline.within(now, None), deadline);
    assert_eq!(deadline.within(now, Some(ms(30))).left(now), ms(30));
    assert_eq!(deadline.within(now + ms(80), Some(ms(30))), deadline);
}

#[test]
fn no_timeout_is_too_long_to_be_added() {
    let now = Instant::now();
    for timeout in [Duration::MAX, parse_grpc_timeout(b"99999999H").unwrap()] {
        let deadline = Deadline::of_timeout(now, timeout);
        assert!(deadline.left(now) >= Duration::from_hours(24 * 300), "{deadline:?}");
        assert_eq!(deadline.field(now), None);
    }
}
