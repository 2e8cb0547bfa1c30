//! Which version of a service gets this request, who else gets a copy, and what is to go wrong with it on purpose?
//!
//! Pure decisions: a random number comes in, so that a simulation can repeat them, and what a key decides is the same at each sidecar.

use std::time::Duration;

use http::header::{HeaderMap, HeaderName};
use http::{HeaderValue, StatusCode};

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapingError {
    /// Some requests would have no version, or some versions no request.
    #[error("the weights add up to {0}; write percentages that add up to 100")]
    WeightsSum(u32),
    /// Nothing to choose from.
    #[error("no version is named; write one at least")]
    NoVersion,
    /// More than all.
    #[error("a share of {0} in 10,000 is more than all; write 10,000 or less")]
    ShareTooLarge(u32),
    /// A percentage that is none.
    #[error("a percentage of {0} is not between 0 and 100; write one that is")]
    Percentage(String),
    /// Nothing would happen to the request.
    #[error("{0} is not an error's status; write one from 400 to 599")]
    NotAnError(u16),
    /// A request would hang.
    #[error("a delay of {0:?} is over {FAULT_DELAY_MAX:?}; write {FAULT_DELAY_MAX:?} or less")]
    DelayTooLong(Duration),
}

/// A wait that was asked for is bounded too: longer than any time-out that a test of time-outs is about.
pub const FAULT_DELAY_MAX: Duration = Duration::from_secs(60);

const ALL: u32 = 10_000;

/// A part of all requests, in ten-thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u32);

impl Share {
    /// So many in 10,000.
    pub fn new(in_10_000: u32) -> Result<Self, ShapingError> {
        if in_10_000 > ALL { Err(ShapingError::ShareTooLarge(in_10_000)) } else { Ok(Self(in_10_000)) }
    }

    /// So many in 100, as people write it: to the hundredth.
    pub fn percent(percent: f64) -> Result<Self, ShapingError> {
        if !(0.0..=100.0).contains(&percent) {
            return Err(ShapingError::Percentage(percent.to_string()));
        }
        // Between 0 and 10,000.
        Self::new((percent * 100.0).round() as u32)
    }

    /// How many in 10,000.
    #[must_use]
    pub fn in_10_000(self) -> u32 {
        self.0
    }

    /// How many in 100.
    #[must_use]
    pub fn in_percent(self) -> f64 {
        f64::from(self.0) / 100.0
    }

    /// Whether a request with this random number is one of them.
    #[must_use]
    pub fn hits(self, random: u64) -> bool {
        below(ALL, random) < self.0
    }
}

/// A number from 0 to `bound - 1`, each as likely as another (to 2^-32) and the greater the greater `random` is.
fn below(bound: u32, random: u64) -> u32 {
    u32::try_from((u128::from(random) * u128::from(bound)) >> 64).unwrap_or(0)
}

/// Versions with their weights in percent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split<T> {
    /// Each with the sum of the weights up to and with its own.
    versions: Vec<(u32, T)>,
}

impl<T> Split<T> {
    /// Weights in percent that add up to 100.
    pub fn new(versions: impl IntoIterator<Item = (u32, T)>) -> Result<Self, ShapingError> {
        let mut sum = 0_u32;
        let versions: Vec<_> = versions
            .into_iter()
            .map(|(weight, version)| {
                sum = sum.saturating_add(weight);
                (sum, version)
            })
            .collect();
        if versions.is_empty() {
            return Err(ShapingError::NoVersion);
        }
        if sum != 100 {
            return Err(ShapingError::WeightsSum(sum));
        }
        Ok(Self { versions })
    }

    /// The same with what stands for each version elsewhere; nothing if one of them has nothing there.
    #[must_use]
    pub fn map<U>(&self, mut to: impl FnMut(&T) -> Option<U>) -> Option<Split<U>> {
        let versions = self.versions.iter().map(|(up_to, version)| Some((*up_to, to(version)?)));
        Some(Split { versions: versions.collect::<Option<_>>()? })
    }

    /// The version for a number: a random one, or a hash of what is to stay with its version (a sticky key). Each version has a
    /// stretch of all numbers, in the order in which they were given, so that of two versions nobody moves but who has to when a
    /// weight changes.
    #[must_use]
    pub fn choose(&self, number: u64) -> Option<&T> {
        let point = below(100, number);
        self.versions.iter().find(|(up_to, _)| point < *up_to).map(|(_, version)| version)
    }
}

/// The number by which a key stays with its version, the same at each sidecar: FNV-1a, spread by SplitMix64's last steps since
/// a version's stretch is a matter of the highest bits. The name that is split goes in, so that two splits don't choose alike.
#[must_use]
pub fn sticky_number(split: &str, key: &[u8]) -> u64 {
    let bytes = split.bytes().chain([0]).chain(key.iter().copied());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// What a header's value is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderTest {
    /// It is this, byte for byte.
    Exact(HeaderValue),
    /// It begins with this.
    Prefix(HeaderValue),
    /// There is one.
    Present,
}

