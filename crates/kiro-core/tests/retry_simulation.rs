//! Do retries, deadlines and breakers together keep a mesh from harming itself?
//!
//! A model mesh in virtual time: callers with a budget each (and a breaker, in some runs), and a service of three replicas that
//! queue first-come first-served and, at their worst, work on what nobody waits for any more. All of it is troubled for some
//! seconds and then is as before. Everything is drawn from a seed; the rules are those of production.
//!
//! A seed that fails is printed, and replays alone:
//! `KIRO_RETRY_SEED=17 cargo test -p kiro-core --test retry_simulation`
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::wildcard_enum_match_arm,
    reason = "a test"
)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Method, StatusCode};
use kiro_core::breaker::{Admission, Breaker, BreakerSettings, BreakerState, Outcome, Transition};
use kiro_core::deadline::{Budget, Deadline, parse_field};
use kiro_core::retry::{
    BudgetSettings, FailedAttempt, Failure, RetryBudget, RetryPolicy, RetrySettings, THROTTLE_FAILURES,
    Verdict, decide,
};

#[path = "../src/random.rs"]
#[allow(dead_code, reason = "not every simulation draws all of it")]
mod random;

use random::Random;

const SEED_VARIABLE: &str = "KIRO_RETRY_SEED";

/// The model's clock: everything happens on one of its ticks.
const TICK: Duration = Duration::from_millis(5);
const TICKS_PER_SECOND: usize = 200;

const REPLICAS: usize = 3;
const TIMEOUT: Duration = Duration::from_secs(1);
const PER_TRY_TIMEOUT: Duration = Duration::from_millis(400);
/// How much of the capacity the usual load needs.
const USUAL_LOAD: f64 = 0.7;

impl Random {
    fn place(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.place(of.len())]
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.place(100) < percent
    }
}

/// What is wrong with a replica while it is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    /// Nobody listens.
    Down,
    /// Streams are refused.
    Refusing,
    /// So many of a hundred requests are worked on and then fail.
    Erring { percent: usize, retry_after: Option<Duration> },
    /// So many of a hundred are worked on and then reset.
    Resetting { percent: usize },
    /// It takes requests and does nothing.
    Hanging,
    /// It works at a fifth of its speed.
    Slow,
    /// Nothing is wrong with it, but three times the load comes.
    Surge,
}

/// One run, drawn from its seed.
#[derive(Clone, Debug)]
struct Plan {
    seed: u64,
    callers: usize,
    requests_per_second: f64,
    trouble: Trouble,
    /// How many replicas have it.
    troubled: usize,
    begin_tick: usize,
    end_tick: usize,
    total_ticks: usize,
    /// How long a replica's full queue lasts: longer than anybody waits, or as short as a concurrency limit makes it.
    queue_seconds: f64,
    /// Whether a full queue says that it has not processed what it refuses.
    full_queue_is_marked: bool,
    /// Whether a replica drops what its caller has given up: deadlines travel.
    deadlines_travel: bool,
    breaker: Option<BreakerSettings>,
    /// What retries without our rules would do: as often as declared.
    naive: bool,
}

impl Plan {
    fn draw(seed: u64) -> Self {
        let mut random = Random(seed);
        let callers = random.pick(&[3, 10, 30, 100, 300]);
        let percent = random.pick(&[20, 50, 80, 95, 100]);
        let retry_after = random.pick(&[None, None, Some(Duration::ZERO), Some(Duration::from_secs(1))]);
        let trouble = random.pick(&[
            Trouble::Down,
            Trouble::Refusing,
            Trouble::Erring { percent, retry_after },
            Trouble::Resetting { percent },
            Trouble::Hanging,
            Trouble::Slow,
            Trouble::Surge,
        ]);
        let begin_tick = 3 * TICKS_PER_SECOND;
        let end_tick = begin_tick + TICKS_PER_SECOND / 2 + random.place(5 * TICKS_PER_SECOND);
        let troubled = 1 + random.place(REPLICAS);
        let full_queue_is_marked = random.percent(50);
        let deadlines_travel = random.percent(75);
        let mut plan = Self {
            seed,
            callers,
            requests_per_second: (callers as f64).clamp(100.0, 300.0),
            trouble,
            troubled,
            begin_tick,
            end_tick,
            total_ticks: 0,
            queue_seconds: 1.5,
            full_queue_is_marked,
            deadlines_travel,
            breaker: None,
            naive: false,
        };
        // A service that works on what nobody waits for, behind a queue without a limit, first has to get through it.
        plan.recover_within(if deadlines_travel { 10 } else { 15 });
        plan
    }

