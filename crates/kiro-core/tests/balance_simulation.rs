//! Does the balancer keep its promises, with several workers, in virtual time?
//!
//! A model service with replicas that queue, fail, are slow or dead, under a load that does not wait for answers. Each promise is
//! kept over many seeds. A failing seed is printed; `KIRO_SEED=17 cargo test -p kiro-core --test balance_simulation NAME` runs it
//! alone, and `KIRO_SEEDS=2000` runs so many, for hours when nobody waits.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test may fail, and says which seed did"
)]

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use kiro_core::balance::{Change, InFlight, Outcome, Replicas, Settings, Snapshot, State, choose};

#[path = "../src/random.rs"]
#[allow(dead_code, reason = "not every simulation draws all of it")]
mod random;

use random::Random;

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MILLISECOND;

/// A worker has to connect to a replica once, and pays this for it.
const HANDSHAKE: u64 = 5 * MILLISECOND;
/// A replica works on so many requests at once; others wait there.
const SLOTS: usize = 8;
const ATTEMPTS: usize = 3;

/// Runs a promise for each seed, or for the one of the environment.
fn for_seeds(seeds: Range<u64>, promise: impl Fn(u64)) {
    struct Told(u64);
    impl Drop for Told {
        fn drop(&mut self) {
            if std::thread::panicking() {
                println!("KIRO_SEED={} runs this one alone", self.0);
            }
        }
    }
    let number = |name| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap_or_else(|_| panic!("{name} is a number")))
    };
    let seeds = match (number("KIRO_SEED"), number("KIRO_SEEDS")) {
        (Some(one), _) => one..one + 1,
        (None, Some(count)) => 0..count,
        (None, None) => seeds,
    };
    for seed in seeds {
        let _told = Told(seed);
        promise(seed);
    }
}

impl Random {
    /// Above 0, up to 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.unit().ln()
    }

    /// Most take 2 ms, one of a hundred 4.5 ms.
    fn service_time(&mut self) -> u64 {
        let normal = (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos();
        (2.0 * MILLISECOND as f64 * (0.35 * normal).exp()) as u64
    }
}

/// Hosts count from 0.
fn host(address: SocketAddr) -> usize {
    match address.ip() {
        std::net::IpAddr::V4(address) => usize::from(address.octets()[3]),
        std::net::IpAddr::V6(_) => unreachable!("the model has no such address"),
    }
}

fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 15006))
}

/// What a replica is like.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Healthy,
    /// Each answer takes so much longer.
    Slow(u64),
    /// Answers 503 at once.
    Failing,
    /// Refuses connections.
    Dead,
}

struct Server {
    manner: Manner,
    /// Which workers have a connection.
    connected: Vec<bool>,
    busy: usize,
    waiting: VecDeque<Request>,
    /// The model's own count of what the balancer counts.
    in_flight: u32,
    trials: u32,
}

struct Request {
    arrived: u64,
    worker: usize,
    tried: Vec<SocketAddr>,
    flight: Option<InFlight>,
}

enum Step {
    Arrival {
        worker: usize,
    },
    /// Its connection stands.
    Connected(Request),
    Served(Request),
    Ended(Request, Outcome),
}

struct Timed {
    at: u64,
    order: u64,
    step: Step,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// How requests find a replica.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Balancer,
    /// What the balancer is compared with.
    Turns,
}

struct Model {
    base: Instant,
    now: u64,
    order: u64,
    random: Random,
    steps: BinaryHeap<Reverse<Timed>>,
    by: By,
    turn: Vec<usize>,
    rate_a_worker: f64,
    replicas: Replicas,
    snapshot: Snapshot,
    servers: Vec<Server>,
    /// What the users of the mesh saw.
    latencies: Vec<u64>,
    errors: usize,
    /// When and where each attempt went.
    attempts: Vec<(u64, SocketAddr)>,
    failed_attempts: usize,
    changes: Vec<(u64, SocketAddr, Change)>,
}

