//! Has an edge carried as many requests as the mesh file lets it?
//!
//! The callee's sidecar counts, since all of an edge's requests come together there: those of other sidecars once their signature is
//! verified, those from outside once the policy has let them in, so that nobody uses up what is not his. Each line of `limits` has a
//! bucket, or one a key, that all workers share.
//!
//! Lines are asked in the file's order, and the first that refuses is the last that is asked.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue};
use kiro_core::identity::ServiceName;
use kiro_core::mesh::{Per, RateLine};
use kiro_core::path;
use kiro_core::rate::{Keyed, KeyedSettings, Left, Limited, RateLimit, RateSettings};

use crate::exchange::Exchange;
use crate::limits;
use crate::lock::lock;
use crate::proof::Trusted;
use crate::reject::{Refused, Reject};

static RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
static RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// A line of `limits` that is about this sidecar's application.
#[derive(Debug)]
pub(crate) struct Rate {
    line: RateLine,
    /// The value of `RateLimit-Policy`.
    policy: HeaderValue,
    /// What has passed.
    pub(crate) bucket: Arc<Bucket>,
}

/// What has passed of one line's requests.
#[derive(Debug)]
pub(crate) struct Bucket {
    rate: RateSettings,
    per: Option<Per>,
    of: Buckets,
    limited: AtomicU64,
}

#[derive(Debug)]
enum Buckets {
    One(RateLimit),
    Each(Keyed),
}

impl Bucket {
    fn new(line: &RateLine, now: Instant) -> Self {
        let of = match line.per {
            None => Buckets::One(RateLimit::new(line.rate, now)),
            Some(_) => {
                let settings = KeyedSettings { rate: line.rate, max_keys: limits::RATE_KEYS };
                // Keyed by what the system gave at random, and by nothing that a caller could know.
                let random = RandomState::new();
                Buckets::Each(Keyed::new(settings, now, [random.hash_one(0), random.hash_one(1)]))
            }
        };
        Self { rate: line.rate, per: line.per.clone(), of, limited: AtomicU64::new(0) }
    }

    fn is_for(&self, line: &RateLine) -> bool {
        self.rate == line.rate && self.per == line.per
    }

    fn take(&self, call: &Call<'_>, now: Instant) -> Result<Left, Limited> {
        let keyed = match &self.of {
            Buckets::One(limit) => return limit.check(now),
            Buckets::Each(keyed) => keyed,
        };
        match &self.per {
            None => keyed.check(&[], now),
            Some(Per::Service) => {
                let name = call.caller.map(|name| name.as_str().as_bytes());
                keyed.check(name.as_slice(), now)
            }
            // Spellings that servers disagree about share one: else each would be another path here, and the same to the application.
            Some(Per::Path) if call.ambiguous => keyed.check(&[], now),
            Some(Per::Path) => keyed.check(&[&path::normalised(call.path)], now),
            Some(Per::Header(name)) => {
                let values: Vec<&[u8]> =
                    call.headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
                keyed.check(&values, now)
            }
        }
    }

    /// How many requests were refused.
    pub(crate) fn limited(&self) -> u64 {
        self.limited.load(Ordering::Relaxed)
    }

    /// How many keys it knows, and how many requests had to share one bucket since it knew too many; none where it has no keys.
    pub(crate) fn keys(&self) -> Option<(u32, u64)> {
        match &self.of {
            Buckets::One(_) => None,
            Buckets::Each(keyed) => Some((keyed.known(), keyed.overflowed())),
        }
    }
}

/// The buckets of a sidecar, by the names of their lines. They outlive changes of the mesh file that are not about them.
#[derive(Debug, Default)]
pub(crate) struct Rates(Mutex<BTreeMap<String, Arc<Bucket>>>);

