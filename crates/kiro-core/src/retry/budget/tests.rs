use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;

use super::*;
use crate::random::Random;

fn settings(ratio_percent: u32, floor_per_second: u32, burst: u32) -> BudgetSettings {
    BudgetSettings { ratio_percent, floor_per_second, burst }
}

/// The rule, spelled out in retries: what is deposited, what comes with time, and no more than the burst.
struct Model {
    settings: BudgetSettings,
    /// In nanoseconds of the floor, which is exact where the floor divides a second.
    saved: u128,
    at: Duration,
}

impl Model {
    fn retry(&self) -> u128 {
        1_000_000_000 / u128::from(self.settings.floor_per_second)
    }

    fn pass(&mut self, at: Duration) {
        self.saved += (at - self.at).as_nanos();
        self.at = at;
        self.bound();
    }

    fn bound(&mut self) {
        self.saved = self.saved.min(self.retry() * u128::from(self.settings.burst));
    }

    fn deposit(&mut self) {
        self.saved += self.retry() * u128::from(self.settings.ratio_percent) / 100;
        self.bound();
    }

    fn withdraw(&mut self) -> bool {
        let Some(left) = self.saved.checked_sub(self.retry()) else { return false };
        self.saved = left;
        true
    }
}

#[test]
fn agrees_with_a_bucket_that_is_spelled_out() {
    for seed in 0..300 {
        let mut random = Random(seed);
        let pick = |random: &mut Random, of: &[u32]| of[random.below(of.len() as u64) as usize];
        let settings = settings(
            pick(&mut random, &[0, 10, 20, 100]),
            pick(&mut random, &[1, 10, 50, 1000]),
            pick(&mut random, &[1, 3, 100, 10_000]),
        );
        let base = Instant::now();
        let budget = RetryBudget::new(settings, base).unwrap();
        let mut model = Model { settings, saved: 0, at: Duration::ZERO };
        model.saved = model.retry() * u128::from(settings.burst);
        let failing = random.below(101);
        for step in 0..2_000 {
            let gap = match random.below(20) {
                0 => Duration::from_millis(random.below(3_000)),
                1..5 => Duration::from_micros(random.below(20_000)),
                _ => Duration::from_nanos(random.below(100_000)),
            };
            let at = model.at + gap;
            model.pass(at);
            if random.below(100) < failing {
                assert_eq!(budget.withdraw(base + at), model.withdraw(), "seed {seed}, step {step}");
            } else {
                budget.deposit(base + at);
                model.deposit();
            }
            let left = model.saved / model.retry();
            assert_eq!(u128::from(budget.left(base + at)), left, "seed {seed}, step {step}");
        }
    }
}

#[test]
fn a_storm_on_many_threads_gets_what_the_budget_has_and_not_one_more() {
    const THREADS: u64 = 8;
    const REQUESTS: u64 = 3_000;
    let base = Instant::now();
    for settings in [settings(20, 10, 100), settings(20, 7, 1), settings(0, 1, 50)] {
        let budget = RetryBudget::new(settings, base).unwrap();
        let retries = AtomicU64::new(0);
        // A second of a storm: each request fails as often as it is tried.
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (budget, retries) = (&budget, &retries);
                scope.spawn(move || {
                    for request in 0..REQUESTS {
                        let now = base + Duration::from_nanos((request * THREADS + thread) * 41_666);
                        budget.deposit(now);
                        for _ in 0..2 {
                            retries.fetch_add(u64::from(budget.withdraw(now)), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let retries = retries.into_inner();
        let deposited = THREADS * REQUESTS * u64::from(settings.ratio_percent) / 100;
        let bound = deposited + u64::from(settings.floor_per_second) + u64::from(settings.burst);
        assert!(retries <= bound, "{settings:?}: {retries} retries of {bound}");
    }
}

#[test]
fn a_deposit_on_one_thread_is_spent_once_on_another() {
    let base = Instant::now();
    let budget = RetryBudget::new(settings(100, 1, 10_000), base).unwrap();
    assert_eq!((0..20_000).filter(|_| budget.withdraw(base)).count(), 10_000);
    let (spent, done) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let last = done.load(Ordering::Acquire);
                    for _ in 0..10_000 {
                        spent.fetch_add(u64::from(budget.withdraw(base)), Ordering::Relaxed);
                    }
                    if last {
                        break;
                    }
                    thread::yield_now();
                }
            });
        }
        for _ in 0..9_000 {
            budget.deposit(base);
        }
        done.store(true, Ordering::Release);
    });
    // No time has passed, and 9,000 are less than the burst: each deposit is one retry, whatever raced.
    assert_eq!(spent.into_inner(), 9_000);
}

#[test]
fn a_quiet_edge_lives_on_its_floor_and_a_busy_one_on_its_share() {
    let base = Instant::now();
    let budget = RetryBudget::new(BudgetSettings::default(), base).unwrap();
    assert_eq!(budget.left(base), 100);
    assert_eq!((0..1_000).filter(|_| budget.withdraw(base)).count(), 100);
    assert!(!budget.withdraw(base + Duration::from_nanos(99_999_999)));
    assert!(budget.withdraw(base + Duration::from_millis(100)));
    for _ in 0..4 {
        budget.deposit(base + Duration::from_millis(100));
        assert!(!budget.withdraw(base + Duration::from_millis(100)));
    }
    budget.deposit(base + Duration::from_millis(100));
    assert!(budget.withdraw(base + Duration::from_millis(100)));
    // However long nothing happens, no more than the burst is saved.
    let later = base + Duration::from_hours(24 * 365 * 200);
    for _ in 0..1_000 {
        budget.deposit(later);
    }
    assert_eq!((0..1_000).filter(|_| budget.withdraw(later)).count(), 100);
    // A worker whose clock reading is older gets nothing out of that.
    assert!(!budget.withdraw(base));
    budget.deposit(base);
    assert!(!budget.withdraw(later));
}