impl Model {
    fn new(seed: u64, workers: usize, rate_a_worker: f64, by: By) -> Self {
        let base = Instant::now();
        let replicas = Replicas::new(Settings::default(), base);
        let mut model = Self {
            base,
            now: 0,
            order: 0,
            random: Random(seed),
            steps: BinaryHeap::new(),
            by,
            turn: vec![0; workers],
            rate_a_worker,
            snapshot: replicas.snapshot(),
            replicas,
            servers: Vec::new(),
            latencies: Vec::new(),
            errors: 0,
            attempts: Vec::new(),
            failed_attempts: 0,
            changes: Vec::new(),
        };
        for worker in 0..workers {
            model.arrival(worker);
        }
        model
    }

    fn instant(&self) -> Instant {
        self.base + Duration::from_nanos(self.now)
    }

    fn discover(&mut self, hosts: Range<u8>) {
        let addresses: Vec<_> = hosts.map(address).collect();
        while addresses.iter().any(|address| host(*address) >= self.servers.len()) {
            let connected = vec![false; self.turn.len()];
            self.servers.push(Server {
                manner: Manner::Healthy,
                connected,
                busy: 0,
                waiting: VecDeque::new(),
                in_flight: 0,
                trials: 0,
            });
        }
        let now = self.instant();
        for event in self.replicas.update(&addresses, now) {
            self.changes.push((self.now, event.address, event.change));
        }
        self.snapshot = self.replicas.snapshot();
        self.check();
    }

    fn server(&mut self, address: SocketAddr) -> &mut Server {
        &mut self.servers[host(address)]
    }

    fn set(&mut self, host: u8, manner: Manner) {
        let server = self.server(address(host));
        server.manner = manner;
        if manner == Manner::Dead {
            server.connected.fill(false);
        }
    }

    fn after(&mut self, wait: u64, step: Step) {
        self.order += 1;
        self.steps.push(Reverse(Timed { at: self.now + wait, order: self.order, step }));
    }

    fn arrival(&mut self, worker: usize) {
        let wait = self.random.exponential(SECOND as f64 / self.rate_a_worker) as u64;
        self.after(wait, Step::Arrival { worker });
    }

    fn run(&mut self, time: u64) {
        let end = self.now + time;
        while self.steps.peek().is_some_and(|Reverse(next)| next.at <= end) {
            let Reverse(timed) = self.steps.pop().unwrap();
            self.now = timed.at;
            match timed.step {
                Step::Arrival { worker } => {
                    self.arrival(worker);
                    self.attempt(Request { arrived: self.now, worker, tried: Vec::new(), flight: None });
                }
                Step::Connected(mut request) => {
                    let now = self.instant();
                    request.flight.as_mut().unwrap().sent(now);
                    self.enter(request);
                }
                Step::Served(request) => {
                    let server = self.server(request.flight.as_ref().unwrap().address());
                    server.busy -= 1;
                    if let Some(next) = server.waiting.pop_front() {
                        self.enter(next);
                    }
                    self.ended(request, Outcome::Success);
                }
                Step::Ended(request, outcome) => self.ended(request, outcome),
            }
        }
        self.now = end;
    }

    fn attempt(&mut self, mut request: Request) {
        let random = self.random.next();
        let flight = match self.by {
            By::Balancer => choose(&self.snapshot, self.instant(), random, &request.tried),
            By::Turns => {
                let turn = &mut self.turn[request.worker];
                *turn += 1;
                let one = &self.snapshot[*turn % self.snapshot.len()];
                choose(std::slice::from_ref(one), self.instant(), random, &[])
            }
        }
        .unwrap();
        let address = flight.address();
        self.attempts.push((self.now, address));
        request.tried.push(address);
        let (worker, trial) = (request.worker, flight.is_trial());
        request.flight = Some(flight);
        let server = self.server(address);
        server.in_flight += 1;
        server.trials += u32::from(trial);
        assert!(server.trials <= 1, "two trials at once");
        if server.manner == Manner::Dead {
            self.after(MILLISECOND / 5, Step::Ended(request, Outcome::ConnectFailure));
        } else if std::mem::replace(&mut server.connected[worker], true) {
            self.enter(request);
        } else {
            self.after(HANDSHAKE, Step::Connected(request));
        }
    }