    /// How long it has to recover, before three seconds in which it must have.
    fn recover_within(&mut self, seconds: usize) {
        self.total_ticks = self.end_tick + (seconds + 3) * TICKS_PER_SECOND;
    }

    fn troubled(&self, tick: usize) -> bool {
        (self.begin_tick..self.end_tick).contains(&tick)
    }
}

struct Caller {
    budget: RetryBudget,
    breaker: Option<Arc<Breaker>>,
    requests: u64,
    /// Retries that the budget must have paid.
    paid: u64,
    /// Retries of what may have been processed, since anything last succeeded.
    in_vain: u32,
    last_state: BreakerState,
}

/// A request on its way, or over.
struct Request {
    caller: usize,
    begun_tick: usize,
    deadline: Deadline,
    attempts: u32,
    /// Which replicas it was sent to, as bits.
    tried: u8,
    admission: Option<Admission>,
    answered: Option<bool>,
}

/// An attempt in a replica's queue.
#[derive(Clone, Copy)]
struct Queued {
    request: usize,
    attempt: u32,
    /// When its caller gives up, as the replica was told.
    over_at: Instant,
}

#[derive(Default)]
struct Replica {
    queue: VecDeque<Queued>,
    /// Requests that it may still work on in this tick.
    capacity: f64,
}

#[derive(Clone, Copy)]
enum Event {
    Send { request: usize },
    Ended { request: usize, attempt: u32, failure: Option<Failure> },
}

struct World {
    plan: Plan,
    random: Random,
    base: Instant,
    tick: usize,
    policy: RetryPolicy,
    callers: Vec<Caller>,
    replicas: [Replica; REPLICAS],
    requests: Vec<Request>,
    /// What happens on each tick. Filled while time goes on, and taken out as it comes.
    events: Vec<Vec<Event>>,
    to_come: f64,
    /// Attempts that a replica took.
    worked: u64,
    attempts: u64,
    transitions: u64,
}

impl World {
    fn new(plan: Plan) -> Self {
        let base = Instant::now();
        let caller = || {
            let breaker = plan.breaker.map(|settings| Breaker::new(settings, base).unwrap());
            let budget = RetryBudget::new(BudgetSettings::default(), base).unwrap();
            Caller { budget, breaker, requests: 0, paid: 0, in_vain: 0, last_state: BreakerState::Closed }
        };
        let callers = (0..plan.callers).map(|_| caller()).collect();
        let settings = RetrySettings { per_try_timeout: Some(PER_TRY_TIMEOUT), ..RetrySettings::default() };
        let events = (0..plan.total_ticks + 2 * TICKS_PER_SECOND).map(|_| Vec::new()).collect();
        Self {
            random: Random(plan.seed ^ 0x5eed),
            base,
            tick: 0,
            policy: RetryPolicy::new(settings).unwrap(),
            callers,
            replicas: Default::default(),
            requests: Vec::new(),
            events,
            to_come: 0.0,
            worked: 0,
            attempts: 0,
            transitions: 0,
            plan,
        }
    }

    fn now(&self) -> Instant {
        self.base + TICK * self.tick as u32
    }

    fn run(mut self) -> Self {
        while self.tick < self.events.len() {
            if self.tick < self.plan.total_ticks {
                self.arrive();
            }
            for event in std::mem::take(&mut self.events[self.tick]) {
                match event {
                    Event::Send { request } => self.send(request),
                    Event::Ended { request, attempt, failure } => self.ended(request, attempt, failure),
                }
            }
            for replica in 0..REPLICAS {
                self.work(replica);
            }
            self.tick += 1;
        }
        assert!(self.requests.iter().all(|request| request.answered.is_some()), "a request has no end");
        self
    }

    /// At the next tick that is not before a time.
    fn at(&mut self, time: Instant, event: Event) {
        let ticks = (time - self.base).as_nanos().div_ceil(TICK.as_nanos()) as usize;
        let tick = ticks.max(self.tick + 1).min(self.events.len() - 1);
        self.events[tick].push(event);
    }

    fn arrive(&mut self) {
        let surge = self.plan.trouble == Trouble::Surge && self.plan.troubled(self.tick);
        let load = if surge { 3.0 } else { 1.0 };
        self.to_come += self.plan.requests_per_second * load / TICKS_PER_SECOND as f64;
        while self.to_come >= 1.0 {
            self.to_come -= 1.0;
            self.begin();
        }
    }

