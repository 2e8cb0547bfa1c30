use super::*;
use crate::random::Random;

const UNPROCESSED: [Failure; 5] = [
    Failure::Connect,
    Failure::RefusedStream,
    Failure::GoAway,
    Failure::StaleConnection,
    Failure::NotProcessed { retry_after: None },
];

fn status(code: u16, retry_after_seconds: Option<u64>) -> Failure {
    Failure::Status {
        status: StatusCode::from_u16(code).unwrap(),
        retry_after: retry_after_seconds.map(Duration::from_secs),
    }
}

fn declared() -> RetryPolicy {
    RetryPolicy::new(RetrySettings::default()).unwrap()
}

fn full(now: Instant) -> RetryBudget {
    RetryBudget::new(BudgetSettings::default(), now).unwrap()
}

fn attempt(failure: Failure) -> FailedAttempt<'static> {
    FailedAttempt {
        method: &Method::GET,
        failure,
        attempts_made: 1,
        another_replica: true,
        body_replayable: true,
        response_begun: false,
        left: Some(Duration::from_secs(15)),
    }
}

/// With a fresh budget and the longest wait that chance allows.
fn check(policy: &RetryPolicy, attempt: &FailedAttempt<'_>) -> Verdict {
    let now = Instant::now();
    decide(policy, &full(now), attempt, now, u64::MAX)
}

fn gives_up(policy: &RetryPolicy, attempt: &FailedAttempt<'_>, reason: GiveUp) {
    assert_eq!(check(policy, attempt), Verdict::GiveUp(reason), "{attempt:?}");
}

fn waits(policy: &RetryPolicy, attempt: &FailedAttempt<'_>) -> Duration {
    match check(policy, attempt) {
        Verdict::Retry { after } => after,
        Verdict::GiveUp(reason) => panic!("{reason}: {attempt:?}"),
    }
}

#[test]
fn what_was_surely_not_processed_goes_elsewhere_at_once_whatever_its_method() {
    for failure in UNPROCESSED {
        for policy in [RetryPolicy::undeclared(), declared()] {
            let post = FailedAttempt { method: &Method::POST, ..attempt(failure) };
            assert_eq!(waits(&policy, &post), Duration::ZERO);
            // Not for ever.
            let second = FailedAttempt { attempts_made: 2, ..post };
            assert!(waits(&policy, &second) > Duration::ZERO, "{failure:?}");
            gives_up(&policy, &FailedAttempt { attempts_made: 3, ..post }, GiveUp::Attempts);
        }
    }
}

#[test]
fn without_another_replica_only_a_new_connection_is_tried_at_once() {
    for failure in UNPROCESSED {
        let alone = FailedAttempt { another_replica: false, ..attempt(failure) };
        let at_once = matches!(failure, Failure::GoAway | Failure::StaleConnection);
        assert_eq!(waits(&RetryPolicy::undeclared(), &alone).is_zero(), at_once, "{failure:?}");
    }
}

#[test]
fn what_may_have_been_processed_needs_a_declaration_and_a_method_that_may_be_repeated() {
    for failure in [Failure::Reset, Failure::Timeout, status(502, None), status(503, None), status(504, None)]
    {
        gives_up(
            &declared(),
            &FailedAttempt { method: &Method::POST, ..attempt(failure) },
            GiveUp::NotIdempotent,
        );
        assert!(waits(&declared(), &attempt(failure)) > Duration::ZERO);
        gives_up(&declared(), &FailedAttempt { attempts_made: 3, ..attempt(failure) }, GiveUp::Attempts);
    }
    for failure in [Failure::Reset, Failure::Timeout] {
        gives_up(&RetryPolicy::undeclared(), &attempt(failure), GiveUp::NotDeclared);
    }
    for code in [200, 404, 429, 500, 501] {
        gives_up(&declared(), &attempt(status(code, None)), GiveUp::Status);
    }
    gives_up(&RetryPolicy::undeclared(), &attempt(status(503, None)), GiveUp::Status);
}