    /// A request is at its replica's application.
    fn enter(&mut self, request: Request) {
        let time = self.random.service_time();
        let server = self.server(request.flight.as_ref().unwrap().address());
        match server.manner {
            Manner::Dead => self.after(0, Step::Ended(request, Outcome::Failure)),
            Manner::Failing => self.after(MILLISECOND / 2, Step::Ended(request, Outcome::Failure)),
            Manner::Healthy | Manner::Slow(_) if server.busy == SLOTS => server.waiting.push_back(request),
            Manner::Healthy => {
                server.busy += 1;
                self.after(time, Step::Served(request));
            }
            Manner::Slow(more) => {
                // It waits for something else, so its slots are not what is missing.
                self.after(time + more, Step::Ended(request, Outcome::Success));
            }
        }
    }

    fn ended(&mut self, mut request: Request, outcome: Outcome) {
        let flight = request.flight.take().unwrap();
        let (address, trial) = (flight.address(), flight.is_trial());
        let server = self.server(address);
        server.in_flight -= 1;
        server.trials -= u32::from(trial);
        let event = flight.end(self.instant(), outcome);
        if let Some(event) = event {
            self.changes.push((self.now, event.address, event.change));
            self.check();
        }
        if outcome == Outcome::Success {
            self.latencies.push(self.now - request.arrived);
            return;
        }
        self.failed_attempts += 1;
        if request.tried.len() < ATTEMPTS {
            self.attempt(request);
        } else {
            self.errors += 1;
        }
    }

    /// What holds after each change.
    fn check(&self) {
        let views = self.replicas.view(self.instant());
        let ejected = views.iter().filter(|view| view.state == State::Ejected).count();
        assert!(ejected <= views.len() / 2, "{ejected} of {} ejected", views.len());
        for view in views {
            assert_eq!(
                view.in_flight,
                self.servers[host(view.address)].in_flight,
                "in flight at {}",
                view.address
            );
        }
    }

    fn quantile(&self, share: f64) -> u64 {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        sorted[((sorted.len() - 1) as f64 * share) as usize]
    }

    fn attempts_at(&self, host: u8, time: Range<u64>) -> usize {
        self.attempts.iter().filter(|(at, to)| *to == address(host) && time.contains(at)).count()
    }
}

/// What a balancer is for: the issue's own figures.
#[test]
fn a_slow_replica_is_hardly_noticed() {
    let run = |seed: u64, by, slow: Option<u64>| {
        let workers = [1, 2, 4][(seed % 3) as usize];
        let mut model = Model::new(seed, workers, 500.0, by);
        model.discover(0..3);
        // Slow from the start, or from a moment when all have been known to be equal.
        if let Some(slow) = slow {
            model.run(slow);
            model.set(0, Manner::Slow(100 * MILLISECOND));
            model.run(3 * SECOND - slow);
        } else {
            model.run(3 * SECOND);
        }
        model
    };
    for_seeds(0..90, |seed| {
        let healthy = run(seed, By::Balancer, None).quantile(0.99) as f64;
        let slow = run(seed, By::Balancer, Some(SECOND * (seed % 2))).quantile(0.99) as f64;
        assert!(slow <= 1.5 * healthy, "p99 is {slow} ns where it was {healthy} ns");
    });
    let (healthy, turns): (Vec<_>, Vec<_>) = (0..9)
        .map(|seed| {
            let p99 = |slow| run(seed, By::Turns, slow).quantile(0.99) as f64;
            (p99(None), p99(Some(0)))
        })
        .unzip();
    let ratio = turns.iter().sum::<f64>() / healthy.iter().sum::<f64>();
    assert!(ratio > 20.0, "taking turns costs only {ratio}: the model is too kind");
}

