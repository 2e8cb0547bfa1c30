use std::cell::RefCell;
use std::sync::Barrier;
use std::sync::mpsc::{SyncSender, sync_channel};

use super::*;

/// A limit whose waiters are numbers, and what was said to them.
struct Bench {
    limit: ConcurrencyLimit<u32>,
    start: Instant,
    told: RefCell<Vec<(u32, Verdict)>>,
}

const TOLD_NOTHING: [(u32, Verdict); 0] = [];

impl Bench {
    fn new(limit: u32, max_waiting: u32) -> Self {
        let settings = ConcurrencySettings {
            limit: Limit::Fixed(NonZeroU32::new(limit).unwrap()),
            queue: QueueSettings { max_waiting, ..QueueSettings::default() },
            ..ConcurrencySettings::default()
        };
        let start = Instant::now();
        Self { limit: ConcurrencyLimit::new(settings, start), start, told: RefCell::default() }
    }

    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn wake(&self) -> impl FnMut(u32, Verdict) -> bool {
        |number, verdict| {
            self.told.borrow_mut().push((number, verdict));
            true
        }
    }

    fn arrive(&self, ms: u64, number: u32) -> Arrival {
        self.limit.arrive(self.at(ms), || number, self.wake())
    }

    /// Arrives, and must find a place to wait.
    fn queue(&self, ms: u64, number: u32) -> (Ticket, u64) {
        match self.arrive(ms, number) {
            Arrival::Queued { ticket, check_at } => (ticket, (check_at - self.start).as_millis() as u64),
            other @ (Arrival::Admitted | Arrival::Shed(_)) => panic!("{number}: {other:?}"),
        }
    }

    fn leave(&self, ms: u64) -> Vec<(u32, Verdict)> {
        self.limit.leave(self.at(ms), Outcome::Answered, Duration::ZERO, self.wake());
        self.told.take()
    }

    fn expired(&self, ticket: Ticket, ms: u64) -> Patience {
        self.limit.expired(ticket, self.at(ms))
    }
}

const RETRY_AFTER: Duration = Duration::from_secs(1);
const TOO_LONG: Shed = Shed { reason: ShedReason::WaitedTooLong, retry_after: RETRY_AFTER };
const FULL: Shed = Shed { reason: ShedReason::QueueFull, retry_after: RETRY_AFTER };

#[test]
fn a_burst_is_served_in_its_order_and_no_more_than_the_queue_waits() {
    let bench = Bench::new(2, 3);
    assert_eq!(bench.arrive(0, 0), Arrival::Admitted);
    assert_eq!(bench.arrive(0, 1), Arrival::Admitted);
    for number in 2..5 {
        bench.queue(1, number);
    }
    assert_eq!(bench.arrive(2, 5), Arrival::Shed(FULL));
    for number in 2..5 {
        assert_eq!(bench.leave(50), [(number, Verdict::Admitted)]);
    }
    assert_eq!(bench.leave(50), TOLD_NOTHING);
    assert_eq!((bench.limit.in_flight(), bench.limit.waiting()), (1, 0));
    assert_eq!(bench.leave(50), TOLD_NOTHING);
    // More than were admitted can't leave.
    assert_eq!(bench.leave(50), TOLD_NOTHING);
    assert_eq!(bench.limit.in_flight(), 0);
}

#[test]
fn under_load_the_newest_goes_first_and_the_old_are_refused() {
    let bench = Bench::new(1, 10);
    assert_eq!(bench.arrive(0, 0), Arrival::Admitted);
    let (oldest, check_at) = bench.queue(0, 1);
    assert_eq!(check_at, 100);
    bench.queue(92, 2);
    bench.queue(95, 3);
    assert_eq!(bench.told.take(), TOLD_NOTHING);
    // The queue has not been empty for 100 ms.
    assert_eq!(bench.expired(oldest, 99), Patience::Until(bench.at(100)));
    bench.queue(100, 4);
    assert_eq!(bench.told.take(), [(1, Verdict::Shed(TOO_LONG))]);
    assert_eq!(bench.leave(103), [(4, Verdict::Admitted), (2, Verdict::Shed(TOO_LONG))]);
    // The last is never refused for its age, so that the next slot finds somebody.
    bench.queue(104, 5);
    assert_eq!(bench.leave(110), [(5, Verdict::Admitted)]);
    assert_eq!(bench.leave(500), [(3, Verdict::Admitted)]);
    // Empty: what comes now is a burst again.
    assert_eq!(bench.queue(501, 6).1, 601);
    assert_eq!(bench.queue(502, 7).1, 601);
    assert_eq!(bench.leave(503), [(6, Verdict::Admitted)]);
}

