use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;

fn address(host: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], host))
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const SHORT: Duration = Duration::from_millis(2);

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A service with a clock that the test moves.
struct Service {
    replicas: Replicas,
    now: Instant,
    seed: u64,
}

impl Service {
    fn new(count: u16) -> Self {
        let now = Instant::now();
        let replicas = Replicas::new(Settings::default(), now);
        let service = Self { replicas, now, seed: 1 };
        service.discover(0..count);
        service
    }

    fn discover(&self, hosts: impl IntoIterator<Item = u16>) -> Vec<Event> {
        self.replicas.update(&hosts.into_iter().map(address).collect::<Vec<_>>(), self.now)
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    fn replica(&self, host: u16) -> Arc<Replica> {
        let snapshot = self.replicas.snapshot();
        Arc::clone(snapshot.iter().find(|replica| replica.address() == address(host)).unwrap())
    }

    fn view(&self, host: u16) -> View {
        self.replica(host).view(self.now)
    }

    fn state(&self, host: u16) -> State {
        self.view(host).state
    }

    /// A request that goes there whatever is known.
    fn send(&self, host: u16) -> InFlight {
        choose(&[self.replica(host)], self.now, 0, &[]).unwrap()
    }

    fn ends(&self, host: u16, outcome: Outcome) -> Option<Change> {
        self.send(host).end(self.now + SHORT, outcome).map(|event| {
            assert_eq!(event.address, address(host));
            event.change
        })
    }

    fn fails(&self, host: u16, times: usize) -> Option<Change> {
        (0..times).filter_map(|_| self.ends(host, Outcome::Failure)).last()
    }

    fn choose(&mut self, tried: &[u16]) -> InFlight {
        let tried: Vec<_> = tried.iter().copied().map(address).collect();
        choose(&self.replicas.snapshot(), self.now, random(&mut self.seed), &tried).unwrap()
    }

    /// How often each replica is chosen in 3,000 requests, one at a time.
    fn shares(&mut self, tried: &[u16]) -> Vec<usize> {
        let mut counts = vec![0; self.replicas.snapshot().len()];
        for _ in 0..3000 {
            counts[usize::from(self.choose(tried).address().port())] += 1;
        }
        counts
    }

    /// The trial of a replica that is due for one, however many choices that takes.
    fn trial(&mut self) -> InFlight {
        (0..1000).map(|_| self.choose(&[])).find(InFlight::is_trial).expect("a trial is due")
    }

    fn no_trial(&mut self) {
        assert!((0..200).all(|_| !self.choose(&[]).is_trial()));
    }
}

fn ejected(cause: Cause, after: u64) -> Option<Change> {
    Some(Change::Ejected { cause, lasts: seconds(after) })
}

#[test]
fn an_empty_set_has_nobody_and_one_replica_is_always_taken() {
    let service = Service::new(0);
    assert!(choose(&service.replicas.snapshot(), service.now, 0, &[]).is_none());
    let mut service = Service::new(1);
    assert_eq!(service.ends(0, Outcome::ConnectFailure), ejected(Cause::Unreachable, 1));
    assert_eq!(service.choose(&[0]).address(), address(0));
    assert_eq!(service.fails(0, 20), None);
    assert_eq!(service.state(0), State::Unreachable);
    // It is the only one, so requests go there, and the first that goes well ends it.
    assert_eq!(service.ends(0, Outcome::Success), Some(Change::Returned { after: Duration::ZERO }));
    assert_eq!(service.fails(0, 20), None);
    assert_eq!(service.state(0), State::Warming);
}

#[test]
fn equal_ones_are_taken_equally_often() {
    for count in 2..6 {
        let mut service = Service::new(count);
        for share in service.shares(&[]) {
            let fair = 3000 / usize::from(count);
            assert!(share.abs_diff(fair) < fair / 5, "{share} of {fair}");
        }
    }
    // The same where two are left of many, by the way that looks at all of them.
    let mut service = Service::new(5);
    let shares = service.shares(&[1, 2]);
    assert!(
        shares[1..3] == [0, 0] && [0, 3, 4].iter().all(|host| shares[*host].abs_diff(1000) < 150),
        "{shares:?}"
    );
}

#[test]
fn the_lighter_of_two_is_taken() {
    let mut service = Service::new(2);
    for (host, took) in [(0, 10), (1, 15)] {
        assert_eq!(service.send(host).end(service.now + Duration::from_millis(took), Outcome::Success), None);
    }
    // By half: three of four. By twice, here by a second request in flight: always.
    let shares = service.shares(&[]);
    assert!(shares[0].abs_diff(2250) < 150, "{shares:?}");
    let busy = service.send(1);
    assert_eq!(service.shares(&[])[1], 0);
    let others: Vec<_> = (0..5).map(|_| service.send(0)).collect();
    assert_eq!(service.shares(&[])[0], 0);
    drop((busy, others));
    assert_eq!(service.view(0).in_flight + service.view(1).in_flight, 0);
}

#[test]
fn what_a_connection_costs_is_not_the_replicas_latency() {
    let service = Service::new(1);
    let mut request = service.send(0);
    request.sent(service.now + Duration::from_millis(50));
    assert_eq!(request.end(service.now + Duration::from_millis(52), Outcome::Success), None);
    assert!(service.view(0).latency.unwrap().abs_diff(SHORT) < Duration::from_micros(10));
}

#[test]
fn only_good_answers_make_a_replica_fast() {
    for outcome in [Outcome::Failure, Outcome::Rejected, Outcome::Abandoned] {
        let mut service = Service::new(1);
        assert_eq!(service.ends(0, outcome), None);
        assert_eq!(service.view(0).latency, None);
        assert_eq!(service.send(0).end(service.now + seconds(1), Outcome::Success), None);
        service.wait(seconds(1));
        assert_eq!(service.ends(0, outcome), None);
        assert!(service.view(0).latency.unwrap() > Duration::from_millis(990));
        assert_eq!(service.send(0).end(service.now + seconds(3), outcome), None);
        assert!(service.view(0).latency.unwrap() > Duration::from_millis(2990));
    }
}

#[test]
fn five_failures_in_a_row_eject() {
    let mut service = Service::new(3);
    assert_eq!(service.fails(0, 4), None);
    assert_eq!(service.ends(0, Outcome::Success), None);
    assert_eq!(service.fails(0, 4), None);
    // Neither of these says that it is well, or that it is not.
    assert_eq!(service.ends(0, Outcome::Rejected), None);
    assert_eq!(service.ends(0, Outcome::Abandoned), None);
    assert_eq!(service.view(0).failures, 4);
    assert_eq!(service.fails(0, 1), ejected(Cause::Failures, 1));
    assert_eq!((service.state(0), service.view(0).share), (State::Ejected, 0.0));
    assert_eq!((service.view(0).ejections, service.view(0).failures), (1, 0));
    assert!(service.view(0).out_for.unwrap() > Duration::from_millis(999));
    assert_eq!(service.shares(&[])[0], 0);
    service.wait(seconds(10));
    assert_eq!(service.view(0).out_for, Some(Duration::ZERO));
}

#[test]
fn half_stay_in() {
    for (count, most) in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3), (7, 3)] {
        let service = Service::new(count);
        let out: Vec<_> = (0..count).filter_map(|host| service.fails(host, 30)).collect();
        assert_eq!(out.len(), most, "of {count}");
        // One that was held by the others goes as soon as one of them is back.
        if most > 0 {
            assert!(matches!(service.ends(0, Outcome::Success), Some(Change::Returned { .. })));
            assert_eq!(service.fails(count - 1, 1), ejected(Cause::Failures, 1));
        }
    }
}