/// One answer that took two seconds must not keep a replica idle for the minute in which it is forgotten.
#[test]
fn who_was_slow_once_soon_has_its_share_again() {
    for_seeds(0..60, |seed| {
        let rate = [50.0, 200.0, 1000.0][(seed % 3) as usize];
        let count = 2 + (seed / 3 % 3) as u8;
        let mut model = Model::new(seed, 1, rate, By::Balancer);
        model.discover(0..count);
        model.run(11 * SECOND);
        model.set(0, Manner::Slow(2 * SECOND));
        model.run(3 * SECOND);
        model.set(0, Manner::Healthy);
        // Ten times two seconds is more than five; then it takes a draw of 128, of two that it is one of.
        model.run(5 * SECOND + (5.0 * 128.0 * f64::from(count) / 2.0 / rate * SECOND as f64) as u64);
        let begin = model.now;
        model.run(10 * SECOND);
        let all = model.attempts.iter().filter(|(at, _)| *at >= begin).count() as f64;
        let share = f64::from(count) * model.attempts_at(0, begin..u64::MAX) as f64 / all;
        assert!(share > 0.7, "it has {share} of its share, of {count} at {rate} a second");
    });
}

/// Who stays slow is asked now and then, and few requests pay for it.
#[test]
fn who_stays_slow_is_hardly_asked() {
    for_seeds(0..60, |seed| {
        let rate = [20.0, 200.0, 1000.0][(seed % 3) as usize];
        let mut model = Model::new(seed, 1, rate, By::Balancer);
        model.discover(0..2);
        model.run(SECOND);
        model.set(0, Manner::Slow(300 * MILLISECOND));
        model.run(5 * SECOND);
        let begin = model.now;
        model.run(60 * SECOND);
        let all = model.attempts.iter().filter(|(at, _)| *at >= begin).count() as f64;
        let slow = model.attempts_at(0, begin..u64::MAX) as f64;
        assert!(slow <= (all / 128.0 + 4.0 * (all / 128.0).sqrt()).min(20.0) + 1.0, "{slow} of {all}");
    });
}

#[test]
fn a_newcomer_is_eased_in() {
    for_seeds(0..15, |seed| {
        let old = 2 + (seed % 3) as u8;
        let mut model = Model::new(seed, 4, 500.0, By::Balancer);
        model.discover(0..old);
        model.run(SECOND);
        model.discover(0..old + 1);
        model.run(16 * SECOND);
        let all = |time: Range<u64>| model.attempts.iter().filter(|(at, _)| time.contains(at)).count() as f64;
        let newcomer =
            |time: Range<u64>| model.attempts_at(old, time.clone()) as f64 / (all(time) / f64::from(old + 1));
        let begin = newcomer(SECOND..2 * SECOND);
        assert!((0.04..0.5).contains(&begin), "at first it has {begin} of its share");
        let middle = newcomer(5 * SECOND..7 * SECOND);
        assert!((0.3..1.0).contains(&middle), "in the midst of its warm-up it has {middle}");
        let end = newcomer(14 * SECOND..17 * SECOND);
        assert!((0.7..1.3).contains(&end), "after it, it has {end}");

        // No herd on anyone: at first the old ones have the newcomer's share too. The allowance is for chance.
        let window = SECOND / 10;
        let mut counts = vec![vec![0.0; usize::from(old) + 1]; 180];
        for (at, to) in &model.attempts {
            counts[(at / window) as usize][host(*to)] += 1.0;
        }
        for (place, counts) in counts.iter().enumerate().filter(|(place, _)| (10..170).contains(place)) {
            let fair = counts.iter().sum::<f64>() / f64::from(old);
            let most = counts.iter().copied().fold(0.0, f64::max);
            assert!(most <= 1.5 * fair + fair.sqrt(), "{counts:?} in the window {place}");
        }
    });
}

#[test]
fn equal_replicas_have_equal_shares() {
    for_seeds(0..6, |seed| {
        let mut model = Model::new(seed, 4, 500.0, By::Balancer);
        model.discover(0..3);
        model.run(40 * SECOND);
        for host in 0..3 {
            let share = 3.0 * model.attempts_at(host, 0..40 * SECOND) as f64 / model.attempts.len() as f64;
            assert!((0.9..1.1).contains(&share), "{host} has {share} of its share");
        }
    });
}