#[test]
fn rounding_never_adds_a_retry() {
    let base = Instant::now();
    let budget = RetryBudget::new(settings(0, 3, 1), base).unwrap();
    assert!(budget.withdraw(base));
    // A third of a second is a little longer than this.
    assert!(!budget.withdraw(base + Duration::from_nanos(333_333_333)));
    assert!(budget.withdraw(base + Duration::from_nanos(333_333_334)));
}

#[test]
fn a_full_bucket_is_not_written_to() {
    let base = Instant::now();
    let budget = RetryBudget::new(BudgetSettings::default(), base).unwrap();
    let before = budget.empty_at.load(Ordering::Relaxed);
    for millis in 0..1_000 {
        budget.deposit(base + Duration::from_millis(millis));
        budget.succeeded();
    }
    assert_eq!(budget.empty_at.load(Ordering::Relaxed), before);
}

/// How many failures in such a rhythm are worth a repetition before none is.
fn failures_until_closed(every: Duration) -> u32 {
    let base = Instant::now();
    let budget = RetryBudget::new(BudgetSettings::default(), base).unwrap();
    (1..).find(|failure| !budget.failed(base + every * *failure).repeat).unwrap() - 1
}

#[test]
fn the_throttle_closes_after_a_hundred_failures_or_two_seconds_of_nothing_else() {
    for (every_millis, failures) in
        [(0, 99), (1, 99), (20, 99), (40, 49), (100, 19), (500, 3), (1_000, 1), (60_000, 1)]
    {
        let every = Duration::from_millis(every_millis);
        assert_eq!(failures_until_closed(every), failures, "{every:?}");
        let closed_after = every * (failures + 1);
        assert!(closed_after <= Duration::from_secs(2) || failures == 1, "{every:?}: {closed_after:?}");
    }
}

/// For how many of a hundred attempts the throttle is open, where this share of them succeeds.
fn open_percent(every: Duration, succeed_percent: u64) -> u64 {
    let base = Instant::now();
    let budget = RetryBudget::new(BudgetSettings::default(), base).unwrap();
    let mut random = Random(7);
    let mut open = 0;
    for attempt in 0..10_000 {
        if random.below(100) < succeed_percent {
            budget.succeeded();
        } else {
            let _ = budget.failed(base + every * attempt);
        }
        open += u64::from(!budget.is_throttled());
    }
    open / 100
}

#[test]
fn the_throttle_is_about_whether_most_attempts_succeed() {
    for every_millis in [0, 1, 10, 100, 1_000, 60_000] {
        let every = Duration::from_millis(every_millis);
        let open = [75, 35].map(|succeed| open_percent(every, succeed));
        assert!(open[0] >= 80 && open[1] <= 20, "{every:?}: {open:?}");
    }
}

#[test]
fn a_retry_that_mends_a_failure_makes_good_for_it() {
    let base = Instant::now();
    let budget = RetryBudget::new(BudgetSettings::default(), base).unwrap();
    // A quiet caller, and one replica of two fails: every other request succeeds with its second attempt.
    for second in 0..1_000 {
        assert!(budget.failed(base + Duration::from_secs(2 * second)).repeat);
        budget.succeeded();
        budget.succeeded();
    }
}

#[test]
fn as_long_as_anything_succeeds_a_reroute_is_worth_it() {
    let base = Instant::now();
    let budget = RetryBudget::new(BudgetSettings::default(), base).unwrap();
    let reroutes = (0..1_000).filter(|_| budget.failed(base).reroute).count();
    assert_eq!(reroutes, 2 * THROTTLE_FAILURES as usize);
    for _ in 0..100 {
        budget.succeeded();
        assert!(budget.failed(base).reroute);
        assert!(!budget.failed(base).reroute);
    }
}

#[test]
fn the_throttle_is_exact_on_many_threads() {
    let base = Instant::now();
    let budget = RetryBudget::new(BudgetSettings::default(), base).unwrap();
    let (reroutes, successes) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 0..4 {
            let (budget, reroutes, successes) = (&budget, &reroutes, &successes);
            scope.spawn(move || {
                let mut random = Random(seed);
                for _ in 0..5_000 {
                    if random.below(4) == 0 {
                        budget.succeeded();
                        successes.fetch_add(1, Ordering::Relaxed);
                    } else {
                        reroutes.fetch_add(u64::from(budget.failed(base).reroute), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let bound = successes.into_inner() + 2 * u64::from(THROTTLE_FAILURES);
    let reroutes = reroutes.into_inner();
    assert!(reroutes <= bound, "{reroutes} of {bound}");
}

#[test]
fn a_budget_that_makes_no_sense_says_what_to_write() {
    let error = |settings| RetryBudget::new(settings, Instant::now()).unwrap_err().to_string();
    assert_eq!(
        error(settings(101, 10, 100)),
        "a retry budget of 101 % would double the load: write 100 % or less"
    );
    assert_eq!(error(settings(20, 0, 100)), "a floor of 0 retries a second: write 1 to 1000");
    assert_eq!(error(settings(20, 1_001, 100)), "a floor of 1001 retries a second: write 1 to 1000");
    assert_eq!(error(settings(20, 10, 0)), "a burst of 0 retries: write 1 to 10000");
    assert_eq!(error(settings(20, 10, 10_001)), "a burst of 10001 retries: write 1 to 10000");
}