#[test]
fn one_connect_failure_is_enough_and_has_no_half() {
    let mut service = Service::new(4);
    for host in 0..3 {
        assert_eq!(service.ends(host, Outcome::ConnectFailure), ejected(Cause::Unreachable, 1));
        assert_eq!(service.state(host), State::Unreachable);
    }
    assert_eq!(service.shares(&[]), [0, 0, 0, 3000]);
    // But who answers stays in when as many are out already.
    assert_eq!(service.fails(3, 20), None);
    // With nobody left, each is worth a try.
    assert_eq!(service.ends(3, Outcome::ConnectFailure), ejected(Cause::Unreachable, 1));
    assert!(service.shares(&[]).iter().all(|share| *share > 500));
}

#[test]
fn one_trial_at_a_time_decides() {
    let mut service = Service::new(3);
    assert_eq!(service.send(0).end(service.now + seconds(9), Outcome::Success), None);
    service.fails(0, 5);
    service.wait(Duration::from_millis(999));
    service.no_trial();
    service.wait(Duration::from_millis(10));
    let trial = service.trial();
    assert_eq!((service.state(0), trial.address()), (State::Probing, address(0)));
    service.no_trial();
    assert_eq!(service.shares(&[])[0], 0);
    assert_eq!(trial.end(service.now, Outcome::Failure).map(|event| event.change), ejected(Cause::Trial, 2));
    assert_eq!(service.state(0), State::Ejected);
    service.no_trial();
    service.wait(seconds(2) + SHORT);
    let trial = service.trial();
    let change = trial.end(service.now + Duration::from_millis(7), Outcome::Success).unwrap().change;
    assert!(matches!(change, Change::Returned { after } if after > seconds(3)), "{change:?}");
    // Its latency is that of the trial, and its share a tenth.
    let view = service.view(0);
    assert_eq!(view.state, State::Warming);
    assert!(view.latency.unwrap().abs_diff(Duration::from_millis(7)) < Duration::from_micros(10));
    assert!((0.09..0.11).contains(&view.share), "{}", view.share);
}

