//! Which of the replicas takes this request?

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::outlier::Standing;
use super::replica::{InFlight, Replica};

/// Chooses a replica for a request that has been at the addresses in `tried` before, and counts it as in flight there. `random` is
/// 64 fresh random bits.
///
/// Two replicas are drawn of those that are in and were not tried, and the one is taken whose latency times requests in flight,
/// this one included, is lower. One draw of 128 goes the other way where nothing has been heard of the heavier one for a while
/// and nobody is on his way there: so what was slow once is found to be quick again, and fewer than one request of a hundred pays for
/// it. A newcomer is drawn less often while it warms up; one whose ejection is over gets a trial, though not a request that has failed already. Where nobody is left,
/// those are taken in this order: one that is due a trial, one that was tried but is well otherwise, one that is out. `None` comes of an empty set alone.
#[must_use]
pub fn choose(
    replicas: &[Arc<Replica>],
    now: Instant,
    random: u64,
    tried: &[SocketAddr],
) -> Option<InFlight> {
    match replicas {
        [] => None,
        [only] => Some(InFlight::begin(only, now)),
        _ => {
            let draw = Draw { replicas, now, tried };
            draw.quick(random).or_else(|| draw.thorough(mix(random)))
        }
    }
}

struct Draw<'a> {
    replicas: &'a [Arc<Replica>],
    now: Instant,
    tried: &'a [SocketAddr],
}

/// Who is drawn from.
#[derive(Clone, Copy, PartialEq)]
enum Round {
    /// Who is in and was not tried, newcomers as often as they are warm.
    Fit,
    /// The same, newcomers like others.
    Newcomers,
    /// Who is in, whether tried or not, unless it only is because too many others are out.
    Tried,
    /// Who is out, but was not tried.
    Out,
    /// Anyone.
    Anyone,
}

impl<'a> Draw<'a> {
    /// The usual case: two different replicas, both fit.
    fn quick(&self, random: u64) -> Option<InFlight> {
        let count = self.replicas.len() as u64;
        let first = scale(random as u32, count);
        let second = scale((random >> 32) as u32, count - 1);
        let second = if second >= first { second + 1 } else { second };
        let first = self.replicas.get(first as usize)?;
        let second = self.replicas.get(second as usize)?;
        let random = mix(random);
        for (replica, salt) in [(first, 1), (second, 2)] {
            if let Some(trial) = self.trial(replica) {
                return Some(trial);
            }
            if !self.takes(Round::Fit, replica, random ^ salt) {
                return None;
            }
        }
        let lighter = self.lighter(first, second, random);
        let heavier = if Arc::ptr_eq(lighter, first) { second } else { first };
        // The low bits: `lighter` has used the others.
        if random & 127 == 0 && self.tried.is_empty() && heavier.is_unheard_of(self.now) {
            return Some(InFlight::exploring(heavier, self.now));
        }
        Some(InFlight::begin(lighter, self.now))
    }

    /// Looks at all of them.
    fn thorough(&self, random: u64) -> Option<InFlight> {
        let begin = |replica| InFlight::begin(replica, self.now);
        let round = |round| self.two_of(round, random).map(begin);
        let trial = |replica: &Arc<Replica>| self.trial(replica);
        let mut untried = self.replicas.iter().filter(|replica| !self.tried(replica));
        self.replicas
            .iter()
            .find_map(trial)
            .or_else(|| round(Round::Fit))
            .or_else(|| round(Round::Newcomers))
            .or_else(|| untried.find_map(|replica| InFlight::trial(replica, self.now)))
            .or_else(|| round(Round::Tried))
            .or_else(|| round(Round::Out))
            .or_else(|| round(Round::Anyone))
    }

    /// Draws two of those that a round takes, each pair as likely as any other, in one pass: a reservoir of two.
    fn two_of(&self, round: Round, random: u64) -> Option<&'a Arc<Replica>> {
        let (mut first, mut second) = (None, None);
        let (mut seen, mut dice) = (0_u64, random);
        for (place, replica) in self.replicas.iter().enumerate() {
            if !self.takes(round, replica, random.wrapping_add(place as u64)) {
                continue;
            }
            seen += 1;
            dice = mix(dice);
            match scale(dice as u32, seen.max(2)) {
                _ if first.is_none() => first = Some(replica),
                _ if second.is_none() => second = Some(replica),
                0 => first = Some(replica),
                1 => second = Some(replica),
                _ => {}
            }
        }
        match (first, second) {
            (Some(first), Some(second)) => Some(self.lighter(first, second, mix(dice))),
            (one, _) => one,
        }
    }

    fn tried(&self, replica: &Replica) -> bool {
        self.tried.contains(&replica.address())
    }

    /// A trial, for a first attempt alone: a request that has failed already is not risked again.
    fn trial(&self, replica: &Arc<Replica>) -> Option<InFlight> {
        if self.tried.is_empty() { InFlight::trial(replica, self.now) } else { None }
    }

    fn takes(&self, round: Round, replica: &Replica, random: u64) -> bool {
        let tried = self.tried(replica);
        match (replica.standing(self.now), round) {
            (_, Round::Anyone) => true,
            (Standing::In { weight }, Round::Fit) => !tried && (weight >= 1.0 || unit(mix(random)) < weight),
            (Standing::In { .. }, Round::Newcomers) => !tried,
            (Standing::In { .. }, Round::Tried) => !replica.is_failing(),
            (Standing::Out, Round::Out) => !tried,
            (Standing::In { .. } | Standing::Out, _) => false,
        }
    }

    /// The lighter of two: always where the other one weighs twice as much or more, else with a chance that falls to one half with
    /// the difference. Estimates of equal replicas differ by chance, and an absolute choice would give the best of them by a
    /// hundredth all of its draws, twice its share, until its own answers make it worse, and then the next one.
    fn lighter(&self, first: &'a Arc<Replica>, second: &'a Arc<Replica>, random: u64) -> &'a Arc<Replica> {
        let (own, others) = first.latency(self.now).against(second.latency(self.now));
        let own = own * (f64::from(first.in_flight()) + 1.0);
        let others = others * (f64::from(second.in_flight()) + 1.0);
        let (light, heavy, lighter, heavier) =
            if own <= others { (own, others, first, second) } else { (others, own, second, first) };
        if unit(random) * 2.0 * light < heavy { lighter } else { heavier }
    }
}

/// Somewhere in `0..count`, by 32 random bits.
fn scale(random: u32, count: u64) -> u64 {
    u64::from(random).saturating_mul(count) >> 32
}

/// Somewhere from 0 up to 1.
fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}

/// More bits of the same randomness (the finaliser of SplitMix64).
fn mix(random: u64) -> u64 {
    let mut z = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