    fn begin(&mut self) {
        let now = self.now();
        let at = self.random.place(self.callers.len());
        let caller = &mut self.callers[at];
        caller.requests += 1;
        let admission = caller.breaker.as_ref().map(|breaker| breaker.admit(now));
        let refused = matches!(admission, Some(Admission::Refused { .. }));
        if let Some(Admission::Trial(trial)) = &admission
            && let Some(transition) = trial.transition()
        {
            self.transition(at, transition);
        }
        let deadline = Budget { route: Some(TIMEOUT), ..Budget::default() }.deadline(now).unwrap();
        let admission = admission.filter(|_| !refused);
        let answered = refused.then_some(false);
        let begun_tick = self.tick;
        self.requests.push(Request {
            caller: at,
            begun_tick,
            deadline,
            attempts: 0,
            tried: 0,
            admission,
            answered,
        });
        if !refused {
            self.callers[at].budget.deposit(now);
            self.send(self.requests.len() - 1);
        }
    }

    /// Sends a request to a replica that it was not sent to before, if there is one.
    fn send(&mut self, at: usize) {
        let now = self.now();
        let request = &mut self.requests[at];
        assert!(!request.deadline.is_over(now), "sent after its deadline");
        let mut replica = self.random.place(REPLICAS);
        while request.tried != (1 << REPLICAS) - 1 && request.tried & 1 << replica != 0 {
            replica = (replica + 1) % REPLICAS;
        }
        request.tried |= 1 << replica;
        request.attempts += 1;
        let attempt = request.attempts;
        let attempt_deadline = request.deadline.within(now, Some(PER_TRY_TIMEOUT));
        self.attempts += 1;
        let told = parse_field(attempt_deadline.field(now).unwrap().as_bytes()).unwrap();
        let over_at = now + told;
        assert!(over_at <= attempt_deadline.at, "the next hop has more time than this one");

        let troubled = self.plan.troubled(self.tick) && replica < self.plan.troubled;
        let limit = self.plan.requests_per_second / USUAL_LOAD / REPLICAS as f64 * self.plan.queue_seconds;
        let failure = match self.plan.trouble {
            Trouble::Down if troubled => Some(Failure::Connect),
            Trouble::Refusing if troubled => Some(Failure::RefusedStream),
            _ if self.replicas[replica].queue.len() as f64 >= limit => Some(self.queue_full()),
            _ => None,
        };
        if failure.is_some() {
            self.at(now + TICK, Event::Ended { request: at, attempt, failure });
        } else {
            self.worked += 1;
            self.replicas[replica].queue.push_back(Queued { request: at, attempt, over_at });
            let failure = Some(Failure::Timeout);
            self.at(attempt_deadline.at, Event::Ended { request: at, attempt, failure });
        }
    }

    fn queue_full(&self) -> Failure {
        if self.plan.full_queue_is_marked {
            Failure::NotProcessed { retry_after: None }
        } else {
            Failure::Status { status: StatusCode::SERVICE_UNAVAILABLE, retry_after: None }
        }
    }

    /// One tick of a replica.
    fn work(&mut self, at: usize) {
        let now = self.now();
        let troubled = self.plan.troubled(self.tick) && at < self.plan.troubled;
        let speed = match self.plan.trouble {
            Trouble::Hanging | Trouble::Down if troubled => 0.0,
            Trouble::Slow if troubled => 0.2,
            _ => 1.0,
        };
        let per_second = self.plan.requests_per_second / USUAL_LOAD / REPLICAS as f64 * speed;
        // What was not used is lost.
        self.replicas[at].capacity =
            self.replicas[at].capacity.min(1.0) + per_second / TICKS_PER_SECOND as f64;
        while self.replicas[at].capacity >= 1.0 {
            let Some(queued) = self.replicas[at].queue.pop_front() else { break };
            if self.plan.deadlines_travel && queued.over_at <= now {
                continue;
            }
            self.replicas[at].capacity -= 1.0;
            let failure = match self.plan.trouble {
                Trouble::Erring { percent, retry_after } if troubled && self.random.percent(percent) => {
                    Some(Failure::Status { status: StatusCode::SERVICE_UNAVAILABLE, retry_after })
                }
                Trouble::Resetting { percent } if troubled && self.random.percent(percent) => {
                    Some(Failure::Reset)
                }
                _ => None,
            };
            let ended = Event::Ended { request: queued.request, attempt: queued.attempt, failure };
            self.at(now + 2 * TICK, ended);
        }
    }

