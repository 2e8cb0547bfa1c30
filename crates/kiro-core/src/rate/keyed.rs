//! Has this one caller, path or header value had its share?
//!
//! A bucket a key, for keys that strangers choose, so memory is bounded. A key whose bucket is full again is as good as unknown, and
//! makes room for another. When no room can be made, new keys share one overflow bucket with the same rate: who was there first is
//! not pushed out by a flood of new names while it uses its bucket, and the flood passes at the rate of one key. (Who rests until its
//! bucket is full is a newcomer again, and during a flood shares its fate.)

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::{Left, Limited, Pace, RateLimit, RateSettings};

/// How many keys are known at the same time, unless the mesh file says otherwise: some 60 bytes each, so well under a megabyte.
pub const MAX_KEYS_DEFAULT: u32 = 10_000;

/// Maps with a lock each, so that workers seldom meet: more than a sidecar has workers, and a lock is held for a tenth of a
/// microsecond.
const SHARDS_MAX: u32 = 16;

/// A shard for so many keys at least: a new key takes the place of an idle one of its own shard only, and a few keys in many shards
/// would seldom find one.
const KEYS_A_SHARD_MIN: u32 = 256;

/// How many known keys an unknown one looks at for one that can go, when there is no room. A bound on the work that a stranger can
/// cause with one request; the next one goes on from there.
const KEYS_LOOKED_AT: usize = 16;

/// A rate for each key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyedSettings {
    /// What a key may do.
    pub rate: RateSettings,
    /// How many keys are known at the same time; 0 counts as 1.
    pub max_keys: u32,
}

/// A bucket for each key.
#[derive(Debug)]
pub struct Keyed {
    settings: KeyedSettings,
    pace: Pace,
    origin: Instant,
    seed: [u64; 2],
    shards: Box<[Mutex<Shard>]>,
    /// Of all shards together, so that it does not matter how evenly keys fall.
    known: AtomicU32,
    overflow: RateLimit,
    overflowed: AtomicU64,
}

/// Some of the keys.
#[derive(Debug, Default)]
struct Shard {
    slots: HashMap<u64, usize, BuildHasherDefault<Hashed>>,
    buckets: Vec<Bucket>,
    /// Where the search for a key that can go continues.
    hand: usize,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    key: u64,
    tat: u64,
}

impl Keyed {
    /// Knows no key yet. `origin` is any moment before the first check. `seed` is 16 random bytes that no caller knows: keys are kept
    /// as 64 bits of a SipHash with it, so that nobody can choose two that fall together, and memory does not grow with their length.
    #[must_use]
    pub fn new(settings: KeyedSettings, origin: Instant, seed: [u64; 2]) -> Self {
        let max_keys = settings.max_keys.max(1);
        let shards = (max_keys / KEYS_A_SHARD_MIN).clamp(1, SHARDS_MAX);
        Self {
            settings: KeyedSettings { max_keys, ..settings },
            pace: Pace::of(&settings.rate),
            origin,
            seed,
            shards: (0..shards).map(|_| Mutex::default()).collect(),
            known: AtomicU32::new(0),
            overflow: RateLimit::new(settings.rate, origin),
            overflowed: AtomicU64::new(0),
        }
    }

    /// What it was made of.
    #[must_use]
    pub fn settings(&self) -> &KeyedSettings {
        &self.settings
    }

    /// Takes a request out of a key's bucket, if it holds one. A key has one part or several (a service and a path): `["a", "bc"]` is
    /// another than `["ab", "c"]`.
    pub fn check(&self, key: &[&[u8]], now: Instant) -> Result<Left, Limited> {
        let key = self.hash(key);
        let ticks = self.pace.ticks(now.saturating_duration_since(self.origin));
        // There is always one. The map of a shard uses the hash's other bits.
        let shard = self.shards.get((key >> 32) as usize % self.shards.len().max(1));
        let known = shard.and_then(|shard| {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let bucket = self.bucket(&mut shard, key, ticks)?;
            Some(match self.pace.take(bucket.tat, ticks) {
                Some(next) => {
                    bucket.tat = next;
                    Ok(self.pace.left(next, ticks))
                }
                None => Err(self.pace.limited(bucket.tat, ticks)),
            })
        });
        known.unwrap_or_else(|| {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            self.overflow.check(now)
        })
    }

    /// How many keys have a bucket.
    #[must_use]
    pub fn known(&self) -> u32 {
        self.known.load(Ordering::Relaxed)
    }