#[test]
fn nothing_is_tried_again_once_a_response_has_begun_or_the_body_is_gone() {
    for failure in UNPROCESSED.into_iter().chain([Failure::Reset, Failure::Timeout, status(503, None)]) {
        gives_up(
            &declared(),
            &FailedAttempt { response_begun: true, ..attempt(failure) },
            GiveUp::ResponseBegun,
        );
        gives_up(
            &declared(),
            &FailedAttempt { body_replayable: false, ..attempt(failure) },
            GiveUp::BodyGone,
        );
        gives_up(
            &declared(),
            &FailedAttempt { left: Some(Duration::ZERO), ..attempt(failure) },
            GiveUp::Deadline,
        );
    }
}

#[test]
fn the_wait_leaves_time_for_the_attempt() {
    for millis in 1..2_000 {
        let left = Duration::from_millis(millis);
        for attempts_made in 1..=2 {
            let attempt = FailedAttempt { attempts_made, left: Some(left), ..attempt(Failure::Reset) };
            let wait = waits(&declared(), &attempt);
            assert!(wait <= left / 2, "{wait:?} of {left:?}");
            let ceiling = Duration::from_millis(25 * u64::from(attempts_made));
            assert!(wait <= ceiling && wait + Duration::from_nanos(2) >= ceiling.min(left / 2), "{wait:?}");
        }
    }
}

#[test]
fn waits_are_spread_over_the_whole_time() {
    let now = Instant::now();
    let mut random = Random(3);
    let mut tenths = [0_u32; 10];
    for _ in 0..10_000 {
        let verdict = decide(&declared(), &full(now), &attempt(Failure::Reset), now, random.next());
        let Verdict::Retry { after } = verdict else { panic!("{verdict:?}") };
        tenths[(after.as_nanos() * 10 / Duration::from_millis(25).as_nanos()) as usize] += 1;
    }
    assert!(tenths.iter().all(|count| (850..1_150).contains(count)), "{tenths:?}");
}

#[test]
fn a_wait_that_the_response_asks_for_is_kept_or_nothing_is_tried() {
    let failures: [fn(u64) -> Failure; 2] = [
        |seconds| status(503, Some(seconds)),
        |seconds| Failure::NotProcessed { retry_after: Some(Duration::from_secs(seconds)) },
    ];
    for failure in failures {
        for seconds in 0..20 {
            for left in [None, Some(0), Some(1), Some(5), Some(15), Some(60)] {
                let left = left.map(Duration::from_secs);
                let asked = Duration::from_secs(seconds);
                let attempt = FailedAttempt { left, ..attempt(failure(seconds)) };
                let has_room = left.is_none_or(|left| asked < left) && asked <= RETRY_AFTER_MAX;
                if has_room {
                    let wait = waits(&declared(), &attempt);
                    assert!(wait >= asked && left.is_none_or(|left| wait < left), "{wait:?}, {attempt:?}");
                } else {
                    gives_up(&declared(), &attempt, GiveUp::Deadline);
                }
            }
        }
    }
    // Callers that were told the same don't come back together.
    assert!(waits(&declared(), &attempt(status(503, Some(1)))) > Duration::from_secs(1));
}

#[test]
fn a_spent_budget_refuses_all_but_reroutes() {
    let now = Instant::now();
    let budget = full(now);
    assert_eq!((0..1_000).filter(|_| budget.withdraw(now)).count(), 100);
    let verdict = |attempt: &FailedAttempt<'_>| decide(&declared(), &budget, attempt, now, 0);
    budget.succeeded();
    assert_eq!(verdict(&attempt(Failure::Reset)), Verdict::GiveUp(GiveUp::Budget));
    assert_eq!(verdict(&attempt(Failure::Connect)), Verdict::Retry { after: Duration::ZERO });
    let second = FailedAttempt { attempts_made: 2, ..attempt(Failure::Connect) };
    assert_eq!(verdict(&second), Verdict::GiveUp(GiveUp::Budget));
    let alone = FailedAttempt { another_replica: false, ..attempt(Failure::Connect) };
    assert_eq!(verdict(&alone), Verdict::GiveUp(GiveUp::Budget));
}