#[test]
fn in_a_full_queue_under_load_the_oldest_makes_room() {
    let bench = Bench::new(1, 2);
    assert_eq!(bench.arrive(0, 0), Arrival::Admitted);
    bench.queue(0, 1);
    bench.queue(97, 2);
    assert_eq!(bench.arrive(99, 9), Arrival::Shed(FULL));
    bench.queue(100, 3);
    assert_eq!(bench.told.take(), [(1, Verdict::Shed(TOO_LONG))]);
    bench.queue(101, 4);
    assert_eq!(bench.told.take(), [(2, Verdict::Shed(TOO_LONG))]);
}

#[test]
fn where_nothing_ends_waiters_learn_by_their_own_timers() {
    let bench = Bench::new(1, 10);
    assert_eq!(bench.arrive(0, 0), Arrival::Admitted);
    let (first, _) = bench.queue(0, 1);
    let (second, check_at) = bench.queue(95, 2);
    assert_eq!(check_at, 105);
    assert_eq!(bench.expired(first, 100), Patience::Shed(TOO_LONG));
    assert_eq!(bench.expired(first, 100), Patience::Told);
    // The newest waits on, but not for ever.
    assert_eq!(bench.expired(second, 105), Patience::Until(bench.at(1095)));
    assert_eq!(bench.expired(second, 1095), Patience::Shed(TOO_LONG));
    assert_eq!((bench.limit.in_flight(), bench.limit.waiting()), (1, 0));
}

#[test]
fn who_goes_away_leaves_no_trace() {
    let bench = Bench::new(1, 10);
    assert_eq!(bench.arrive(0, 0), Arrival::Admitted);
    let (first, _) = bench.queue(1, 1);
    let (second, _) = bench.queue(2, 2);
    assert!(bench.limit.cancel(first));
    assert!(!bench.limit.cancel(first));
    assert_eq!(bench.leave(3), [(2, Verdict::Admitted)]);
    assert!(!bench.limit.cancel(second));
    // The queue was empty in between: no load.
    let (_, check_at) = bench.queue(90, 3);
    assert_eq!(check_at, 190);
}

#[test]
fn a_slot_for_somebody_who_is_not_there_goes_to_the_next() {
    let bench = Bench::new(1, 10);
    assert_eq!(bench.arrive(0, 0), Arrival::Admitted);
    for number in 1..4 {
        bench.queue(1, number);
    }
    let mut asked = Vec::new();
    bench.limit.leave(bench.at(2), Outcome::Answered, Duration::ZERO, |number, _| {
        asked.push(number);
        number == 3
    });
    assert_eq!((asked, bench.limit.in_flight(), bench.limit.waiting()), (vec![1, 2, 3], 1, 0));
}

#[test]
fn without_places_to_wait_it_is_a_plain_limit() {
    let bench = Bench::new(1, 0);
    assert_eq!(bench.arrive(0, 0), Arrival::Admitted);
    for ms in [0, 50, 150, 1000] {
        assert_eq!(bench.arrive(ms, 1), Arrival::Shed(FULL));
    }
    assert_eq!(bench.leave(1001), TOLD_NOTHING);
    assert_eq!(bench.arrive(1001, 1), Arrival::Admitted);
}

#[test]
fn bounds_with_nothing_between_are_refused() {
    assert_eq!(Adaptive::new(0, 5), Err(AdaptiveError::NoRequests));
    assert_eq!(Adaptive::new(6, 5), Err(AdaptiveError::Crossed { min: 6, max: 5 }));
    assert_eq!(Adaptive::new(1, 5).map(|bounds| bounds.initial()), Ok(5));
    assert_eq!(Adaptive::new(30, 50).map(|bounds| bounds.initial()), Ok(30));
}

#[test]
fn threads_never_exceed_the_limit_and_no_waiter_is_forgotten() {
    const THREADS: u32 = 8;
    const SLOTS: u32 = 3;
    let limit = limit_without_time(SLOTS, THREADS);
    let (inside, highest, barrier) = (AtomicU32::new(0), AtomicU32::new(0), Barrier::new(THREADS as usize));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                barrier.wait();
                for _ in 0..2_000 {
                    let leave = limit.enter();
                    let now_inside = inside.fetch_add(1, Ordering::SeqCst) + 1;
                    highest.fetch_max(now_inside, Ordering::SeqCst);
                    std::thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                    leave();
                }
            });
        }
    });
    assert_eq!((limit.limit.in_flight(), limit.limit.waiting()), (0, 0));
    assert_eq!(highest.into_inner(), SLOTS);
}