/// Where requests with some header go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderRoute<T> {
    /// The header.
    pub name: HeaderName,
    /// What it is asked for. A header with several values fits if one of them does.
    pub test: HeaderTest,
    /// Where to.
    pub to: T,
}

impl<T> HeaderRoute<T> {
    fn fits(&self, headers: &HeaderMap) -> bool {
        let mut values = headers.get_all(&self.name).iter();
        match &self.test {
            HeaderTest::Exact(wanted) => values.any(|value| value == wanted),
            HeaderTest::Prefix(prefix) => values.any(|value| value.as_bytes().starts_with(prefix.as_bytes())),
            HeaderTest::Present => values.next().is_some(),
        }
    }
}

/// The first route that fits.
#[must_use]
pub fn route<'a, T>(routes: &'a [HeaderRoute<T>], headers: &HeaderMap) -> Option<&'a T> {
    routes.iter().find(|route| route.fits(headers)).map(|route| &route.to)
}

/// Copies of some requests go to another version, whose answers nobody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror<T> {
    /// Where to.
    pub to: T,
    /// Of how many requests.
    pub share: Share,
}

impl<T> Mirror<T> {
    /// Where a copy of the request with this random number goes.
    #[must_use]
    pub fn copy_to(&self, random: u64) -> Option<&T> {
        self.share.hits(random).then_some(&self.to)
    }
}

/// What goes wrong on purpose. Each happens or not, independently of the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    delay: Option<(Share, Duration)>,
    abort: Option<(Share, StatusCode)>,
}

/// What goes wrong with one request. First the delay, then the abort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Injected {
    /// Wait so long before the request goes on.
    pub delay: Option<Duration>,
    /// Answer with this status in the application's place.
    pub abort: Option<StatusCode>,
}

impl Fault {
    /// With a delay for some requests.
    pub fn with_delay(self, share: Share, delay: Duration) -> Result<Self, ShapingError> {
        if delay > FAULT_DELAY_MAX {
            return Err(ShapingError::DelayTooLong(delay));
        }
        Ok(Self { delay: Some((share, delay)), ..self })
    }

    /// With an error for some requests.
    pub fn with_abort(self, share: Share, status: StatusCode) -> Result<Self, ShapingError> {
        if !status.is_client_error() && !status.is_server_error() {
            return Err(ShapingError::NotAnError(status.as_u16()));
        }
        Ok(Self { abort: Some((share, status)), ..self })
    }

    /// How many requests wait, and how long.
    #[must_use]
    pub fn delay(&self) -> Option<(Share, Duration)> {
        self.delay
    }

    /// How many requests are answered with an error, and with which.
    #[must_use]
    pub fn abort(&self) -> Option<(Share, StatusCode)> {
        self.abort
    }

