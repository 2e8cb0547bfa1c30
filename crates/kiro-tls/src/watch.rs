//! How are renewed files picked up without a restart?
//!
//! By polling: notifications do not cross every kind of mount. A poll is a handful of `stat`s; only what has changed is read.
//! A renewal that can't be used changes nothing but the log, which says so once: after the files have stood still for one poll,
//! since a writer replaces several files one after the other.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiro_core::identity::SpiffeId;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::expiry::{ExpiryLevel, expiry_warning};
use crate::facts::{LeafFacts, instant};
use crate::files::Place;
use crate::identity::IdentityError;
use crate::sidecar::{SidecarFiles, SidecarIdentity, SidecarSource, Stamps};

/// How often files are looked at: a change shall hold within a second, and a bad one is told after two looks.
pub const POLL_EVERY: Duration = Duration::from_millis(500);

/// Loads a sidecar's identity and follows its files until all receivers are gone. From memory there is nothing to follow: the
/// receiver's sender is gone from the start. Must be called within a tokio runtime.
///
/// # Errors
/// Where what is there at start can't be used: names the file, what is wrong with it, and how to mend it.
pub fn watch_sidecar(
    source: SidecarSource,
    expected: SpiffeId,
) -> Result<watch::Receiver<Arc<SidecarIdentity>>, IdentityError> {
    match source {
        SidecarSource::Memory(files) => {
            let identity = SidecarIdentity::from_files(&files, &expected)?;
            Ok(watch::channel(Arc::new(identity)).1)
        }
        SidecarSource::Directory(directory) => {
            // Stamps first: what changes while we read differs from them, and is read again.
            let loaded = Loaded::now(&directory);
            let files = SidecarFiles::read(&directory)?;
            let identity = SidecarIdentity::build(&files, &expected, 1, &Place::directory(&directory))?;
            let follower = Follower {
                directory,
                expected,
                generation: 1,
                digest: files.digest(),
                loaded,
                trouble: None,
                expiry: ExpiryLog::default(),
            };
            let (sender, receiver) = watch::channel(Arc::new(identity));
            tokio::spawn(follower.follow(sender));
            Ok(receiver)
        }
    }
}

struct Follower {
    directory: PathBuf,
    expected: SpiffeId,
    generation: u64,
    digest: [u8; 32],
    /// What the files were like just before they were read.
    loaded: Loaded,
    /// The last look's files could not be used.
    trouble: Option<Trouble>,
    expiry: ExpiryLog,
}

#[derive(Clone, Copy)]
struct Loaded {
    stamps: Stamps,
    /// One of the files was so new that its stamp may not tell of the next change.
    fresh: bool,
}

impl Loaded {
    fn now(directory: &Path) -> Self {
        let stamps = Stamps::of(directory);
        Self { stamps, fresh: stamps.any_fresh(OffsetDateTime::now_utc().unix_timestamp()) }
    }
}

struct Trouble {
    stamps: Stamps,
    told: bool,
}

impl Follower {
    async fn follow(mut self, sender: watch::Sender<Arc<SidecarIdentity>>) {
        let mut ticks = tokio::time::interval(POLL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = sender.closed() => return,
            }
            if let Some(identity) = self.look() {
                sender.send_replace(Arc::new(identity));
            }
            self.expiry.look(&self.expected, &sender.borrow(), OffsetDateTime::now_utc());
        }
    }

    /// One look at the files. What could not be used is tried again at each look (a certificate may not be valid yet); what was
    /// taken is read again only when a stamp has changed.
    fn look(&mut self) -> Option<SidecarIdentity> {
        let now = Loaded::now(&self.directory);
        if self.trouble.is_none() && now.stamps == self.loaded.stamps && !self.loaded.fresh {
            return None;
        }
        match self.load() {
            Ok(identity) => {
                self.loaded = now;
                if self.trouble.take().is_some_and(|trouble| trouble.told) && identity.is_none() {
                    tracing::info!(target: "kiro::reload", service = self.expected.service.as_str(), "certificates are again the ones that run");
                }
                identity
            }
            Err(error) => {
                self.note(now.stamps, &error);
                None
            }
        }
    }

    /// `None` where the content is what runs already.
    fn load(&mut self) -> Result<Option<SidecarIdentity>, IdentityError> {
        let files = SidecarFiles::read(&self.directory)?;
        let digest = files.digest();
        if digest == self.digest {
            return Ok(None);
        }
        let place = Place::directory(&self.directory);
        let identity = SidecarIdentity::build(&files, &self.expected, self.generation + 1, &place)?;
        self.generation += 1;
        self.digest = digest;
        let facts = identity.identity.facts();
        tracing::info!(
            target: "kiro::reload",
            service = self.expected.service.as_str(),
            generation = self.generation,
            serial = facts.serial.as_str(),
            not_after = instant(facts.not_after),
            fingerprint = facts.fingerprint.as_str(),
            "certificates renewed"
        );
        Ok(Some(identity))
    }

    fn note(&mut self, now: Stamps, error: &IdentityError) {
        match &mut self.trouble {
            Some(trouble) if trouble.stamps == now => {
                if !trouble.told {
                    trouble.told = true;
                    tracing::error!(
                        target: "kiro::reload",
                        service = self.expected.service.as_str(),
                        generation = self.generation,
                        %error,
                        "certificates can't be renewed: the running ones stay"
                    );
                }
            }
            Some(_) | None => self.trouble = Some(Trouble { stamps: now, told: false }),
        }
    }
}