#[test]
fn a_trial_that_tells_nothing_makes_way_for_another() {
    let mut service = Service::new(2);
    service.fails(0, 5);
    service.wait(seconds(1) + SHORT);
    // The client went away: not the next one at once, which might wait as long.
    assert_eq!(service.trial().end(service.now, Outcome::Abandoned), None);
    service.no_trial();
    service.wait(seconds(1) + SHORT);
    // Lost without a word.
    drop(service.trial());
    assert_eq!(service.view(0).out_for, Some(Duration::ZERO));
    // One that has no end, such as a request that waits for an event.
    let endless = service.trial();
    service.wait(seconds(19));
    service.no_trial();
    service.wait(seconds(2));
    let second = service.trial();
    assert_eq!(endless.end(service.now, Outcome::Failure), None);
    assert_eq!(service.state(0), State::Probing);
    // 404 is an answer.
    assert!(matches!(
        second.end(service.now, Outcome::Rejected),
        Some(Event { change: Change::Returned { .. }, .. })
    ));
}

#[test]
fn a_request_that_has_failed_goes_to_the_surest() {
    let mut service = Service::new(3);
    service.fails(0, 5);
    service.wait(seconds(1) + SHORT);
    // Not to a trial, while another one is in.
    assert!((0..200).all(|_| service.choose(&[1]).address() == address(2)));
    // Rather a trial than the same again, and rather the same again than who is out.
    let trial = service.choose(&[1, 2]);
    assert!(trial.is_trial());
    assert!((0..200).all(|_| service.choose(&[1, 2]).address() != address(0)));
    // But not again to one that is only in since half have to be.
    service.fails(1, 5);
    service.fails(2, 5);
    assert!((0..200).all(|_| service.choose(&[1, 2]).address() == address(0)));
    assert_eq!(service.shares(&[0, 1, 2]).iter().sum::<usize>(), 3000);
    drop(trial);
}