#[test]
fn what_gives_up_costs_nothing() {
    let now = Instant::now();
    let budget = full(now);
    for attempt in [
        FailedAttempt { method: &Method::POST, ..attempt(Failure::Reset) },
        FailedAttempt { attempts_made: 3, ..attempt(Failure::Reset) },
        FailedAttempt { response_begun: true, ..attempt(Failure::Reset) },
        FailedAttempt { left: Some(Duration::ZERO), ..attempt(Failure::Reset) },
        attempt(Failure::Connect),
    ] {
        decide(&declared(), &budget, &attempt, now, 0);
        assert_eq!(budget.left(now), 100, "{attempt:?}");
    }
    decide(&declared(), &budget, &attempt(Failure::Reset), now, 0);
    assert_eq!(budget.left(now), 99);
}

#[test]
fn a_callee_that_is_gone_sees_no_more_attempts_than_the_budget_has() {
    for failure in [Failure::Connect, Failure::RefusedStream, Failure::Reset, status(503, None)] {
        let base = Instant::now();
        let budget = full(base);
        let (mut requests, mut retries) = (0_u32, 0_u32);
        // Ten seconds of a thousand requests a second.
        for request in 0..10_000 {
            let now = base + Duration::from_millis(request);
            budget.deposit(now);
            requests += 1;
            for attempts_made in 1.. {
                let attempt = FailedAttempt { attempts_made, ..attempt(failure) };
                match decide(&declared(), &budget, &attempt, now, 0) {
                    Verdict::Retry { .. } => retries += 1,
                    Verdict::GiveUp(_) => break,
                }
            }
        }
        let bound = requests / 5 + 100 + 100 + 2 * THROTTLE_FAILURES;
        assert!(retries <= bound, "{failure:?}: {retries} of {bound}");
        if !failure.is_surely_not_processed() {
            assert!(retries <= THROTTLE_FAILURES, "{failure:?}: {retries}");
        }
    }
}

#[test]
fn an_update_that_takes_one_replica_of_two_costs_neither_a_request_nor_the_budget() {
    let base = Instant::now();
    let budget = full(base);
    for request in 0..10_000 {
        let now = base + Duration::from_millis(request);
        budget.deposit(now);
        if request % 2 == 0 {
            let post = FailedAttempt {
                method: &Method::POST,
                ..attempt(Failure::NotProcessed { retry_after: None })
            };
            let verdict = decide(&RetryPolicy::undeclared(), &budget, &post, now, 0);
            assert_eq!(verdict, Verdict::Retry { after: Duration::ZERO });
        }
        budget.succeeded();
    }
    assert_eq!(budget.left(base + Duration::from_secs(10)), 100);
}

#[test]
fn to_ask_another_replica_than_a_busy_one_is_paid_for() {
    let base = Instant::now();
    let budget = full(base);
    let mut asked = 0;
    assert!(Failure::Busy.is_surely_not_processed());
    for request in 0..10_000 {
        let now = base + Duration::from_millis(request);
        budget.deposit(now);
        let post = FailedAttempt { method: &Method::POST, ..attempt(Failure::Busy) };
        match decide(&RetryPolicy::undeclared(), &budget, &post, now, 0) {
            Verdict::Retry { .. } => asked += 1,
            Verdict::GiveUp(reason) => assert_eq!(reason, GiveUp::Budget),
        }
        budget.succeeded();
    }
    // A fifth of the requests, ten a second, and what the budget holds at first.
    assert!((2_000..=2_300).contains(&asked), "{asked}");
}

#[test]
fn every_reason_has_a_word_of_its_own() {
    let words = [
        GiveUp::ResponseBegun,
        GiveUp::BodyGone,
        GiveUp::Deadline,
        GiveUp::NotDeclared,
        GiveUp::Status,
        GiveUp::NotIdempotent,
        GiveUp::Attempts,
        GiveUp::Throttled,
        GiveUp::Budget,
    ]
    .map(GiveUp::word);
    let distinct: std::collections::HashSet<&str> = words.into_iter().collect();
    assert_eq!(distinct.len(), words.len());
    assert!(words.iter().all(|word| word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')));
}
