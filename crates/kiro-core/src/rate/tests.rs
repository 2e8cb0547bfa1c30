use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::*;

fn rate(requests: u32, per: Duration, burst: u32) -> RateSettings {
    RateSettings::new(requests, per, Some(burst)).unwrap()
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_burst_passes_and_then_one_an_interval() {
    let start = Instant::now();
    let limit = RateLimit::new(rate(10, SECOND, 3), start);
    let left = |remaining, reset_ms| Ok(Left { remaining, reset: Duration::from_millis(reset_ms) });
    assert_eq!(limit.check(start), left(2, 200));
    assert_eq!(limit.check(start), left(1, 100));
    assert_eq!(limit.check(start), left(0, 100));
    assert_eq!(limit.check(start), Err(Limited { retry_after: Duration::from_millis(100) }));
    assert!(limit.check(start + Duration::from_nanos(99_999_999)).is_err());
    assert!(limit.check(start + Duration::from_millis(100)).is_ok());
    // However long nobody comes, no more than a burst.
    let later = start + Duration::from_secs(1_000_000);
    assert_eq!((0..10).filter(|_| limit.check(later).is_ok()).count(), 3);
    // Nor from a clock that is behind, or before the beginning.
    assert!(limit.check(start).is_err());
}

#[test]
fn who_waits_as_told_passes_and_no_sooner() {
    let start = Instant::now();
    let rates = [
        (3, SECOND, 1),
        (7, SECOND, 7),
        (1_000_000, SECOND, 1),
        (999_983, SECOND, 5),
        (1, Duration::from_secs(86_400), 2),
        (30, Duration::from_secs(60), 30),
        (7, Duration::from_millis(13), 3),
    ];
    for (requests, per, burst) in rates {
        let limit = RateLimit::new(rate(requests, per, burst), start);
        let mut now = start + Duration::from_nanos(12_345);
        for _ in 0..1_000 {
            let refused = loop {
                if let Err(limited) = limit.check(now) {
                    break limited;
                }
            };
            if refused.retry_after > Duration::from_nanos(2) {
                let early = now + refused.retry_after - Duration::from_nanos(2);
                assert!(limit.check(early).is_err(), "{requests} in {per:?}");
            }
            now += refused.retry_after;
            assert!(limit.check(now).is_ok(), "{requests} in {per:?}");
        }
    }
}

#[test]
fn a_rate_does_not_drift() {
    // Three a second is no whole number of nanoseconds: after a year at the exact pace, still none refused and none too many.
    let start = Instant::now();
    let limit = RateLimit::new(rate(3, SECOND, 3), start);
    for second in (0..366 * 86_400).step_by(86_399) {
        let now = start + Duration::from_secs(second);
        assert_eq!((0..5).filter(|_| limit.check(now).is_ok()).count(), 3, "second {second}");
        assert_eq!((0..5).filter(|_| limit.check(now + SECOND).is_ok()).count(), 3, "second {second}");
    }
}

#[test]
fn threads_that_ask_at_one_moment_get_exactly_the_burst() {
    const THREADS: u32 = 8;
    let start = Instant::now();
    for round in 1..=50_u32 {
        let burst = round * 7;
        let limit = RateLimit::new(rate(1, SECOND, burst), start);
        let keys = Keyed::new(KeyedSettings { rate: rate(1, SECOND, burst), max_keys: 10 }, start, [1, 2]);
        let (passed, passed_keyed, barrier) =
            (AtomicU32::new(0), AtomicU32::new(0), Barrier::new(THREADS as usize));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    barrier.wait();
                    for _ in 0..burst {
                        passed.fetch_add(u32::from(limit.check(start).is_ok()), Ordering::Relaxed);
                        let keyed = keys.check(&[b"one"], start);
                        passed_keyed.fetch_add(u32::from(keyed.is_ok()), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!((passed.into_inner(), passed_keyed.into_inner()), (burst, burst));
    }
}

#[test]
fn rates_that_no_bucket_can_keep_are_refused_with_a_fix() {
    let check = |requests, per, burst, fix: &str| {
        let error = RateSettings::new(requests, per, burst).unwrap_err().to_string();
        assert!(error.contains(fix), "{error}");
    };
    check(0, SECOND, None, "requests is 0");
    check(1, Duration::ZERO, None, "per is 0");
    check(1, SECOND, Some(0), "burst is 0");
    check(1_000_001, SECOND, None, "write fewer");
    check(1, Duration::from_nanos(999), None, "write fewer");
    check(1, Duration::from_secs(86_400), Some(367), "smaller burst");
    check(1, Duration::MAX, None, "smaller burst");
    check(u32::MAX, Duration::MAX, Some(u32::MAX), "smaller burst");
    check(u32::MAX, Duration::from_secs(367 * 86_400), None, "smaller burst");
    // The ends of what is allowed.
    for (requests, per, burst) in [
        (1_000_000, SECOND, u32::MAX),
        (1, Duration::from_nanos(1_000), 1),
        (1, Duration::from_secs(86_400), 366),
        (u32::MAX, Duration::from_secs(366 * 86_400), u32::MAX),
    ] {
        let start = Instant::now();
        let limit = RateLimit::new(rate(requests, per, burst), start);
        assert_eq!(limit.check(start).map(|left| left.remaining), Ok(burst - 1));
        let far = start + Duration::from_secs(40 * 366 * 86_400);
        assert_eq!(limit.check(far).map(|left| left.remaining), Ok(burst - 1));
    }
}

#[test]
fn fields_are_those_of_the_draft() {
    let name = PolicyName::new("auth.verify").unwrap();
    let policy = |requests, per| name.policy_field(&rate(requests, per, 1));
    assert_eq!(policy(100, Duration::from_secs(60)), "\"auth.verify\";q=100;w=60");
    // Windows have whole seconds; the quota follows.
    assert_eq!(policy(10, Duration::from_millis(100)), "\"auth.verify\";q=100;w=1");
    assert_eq!(policy(3, Duration::from_millis(1500)), "\"auth.verify\";q=4;w=2");
    assert_eq!(policy(u32::MAX, Duration::from_secs(4295)), "\"auth.verify\";q=4294967295;w=4295");
    let left = Left { remaining: 50, reset: Duration::from_millis(29_001) };
    assert_eq!(name.left_field(&left), "\"auth.verify\";r=50;t=30");
    let limited = Limited { retry_after: Duration::from_nanos(1) };
    assert_eq!(
        (limited.retry_after_seconds(), &*name.limited_field(&limited)),
        (1, "\"auth.verify\";r=0;t=1")
    );
    let limited = Limited { retry_after: Duration::from_millis(2_000) };
    assert_eq!(
        (limited.retry_after_seconds(), &*name.limited_field(&limited)),
        (2, "\"auth.verify\";r=0;t=2")
    );
    for bad in ["", "a\"b", "a\\b", "a b", "a,b", "ä", "a\r\nb", &"a".repeat(65)] {
        assert!(PolicyName::new(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn what_is_left_never_promises_more_than_the_rate() {
    // Section 8.5 of the draft: a caller that takes r in t must not come to more than the policy's rate.
    let start = Instant::now();
    for (requests, seconds, burst) in [(10, 1, 10), (100, 60, 5), (3, 7, 30), (1, 1, 1)] {
        let per = Duration::from_secs(seconds);
        let limit = RateLimit::new(rate(requests, per, burst), start);
        while let Ok(left) = limit.check(start) {
            let promised = f64::from(left.remaining) / left.reset.as_secs_f64();
            assert!(promised <= f64::from(requests) / per.as_secs_f64() * 1.000_001, "{left:?}");
        }
    }
}
