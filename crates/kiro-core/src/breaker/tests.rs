use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicUsize};
use std::thread;

use super::*;
use crate::random::Random;

/// A breaker and the time, for stories.
struct Story {
    breaker: Arc<Breaker>,
    now: Instant,
}

impl Story {
    fn begin() -> Self {
        let now = Instant::now();
        Self { breaker: Breaker::new(BreakerSettings::default(), now).unwrap(), now }
    }

    fn pass(&mut self, seconds: f64) {
        self.now += Duration::from_secs_f64(seconds);
    }

    fn admit(&self) -> Admission {
        self.breaker.admit(self.now)
    }

    /// No jitter: the longest time.
    fn record(&self, admission: Admission, outcome: Outcome) -> Option<Transition> {
        self.breaker.record(self.now, admission, outcome, || 0)
    }

    fn request(&self, outcome: Outcome) -> Option<Transition> {
        let admission = self.admit();
        assert!(!matches!(admission, Admission::Refused { .. }), "{admission:?}");
        self.record(admission, outcome)
    }

    fn requests(&self, count: u32, outcome: Outcome) {
        for _ in 0..count {
            assert_eq!(self.request(outcome), None);
        }
    }

    fn trial(&self) -> Admission {
        let admission = self.admit();
        assert!(matches!(admission, Admission::Trial(_)), "{admission:?}");
        admission
    }

    fn refused_for(&self) -> Duration {
        match self.admit() {
            Admission::Refused { retry_after } => retry_after,
            admitted @ (Admission::Closed(_) | Admission::Trial(_)) => panic!("{admitted:?}"),
        }
    }

    fn state(&self) -> BreakerState {
        self.breaker.snapshot(self.now).state
    }

    /// Opens it, and says for how long.
    fn open(&self) -> Duration {
        self.requests(19, Outcome::Failure);
        let transition = self.request(Outcome::Failure).unwrap();
        assert_eq!((transition.from, transition.to), (BreakerState::Closed, BreakerState::Open));
        transition.open_for.unwrap()
    }

    fn close(&self) {
        for _ in 0..3 {
            let trial = self.trial();
            self.record(trial, Outcome::Success);
        }
        assert_eq!(self.state(), BreakerState::Closed);
    }
}

#[test]
fn opens_on_half_of_twenty_within_ten_seconds() {
    let story = Story::begin();
    story.requests(9, Outcome::Success);
    story.requests(10, Outcome::Failure);
    let transition = story.request(Outcome::Failure).unwrap();
    let window = WindowCounts { requests: 20, failures: 11 };
    let open_for = Some(Duration::from_secs(5));
    assert_eq!(
        transition,
        Transition { from: BreakerState::Closed, to: BreakerState::Open, window, open_for }
    );
    assert_eq!(story.refused_for(), Duration::from_secs(5));

    // 49 of a hundred are none of its business, nor is what callers themselves broke off.
    let story = Story::begin();
    story.requests(51, Outcome::Success);
    story.requests(49, Outcome::Failure);
    story.requests(100, Outcome::Abandoned);
    assert_eq!(story.breaker.snapshot(story.now).window, WindowCounts { requests: 100, failures: 49 });

    // What is ten seconds old is forgotten.
    let mut story = Story::begin();
    for _ in 0..10 {
        story.requests(1, Outcome::Failure);
        story.pass(1.0);
    }
    story.requests(9, Outcome::Failure);
    story.pass(0.9);
    story.requests(1, Outcome::Failure);
    assert!(story.request(Outcome::Failure).is_some());
}

#[test]
fn closes_after_three_trials_that_all_succeed() {
    let mut story = Story::begin();
    story.open();
    story.pass(4.999);
    assert_eq!(story.refused_for(), Duration::from_millis(1));
    story.pass(0.001);
    let first = story.trial();
    let Admission::Trial(trial) = &first else { panic!("{first:?}") };
    let begun = trial.transition().unwrap();
    assert_eq!((begun.from, begun.to), (BreakerState::Open, BreakerState::HalfOpen));
    let (second, third) = (story.trial(), story.trial());
    assert_eq!(story.refused_for(), Duration::from_secs(1));
    assert_eq!(story.record(first, Outcome::Success), None);
    assert_eq!(story.record(second, Outcome::Success), None);
    assert_eq!(story.state(), BreakerState::HalfOpen);
    let closed = story.record(third, Outcome::Success).unwrap();
    assert_eq!((closed.from, closed.to), (BreakerState::HalfOpen, BreakerState::Closed));
    // What opened it counts no more.
    assert_eq!(story.breaker.snapshot(story.now).window, WindowCounts::default());
    story.requests(19, Outcome::Failure);
}

