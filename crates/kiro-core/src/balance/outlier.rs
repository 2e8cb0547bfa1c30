//! Is a replica in, and when does that change?
//!
//! A replica is in, ejected, or unreachable. What a choice has to know of it is one word. Only a trial is claimed by
//! compare-and-swap; each change between in and out is made under the lock of the set's [`Census`], which makes the rule of the
//! half exact.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::settings::Settings;
use super::state::{Cause, Change, State};

/// A trial without an answer for so long no longer keeps others from trying: it may be a request that waits for an event. Longer
/// than the 15 s that a request usually has, so that a replica that hangs is tried by one request at a time.
pub(super) const TRIAL_LEASE: Duration = Duration::from_secs(20);

/// A newcomer's share at first.
const FIRST_SHARE: f64 = 0.1;

/// How a choice sees a replica.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Standing {
    /// It may be taken, so often of all times when it is drawn.
    In {
        weight: f64,
    },
    Out,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    In,
    Ejected,
    Unreachable,
}

/// A replica's word: two bits of kind, one that says that a trial is under way, and 61 of nanoseconds since the set began (73
/// years): until when it is out, or when its trial is given up, or, if it is in, when it is warm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word {
    kind: Kind,
    trial: bool,
    until: u64,
}

const UNTIL_BITS: u32 = 61;
const UNTIL_MAX: u64 = (1 << UNTIL_BITS) - 1;

impl Word {
    fn unpack(word: u64) -> Self {
        let kind = match word >> (UNTIL_BITS + 1) {
            0 => Kind::In,
            1 => Kind::Ejected,
            _ => Kind::Unreachable,
        };
        Self { kind, trial: word >> UNTIL_BITS & 1 == 1, until: word & UNTIL_MAX }
    }

    fn pack(self) -> u64 {
        let kind = match self.kind {
            Kind::In => 0,
            Kind::Ejected => 1,
            Kind::Unreachable => 2,
        };
        kind << (UNTIL_BITS + 1) | u64::from(self.trial) << UNTIL_BITS | self.until.min(UNTIL_MAX)
    }
}

/// How many of a set are out. Its lock is held for each change of who is in.
#[derive(Debug, Default)]
pub(super) struct Census {
    counts: Mutex<Counts>,
    /// Whether one more may be ejected, as of the last change: a look before the lock is taken.
    room: AtomicU32,
}

#[derive(Debug, Default)]
struct Counts {
    members: u32,
    ejected: u32,
    unreachable: u32,
}

impl Counts {
    /// Half of the replicas at most, rounded down: none of one, one of two and of three.
    fn ejected_max(&self) -> u32 {
        self.members / 2
    }

    fn may_eject(&self) -> bool {
        self.ejected.saturating_add(self.unreachable) < self.ejected_max()
    }

    fn add(&mut self, kind: Kind) {
        match kind {
            Kind::In => {}
            Kind::Ejected => self.ejected = self.ejected.saturating_add(1),
            Kind::Unreachable => self.unreachable = self.unreachable.saturating_add(1),
        }
    }

    fn remove(&mut self, kind: Kind) {
        match kind {
            Kind::In => {}
            Kind::Ejected => self.ejected = self.ejected.saturating_sub(1),
            Kind::Unreachable => self.unreachable = self.unreachable.saturating_sub(1),
        }
    }
}

/// The census, locked.
pub(super) struct Counting<'a> {
    counts: MutexGuard<'a, Counts>,
    room: &'a AtomicU32,
}

impl Census {
    pub(super) fn lock(&self) -> Counting<'_> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        Counting { counts, room: &self.room }
    }

    fn may_eject(&self) -> bool {
        self.room.load(Ordering::Relaxed) != 0
    }
}

impl Counting<'_> {
    /// So many replicas are in the set now.
    pub(super) fn members(&mut self, count: usize) {
        self.counts.members = u32::try_from(count).unwrap_or(u32::MAX);
    }

    /// More are ejected than the half allows: others have left.
    pub(super) fn too_many(&self) -> bool {
        self.counts.ejected > self.counts.ejected_max()
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.room.store(u32::from(self.counts.may_eject()), Ordering::Relaxed);
    }
}

