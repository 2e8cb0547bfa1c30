//! Which replicas has a service?

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::outlier::Census;
use super::replica::{Replica, View};
use super::settings::Settings;
use super::state::Event;

/// More addresses of one service are not used: far more than the 65,535 bytes of a DNS answer are likely to bring, and a bound.
pub const REPLICAS_MAX: usize = 1024;

/// So many that have left are remembered, and for so long: a replica that is restarted, or an answer of DNS that lacks one, must
/// not wipe out that it was failing. As long as an ejection lasts at most by default.
const DEPARTED_MAX: usize = 64;
const DEPARTED_FOR: Duration = Duration::from_secs(60);

/// The replicas as of one update, for [`choose`](super::choose).
pub type Snapshot = Arc<[Arc<Replica>]>;

/// The replicas of a service, shared by all workers.
#[derive(Debug)]
pub struct Replicas {
    settings: Settings,
    base: Instant,
    census: Arc<Census>,
    version: AtomicU64,
    members: Mutex<Members>,
}

#[derive(Debug)]
struct Members {
    snapshot: Snapshot,
    /// Who has left, and when: the latest last.
    departed: VecDeque<(Instant, Arc<Replica>)>,
}

impl Replicas {
    /// Nobody yet.
    #[must_use]
    pub fn new(settings: Settings, now: Instant) -> Self {
        Self {
            settings,
            base: now,
            census: Arc::default(),
            version: AtomicU64::new(0),
            members: Mutex::new(Members { snapshot: Arc::from([]), departed: VecDeque::new() }),
        }
    }

    /// Discovery's answer. Addresses that stay keep all that is known of them; those that went are forgotten, after a while: one
    /// that soon comes back is still ejected. Newcomers warm up where there are others. The events are about replicas that are back
    /// since so many others have left.
    pub fn update(&self, addresses: &[SocketAddr], now: Instant) -> Vec<Event> {
        let mut members = self.members();
        let mut census = self.census.lock();
        let Members { snapshot, departed } = &mut *members;
        departed.retain(|(left, _)| now.saturating_duration_since(*left) < DEPARTED_FOR);

        let mut replicas: Vec<Arc<Replica>> = Vec::with_capacity(addresses.len().min(REPLICAS_MAX));
        let mut joining = Vec::new();
        for address in addresses {
            if replicas.len() == REPLICAS_MAX || replicas.iter().any(|replica| replica.address() == *address)
            {
                continue;
            }
            let stays = snapshot.iter().find(|replica| replica.address() == *address).cloned();
            let replica = stays.unwrap_or_else(|| {
                let replica = self.remembered(departed, *address);
                joining.push(Arc::clone(&replica));
                replica
            });
            replicas.push(replica);
        }
        // Answers of DNS come in any order: the same addresses are no news.
        if joining.is_empty() && replicas.len() == snapshot.len() {
            return Vec::new();
        }
        for replica in snapshot.iter() {
            if !replicas.iter().any(|stays| stays.address() == replica.address()) {
                replica.leave(&mut census);
                if departed.len() == DEPARTED_MAX {
                    departed.pop_front();
                }
                departed.push_back((now, Arc::clone(replica)));
            }
        }
        census.members(replicas.len());
        // Where all are new there is nobody to take their share in the meantime.
        let all_are_new = joining.len() == replicas.len();
        for replica in joining {
            replica.join(&mut census, now, all_are_new);
        }

        let mut events = Vec::new();
        let mut ejected: Vec<_> = replicas.iter().filter_map(|one| Some((one.out_for(now)?, one))).collect();
        ejected.sort_by_key(|(left, _)| *left);
        for (_, replica) in ejected {
            if !census.too_many() {
                break;
            }
            events.extend(replica.readmit(&mut census, now));
        }
        *snapshot = replicas.into();
        self.version.fetch_add(1, Ordering::Release);
        events
    }

    fn remembered(
        &self,
        departed: &mut VecDeque<(Instant, Arc<Replica>)>,
        address: SocketAddr,
    ) -> Arc<Replica> {
        let place = departed.iter().position(|(_, replica)| replica.address() == address);
        place.and_then(|place| departed.remove(place)).map_or_else(
            || Arc::new(Replica::new(address, self.base, self.settings, Arc::clone(&self.census))),
            |(_, replica)| replica,
        )
    }

    /// The replicas of now. A lock is taken for it: a worker keeps its snapshot until [`version`](Self::version) has changed.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Arc::clone(&self.members().snapshot)
    }

    /// Changes with each update that has news; read without a lock.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// What is known of each, as of `now`.
    #[must_use]
    pub fn view(&self, now: Instant) -> Vec<View> {
        self.snapshot().iter().map(|replica| replica.view(now)).collect()
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
