//! Do the limits hold, stay fair and keep the goodput up, in hundreds of runs in virtual time?
//!
//! The types are those that run in production. A run that fails prints its seed; `KIRO_SEED=n` repeats it alone.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test may fail; clippy lets it only below #[test]"
)]

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use kiro_core::concurrency::{
    Adaptive, Arrival, ConcurrencyLimit, ConcurrencySettings, Limit, Outcome, Patience, QueueSettings,
    Ticket, Verdict,
};
use kiro_core::rate::{Keyed, KeyedSettings, RateLimit, RateSettings};

#[path = "../src/random.rs"]
#[allow(dead_code, reason = "not every simulation draws all of it")]
mod random;

use random::Random;

impl Random {
    /// From `low` to `high`, both included.
    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// Of some order of magnitude.
    fn up_to_a_power_of_ten(&mut self, low: u64, high: u64) -> u64 {
        let power = self.between(low, high);
        self.between(1, 10_u64.pow(u32::try_from(power).unwrap()))
    }

    /// Between 0 and 1, neither included.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// What lies between two arrivals that know nothing of each other.
    fn exponential(&mut self, mean: f64) -> f64 {
        -self.unit().ln() * mean
    }
}

/// Runs a story for each seed, or for the one that the environment names.
fn for_seeds(name: &str, seeds: u64, story: impl Fn(u64) -> Result<(), String>) {
    let only =
        std::env::var("KIRO_SEED").ok().map(|seed| seed.parse::<u64>().expect("KIRO_SEED is a number"));
    for seed in only.map_or(0..seeds, |seed| seed..seed + 1) {
        if let Err(what) = story(seed) {
            panic!(
                "seed {seed}: {what}\nrepeat: KIRO_SEED={seed} cargo test -p kiro-core --test limits_simulation {name}"
            );
        }
    }
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

// Rates

/// A rate limit spelled out: a request passes if in every stretch that ends with it no more than `burst + time × rate` do.
struct SlidingModel {
    requests: i128,
    per: i128,
    burst: i128,
    passed: Vec<i128>,
}

impl SlidingModel {
    /// None: the limit is within a nanosecond of letting it pass, and may round either way.
    fn judge(&self, now: i128) -> Option<bool> {
        let mut judged = Some(true);
        for (earlier, then) in self.passed.iter().rev().enumerate() {
            let count = earlier as i128 + 2;
            let slack = (now - then) * self.requests - (count - self.burst) * self.per;
            if slack <= -self.requests {
                return Some(false);
            }
            if slack < 0 {
                judged = None;
            }
        }
        judged
    }
}

fn some_rate(random: &mut Random) -> RateSettings {
    loop {
        let requests = random.up_to_a_power_of_ten(1, 5) as u32;
        let per = Duration::from_nanos(random.up_to_a_power_of_ten(4, 13));
        let burst = random.between(1, 40) as u32;
        if let Ok(settings) = RateSettings::new(requests, per, Some(burst)) {
            return settings;
        }
    }
}

#[test]
fn a_rate_limit_agrees_with_a_window_that_slides() {
    for_seeds("a_rate_limit_agrees", 400, |seed| {
        let mut random = Random(seed);
        let settings = some_rate(&mut random);
        let origin = Instant::now();
        let limit = RateLimit::new(settings, origin);
        let mut model = SlidingModel {
            requests: i128::from(settings.requests()),
            per: settings.per().as_nanos() as i128,
            burst: i128::from(settings.burst()),
            passed: Vec::new(),
        };
        let interval = (model.per / model.requests).max(1) as u64;
        let mut now = u128::from(random.between(0, 1 << 50));
        for step in 0..200 {
            now += u128::from(match random.between(0, 9) {
                0..=3 => 0,
                4..=6 => random.between(0, interval),
                7 => interval,
                8 => random.between(0, 4 * interval),
                _ => random.between(0, interval.saturating_mul(u64::from(settings.burst()))),
            });
            let passes = limit.check(origin + Duration::from_nanos(now as u64)).is_ok();
            let judged = model.judge(now as i128);
            ensure(judged.is_none_or(|judged| judged == passes), || {
                format!("{settings:?}, step {step} at {now} ns: {passes}, the model {judged:?}")
            })?;
            if passes {
                model.passed.push(now as i128);
            }
        }
        Ok(())
    });
}

/// Callers that keep to the limit, if unevenly, beside one that does not and many that come once.
#[test]
fn who_keeps_to_the_rate_is_never_refused_and_who_does_not_gets_no_more() {
    for_seeds("who_keeps_to_the_rate", 200, |seed| {
        let mut random = Random(seed);
        let requests = random.between(1, 20);
        let per_ns = random.between(1_000_000, 2_000_000_000);
        let rate = RateSettings::new(requests as u32, Duration::from_nanos(per_ns), None)
            .map_err(|error| error.to_string())?;
        let origin = Instant::now();
        let keyed =
            Keyed::new(KeyedSettings { rate, max_keys: 10_000 }, origin, [random.next(), random.next()]);
        let mut honest = vec![VecDeque::<u64>::new(); 8];
        let (mut others, mut greedy_passed, mut now) = (0_u64, 0_u64, 0);
        while now < per_ns * 6 {
            let at = origin + Duration::from_nanos(now);
            for (caller, sent) in honest.iter_mut().enumerate() {
                while sent.front().is_some_and(|then| now - then >= per_ns) {
                    sent.pop_front();
                }
                // All that the window has room for, some, or none.
                for _ in 0..random.between(0, requests - sent.len() as u64) {
                    let passes = keyed.check(&[b"honest", &[caller as u8]], at).is_ok();
                    ensure(passes, || format!("{rate:?}: caller {caller} refused at {now}"))?;
                    sent.push_back(now);
                }
            }
            for _ in 0..2 * requests {
                greedy_passed += u64::from(keyed.check(&[b"greedy"], at).is_ok());
            }
            others += 1;
            ensure(keyed.check(&[b"other", &others.to_be_bytes()], at).is_ok(), || "other".to_owned())?;
            now += random.between(1, per_ns / requests / 4);
        }
        let passed = greedy_passed as f64;
        let share = requests as f64 * (1.0 + now as f64 / per_ns as f64);
        ensure(passed <= share && passed >= 0.75 * share - requests as f64, || {
            format!("{rate:?}: the greedy one passed {passed} times, its share was {share:.1}")
        })?;
        ensure(keyed.overflowed() == 0, || format!("{} overflowed", keyed.overflowed()))
    });
}

// Concurrency

/// An application: `slots` requests go on at full speed, more than that share it (processor sharing).
struct App {
    slots: f64,
    /// A disturbance makes it slower.
    speed: f64,
    /// How much work each request in flight has been given so far.
    progress: f64,
    last: f64,
    running: BinaryHeap<Reverse<(u64, usize)>>,
}

/// Work is counted in whole nanoseconds, so that it has an order.
const NANOS: f64 = 1e9;

impl App {
    fn rate(&self) -> f64 {
        let running = self.running.len() as f64;
        if running > self.slots { self.speed * self.slots / running } else { self.speed }
    }

    fn advance(&mut self, now: f64) {
        self.progress += (now - self.last) * self.rate();
        self.last = now;
    }

    /// How much of what it can do it does.
    fn busy(&self) -> f64 {
        (self.running.len() as f64 / self.slots).min(1.0)
    }

    fn begin(&mut self, request: usize, work: f64) {
        self.running.push(Reverse((((self.progress + work) * NANOS) as u64, request)));
    }

    /// When the next one ends, if nothing else happens.
    fn next_end(&self) -> f64 {
        let Some(Reverse((end, _))) = self.running.peek() else { return f64::INFINITY };
        self.last + (*end as f64 / NANOS - self.progress).max(0.0) / self.rate()
    }

    fn end(&mut self) -> usize {
        self.running.pop().expect("one that ends").0.1
    }
}

/// What stands before the application.
enum Gate {
    Limit(Box<ConcurrencyLimit<usize>>),
    /// A plain queue with a fixed number of slots, for comparison.
    Fifo {
        slots: usize,
        waiting: VecDeque<usize>,
    },
}

#[derive(Clone, Copy, Debug)]
struct Request {
    caller: usize,
    arrived: f64,
    admitted: f64,
    work: f64,
}

/// A stretch in which the application is slower, or has fewer slots.
#[derive(Clone, Copy, Debug)]
struct Disturbance {
    from: f64,
    to: f64,
    speed: f64,
    slots: f64,
}

#[derive(Clone, Copy, Debug)]
struct Load {
    slots: u32,
    service_s: f64,
    /// Whether service times vary as much as they are long, or are all the same.
    varied: bool,
    /// In multiples of what the application can do.
    offered: f64,
    /// How long a caller waits for its answer.
    patience_s: f64,
    until: f64,
    disturbance: Option<Disturbance>,
}

/// What became of a run.
#[derive(Debug)]
struct Outcomes {
    /// Work that was done for somebody who still waited, by second, in parts of what could have been done.
    goodput: Vec<f64>,
    /// Of answers in time, with when they came.
    latencies: Vec<(f64, f64)>,
    /// The limit at the end of each tenth of a second.
    limits: Vec<u32>,
    /// Requests of each caller but for those that go on at the end, and answers to them.
    arrived: [u64; CALLERS],
    answered: [u64; CALLERS],
}

/// Some send far more than others.
const CALLERS: usize = 3;

impl Outcomes {
    fn goodput(&self, seconds: std::ops::Range<usize>) -> f64 {
        let stretch = &self.goodput[seconds];
        stretch.iter().sum::<f64>() / stretch.len() as f64
    }

    fn latency_p99(&self, from: f64) -> f64 {
        let mut latencies: Vec<_> =
            self.latencies.iter().filter(|(at, _)| *at >= from).map(|(_, latency)| *latency).collect();
        latencies.sort_by(f64::total_cmp);
        latencies.get(latencies.len() * 99 / 100).copied().unwrap_or(f64::INFINITY)
    }
}

struct Simulation {
    random: Random,
    load: Load,
    start: Instant,
    app: App,
    gate: Gate,
    requests: Vec<Request>,
    timers: BinaryHeap<Reverse<(u64, Ticket)>>,
    outcomes: Outcomes,
}

impl Simulation {
    fn new(seed: u64, load: Load, gate: impl FnOnce(Instant) -> Gate) -> Self {
        let start = Instant::now();
        let slots = f64::from(load.slots);
        Self {
            random: Random(seed ^ 0x5eed),
            load,
            start,
            app: App { slots, speed: 1.0, progress: 0.0, last: 0.0, running: BinaryHeap::new() },
            gate: gate(start),
            requests: Vec::new(),
            timers: BinaryHeap::new(),
            outcomes: Outcomes {
                goodput: vec![0.0; load.until.ceil() as usize],
                latencies: Vec::new(),
                limits: Vec::new(),
                arrived: [0; CALLERS],
                answered: [0; CALLERS],
            },
        }
    }

    fn run(mut self) -> Outcomes {
        let capacity = f64::from(self.load.slots) / self.load.service_s;
        let between = 1.0 / (capacity * self.load.offered);
        let mut next_arrival = self.random.exponential(between);
        let mut next_look = 0.1;
        loop {
            let end = self.app.next_end();
            let timer = self.timers.peek().map_or(f64::INFINITY, |Reverse((at, _))| *at as f64 / NANOS);
            let change = self.next_change();
            let now = next_arrival.min(end).min(timer).min(next_look).min(change);
            if now >= self.load.until {
                for Reverse((_, request)) in &self.app.running {
                    self.outcomes.arrived[self.requests[*request].caller] -= 1;
                }
                return self.outcomes;
            }
            self.outcomes.goodput[now as usize] += (now - self.app.last) * self.app.busy();
            self.app.advance(now);
            if now == change {
                self.disturb(now);
            } else if now == end {
                self.ended(now);
            } else if now == next_arrival {
                self.arrives(now);
                next_arrival = now + self.random.exponential(between);
            } else if now == timer {
                self.timer(now);
            } else {
                if let Gate::Limit(limit) = &self.gate {
                    self.outcomes.limits.push(limit.limit());
                }
                next_look += 0.1;
            }
        }
    }

    fn instant(&self, now: f64) -> Instant {
        self.start + Duration::from_secs_f64(now)
    }

    fn next_change(&self) -> f64 {
        let Some(disturbance) = self.load.disturbance else { return f64::INFINITY };
        let changes = [disturbance.from, disturbance.to];
        changes.into_iter().find(|at| *at > self.app.last).unwrap_or(f64::INFINITY)
    }

    fn disturb(&mut self, now: f64) {
        let Some(disturbance) = self.load.disturbance else { return };
        let begins = now < disturbance.to;
        self.app.speed = if begins { disturbance.speed } else { 1.0 };
        self.app.slots = if begins { disturbance.slots } else { f64::from(self.load.slots) };
    }

    fn arrives(&mut self, now: f64) {
        let mean = self.load.service_s;
        let work = if self.load.varied { self.random.exponential(mean) } else { mean };
        let request = self.requests.len();
        let caller = match self.random.between(0, 9) {
            0 => 0,
            1..=3 => 1,
            _ => 2,
        };
        self.outcomes.arrived[caller] += 1;
        self.requests.push(Request { caller, arrived: now, admitted: f64::NAN, work });
        let at = self.instant(now);
        let admitted = RefCell::new(Vec::new());
        match &mut self.gate {
            Gate::Limit(limit) => match limit.arrive(at, || request, wake(&admitted)) {
                Arrival::Admitted => admitted.borrow_mut().push(request),
                Arrival::Queued { ticket, check_at } => {
                    let check_at = (check_at - self.start).as_nanos() as u64;
                    self.timers.push(Reverse((check_at, ticket)));
                }
                Arrival::Shed(_) => {}
            },
            Gate::Fifo { slots, waiting } => {
                if self.app.running.len() < *slots {
                    admitted.borrow_mut().push(request);
                } else {
                    waiting.push_back(request);
                }
            }
        }
        self.admit(now, admitted.take());
    }

    fn admit(&mut self, now: f64, admitted: Vec<usize>) {
        for request in admitted {
            self.requests[request].admitted = now;
            self.app.begin(request, self.requests[request].work);
        }
    }

    fn ended(&mut self, now: f64) {
        let request = self.app.end();
        let Request { caller, arrived, admitted: since, work } = self.requests[request];
        self.outcomes.answered[caller] += 1;
        if now - arrived <= self.load.patience_s {
            self.outcomes.latencies.push((now, now - arrived));
        } else {
            self.outcomes.goodput[now as usize] -= work / (self.app.slots * self.app.speed);
        }
        let at = self.instant(now);
        let admitted = RefCell::new(Vec::new());
        match &mut self.gate {
            Gate::Limit(limit) => {
                let latency = Duration::from_secs_f64(now - since);
                limit.leave(at, Outcome::Answered, latency, wake(&admitted));
                assert!(limit.in_flight() as usize == self.app.running.len() + admitted.borrow().len());
            }
            Gate::Fifo { waiting, .. } => admitted.borrow_mut().extend(waiting.pop_front()),
        }
        self.admit(now, admitted.take());
    }

    fn timer(&mut self, now: f64) {
        let Some(Reverse((at, ticket))) = self.timers.pop() else { return };
        let Gate::Limit(limit) = &self.gate else { return };
        if let Patience::Until(until) = limit.expired(ticket, self.start + Duration::from_nanos(at)) {
            let until = (until - self.start).as_nanos() as u64;
            assert!(until > at && now * NANOS < until as f64 + 1.0, "a timer in the past");
            self.timers.push(Reverse((until, ticket)));
        }
    }
}

fn wake(admitted: &RefCell<Vec<usize>>) -> impl FnMut(usize, Verdict) -> bool {
    |request, verdict| {
        if verdict == Verdict::Admitted {
            admitted.borrow_mut().push(request);
        }
        true
    }
}

fn gate(limit: Limit) -> impl FnOnce(Instant) -> Gate {
    let settings = ConcurrencySettings { limit, queue: QueueSettings::default(), ..Default::default() };
    move |start| Gate::Limit(Box::new(ConcurrencyLimit::new(settings, start)))
}

/// What a small application can do: 400 requests a second at most, so that a run is quick.
fn some_load(random: &mut Random, capacity_min: f64) -> Load {
    loop {
        let service_s = 0.002 * 200_f64.powf(random.unit());
        let load = Load {
            slots: random.between(1, 40) as u32,
            service_s,
            varied: random.between(0, 1) == 1,
            offered: 3.0,
            patience_s: 0.25 + 10.0 * service_s,
            until: 10.0,
            disturbance: None,
        };
        let capacity = f64::from(load.slots) / load.service_s;
        if (capacity_min..=400.0).contains(&capacity) {
            return load;
        }
    }
}

#[test]
fn at_three_times_the_load_the_goodput_stays_where_a_plain_queue_collapses() {
    for_seeds("at_three_times_the_load", 200, |seed| {
        let mut random = Random(seed);
        let load = some_load(&mut random, 10.0);
        let limit = Limit::Fixed(NonZeroU32::new(load.slots).ok_or("no slots")?);
        let ours = Simulation::new(seed, load, gate(limit)).run();
        let plain = |_| Gate::Fifo { slots: load.slots as usize, waiting: VecDeque::new() };
        let plain = Simulation::new(seed, load, plain).run();
        let (goodput, latency) = (ours.goodput(1..10), ours.latency_p99(1.0));
        ensure(goodput >= 0.9, || format!("{load:?}: goodput {goodput:.3}"))?;
        // Six means are what one in a hundred takes of service times that vary as much as they are long (4.6), and some.
        let small = 6.0 * load.service_s + 0.1;
        ensure(latency <= small, || format!("{load:?}: one in a hundred waited {latency:.3} s"))?;
        let plain = plain.goodput(8..10);
        ensure(plain < 0.2, || format!("{load:?}: a plain queue's goodput {plain:.3}"))
    });
}

#[test]
fn below_the_limit_nobody_is_refused_and_above_it_all_callers_fare_alike() {
    for_seeds("below_the_limit", 100, |seed| {
        let mut random = Random(seed);
        let load = some_load(&mut random, 10.0);
        let limit = Limit::Fixed(NonZeroU32::new(load.slots).ok_or("no slots")?);
        let quiet = Load { offered: 0.5, slots: load.slots.max(8), ..load };
        let wide = Limit::Fixed(NonZeroU32::new(quiet.slots * 2).ok_or("no slots")?);
        let run = Simulation::new(seed, quiet, gate(wide)).run();
        ensure(run.answered == run.arrived, || {
            format!("{quiet:?}: {:?} of {:?} answered", run.answered, run.arrived)
        })?;
        let run = Simulation::new(seed, load, gate(limit)).run();
        let parts: Vec<_> = (0..CALLERS).map(|n| run.answered[n] as f64 / run.arrived[n] as f64).collect();
        let mean = parts.iter().sum::<f64>() / CALLERS as f64;
        // Each caller's part of its own requests, however many those are, within five standard deviations of chance.
        for (part, arrived) in parts.iter().zip(run.arrived) {
            let chance = 5.0 * (mean * (1.0 - mean) / arrived as f64).sqrt() + 2.0 / arrived as f64;
            ensure((part - mean).abs() <= chance, || format!("{load:?}: {parts:.3?} of {:?}", run.arrived))?;
        }
        Ok(())
    });
}

/// Slow for a while, or with fewer slots, or both: 1 s to 15 s.
fn some_disturbance(random: &mut Random, slots: f64) -> Disturbance {
    let (kind, lasts) = (random.between(0, 2), random.between(1, 15) as f64);
    Disturbance {
        from: 20.0,
        to: 20.0 + lasts,
        speed: if kind == 0 { 1.0 } else { 0.2 },
        slots: if kind == 1 { slots } else { (slots / 4.0).max(1.0) },
    }
}

#[test]
fn an_adaptive_limit_converges_and_comes_back_after_a_disturbance() {
    let (sum, runs) = (Cell::new(0.0), Cell::new(0.0));
    for_seeds("an_adaptive_limit", 60, |seed| {
        let mut random = Random(seed);
        let mut load = some_load(&mut random, 150.0);
        while load.slots < 4 {
            load = some_load(&mut random, 150.0);
        }
        let slots = f64::from(load.slots);
        let disturbance = some_disturbance(&mut random, slots);
        let over = disturbance.to as usize;
        let load = Load { disturbance: Some(disturbance), until: (over + 20) as f64, ..load };
        let run = Simulation::new(seed, load, gate(Limit::Adaptive(Adaptive::default()))).run();
        // Probes included, of which there is at least one in ten seconds.
        let (before, after) = (run.goodput(10..20), run.goodput(over + 10..over + 20));
        sum.set(sum.get() + before + after);
        runs.set(runs.get() + 2.0);
        // Where service times vary as much as they are long, a baseline that is low or high by chance costs some.
        let least = if load.varied { 0.8 } else { 0.9 };
        ensure(before >= least, || format!("{load:?}: goodput {before:.3} after 10 s"))?;
        ensure(after >= least, || format!("{load:?}: goodput {after:.3} 10 s after the disturbance"))?;
        let limits = &run.limits[(over + 10) * 10..];
        let limit = limits.iter().map(|limit| f64::from(*limit)).sum::<f64>() / limits.len() as f64;
        ensure(limit >= 0.8 * slots && limit <= 4.0 * slots + 20.0, || format!("{load:?}: limit {limit:.0}"))
    });
    let mean = sum.get() / runs.get();
    assert!(mean >= 0.9, "goodput over all seeds: {mean:.3}");
}