#[test]
fn a_dead_replica_costs_its_first_failures() {
    for_seeds(0..200, |seed| {
        let workers = [1, 2, 4][(seed % 3) as usize];
        let count = 2 + (seed % 4) as u8;
        let mut model = Model::new(seed, workers, 200.0, By::Balancer);
        model.discover(0..count);
        model.run(SECOND);
        model.set(0, Manner::Dead);
        let in_flight = model.servers[0].in_flight as usize;
        model.run(3 * SECOND);
        let noticed = model.changes.first().expect("it was noticed").0;
        // Each that is told of as "ejected" is the first, or a trial.
        let told =
            model.changes.iter().filter(|(_, _, change)| matches!(change, Change::Ejected { .. })).count();
        assert!((2..=3).contains(&told), "after one second and two more: {:?}", model.changes);
        let asked = model.attempts_at(0, noticed..u64::MAX);
        assert!(
            asked < told + usize::from(model.servers[0].trials > 0),
            "asked {asked} times: {:?}",
            model.changes
        );
        // Between death and notice there is a fifth of a millisecond.
        assert!(model.failed_attempts <= in_flight + told + 3, "{} failures", model.failed_attempts);
        assert_eq!(model.errors, 0);

        // It comes back by the next trial, eased in.
        model.set(0, Manner::Healthy);
        model.run(6 * SECOND);
        let returned = model.changes.iter().find(|(_, _, change)| matches!(change, Change::Returned { .. }));
        let returned = returned.expect("it is back").0;
        let share = model.attempts_at(0, returned..returned + SECOND) as f64 * f64::from(count)
            / model.attempts.iter().filter(|(at, _)| (returned..returned + SECOND).contains(at)).count()
                as f64;
        assert!(share < 0.75, "it has {share} of its share in its first second");
    });
}

/// Replicas do what they like, and come and go; [`Model::check`] looks after each event.
#[test]
fn whatever_happens_half_stay_in_and_all_come_back() {
    for_seeds(0..120, |seed| {
        let mut model = Model::new(seed, 2, 25.0, By::Balancer);
        model.discover(0..3);
        for _ in 0..20 {
            let dice = model.random.next();
            let count = model.snapshot.len() as u64;
            let manner = match dice % 8 {
                0..3 => Manner::Healthy,
                3..6 => Manner::Failing,
                6 => Manner::Slow(MILLISECOND * (dice >> 32 & 0xff)),
                _ => Manner::Dead,
            };
            model.set((dice >> 8) as u8 % count as u8, manner);
            if dice >> 16 & 3 == 0 {
                model.discover(0..1 + (dice >> 24) as u8 % 6);
            }
            model.run((dice >> 40) % (2 * SECOND));
        }
        let count = model.snapshot.len() as u8;
        for host in 0..model.servers.len() as u8 {
            model.set(host, Manner::Healthy);
        }
        let errors = model.errors;
        model.run(61 * SECOND);
        let failed = model.errors - errors;
        assert!(failed <= 40, "{failed} requests failed after all was well again");
        model.check();
        for view in model.replicas.view(model.instant()) {
            assert!(matches!(view.state, State::Up | State::Warming), "{view:?}");
        }
        let begin = model.now;
        model.run(2 * SECOND);
        assert!((0..count).all(|host| model.attempts_at(host, begin..u64::MAX) > 0));
    });
}

/// Where all fail, the mesh goes on asking, and sees at once that they are back.
#[test]
fn an_outage_of_all_ends_when_it_ends() {
    for_seeds(0..200, |seed| {
        let manner = if seed % 2 == 0 { Manner::Failing } else { Manner::Dead };
        let count = 1 + (seed % 3) as u8;
        let mut model = Model::new(seed, 2, 50.0, By::Balancer);
        model.discover(0..count);
        model.run(SECOND);
        for host in 0..count {
            model.set(host, manner);
        }
        model.run(10 * SECOND);
        for host in 0..count {
            model.set(host, Manner::Healthy);
        }
        model.run(10 * MILLISECOND);
        let errors = model.errors;
        model.run(10 * SECOND);
        assert_eq!(model.errors, errors);
    });
}