impl Rates {
    /// The lines of a mesh file that are about one service, each with the bucket that it had, if that was for the same rate.
    pub(crate) fn of<'l>(
        &self,
        lines: impl Iterator<Item = &'l RateLine>,
        me: &ServiceName,
        now: Instant,
    ) -> Box<[Rate]> {
        let known = lock(&self.0);
        let rate = |line: &RateLine| {
            let before = known.get(line.name.as_str()).filter(|bucket| bucket.is_for(line));
            Some(Rate {
                // A limit's name can stand in a field.
                policy: HeaderValue::try_from(line.name.policy_field(&line.rate)).ok()?,
                bucket: before.map_or_else(|| Arc::new(Bucket::new(line, now)), Arc::clone),
                line: line.clone(),
            })
        };
        lines.filter(|line| line.to == *me).filter_map(rate).collect()
    }

    /// Takes over what holds from now on, and forgets all else.
    pub(crate) fn keep(&self, rates: &[Rate]) {
        let buckets = rates.iter().map(|rate| (rate.line.name.as_str().to_owned(), Arc::clone(&rate.bucket)));
        *lock(&self.0) = buckets.collect();
    }

    /// All of them, by the names of their lines.
    pub(crate) fn all(&self) -> Vec<(String, Arc<Bucket>)> {
        let buckets = lock(&self.0);
        buckets.iter().map(|(name, bucket)| (name.clone(), Arc::clone(bucket))).collect()
    }
}

/// A request as its limits see it.
struct Call<'a> {
    /// None for an outside client.
    caller: Option<&'a ServiceName>,
    path: &'a str,
    ambiguous: bool,
    headers: &'a HeaderMap,
}

/// What its limits have to say of a request: the fields of their kind, for its answer.
#[derive(Debug, Default)]
pub(crate) struct Told(Vec<(HeaderValue, HeaderValue)>);

impl Told {
    /// Adds the fields to an answer. They are lists, so those of an application stay.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        for (policy, rate) in &self.0 {
            headers.append(&RATE_LIMIT_POLICY, policy.clone());
            headers.append(&RATE_LIMIT, rate.clone());
        }
    }

    fn add(&mut self, policy: &HeaderValue, rate: String) {
        self.0.extend(HeaderValue::try_from(rate).ok().map(|rate| (policy.clone(), rate)));
    }
}

/// Takes a request out of the bucket of each line that it fits.
pub(crate) fn check<B>(trusted: &Trusted<B>, exchange: &mut Exchange) -> Result<(), Refused> {
    if exchange.state().rates.is_empty() {
        return Ok(());
    }
    let mut told = Told::default();
    let passed = ask(&exchange.state().rates, trusted, exchange, &mut told);
    if !told.0.is_empty() {
        exchange.rates(told);
    }
    passed
}