#[test]
fn one_failure_opens_it_again_for_twice_as_long_up_to_a_minute() {
    let mut story = Story::begin();
    let mut times = vec![story.open().as_secs()];
    for _ in 0..6 {
        story.pass(60.0);
        let (first, second) = (story.trial(), story.trial());
        assert_eq!(story.record(first, Outcome::Success), None);
        times.push(story.record(second, Outcome::Failure).unwrap().open_for.unwrap().as_secs());
    }
    assert_eq!(times, [5, 10, 20, 40, 60, 60, 60]);

    // Successes of another round don't count: there must be three in a row.
    story.pass(60.0);
    for _ in 0..2 {
        let trial = story.trial();
        story.record(trial, Outcome::Success);
    }
    assert_eq!(story.state(), BreakerState::HalfOpen);
    let trial = story.trial();
    story.record(trial, Outcome::Success);

    // Soon again is the same trouble still; a minute later it is another one.
    story.pass(59.0);
    assert_eq!(story.open(), Duration::from_secs(60));
    story.pass(60.0);
    story.close();
    story.pass(60.0);
    assert_eq!(story.open(), Duration::from_secs(5));
}

#[test]
fn a_trial_whose_caller_goes_away_frees_its_place() {
    let mut story = Story::begin();
    story.open();
    story.pass(5.0);
    for _ in 0..10 {
        let trials = [story.trial(), story.trial(), story.trial()];
        story.refused_for();
        let [first, second, third] = trials;
        drop(first);
        assert_eq!(story.record(second, Outcome::Abandoned), None);
        let again = [story.trial(), story.trial()];
        story.refused_for();
        drop((third, again));
        assert_eq!(story.breaker.snapshot(story.now).trials_in_flight, 0);
    }
    story.close();
}

#[test]
fn trials_that_hang_are_given_up() {
    let mut story = Story::begin();
    story.open();
    story.pass(5.0);
    let hanging = [story.trial(), story.trial(), story.trial()];
    story.pass(29.0);
    story.refused_for();
    story.pass(1.0);
    let fresh = story.trial();
    // Those that hung belong to another round: they neither open it, nor free a place that isn't theirs.
    for trial in hanging {
        assert_eq!(story.record(trial, Outcome::Failure), None);
    }
    assert_eq!(story.breaker.snapshot(story.now).trials_in_flight, 1);
    assert_eq!(story.record(fresh, Outcome::Success), None);
    assert_eq!(story.breaker.snapshot(story.now).trials_succeeded, 1);
}

#[test]
fn who_comes_second_to_the_lock_begins_no_round_of_its_own() {
    let mut story = Story::begin();
    story.open();
    // Both saw that the time is over; the second one waited for the lock while the first one began.
    story.pass(5.0);
    let first = story.trial();
    let second = story.breaker.begin_round(story.now);
    let Admission::Trial(trial) = &second else { panic!("{second:?}") };
    assert_eq!(trial.transition(), None);
    assert_eq!(story.breaker.snapshot(story.now).trials_in_flight, 2);
    // Or began, failed, and opened it again.
    assert!(story.record(first, Outcome::Failure).is_some());
    let third = story.breaker.begin_round(story.now);
    assert!(matches!(third, Admission::Refused { .. }), "{third:?}");
}

#[test]
fn what_was_admitted_before_it_opened_says_nothing_afterwards() {
    let mut story = Story::begin();
    let late: Vec<Admission> = (0..100).map(|_| story.admit()).collect();
    story.open();
    story.pass(5.0);
    story.close();
    for admission in late {
        assert_eq!(story.record(admission, Outcome::Failure), None);
    }
    assert_eq!(story.breaker.snapshot(story.now).window, WindowCounts::default());
}