#[test]
fn ejections_double_and_are_forgiven() {
    let mut service = Service::new(2);
    let mut lasted = Vec::new();
    service.fails(0, 5);
    for _ in 0..8 {
        let out_for = service.view(0).out_for.unwrap();
        lasted.push((out_for + SHORT * 2).as_secs());
        service.wait(out_for + SHORT);
        let _ = service.trial().end(service.now, Outcome::Failure);
    }
    assert_eq!(lasted, [1, 2, 4, 8, 16, 32, 60, 60]);
    // Soon after its return it goes out for as long as ever; after a minute's health it begins anew.
    assert!(matches!(service.ends(0, Outcome::Success), Some(Change::Returned { .. })));
    service.wait(seconds(59));
    assert_eq!(service.fails(0, 5), ejected(Cause::Failures, 60));
    assert!(matches!(service.ends(0, Outcome::Success), Some(Change::Returned { .. })));
    service.wait(seconds(61));
    assert_eq!(service.fails(0, 5), ejected(Cause::Failures, 1));
    assert_eq!(service.fails(1, 50), None);
}

#[test]
fn what_began_before_an_ejection_tells_nothing_after_it() {
    let service = Service::new(2);
    let old: Vec<_> = (0..20).map(|_| service.send(0)).collect();
    assert_eq!(service.fails(0, 5), ejected(Cause::Failures, 1));
    for (request, outcome) in
        old.into_iter().zip([Outcome::Success, Outcome::Failure, Outcome::ConnectFailure].repeat(7))
    {
        assert_eq!(request.end(service.now, outcome), None);
    }
    assert_eq!(service.state(0), State::Ejected);
    let old = service.send(1);
    service.ends(1, Outcome::ConnectFailure);
    assert!(service.ends(1, Outcome::Success).is_some());
    service.fails(1, 4);
    assert_eq!(old.end(service.now, Outcome::Success), None);
    assert_eq!(service.view(1).failures, 4);
    // Nor after its return.
    assert!(matches!(service.ends(0, Outcome::Success), Some(Change::Returned { .. })));
    let old: Vec<_> = (0..9).map(|_| service.send(0)).collect();
    assert_eq!(service.fails(0, 5), ejected(Cause::Failures, 2));
    assert!(matches!(service.ends(0, Outcome::Success), Some(Change::Returned { .. })));
    assert!(old.into_iter().all(|request| request.end(service.now, Outcome::Failure).is_none()));
    assert_eq!(service.view(0).failures, 0);
}

#[test]
fn who_was_unreachable_and_fails_is_ejected_as_far_as_half_allow() {
    let mut service = Service::new(3);
    service.ends(0, Outcome::ConnectFailure);
    service.ends(1, Outcome::ConnectFailure);
    service.wait(seconds(1) + SHORT);
    let trials = [service.trial(), service.trial()];
    let changes = trials.map(|trial| trial.end(service.now, Outcome::Failure).unwrap().change);
    assert!(
        matches!(changes, [Change::Ejected { cause: Cause::Trial, .. }, Change::Readmitted { .. }]),
        "{changes:?}"
    );
}

#[test]
fn newcomers_warm_up_where_others_are() {
    let mut service = Service::new(2);
    assert!((0..2).all(|host| service.state(host) == State::Up));
    service.discover(0..3);
    assert_eq!([0, 2].map(|host| service.state(host)), [State::Up, State::Warming]);
    let mut last = 0;
    for step in [0, 4, 7] {
        service.wait(seconds(step));
        let share = service.shares(&[])[2];
        assert!(share > last, "{share} after {last}");
        last = share;
    }
    assert!(last.abs_diff(1000) < 150, "{last}");
    assert_eq!(service.state(2), State::Up);
    // All of them new: nobody else could take the requests meanwhile.
    service.discover(10..12);
    assert!((10..12).all(|host| service.state(host) == State::Up));
    // The only one that is left.
    service.discover([10, 12]);
    service.discover([12]);
    assert_eq!(service.choose(&[]).address(), address(12));
}