    /// What is to go wrong with a request.
    #[must_use]
    pub fn inject(&self, random: &mut impl FnMut() -> u64) -> Injected {
        Injected {
            delay: self.delay.and_then(|(share, delay)| share.hits(random()).then_some(delay)),
            abort: self.abort.and_then(|(share, status)| share.hits(random()).then_some(status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64.
    fn random(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed;
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
    }

    #[test]
    fn weights_are_kept_to_the_number() {
        let split = Split::new([(89, "v1"), (0, "never"), (10, "v2"), (1, "v3")]).unwrap();
        // A hundred numbers, evenly: as many of each as its weight says.
        let step = u64::MAX / 100;
        let chosen =
            |version| (0..100).filter(|n| split.choose(n * step + step / 2) == Some(&version)).count();
        assert_eq!(["v1", "never", "v2", "v3"].map(chosen), [89, 0, 10, 1]);
        assert_eq!((split.choose(0), split.choose(u64::MAX)), (Some(&"v1"), Some(&"v3")));
        assert_eq!(Split::new([(100, ())]).unwrap().choose(7), Some(&()));
    }

    #[test]
    fn of_two_versions_only_those_move_that_have_to() {
        let mut random = random(1);
        let split = |weight| Split::new([(100 - weight, 1), (weight, 2)]).unwrap();
        for _ in 0..1_000 {
            let key = random();
            let versions: Vec<_> = (0..=100).map(|weight| *split(weight).choose(key).unwrap()).collect();
            assert!(versions.is_sorted(), "{key}: {versions:?}");
            assert_eq!((versions[0], versions[100]), (1, 2));
        }
    }

    #[test]
    fn keys_stay_where_they_are_and_are_spread_by_weight() {
        let split = Split::new([(90, 1), (10, 2)]).unwrap();
        let of = |name, key: u32| *split.choose(sticky_number(name, key.to_string().as_bytes())).unwrap();
        let second = (0..10_000).filter(|key| of("profile", *key) == 2).count();
        assert!((850..1_150).contains(&second), "{second}");
        let both = (0..10_000).filter(|key| of("profile", *key) == 2 && of("auth", *key) == 2).count();
        assert!(both < 200, "two splits choose alike: {both}");
        // Whatever changes here moves users between versions while sidecars are updated.
        assert_eq!(sticky_number("profile", b"alice"), 13_472_334_317_265_868_979);
    }

    #[test]
    fn versions_are_known_by_other_things_elsewhere() {
        let split = Split::new([(90, "v1"), (10, "v2")]).unwrap();
        let places = split.map(|name| Some(name.len() + usize::from(*name == "v2"))).unwrap();
        assert_eq!((places.choose(0), places.choose(u64::MAX)), (Some(&2), Some(&3)));
        assert_eq!(split.map(|name| (*name == "v1").then_some(())), None);
    }

    #[test]
    fn weights_that_do_not_add_up_are_refused() {
        let error = |weights: &[u32]| Split::new(weights.iter().map(|weight| (*weight, ()))).unwrap_err();
        assert_eq!(error(&[]), ShapingError::NoVersion);
        assert_eq!(error(&[50, 49]), ShapingError::WeightsSum(99));
        assert_eq!(error(&[100, 1]), ShapingError::WeightsSum(101));
        assert_eq!(error(&[u32::MAX, 101]), ShapingError::WeightsSum(u32::MAX));
        assert!(error(&[90]).to_string().contains("add up to 90; write"));
    }

    #[test]
    fn the_first_route_that_fits_wins() {
        let name = HeaderName::from_static("x-version");
        let value = HeaderValue::from_static;
        let to = |test, to| HeaderRoute { name: name.clone(), test, to };
        let routes = [
            to(HeaderTest::Exact(value("beta")), 1),
            to(HeaderTest::Prefix(value("be")), 2),
            to(HeaderTest::Present, 3),
        ];
        let routed = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            headers.append("x-other", value("beta"));
            for one in values {
                headers.append(&name, value(one));
            }
            route(&routes, &headers).copied()
        };
        assert_eq!(routed(&["beta"]), Some(1));
        assert_eq!(routed(&["beta2"]), Some(2));
        assert_eq!(routed(&["Beta"]), Some(3));
        assert_eq!(routed(&[""]), Some(3));
        assert_eq!(routed(&["gamma", "beta"]), Some(1));
        assert_eq!(routed(&[]), None);
    }

    #[test]
    fn shares_hit_as_often_as_they_say() {
        for parts in [0, 1, 2_500, 10_000] {
            let share = Share::new(parts).unwrap();
            let step = u64::MAX / 10_000;
            let hits = (0..10_000).filter(|n| share.hits(n * step + step / 2)).count();
            assert_eq!(hits, parts as usize);
            assert_eq!(share.hits(u64::MAX), parts == 10_000);
            let mirror = Mirror { to: "v2", share };
            assert_eq!(mirror.copy_to(0), (parts > 0).then_some(&"v2"));
        }
        assert!(Share::new(10_001).is_err());
        assert_eq!(Share::percent(0.01), Share::new(1));
        assert_eq!(Share::percent(12.34), Share::new(1_234));
        assert_eq!(Share::percent(100.0), Share::new(10_000));
        for bad in [-0.01, 100.01, f64::NAN, f64::INFINITY] {
            assert!(Share::percent(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn faults_come_as_often_as_asked_for_and_independently() {
        let (delay, status) = (Duration::from_millis(200), StatusCode::SERVICE_UNAVAILABLE);
        let fault = Fault::default().with_delay(Share::new(5_000).unwrap(), delay).unwrap();
        let fault = fault.with_abort(Share::new(2_000).unwrap(), status).unwrap();
        let mut random = random(2);
        let mut counts = [0_u32; 4];
        for _ in 0..10_000 {
            let injected = fault.inject(&mut random);
            assert!(injected.delay.is_none_or(|seen| seen == delay));
            assert!(injected.abort.is_none_or(|seen| seen == status));
            counts[usize::from(injected.delay.is_some()) + 2 * usize::from(injected.abort.is_some())] += 1;
        }
        for (count, expected) in counts.into_iter().zip([4_000, 4_000, 1_000, 1_000]) {
            assert!(count.abs_diff(expected) < 200, "{counts:?}");
        }
        assert_eq!(Fault::default().inject(&mut random), Injected::default());
    }

    #[test]
    fn faults_that_hang_or_do_nothing_are_refused() {
        let all = Share::new(10_000).unwrap();
        assert!(Fault::default().with_delay(all, FAULT_DELAY_MAX).is_ok());
        let long = FAULT_DELAY_MAX + Duration::from_nanos(1);
        assert_eq!(Fault::default().with_delay(all, long), Err(ShapingError::DelayTooLong(long)));
        for (status, fine) in [(399, false), (400, true), (599, true), (600, false), (200, false)] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(Fault::default().with_abort(all, status).is_ok(), fine, "{status}");
        }
    }
}