/// What is only read and written under the census' lock; its own is never waited for.
#[derive(Debug, Default)]
struct Record {
    /// Whether the census counts this replica.
    member: bool,
    /// How many ejections followed each other.
    in_a_row: u32,
    out_since: u64,
    returned: Option<u64>,
}

/// Whether one replica is in.
#[derive(Debug)]
pub(super) struct Outlier {
    word: AtomicU64,
    /// Failures since the last success.
    failures: AtomicU32,
    /// How often it went out. A request knows in which stint it began: what it tells of an earlier one is old news.
    stint: AtomicU32,
    census: Arc<Census>,
    record: Mutex<Record>,
}

/// The right to tell whether a replica is well again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Claim(u64);

/// When a request began, as far as going out and coming back are concerned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Began {
    pub(super) stint: u32,
    pub(super) claim: Option<Claim>,
}

/// Times in this file are nanoseconds since the set began.
fn after(now: u64, time: Duration) -> u64 {
    now.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)).min(UNTIL_MAX)
}

fn since(now: u64, then: u64) -> Duration {
    Duration::from_nanos(now.saturating_sub(then))
}

impl Outlier {
    pub(super) fn new(census: Arc<Census>) -> Self {
        let word = Word { kind: Kind::In, trial: false, until: 0 }.pack();
        Self {
            word: AtomicU64::new(word),
            failures: AtomicU32::new(0),
            stint: AtomicU32::new(0),
            census,
            record: Mutex::default(),
        }
    }

    fn word(&self) -> Word {
        Word::unpack(self.word.load(Ordering::Acquire))
    }