/// Says once a level that a certificate ends soon.
#[derive(Default)]
struct ExpiryLog {
    generation: u64,
    /// Of leaf, CA and ingress.
    told: [Option<ExpiryLevel>; 3],
}

impl ExpiryLog {
    fn look(&mut self, expected: &SpiffeId, identity: &SidecarIdentity, now: OffsetDateTime) {
        if self.generation != identity.generation {
            *self = Self { generation: identity.generation, ..Self::default() };
        }
        // While a CA is being replaced there are two; what counts is that one of them lives on.
        let authority = identity.identity.authorities().iter().max_by_key(|facts| facts.not_after);
        let certificates = [
            ("leaf", Some(identity.identity.facts())),
            ("ca", authority),
            ("ingress", identity.ingress.as_ref().map(|ingress| ingress.facts())),
        ];
        for ((certificate, facts), told) in certificates.into_iter().zip(&mut self.told) {
            let Some(facts) = facts else { continue };
            let Some(warning) = expiry_warning(facts.not_after, now) else { continue };
            if *told < Some(warning.level) {
                *told = Some(warning.level);
                write_warning(expected, certificate, facts, warning.level);
            }
        }
    }
}

fn write_warning(expected: &SpiffeId, certificate: &str, facts: &LeafFacts, level: ExpiryLevel) {
    tracing::warn!(
        target: "kiro::expiry",
        service = expected.service.as_str(),
        certificate,
        within_days = level.days(),
        not_after = instant(facts.not_after),
        serial = facts.serial.as_str(),
        fix = "renew it with `make certs`",
        "{}",
        if level == ExpiryLevel::Past { "certificate has expired" } else { "certificate expires soon" }
    );
}

#[cfg(test)]
mod tests {
    use kiro_core::identity::{ServiceName, TrustDomain};

    use super::*;

    /// A follower that has taken what is in a directory, some time ago.
    fn settled() -> (tempfile::TempDir, Follower) {
        let directory = tempfile::tempdir().unwrap();
        for name in ["ca.pem", "leaf.pem"] {
            std::fs::write(directory.path().join(name), name).unwrap();
        }
        for name in ["leaf.key", "edges.json"] {
            // tempfile makes files that are their owner's alone.
            let file = tempfile::NamedTempFile::new_in(directory.path()).unwrap();
            file.persist(directory.path().join(name)).unwrap();
        }
        let domain = TrustDomain::parse("kiro.mesh").unwrap();
        let follower = Follower {
            directory: directory.path().to_owned(),
            expected: SpiffeId::sidecar(&domain, &ServiceName::parse("profile").unwrap()),
            generation: 1,
            digest: SidecarFiles::read(directory.path()).unwrap().digest(),
            loaded: Loaded { stamps: Stamps::of(directory.path()), fresh: false },
            trouble: None,
            expiry: ExpiryLog::default(),
        };
        (directory, follower)
    }

    #[test]
    fn what_has_the_same_stamp_is_not_read_again() {
        let (_directory, mut follower) = settled();
        // Were the files read, their content would not be the one that is known, and would be bad.
        follower.digest = [0; 32];
        assert!(follower.look().is_none() && follower.trouble.is_none());
    }

    #[test]
    fn what_was_too_new_for_its_stamp_is_read_again() {
        let (_directory, mut follower) = settled();
        follower.digest = [0; 32];
        follower.loaded.fresh = true;
        assert!(follower.look().is_none() && follower.trouble.is_some());
    }

    #[test]
    fn trouble_is_looked_into_whatever_the_stamps_say() {
        let (_directory, mut follower) = settled();
        follower.trouble = Some(Trouble { stamps: follower.loaded.stamps, told: true });
        assert!(follower.look().is_none() && follower.trouble.is_none());
    }
}