    fn ended(&mut self, at: usize, attempt: u32, failure: Option<Failure>) {
        let now = self.now();
        let request = &self.requests[at];
        // Of an attempt that was given up, nobody hears any more.
        if request.answered.is_some() || request.attempts != attempt {
            return;
        }
        let caller = request.caller;
        let Some(failure) = failure else {
            self.callers[caller].budget.succeeded();
            self.callers[caller].in_vain = 0;
            return self.finish(at, true);
        };
        match self.decide(at, failure) {
            Verdict::GiveUp(_) => self.finish(at, false),
            Verdict::Retry { after } => {
                let request = &self.requests[at];
                assert!(after < request.deadline.left(now), "a wait of {after:?} is beyond the deadline");
                // The model's ticks are coarse: a wait that ends within the last one has no attempt any more.
                if request.deadline.left(now) - after <= TICK {
                    return self.finish(at, false);
                }
                self.count_retry(at, failure);
                self.at(now + after, Event::Send { request: at });
            }
        }
    }

    fn decide(&mut self, at: usize, failure: Failure) -> Verdict {
        let (now, random) = (self.now(), self.random.next());
        let request = &self.requests[at];
        let left = request.deadline.left(now);
        if self.plan.naive {
            let may = request.attempts <= 2 && left > Duration::from_millis(250);
            let after = Duration::from_millis(25 * u64::from(request.attempts));
            return if may {
                Verdict::Retry { after }
            } else {
                Verdict::GiveUp(kiro_core::retry::GiveUp::Attempts)
            };
        }
        let attempt = FailedAttempt {
            method: &Method::GET,
            failure,
            attempts_made: request.attempts,
            another_replica: request.tried.count_ones() < REPLICAS as u32,
            body_replayable: true,
            response_begun: false,
            left: Some(left),
        };
        decide(&self.policy, &self.callers[request.caller].budget, &attempt, now, random)
    }

    /// The budget's bound holds at each step, for each caller.
    fn count_retry(&mut self, at: usize, failure: Failure) {
        if self.plan.naive {
            return;
        }
        let request = &self.requests[at];
        let unprocessed = failure.is_surely_not_processed();
        let caller = &mut self.callers[request.caller];
        if !(unprocessed && request.attempts == 1) {
            caller.paid += 1;
        }
        let seconds_floor = (TICK * self.tick as u32).as_millis() as u64 / 100;
        let bound = caller.requests / 5 + seconds_floor + 100;
        assert!(caller.paid <= bound, "{} retries of {bound}", caller.paid);
        if !unprocessed {
            caller.in_vain += 1;
            assert!(caller.in_vain < THROTTLE_FAILURES, "{} retries in vain", caller.in_vain);
        }
    }

    fn finish(&mut self, at: usize, good: bool) {
        let now = self.now();
        let request = &mut self.requests[at];
        assert!(now < request.deadline.at + TICK, "it ended after its deadline");
        request.answered = Some(good);
        let (caller, admission) = (request.caller, request.admission.take());
        let outcome = if good { Outcome::Success } else { Outcome::Failure };
        let breaker = self.callers[caller].breaker.clone();
        if let (Some(breaker), Some(admission)) = (breaker, admission) {
            let random = &mut self.random;
            if let Some(transition) = breaker.record(now, admission, outcome, || random.next()) {
                self.transition(caller, transition);
            }
        }
    }

    fn transition(&mut self, caller: usize, transition: Transition) {
        assert_eq!(transition.from, self.callers[caller].last_state, "an event is missing");
        self.callers[caller].last_state = transition.to;
        self.transitions += 1;
    }

    /// The share of good answers among requests that began in these ticks.
    fn goodput(&self, ticks: Range<usize>) -> f64 {
        let in_time = || self.requests.iter().filter(|request| ticks.contains(&request.begun_tick));
        in_time().filter(|request| request.answered == Some(true)).count() as f64 / in_time().count() as f64
    }

    /// The last three seconds, which begin when the plan's time to recover is over.
    fn goodput_afterwards(&self) -> f64 {
        self.goodput(self.plan.total_ticks - 3 * TICKS_PER_SECOND..self.plan.total_ticks)
    }
}

/// Says which plan it was when a check fails.
struct Named(Plan, &'static str);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "{:#?}\nreplay: {SEED_VARIABLE}={} cargo test -p kiro-core --test retry_simulation {}",
                self.0, self.0.seed, self.1
            );
        }
    }
}