    fn store(&self, kind: Kind, until: u64) {
        self.word.store(Word { kind, trial: false, until }.pack(), Ordering::Release);
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn standing(&self, now: u64, settings: &Settings) -> Standing {
        let word = self.word();
        match word.kind {
            Kind::In if word.until <= now => Standing::In { weight: 1.0 },
            Kind::In => {
                let left = since(word.until, now).as_secs_f64() / settings.warm_up().as_secs_f64();
                Standing::In { weight: 1.0 - (1.0 - FIRST_SHARE) * left.min(1.0) }
            }
            Kind::Ejected | Kind::Unreachable => Standing::Out,
        }
    }

    pub(super) fn state(&self, now: u64) -> State {
        let word = self.word();
        match word.kind {
            Kind::In if word.until <= now => State::Up,
            Kind::In => State::Warming,
            Kind::Ejected | Kind::Unreachable if word.trial => State::Probing,
            Kind::Ejected => State::Ejected,
            Kind::Unreachable => State::Unreachable,
        }
    }

    /// How long it is out for yet.
    pub(super) fn out_for(&self, now: u64) -> Option<Duration> {
        let word = self.word();
        match word.kind {
            Kind::In => None,
            Kind::Ejected | Kind::Unreachable => {
                Some(if word.trial { Duration::ZERO } else { since(word.until, now) })
            }
        }
    }

    pub(super) fn ejections(&self) -> u32 {
        self.stint.load(Ordering::Relaxed)
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    /// A request begins that is no trial.
    pub(super) fn begin(&self) -> Began {
        Began { stint: self.stint.load(Ordering::Acquire), claim: None }
    }

    /// Claims the trial of a replica that is due for one.
    pub(super) fn claim(&self, now: u64) -> Option<Began> {
        let stint = self.stint.load(Ordering::Acquire);
        let old = self.word.load(Ordering::Acquire);
        let word = Word::unpack(old);
        if word.kind == Kind::In || word.until > now {
            return None;
        }
        let claimed = Word { trial: true, until: after(now, TRIAL_LEASE), ..word }.pack();
        self.word.compare_exchange(old, claimed, Ordering::AcqRel, Ordering::Acquire).ok()?;
        Some(Began { stint, claim: Some(Claim(claimed)) })
    }

    /// A trial ended that told nothing: another one may begin after `wait`.
    pub(super) fn release(&self, claim: Claim, now: u64, wait: Duration) {
        let until = after(now, wait);
        let word = Word { trial: false, until, ..Word::unpack(claim.0) };
        // Where it fails, the claim was over: it came back, or another trial is under way.
        let _ = self.word.compare_exchange(claim.0, word.pack(), Ordering::AcqRel, Ordering::Acquire);
    }

    /// A request went well, if it was `good`, or was at least answered. Gives a change where the replica comes back.
    pub(super) fn answered(&self, began: Began, good: bool, now: u64, settings: &Settings) -> Option<Change> {
        if self.stint.load(Ordering::Acquire) != began.stint {
            return None;
        }
        if good && self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
        if self.word().kind == Kind::In {
            return None;
        }
        let mut census = self.census.lock();
        let mut record = self.record();
        // Another worker may have been quicker, and it may even be out again.
        if !record.member || self.word().kind == Kind::In || self.stint.load(Ordering::Acquire) != began.stint
        {
            return None;
        }
        let after = self.back(&mut census, &mut record, now, settings);
        Some(Change::Returned { after })
    }

    /// A request failed in a way that speaks against the replica.
    pub(super) fn failed(
        &self,
        began: Began,
        connect: bool,
        now: u64,
        settings: &Settings,
    ) -> Option<Change> {
        if self.stint.load(Ordering::Acquire) != began.stint {
            return None;
        }
        if self.word().kind != Kind::In {
            return self.trial_failed(began.claim?, connect, now, settings);
        }
        if !connect {
            let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
            if failures < settings.failures() || !self.census.may_eject() {
                return None;
            }
        }
        let mut census = self.census.lock();
        let mut record = self.record();
        if !record.member || self.word().kind != Kind::In || self.stint.load(Ordering::Acquire) != began.stint
        {
            return None;
        }
        if connect {
            return Some(self.out(Kind::Unreachable, &mut census, &mut record, now, settings));
        }
        // A success may have come in between.
        if self.failures.load(Ordering::Relaxed) < settings.failures() || !census.counts.may_eject() {
            return None;
        }
        Some(self.out(Kind::Ejected, &mut census, &mut record, now, settings))
    }

    /// A trial failed: out for longer, and for the reason that holds now. One that was unreachable and now answers with failures
    /// is ejected only as far as the half allows, and else back.
    fn trial_failed(&self, claim: Claim, connect: bool, now: u64, settings: &Settings) -> Option<Change> {
        let mut census = self.census.lock();
        let mut record = self.record();
        let old = Word::unpack(claim.0);
        let kind = if connect {
            Kind::Unreachable
        } else if old.kind == Kind::Ejected || census.counts.ejected < census.counts.ejected_max() {
            Kind::Ejected
        } else {
            Kind::In
        };
        let lasts = settings.ejection(record.in_a_row);
        let until = after(now, if kind == Kind::In { settings.warm_up() } else { lasts });
        let word = Word { kind, trial: false, until };
        self.word.compare_exchange(claim.0, word.pack(), Ordering::AcqRel, Ordering::Acquire).ok()?;
        if record.member {
            census.counts.remove(old.kind);
            census.counts.add(kind);
        }
        if kind == Kind::In {
            record.returned = Some(now);
            return Some(Change::Readmitted { after: since(now, record.out_since) });
        }
        record.in_a_row = record.in_a_row.saturating_add(1);
        Some(Change::Ejected { cause: Cause::Trial, lasts })
    }

    fn out(
        &self,
        kind: Kind,
        census: &mut Counting<'_>,
        record: &mut Record,
        now: u64,
        settings: &Settings,
    ) -> Change {
        if record.returned.is_some_and(|returned| since(now, returned) >= settings.forgiven_after()) {
            record.in_a_row = 0;
        }
        let lasts = settings.ejection(record.in_a_row);
        record.in_a_row = record.in_a_row.saturating_add(1);
        record.out_since = now;
        census.counts.add(kind);
        self.failures.store(0, Ordering::Relaxed);
        // Before the word: who sees that it is out knows the new stint too.
        self.stint.fetch_add(1, Ordering::AcqRel);
        self.store(kind, after(now, lasts));
        let cause = if kind == Kind::Unreachable { Cause::Unreachable } else { Cause::Failures };
        Change::Ejected { cause, lasts }
    }

    fn back(
        &self,
        census: &mut Counting<'_>,
        record: &mut Record,
        now: u64,
        settings: &Settings,
    ) -> Duration {
        census.counts.remove(self.word().kind);
        record.returned = Some(now);
        self.failures.store(0, Ordering::Relaxed);
        self.store(Kind::In, after(now, settings.warm_up()));
        since(now, record.out_since)
    }

    /// The replica is one of the set from now on: it begins to warm up where others are `warm` already. One that was ejected when
    /// it left stays so, if the half allows; one that was unreachable is worth a try, since somebody has announced it anew.
    pub(super) fn join(&self, census: &mut Counting<'_>, now: u64, warm: bool, settings: &Settings) {
        let mut record = self.record();
        record.member = true;
        let word = self.word();
        if word.kind == Kind::Ejected && census.counts.may_eject() {
            census.counts.add(Kind::Ejected);
            return;
        }
        if word.kind != Kind::In {
            record.returned = Some(now);
        }
        self.failures.store(0, Ordering::Relaxed);
        let until = if warm { now } else { after(now, settings.warm_up()) };
        self.store(Kind::In, until);
    }

    /// The replica has left the set.
    pub(super) fn leave(&self, census: &mut Counting<'_>) {
        let mut record = self.record();
        record.member = false;
        census.counts.remove(self.word().kind);
    }

    /// Brings an ejected replica back untried.
    pub(super) fn readmit(&self, census: &mut Counting<'_>, now: u64, settings: &Settings) -> Option<Change> {
        if self.word().kind != Kind::Ejected {
            return None;
        }
        let after = self.back(census, &mut self.record(), now, settings);
        Some(Change::Readmitted { after })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four replicas that each fail for the fifth time while nobody may count yet: all of them have seen that there is room.
    #[test]
    fn the_half_is_counted_under_the_lock() {
        let settings = Settings::default();
        for round in 0..20 {
            let census = Arc::new(Census::default());
            let outliers: Vec<_> = (0..4).map(|_| Outlier::new(Arc::clone(&census))).collect();
            let mut locked = census.lock();
            locked.members(4);
            for outlier in &outliers {
                outlier.join(&mut locked, 0, true, &settings);
            }
            drop(locked);
            for outlier in &outliers {
                assert!((0..4).all(|_| outlier.failed(outlier.begin(), false, 0, &settings).is_none()));
            }
            let locked = census.lock();
            std::thread::scope(|scope| {
                let threads: Vec<_> = outliers
                    .iter()
                    .map(|outlier| scope.spawn(|| outlier.failed(outlier.begin(), false, 0, &settings)))
                    .collect();
                while outliers.iter().any(|outlier| outlier.failures() < settings.failures()) {
                    std::thread::yield_now();
                }
                drop(locked);
                let out = threads.into_iter().filter_map(|thread| thread.join().unwrap()).count();
                assert_eq!(out, 2, "round {round}");
            });
        }
    }

    #[test]
    fn a_word_holds_what_was_put_in() {
        for kind in [Kind::In, Kind::Ejected, Kind::Unreachable] {
            for (trial, until) in [(false, 0), (true, 1), (false, UNTIL_MAX), (true, UNTIL_MAX)] {
                let word = Word { kind, trial, until };
                assert_eq!(Word::unpack(word.pack()), word);
            }
        }
        assert_eq!(after(u64::MAX, Duration::MAX), UNTIL_MAX);
    }
}