#[test]
fn a_cold_start_is_forgotten_faster() {
    let mut service = Service::new(1);
    service.discover(0..2);
    let latency = |service: &Service, host| service.view(host).latency.unwrap().as_millis();
    for host in 0..2 {
        assert_eq!(service.send(host).end(service.now + Duration::from_millis(100), Outcome::Success), None);
    }
    service.wait(seconds(5));
    assert!((58..64).contains(&latency(&service, 0)) && (12..15).contains(&latency(&service, 1)));
}

#[test]
fn who_stays_keeps_all_and_who_comes_back_soon_is_remembered() {
    let mut service = Service::new(4);
    service.fails(0, 5);
    service.ends(1, Outcome::ConnectFailure);
    assert_eq!(service.ends(2, Outcome::Success), None);
    let kept = service.replica(2);
    let version = service.replicas.version();
    service.discover([2, 3, 4, 2]);
    assert_ne!(service.replicas.version(), version);
    assert_eq!(service.replicas.snapshot().len(), 3);
    assert!(Arc::ptr_eq(&kept, &service.replica(2)) && service.view(2).latency.is_some());
    let version = service.replicas.version();
    service.discover([4, 2, 3]);
    assert_eq!(service.replicas.version(), version);

    service.discover(0..5);
    assert_eq!(service.state(0), State::Ejected);
    // It has been announced anew, which is worth a try, with care.
    assert_eq!(service.state(1), State::Warming);
    assert_eq!(service.ends(1, Outcome::ConnectFailure), ejected(Cause::Unreachable, 2));

    service.discover(2..5);
    service.wait(seconds(61));
    service.discover(0..5);
    assert_eq!((service.view(0).state, service.view(0).ejections), (State::Warming, 0));
}

#[test]
fn memory_is_bounded() {
    let mut service = Service::new(0);
    for round in 0..50_u16 {
        service.discover((0..40).map(|host| round * 40 + host));
        service.wait(Duration::from_millis(10));
    }
    // Of those that are gone the latest 64 are known: this one was lost on the way.
    let last = service.replica(49 * 40);
    service.discover((0..70).map(|host| 3000 + host));
    service.discover([]);
    service.discover([49 * 40]);
    assert!(!Arc::ptr_eq(&last, &service.replica(49 * 40)));
    service.discover(0..5000);
    assert_eq!(service.replicas.snapshot().len(), REPLICAS_MAX);
}

#[test]
fn who_leaves_lets_others_in_again() {
    let service = Service::new(6);
    for host in 0..3 {
        service.fails(host, 5);
    }
    let events = service.discover(0..4);
    assert_eq!(events.len(), 1);
    assert!(matches!(events[0].change, Change::Readmitted { .. }));
    let out = |service: &Service| {
        service.replicas.view(service.now).iter().filter(|view| view.share == 0.0).count()
    };
    assert_eq!(out(&service), 2);
    service.discover([0]);
    assert_eq!(out(&service), 0);
    // Those that left are no longer counted, so that they take no room.
    service.discover(10..13);
    assert_eq!(service.fails(10, 5), ejected(Cause::Failures, 1));
    // What becomes of their requests concerns nobody.
    let gone = service.send(11);
    service.discover([10, 12]);
    assert_eq!(gone.end(service.now, Outcome::ConnectFailure), None);
}