#[test]
fn jitter_only_shortens_and_by_a_quarter_at_most() {
    let whole = Duration::from_secs(60);
    assert_eq!(jittered(whole, 0), whole);
    let shortest = jittered(whole, u64::MAX);
    assert!(shortest >= Duration::from_secs(45) && shortest < Duration::from_millis(45_001), "{shortest:?}");
}

#[test]
fn a_snapshot_says_what_it_does_and_until_when() {
    let mut story = Story::begin();
    let begin = story.now;
    story.pass(2.0);
    story.open();
    let opened = story.now;
    story.pass(1.0);
    let snapshot = story.breaker.snapshot(story.now);
    assert_eq!(
        snapshot,
        BreakerSnapshot {
            state: BreakerState::Open,
            since: opened,
            next_trial: Some(begin + Duration::from_secs(7)),
            window: WindowCounts { requests: 20, failures: 20 },
            opened_count: 1,
            trials_in_flight: 0,
            trials_succeeded: 0,
        }
    );
    story.pass(4.0);
    let trial = story.trial();
    let snapshot = story.breaker.snapshot(story.now);
    assert_eq!((snapshot.state.word(), snapshot.next_trial), ("half_open", None));
    assert_eq!(snapshot.trials_in_flight, 1);
    drop(trial);
}

#[test]
fn settings_that_make_no_sense_say_what_to_write() {
    let error = |change: fn(&mut BreakerSettings)| {
        let mut settings = BreakerSettings::default();
        change(&mut settings);
        Breaker::new(settings, Instant::now()).unwrap_err().to_string()
    };
    assert_eq!(error(|s| s.failures_percent = 0), "a breaker at 0 % of failures: write 1 to 100 %");
    assert_eq!(error(|s| s.failures_percent = 101), "a breaker at 101 % of failures: write 1 to 100 %");
    assert_eq!(error(|s| s.requests_min = 0), "a breaker over at least 0 requests: write 1 or more");
    assert!(error(|s| s.open_base = Duration::ZERO).starts_with("open for 0ns up to 60s: write times"));
    assert!(error(|s| s.open_max = Duration::from_secs(4)).starts_with("open for 5s up to 4s"));
    assert!(error(|s| s.open_max = Duration::from_hours(1)).contains("600s"));
    assert!(error(|s| s.trials = 0).starts_with("0 trials at a time, 3 successes: write 1 to 100"));
    assert!(error(|s| s.successes = 101).starts_with("3 trials at a time, 101 successes"));
}

/// The rule, spelled out: every outcome is kept, every admission knows what it was.
struct Model {
    settings: BreakerSettings,
    state: BreakerState,
    since: Duration,
    until: Duration,
    period: u64,
    outcomes: VecDeque<(u64, bool)>,
    trials: Vec<u64>,
    succeeded: u32,
    exponent: Option<u32>,
    next_id: u64,
}

/// What the model gave: an id and the period for what may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Given {
    Closed { period: u64 },
    Trial { id: u64 },
    Refused(Duration),
}

impl Model {
    fn new(settings: BreakerSettings) -> Self {
        Self {
            settings,
            state: BreakerState::Closed,
            since: Duration::ZERO,
            until: Duration::ZERO,
            period: 0,
            outcomes: VecDeque::new(),
            trials: Vec::new(),
            succeeded: 0,
            exponent: None,
            next_id: 0,
        }
    }

    fn enter(&mut self, state: BreakerState, now: Duration) {
        (self.state, self.since) = (state, now);
        self.period += 1;
        self.trials.clear();
        self.succeeded = 0;
    }

    fn open(&mut self, now: Duration, random: u64) {
        let exponent = self.exponent.unwrap();
        let whole = (self.settings.open_base * 2_u32.pow(exponent.min(16))).min(self.settings.open_max);
        self.enter(BreakerState::Open, now);
        self.until = now + jittered(whole, random);
    }

    fn admit(&mut self, now: Duration) -> Given {
        let half_open_too_long = self.state == BreakerState::HalfOpen
            && self.trials.len() >= self.settings.trials as usize
            && now - self.since >= ROUND_MAX;
        if (self.state == BreakerState::Open && now >= self.until) || half_open_too_long {
            self.enter(BreakerState::HalfOpen, now);
        }
        match self.state {
            BreakerState::Closed => Given::Closed { period: self.period },
            BreakerState::Open => Given::Refused(self.until - now),
            BreakerState::HalfOpen if self.trials.len() < self.settings.trials as usize => {
                self.next_id += 1;
                self.trials.push(self.next_id);
                Given::Trial { id: self.next_id }
            }
            BreakerState::HalfOpen => Given::Refused(RETRY_AFTER_TRIALS),
        }
    }