/// Runs a check over seeds, or over the one that is asked for.
fn over(seeds: Range<u64>, test: &'static str, change: impl Fn(&mut Plan), check: impl Fn(&World)) {
    let one = std::env::var(SEED_VARIABLE).ok().map(|seed| seed.parse().unwrap());
    for seed in one.map_or(seeds, |seed| seed..seed + 1) {
        let mut plan = Plan::draw(seed);
        change(&mut plan);
        let _named = Named(plan.clone(), test);
        check(&World::new(plan).run());
    }
}

/// No storm, and no state that outlives its cause.
fn check_all(world: &World) {
    let total: u64 = world.callers.iter().map(|caller| caller.requests).sum();
    let seconds = world.tick as u64 / TICKS_PER_SECOND as u64;
    let floor = world.callers.len() as u64 * (10 * seconds + 100);
    assert!(world.worked <= total + total / 5 + floor, "worked {} times for {total} requests", world.worked);
    // A request that surely nobody processed is sent once more.
    assert!(
        world.attempts <= 2 * total + total / 5 + floor,
        "{} attempts for {total} requests",
        world.attempts
    );
    let before = world.goodput(0..world.plan.begin_tick - TICKS_PER_SECOND);
    assert!(before > 0.999, "before: {before}");
    let afterwards = world.goodput_afterwards();
    assert!(afterwards > 0.99, "afterwards: {afterwards}");
}

#[test]
fn no_storm_and_no_state_that_outlives_its_cause() {
    over(0..200, "no_storm", |_| {}, check_all);
}

/// Callers that send a request in ten seconds each can't learn from their own failures in time: here it is the callee's limit that
/// keeps its queue shorter than anybody's patience.
#[test]
fn no_storm_of_ten_thousand_callers() {
    let change = |plan: &mut Plan| {
        plan.callers = 10_000;
        plan.requests_per_second = 1_000.0;
        plan.queue_seconds = 0.2;
        plan.recover_within(10);
    };
    over(0..7, "ten_thousand", change, check_all);
}

/// What the model is worth: without the rules, retries keep it down for good.
#[test]
fn without_the_rules_the_same_mesh_stays_down() {
    let mut stay_down = 0;
    for seed in 0..20 {
        let mut plan = Plan { naive: true, deadlines_travel: false, ..Plan::draw(seed) };
        plan.recover_within(15);
        stay_down += u32::from(World::new(plan).run().goodput_afterwards() < 0.5);
    }
    assert!(stay_down >= 8, "{stay_down} of 20");
}

/// Breakers open on what deserves it, and all of them close again.
#[test]
fn breakers_open_and_close_again() {
    let settings = BreakerSettings::default();
    let change = |plan: &mut Plan| {
        plan.callers = plan.callers.min(10);
        plan.requests_per_second = 60.0;
        plan.breaker = Some(settings);
        // A minute at most, trials that need requests to come by, and a queue that the trials found full.
        plan.recover_within(75);
    };
    let check = |world: &World| {
        for caller in &world.callers {
            let snapshot = caller.breaker.as_ref().unwrap().snapshot(world.now());
            assert_eq!(snapshot.state, caller.last_state, "an event is missing");
            assert_eq!(snapshot.state, BreakerState::Closed, "{snapshot:?}");
            assert_eq!(snapshot.trials_in_flight, 0);
        }
        // All of it gone for longer than it was well before is more than half of what the window has.
        let plan = &world.plan;
        let gone = matches!(plan.trouble, Trouble::Down | Trouble::Refusing) && plan.troubled == REPLICAS;
        if gone && plan.end_tick - plan.begin_tick > plan.begin_tick + TICKS_PER_SECOND {
            assert!(world.transitions >= 3 * plan.callers as u64, "{} transitions", world.transitions);
        }
        assert!(world.goodput_afterwards() > 0.999, "afterwards: {}", world.goodput_afterwards());
    };
    over(0..60, "breakers", change, check);
}

/// With a minute's back-off a breaker may be what is left of a trouble. Where it is declared to stay open for five seconds at
/// most, it is not.
#[test]
fn a_short_breaker_outlives_no_trouble() {
    let second = Duration::from_secs(1);
    let settings = BreakerSettings { open_base: second, open_max: 5 * second, ..BreakerSettings::default() };
    let change = |plan: &mut Plan| {
        plan.callers = plan.callers.min(10);
        plan.breaker = Some(settings);
    };
    over(0..60, "short_breaker", change, check_all);
}