#[test]
fn who_begins_to_wait_is_announced_before_it_looks_for_a_slot_for_the_last_time() {
    // Else somebody who leaves between that look and the announcement would wake nobody. Too short a moment for threads to hit it
    // by chance, so the order itself is asked for.
    let bench = Bench::new(1, 10);
    assert_eq!(bench.arrive(0, 0), Arrival::Admitted);
    for number in 1..4 {
        let mut announced = 0;
        let waiter = || {
            announced = bench.limit.waiting();
            number
        };
        assert!(matches!(bench.limit.arrive(bench.at(1), waiter, bench.wake()), Arrival::Queued { .. }));
        assert_eq!(announced, number);
    }
}

/// Time stands still, so that nobody is refused and each wait must be ended by somebody's end.
struct WithoutTime {
    limit: ConcurrencyLimit<SyncSender<Verdict>>,
    now: Instant,
}

fn limit_without_time(slots: u32, max_waiting: u32) -> WithoutTime {
    let settings = ConcurrencySettings {
        limit: Limit::Fixed(NonZeroU32::new(slots).unwrap()),
        queue: QueueSettings { max_waiting, ..QueueSettings::default() },
        ..ConcurrencySettings::default()
    };
    let now = Instant::now();
    WithoutTime { limit: ConcurrencyLimit::new(settings, now), now }
}

impl WithoutTime {
    /// Waits for a slot; what it gives back leaves it.
    fn enter(&self) -> impl FnOnce() {
        let wake = |waiter: SyncSender<Verdict>, verdict| waiter.send(verdict).is_ok();
        let (sender, receiver) = sync_channel(1);
        match self.limit.arrive(self.now, || sender, wake) {
            Arrival::Admitted => {}
            Arrival::Queued { .. } => {
                let verdict = receiver.recv_timeout(Duration::from_secs(20)).expect("forgotten");
                assert_eq!(verdict, Verdict::Admitted);
            }
            Arrival::Shed(shed) => panic!("{shed:?}"),
        }
        move || self.limit.leave(self.now, Outcome::Answered, Duration::ZERO, wake)
    }
}

/// An adaptive limit whose requests end one after the other, each a millisecond apart, always with others that wait.
struct Adapting {
    limit: ConcurrencyLimit<()>,
    now: Instant,
    bound: bool,
}

impl Adapting {
    fn new(min: u32, max: u32) -> Self {
        let now = Instant::now();
        let settings = ConcurrencySettings {
            limit: Limit::Adaptive(Adaptive::new(min, max).unwrap()),
            queue: QueueSettings { max_waiting: 0, ..QueueSettings::default() },
            ..ConcurrencySettings::default()
        };
        Self { limit: ConcurrencyLimit::new(settings, now), now, bound: true }
    }

    fn run(&mut self, requests: u32, latency_ms: u64, outcome: Outcome) -> u32 {
        let wake = |(), _| true;
        for _ in 0..requests {
            self.now += Duration::from_millis(1);
            while self.limit.arrive(self.now, || (), wake) == Arrival::Admitted && self.bound {}
            self.limit.leave(self.now, outcome, Duration::from_millis(latency_ms), wake);
        }
        self.limit.limit()
    }
}

#[test]
fn an_adaptive_limit_grows_only_where_it_is_reached_and_stays_in_its_bounds() {
    let mut idle = Adapting::new(4, 1000);
    idle.bound = false;
    assert_eq!(idle.run(20_000, 5, Outcome::Answered), 20);
    let mut bound = Adapting::new(4, 60);
    assert_eq!(bound.run(900, 5, Outcome::Answered), 60);
    // Ten times slower, whatever the limit: it shrinks, finds that it was not the reason, and grows again.
    let shrunk = (0..20).map(|_| bound.run(100, 50, Outcome::Answered)).min().unwrap();
    assert!((4..30).contains(&shrunk), "{shrunk}");
    assert!(bound.run(5_000, 50, Outcome::Answered) > 30);
    assert_eq!(Adapting::new(7, 7).run(5_000, 5, Outcome::Answered), 7);
}

#[test]
fn an_adaptive_limit_backs_off_from_an_application_that_refuses_and_learns_nothing_from_others() {
    let mut refused = Adapting::new(4, 1000);
    assert_eq!(refused.run(101, 1, Outcome::Overloaded), 18);
    assert_eq!(refused.run(20_000, 1, Outcome::Overloaded), 4);
    let mut ignored = Adapting::new(4, 1000);
    assert_eq!(ignored.run(20_000, 60_000, Outcome::Ignored), 20);
    // A few answers between refusals, quick because there is nothing in flight, are no baseline.
    let mut both = Adapting::new(4, 1000);
    both.run(300, 100, Outcome::Answered);
    for _ in 0..3 {
        both.run(1, 0, Outcome::Answered);
        both.run(110, 1, Outcome::Overloaded);
    }
    let before = both.limit.limit();
    let after = (0..10).map(|_| both.run(60, 100, Outcome::Answered)).take_while(|limit| *limit <= before);
    assert!(after.count() < 3, "it does not grow");
}