    fn record(&mut self, now: Duration, given: Given, outcome: Outcome, random: u64) {
        match given {
            Given::Refused(_) => {}
            Given::Closed { period } => {
                if period != self.period || outcome == Outcome::Abandoned {
                    return;
                }
                self.outcomes.push_back((now.as_secs(), outcome == Outcome::Failure));
                let (requests, failures) = self.counts(now);
                let too_often = failures * 100 >= requests * u64::from(self.settings.failures_percent);
                if outcome == Outcome::Failure
                    && requests >= u64::from(self.settings.requests_min)
                    && too_often
                {
                    self.exponent = Some(match self.exponent {
                        Some(exponent) if now - self.since < self.settings.open_max => exponent + 1,
                        Some(_) | None => 0,
                    });
                    self.open(now, random);
                }
            }
            Given::Trial { id } => {
                let Some(at) = self.trials.iter().position(|trial| *trial == id) else { return };
                self.trials.remove(at);
                match outcome {
                    Outcome::Abandoned => {}
                    Outcome::Failure => {
                        self.exponent = self.exponent.map(|exponent| exponent + 1);
                        self.open(now, random);
                    }
                    Outcome::Success => {
                        self.succeeded += 1;
                        if self.succeeded >= self.settings.successes {
                            self.enter(BreakerState::Closed, now);
                            self.outcomes.clear();
                        }
                    }
                }
            }
        }
    }

    fn counts(&self, now: Duration) -> (u64, u64) {
        let inside = self.outcomes.iter().filter(|(second, _)| now.as_secs() - second < WINDOW.as_secs());
        let failures = inside.clone().filter(|(_, failed)| *failed).count();
        (inside.count() as u64, failures as u64)
    }
}

#[test]
fn agrees_with_a_model_that_keeps_every_outcome() {
    let mut opened = 0;
    let mut closed_again = 0;
    for seed in 0..300 {
        let mut random = Random(seed);
        let settings = BreakerSettings {
            failures_percent: [1, 30, 50, 100][random.below(4) as usize],
            requests_min: [1, 5, 20][random.below(3) as usize],
            open_base: Duration::from_millis(500 + random.below(5_000)),
            open_max: Duration::from_millis(6_000 + random.below(60_000)),
            trials: 1 + random.below(4) as u32,
            successes: 1 + random.below(4) as u32,
        };
        let base = Instant::now();
        let breaker = Breaker::new(settings, base).unwrap();
        let mut model = Model::new(settings);
        let mut now = Duration::ZERO;
        let mut under_way: Vec<(Admission, Given)> = Vec::new();
        let mut failing = random.below(101);
        for step in 0..1_500 {
            if random.below(100) == 0 {
                failing = random.below(101);
            }
            now += match random.below(40) {
                0 => Duration::from_millis(random.below(12_000)),
                1 => Duration::from_millis(random.below(40_000)),
                _ => Duration::from_millis(random.below(200)),
            };
            let at = base + now;
            if random.below(2) == 0 && under_way.len() < 30 {
                let (admission, given) = (breaker.admit(at), model.admit(now));
                let same = match (&admission, given) {
                    (Admission::Closed(_), Given::Closed { .. })
                    | (Admission::Trial(_), Given::Trial { .. }) => true,
                    (Admission::Refused { retry_after }, Given::Refused(wait)) => *retry_after == wait,
                    _ => false,
                };
                assert!(same, "seed {seed}, step {step}: {admission:?}, {given:?}");
                under_way.push((admission, given));
            } else if !under_way.is_empty() {
                let which = random.below(under_way.len() as u64) as usize;
                let (admission, given) = under_way.swap_remove(which);
                let (outcome, chance) = match random.below(10) {
                    0 => (Outcome::Abandoned, 0),
                    _ if random.below(100) < failing => (Outcome::Failure, random.next()),
                    _ => (Outcome::Success, 0),
                };
                let before = model.state;
                if outcome == Outcome::Abandoned && random.below(2) == 0 {
                    drop(admission);
                } else {
                    let event = breaker.record(at, admission, outcome, || chance);
                    opened += u32::from(event.is_some_and(|event| event.to == BreakerState::Open));
                    closed_again += u32::from(event.is_some_and(|event| event.to == BreakerState::Closed));
                    model.record(now, given, outcome, chance);
                    assert_eq!(event.is_some(), before != model.state, "seed {seed}, step {step}: {event:?}");
                    check_snapshot(&breaker, &model, base, now, &format!("seed {seed}, step {step}"));
                    continue;
                }
                model.record(now, given, outcome, chance);
            }
            check_snapshot(&breaker, &model, base, now, &format!("seed {seed}, step {step}"));
        }
    }
    // The seeds go everywhere.
    assert!(opened > 1_000 && closed_again > 300, "{opened} opened, {closed_again} closed");
}