fn ask<B>(rates: &[Rate], trusted: &Trusted<B>, exchange: &Exchange, told: &mut Told) -> Result<(), Refused> {
    let (path, ambiguous) = trusted.path();
    let caller = exchange.via().caller.as_ref();
    let call = Call { caller, path, ambiguous, headers: trusted.headers() };
    let now = Instant::now();
    for Rate { line, policy, bucket } in rates {
        if !line.fits(caller, exchange.method(), path, ambiguous) {
            continue;
        }
        match bucket.take(&call, now) {
            Ok(left) => told.add(policy, line.name.left_field(&left)),
            Err(limited) => {
                bucket.limited.fetch_add(1, Ordering::Relaxed);
                told.add(policy, line.name.limited_field(&limited));
                let (requests, per) = (line.rate.requests(), line.rate.per().as_secs());
                let cause = format!(
                    "`limits`, line {} of the mesh file (`{}`): more than {requests} in {per} s",
                    line.line,
                    line.name.as_str()
                );
                return Err(Refused::new(Reject::RateLimited, cause).after(limited.retry_after));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kiro_core::mesh;

    use super::*;

    /// The lines of a mesh in which all call `callee`.
    fn lines(limits: &str) -> Vec<RateLine> {
        let text = format!(
            "trust_domain: d\nservices: {{ a: {{ app: {{ port: 80 }} }}, b: {{ app: {{ port: 80 }} }}, callee: {{ app: {{ port: 80 }} }} }}\n\
             limits:\n{limits}"
        );
        mesh::parse(&text).unwrap().limits
    }

    fn callee() -> ServiceName {
        ServiceName::parse("callee").unwrap()
    }

    #[test]
    fn a_bucket_outlives_a_change_that_is_not_about_it() {
        let (rates, now) = (Rates::default(), Instant::now());
        let taken = |limits: &str| {
            let rates_now = rates.of(lines(limits).iter(), &callee(), now);
            rates.keep(&rates_now);
            rates_now
                .iter()
                .map(|rate| (rate.line.name.as_str().to_owned(), Arc::clone(&rate.bucket)))
                .collect::<Vec<_>>()
        };
        let first = taken(
            "  - { from: a, to: callee, rate: 1/s }\n  - { from: b, to: callee, rate: 1/s }\n  - { from: a, to: b, rate: 1/s }\n",
        );
        assert_eq!(first.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a.callee", "b.callee"]);
        // It stands elsewhere, and counts other paths.
        let second = taken(
            "  - { from: b, to: callee, rate: 2/s }\n  - { from: a, to: callee, rate: 1/s, paths: [/x] }\n",
        );
        assert!(Arc::ptr_eq(&first[0].1, &second[1].1));
        assert!(!Arc::ptr_eq(&first[1].1, &second[0].1), "another rate");
        let third = taken("  - { from: a, to: callee, rate: 1/s, per: path }\n");
        assert!(!Arc::ptr_eq(&first[0].1, &third[0].1), "other shares");
        assert_eq!(rates.all().len(), 1, "what is gone is forgotten");
        // Nothing is forgotten for a file that does not hold in the end.
        let _ = rates.of(lines("  []").iter(), &callee(), now);
        assert!(Arc::ptr_eq(&rates.all()[0].1, &third[0].1));
    }

    #[test]
    fn shares_are_told_apart_by_what_the_line_says() {
        let now = Instant::now();
        let (a, b) = (ServiceName::parse("a").unwrap(), ServiceName::parse("b").unwrap());
        let fields = |values: &[&'static str]| -> HeaderMap {
            values
                .iter()
                .map(|value| (HeaderName::from_static("x-user"), HeaderValue::from_static(value)))
                .collect()
        };
        let (none, one, two) = (fields(&[]), fields(&["1"]), fields(&["1", "2"]));
        let all: Vec<Call<'_>> = [None, Some(&a), Some(&b)]
            .into_iter()
            .flat_map(|caller| {
                [("/a", false), ("/%61", false), ("/b", false), ("//a", true), ("/a%2F", true)]
                    .map(|path| (caller, path))
            })
            .flat_map(|(caller, path)| [&none, &one, &two].map(|headers| (caller, path, headers)))
            .map(|(caller, (path, ambiguous), headers)| Call { caller, path, ambiguous, headers })
            .collect();
        for (per, shares) in [("service", 3), ("path", 3), ("header:X-User", 3)] {
            let line = format!("  - {{ from: \"*\", to: callee, rate: 1/h, per: {per} }}\n");
            let bucket = Bucket::new(&lines(&line)[0], now);
            let passed = all.iter().filter(|call| bucket.take(call, now).is_ok()).count();
            assert_eq!((passed, bucket.keys()), (shares, Some((3, 0))), "{per}");
        }
        let bucket = Bucket::new(&lines("  - { from: \"*\", to: callee, rate: 1/h }\n")[0], now);
        assert_eq!(all.iter().filter(|call| bucket.take(call, now).is_ok()).count(), 1);
        assert!(bucket.take(&all[0], now + Duration::from_secs(3600)).is_ok());
    }
}