    /// How many requests ever had to share the overflow bucket.
    #[must_use]
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// The key's own bucket: the one it has, a new one, or one that nobody misses. None: all are in use.
    fn bucket<'a>(&self, shard: &'a mut Shard, key: u64, now: u64) -> Option<&'a mut Bucket> {
        if let Some(slot) = shard.slots.get(&key) {
            return shard.buckets.get_mut(*slot);
        }
        let max = self.settings.max_keys;
        let grow = |known: u32| (known < max).then_some(known.saturating_add(1));
        let slot = match self.known.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow) {
            Ok(_) => {
                shard.buckets.push(Bucket { key, tat: 0 });
                shard.buckets.len().checked_sub(1)?
            }
            Err(_) => shard.reuse(key, now)?,
        };
        shard.slots.insert(key, slot);
        shard.buckets.get_mut(slot)
    }

    #[allow(
        deprecated,
        reason = "the standard library's successor takes no key, and a chosen key is the point here"
    )]
    fn hash(&self, key: &[&[u8]]) -> u64 {
        let [k0, k1] = self.seed;
        let mut hasher = std::hash::SipHasher::new_with_keys(k0, k1);
        for part in key {
            hasher.write_u64(part.len() as u64);
            hasher.write(part);
        }
        hasher.finish()
    }
}

impl Shard {
    /// Gives a bucket that is full again to another key.
    fn reuse(&mut self, key: u64, now: u64) -> Option<usize> {
        for _ in 0..KEYS_LOOKED_AT.min(self.buckets.len()) {
            let slot = self.hand;
            self.hand = if slot + 1 < self.buckets.len() { slot + 1 } else { 0 };
            let bucket = self.buckets.get_mut(slot)?;
            if bucket.tat <= now {
                self.slots.remove(&bucket.key);
                *bucket = Bucket { key, tat: 0 };
                return Some(slot);
            }
        }
        None
    }
}

/// For keys that are hashes already.
#[derive(Clone, Copy, Debug, Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        // Only u64 comes here; this is for completeness.
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn rate(requests: u32, per: Duration, burst: u32) -> RateSettings {
        RateSettings::new(requests, per, Some(burst)).unwrap()
    }

    /// Some keys as bytes.
    fn key(number: u64) -> [u8; 8] {
        number.to_be_bytes()
    }

    #[test]
    fn keys_do_not_share_and_are_told_apart_by_their_parts() {
        let start = Instant::now();
        let keyed = Keyed::new(KeyedSettings { rate: rate(1, SECOND, 1), max_keys: 100 }, start, [3, 4]);
        for parts in [&[b"a".as_slice(), b"bc"] as &[&[u8]], &[b"ab", b"c"], &[b"abc"], &[b"abc", b""], &[]] {
            assert!(keyed.check(parts, start).is_ok(), "{parts:?}");
            assert!(keyed.check(parts, start).is_err(), "{parts:?}");
        }
        assert_eq!((keyed.known(), keyed.overflowed()), (5, 0));
    }

    #[test]
    fn memory_is_bounded_and_a_flood_of_keys_gets_one_keys_rate() {
        let start = Instant::now();
        for max_keys in [1, 2, 10, 300, 10_000] {
            let settings = KeyedSettings { rate: rate(1, SECOND, 2), max_keys };
            let keyed = Keyed::new(settings, start, [5, u64::from(max_keys)]);
            let known = u64::from(max_keys);
            for number in 0..known {
                assert!(keyed.check(&[&key(number)], start).is_ok());
            }
            let flood = (known..known * 2 + 100).filter(|n| keyed.check(&[&key(*n)], start).is_ok()).count();
            assert_eq!((flood, keyed.known(), keyed.overflowed()), (2, max_keys, known + 100));
            // Who was there keeps what was left.
            for number in 0..known {
                assert!(keyed.check(&[&key(number)], start).is_ok());
                assert!(keyed.check(&[&key(number)], start).is_err());
            }
            // All full again: each makes room for one new, and nothing grows.
            let later = start + Duration::from_secs(3);
            for number in known * 3..known * 4 {
                for _ in 0..2 {
                    let _ = keyed.check(&[&key(number)], later);
                }
            }
            // All of one shard; of many, those whose share of the new keys fell short stay.
            let new = keyed.overflowed() - known - 100;
            assert!(new <= known * 2 / 10, "{new} of {max_keys}");
            assert_eq!(keyed.known(), max_keys);
            let held: usize = keyed.shards.iter().map(|shard| shard.lock().unwrap().buckets.len()).sum();
            let named: usize = keyed.shards.iter().map(|shard| shard.lock().unwrap().slots.len()).sum();
            assert_eq!((held, named), (max_keys as usize, max_keys as usize));
        }
    }

    #[test]
    fn a_key_that_makes_room_had_nothing_to_lose() {
        let start = Instant::now();
        let keyed = Keyed::new(KeyedSettings { rate: rate(1, SECOND, 1), max_keys: 1 }, start, [6, 7]);
        assert!(keyed.check(&[b"a"], start).is_ok());
        let almost = start + Duration::from_millis(999);
        assert!(keyed.check(&[b"b"], almost).is_ok());
        assert_eq!(keyed.overflowed(), 1);
        assert!(keyed.check(&[b"a"], almost).is_err());
        let full = start + SECOND;
        assert!(keyed.check(&[b"b"], full).is_ok());
        assert_eq!(keyed.overflowed(), 1);
        assert!(keyed.check(&[b"b"], full).is_err());
    }
}