#[test]
fn settings_make_sense() {
    let settings = |decay, warm_up, first, longest| {
        Settings::new(seconds(decay), seconds(warm_up), NonZeroU32::MIN, seconds(first), seconds(longest))
    };
    assert_eq!(settings(0, 1, 1, 1), Err(SettingsError::Decay(Duration::ZERO)));
    assert_eq!(settings(1, 601, 1, 1), Err(SettingsError::WarmUp(seconds(601))));
    let ejection =
        |first, longest| Err(SettingsError::Ejection { first: seconds(first), longest: seconds(longest) });
    assert_eq!(settings(1, 1, 0, 1), ejection(0, 1));
    assert_eq!(settings(1, 1, 2, 1), ejection(2, 1));
    assert_eq!(settings(1, 1, 1, 3601), ejection(1, 3601));
    let one = settings(1, 0, 1, 3600).unwrap();
    let now = Instant::now();
    let replicas = Replicas::new(one, now);
    replicas.update(&[address(0)], now);
    replicas.update(&[address(0), address(1)], now);
    // No warm-up, and one failure is enough.
    let states = || replicas.view(now).iter().map(|view| view.state).collect::<Vec<_>>();
    assert_eq!(states(), [State::Up, State::Up]);
    let request = choose(&replicas.snapshot()[..1], now, 0, &[]).unwrap();
    assert!(request.end(now, Outcome::Failure).is_some());
    assert_eq!(states(), [State::Ejected, State::Up]);
}

/// Threads that eject whatever they can, while one looks on.
#[test]
fn half_stay_in_whoever_races() {
    for count in 1..=5_u16 {
        let service = Service::new(count);
        let (ejections, over) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4_u64)
                .map(|worker| {
                    let (service, ejections) = (&service, &ejections);
                    scope.spawn(move || {
                        let (mut seed, mut now) = (worker, service.now);
                        let snapshot = service.replicas.snapshot();
                        for _ in 0..5_000 {
                            now += Duration::from_millis(5);
                            let request = choose(&snapshot, now, random(&mut seed), &[]).unwrap();
                            let good = random(&mut seed).is_multiple_of(16);
                            let event =
                                request.end(now, if good { Outcome::Success } else { Outcome::Failure });
                            if event.is_some_and(|event| {
                                matches!(event.change, Change::Ejected { cause: Cause::Failures, .. })
                            }) {
                                ejections.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    })
                })
                .collect();
            let onlooker = scope.spawn(|| {
                // Each replica is looked at in turn, so that one may go out after another came back: only what stays so counts.
                let snapshot = service.replicas.snapshot();
                let stints =
                    || snapshot.iter().map(|one| one.view(service.now).ejections).collect::<Vec<_>>();
                while !over.load(Ordering::Relaxed) {
                    let before = stints();
                    let out = snapshot.iter().filter(|one| one.view(service.now).share == 0.0).count();
                    if stints() == before {
                        assert!(out <= usize::from(count / 2), "{out} of {count} are out");
                    }
                    std::thread::yield_now();
                }
            });
            for worker in workers {
                worker.join().unwrap();
            }
            over.store(true, Ordering::Relaxed);
            onlooker.join().unwrap();
        });
        assert_eq!(ejections.load(Ordering::Relaxed) > 0, count > 1);
        assert_eq!(service.replicas.view(service.now).iter().map(|view| view.in_flight).sum::<u32>(), 0);
        assert!(
            service.replicas.view(service.now).iter().filter(|view| view.share == 0.0).count()
                <= usize::from(count / 2)
        );
    }
}

/// Four failures end at once: however the threads interleave, the replica goes out once, and of four replicas two.
#[test]
fn ejections_are_exact_under_races() {
    for round in 0..200 {
        let service = Service::new(4);
        let (changes, gate) = (AtomicU64::new(0), std::sync::Barrier::new(4));
        for host in 0..4 {
            service.fails(host, 4);
        }
        std::thread::scope(|scope| {
            for host in 0..4 {
                let (service, changes, gate) = (&service, &changes, &gate);
                scope.spawn(move || {
                    let request = service.send(host);
                    gate.wait();
                    changes.fetch_add(
                        u64::from(request.end(service.now, Outcome::Failure).is_some()),
                        Ordering::Relaxed,
                    );
                });
            }
        });
        assert_eq!(changes.load(Ordering::Relaxed), 2, "round {round}");
    }
}