fn check_snapshot(breaker: &Breaker, model: &Model, base: Instant, now: Duration, place: &str) {
    let snapshot = breaker.snapshot(base + now);
    assert_eq!(snapshot.state, model.state, "{place}");
    assert_eq!(snapshot.since, base + model.since, "{place}");
    assert_eq!(snapshot.trials_in_flight as usize, model.trials.len(), "{place}");
    assert_eq!(snapshot.trials_succeeded, model.succeeded, "{place}");
    assert_eq!((snapshot.window.requests, snapshot.window.failures), model.counts(now), "{place}");
    let until = (model.state == BreakerState::Open).then(|| base + model.until);
    assert_eq!(snapshot.next_trial, until, "{place}");
}

#[test]
fn of_many_threads_one_opens_it_and_three_try() {
    const THREADS: usize = 8;
    for round in 0..30 {
        let story = Story::begin();
        let (breaker, now) = (&story.breaker, story.now);
        let opened = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let admission = breaker.admit(now);
                        let event = breaker.record(now, admission, Outcome::Failure, || 0);
                        opened.fetch_add(usize::from(event.is_some()), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(opened.into_inner(), 1, "round {round}");

        let now = now + Duration::from_secs(5);
        let (in_flight, most, begun) = (AtomicU32::new(0), AtomicU32::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let Admission::Trial(trial) = breaker.admit(now) else { continue };
                        begun.fetch_add(usize::from(trial.transition().is_some()), Ordering::Relaxed);
                        most.fetch_max(in_flight.fetch_add(1, Ordering::AcqRel) + 1, Ordering::AcqRel);
                        thread::yield_now();
                        in_flight.fetch_sub(1, Ordering::AcqRel);
                        drop(trial);
                    }
                });
            }
        });
        assert_eq!(begun.into_inner(), 1, "round {round}");
        assert!(most.into_inner() <= 3, "round {round}");
        assert_eq!(breaker.snapshot(now).trials_in_flight, 0, "round {round}");

        let closed = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let admission = breaker.admit(now);
                        let event = breaker.record(now, admission, Outcome::Success, || 0);
                        closed.fetch_add(usize::from(event.is_some()), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(closed.into_inner(), 1, "round {round}");
    }
}

#[test]
fn no_outcome_is_lost_between_threads() {
    let settings = BreakerSettings { requests_min: u32::MAX, ..BreakerSettings::default() };
    let now = Instant::now();
    let breaker = Breaker::new(settings, now).unwrap();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for request in 0..5_000_u64 {
                    let at = now + Duration::from_millis(request);
                    let admission = breaker.admit(at);
                    let outcome = if request % 3 == 0 { Outcome::Failure } else { Outcome::Success };
                    breaker.record(at, admission, outcome, || 0);
                }
            });
        }
    });
    let counts = breaker.snapshot(now + Duration::from_secs(5)).window;
    assert_eq!(counts, WindowCounts { requests: 20_000, failures: 4 * 1_667 });
}

#[test]
fn a_second_that_is_full_keeps_its_share() {
    let window = Window::default();
    for request in 0..1_000_000_u64 {
        window.add(3, request % 4 == 0);
    }
    let counts = window.counts(3);
    assert!(counts.requests > 100_000);
    let percent = counts.failures * 1_000 / counts.requests;
    assert!((245..255).contains(&percent), "{counts:?}");
}
