//! Where is a service at the moment?
//!
//! One resolver for the process asks for each name in use every few seconds, whatever the TTL says, and at once when a connect
//! fails. NXDOMAIN is an answer (nobody is there); any other failure keeps the last good answer. Each worker has a copy of the
//! replicas, so that a request asks nobody.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Instant;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use kiro_core::balance::{Replica, Snapshot};
use kiro_core::identity::ServiceName;
use tokio::sync::mpsc;

use crate::edge::{Edge, Known};
use crate::limits;
use crate::reject::{Refused, Reject};
use crate::worker::Worker;

/// The way from workers to the resolver.
#[derive(Clone)]
pub(crate) struct Resolver {
    asks: mpsc::Sender<Arc<Edge>>,
}

impl Resolver {
    /// Starts the resolver on the current runtime; peers listen on `port`. The system's configuration is read on first use: a mesh
    /// whose services all have `endpoints` needs none.
    pub(crate) fn start(port: u16) -> Self {
        // One ask a name and worker: the bound is only reached by a mesh of thousands starting at once, which then waits.
        let (asks, mut received) = mpsc::channel::<Arc<Edge>>(256);
        tokio::spawn(async move {
            let mut lookup: Option<Arc<TokioResolver>> = None;
            while let Some(edge) = received.recv().await {
                if !edge.begin_following() {
                    continue;
                }
                match resolver(&mut lookup) {
                    Ok(resolver) => drop(tokio::spawn(follow(Arc::downgrade(&edge), resolver, port))),
                    // A configuration that can't be read now may be there at the next request.
                    Err(error) => {
                        edge.known.send_modify(|known| known.outcome = Some(Err(error)));
                        edge.end_following();
                    }
                }
            }
        });
        Self { asks }
    }
}

fn resolver(cached: &mut Option<Arc<TokioResolver>>) -> Result<Arc<TokioResolver>, Arc<str>> {
    if let Some(resolver) = cached {
        return Ok(Arc::clone(resolver));
    }
    let build = || {
        let mut builder = TokioResolver::builder_tokio()?;
        let options = builder.options_mut();
        options.cache_size = 0;
        options.timeout = limits::RESOLVE / 2;
        options.attempts = 1;
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        builder.build()
    };
    let resolver =
        Arc::new(build().map_err(|error| Arc::from(format!("the system's DNS configuration: {error}")))?);
    *cached = Some(Arc::clone(&resolver));
    Ok(resolver)
}

/// Asks for a service's name until the service is gone from the mesh file, has a place there, or has not been called for a while.
async fn follow(edge: Weak<Edge>, resolver: Arc<TokioResolver>, port: u16) {
    let mut unused = 0;
    loop {
        let Some(edge) = edge.upgrade() else { return };
        unused = if edge.was_used() { 0 } else { unused + 1 };
        if edge.is_placed() || unused > limits::RESOLVE_UNUSED {
            edge.end_following();
            // The next call asks anew, rather than to go by what was once known.
            edge.known.send_replace(Known::default());
            if !edge.is_placed() {
                edge.learn(&[], Instant::now());
            }
            return;
        }
        let found = look_up(&resolver, &edge.name).await;
        if !edge.is_placed() {
            learn(&edge, found, port);
        }
        let again = Arc::clone(&edge.again);
        drop(edge);
        let _ = tokio::time::timeout(limits::RESOLVE_EVERY, again.notified()).await;
        // However many connects fail, a name is asked for a few times a second at the most.
        tokio::time::sleep(limits::RESOLVE_AT_MOST_EVERY).await;
    }
}

/// Takes a lookup's end over. The replicas come first: whoever waits for the outcome looks at them next.
fn learn(edge: &Edge, found: Found, port: u16) {
    let mut known = edge.known.borrow().clone();
    let before = Arc::clone(&known.addresses);
    update(&mut known, found, &edge.name, Instant::now());
    if known.addresses != before {
        let addresses: Vec<SocketAddr> =
            known.addresses.iter().map(|address| SocketAddr::new(*address, port)).collect();
        edge.learn(&addresses, Instant::now());
    }
    edge.known.send_replace(known);
}

enum Found {
    Addresses(Vec<IpAddr>),
    Nobody,
    Failed(String),
}

async fn look_up(resolver: &TokioResolver, name: &ServiceName) -> Found {
    match tokio::time::timeout(limits::RESOLVE, resolver.lookup_ip(name.as_str())).await {
        Err(_) => Found::Failed(format!("no answer within {} s", limits::RESOLVE.as_secs())),
        Ok(Ok(answer)) => {
            let mut addresses: Vec<IpAddr> = answer.iter().collect();
            addresses.sort_unstable();
            addresses.dedup();
            Found::Addresses(addresses)
        }
        Ok(Err(error)) if error.is_no_records_found() => Found::Nobody,
        Ok(Err(error)) => Found::Failed(error.to_string()),
    }
}

/// Takes an answer in, and says what is new and wrong.
fn update(known: &mut Known, found: Found, name: &ServiceName, now: Instant) {
    let (addresses, outcome) = match found {
        Found::Addresses(addresses) => (Arc::from(addresses), Ok(())),
        Found::Nobody => {
            (Arc::from([]), Err(Arc::from(format!("the name `{name}` does not exist (NXDOMAIN)"))))
        }
        Found::Failed(error) => {
            (Arc::clone(&known.addresses), Err(Arc::from(format!("the name `{name}`: {error}"))))
        }
    };
    if let Err(error) = &outcome
        && known.outcome.as_ref() != Some(&outcome)
    {
        tracing::warn!(target: "kiro::discover", name = name.as_str(), kept = addresses.len(), %error, "lookup failed");
    } else if outcome.is_ok() && matches!(known.outcome, Some(Err(_))) {
        tracing::info!(target: "kiro::discover", name = name.as_str(), addresses = addresses.len(), "lookup succeeds again");
    }
    if outcome.is_ok() {
        known.confirmed = Some(now);
    }
    (known.addresses, known.outcome) = (addresses, Some(outcome));
}

/// A worker's copy of the replicas of each service that it calls.
pub(crate) struct Names {
    resolver: Resolver,
    copies: RefCell<HashMap<ServiceName, Copy>>,
}

struct Copy {
    edge: Arc<Edge>,
    version: u64,
    replicas: Rc<[Arc<Replica>]>,
}

impl Names {
    /// A copy that knows nothing yet.
    pub(crate) fn new(resolver: Resolver) -> Self {
        Self { resolver, copies: RefCell::default() }
    }

    /// The replicas of a service, never none.
    pub(crate) async fn replicas(
        &self,
        worker: &Worker,
        edge: &Arc<Edge>,
    ) -> Result<Rc<[Arc<Replica>]>, Refused> {
        edge.is_used();
        let version = edge.replicas.version();
        if let Some(copy) = self.copies.borrow().get(&edge.name)
            && copy.version == version
            && Arc::ptr_eq(&copy.edge, edge)
            && !copy.replicas.is_empty()
        {
            return Ok(Rc::clone(&copy.replicas));
        }
        // Rare, and large.
        Box::pin(self.renew(worker, edge)).await
    }

    async fn renew(&self, worker: &Worker, edge: &Arc<Edge>) -> Result<Rc<[Arc<Replica>]>, Refused> {
        let mut replicas = self.copy(worker, edge);
        if replicas.is_empty() && !edge.is_placed() {
            self.ask(edge).await?;
            replicas = self.copy(worker, edge);
        }
        if replicas.is_empty() {
            let error = match &edge.known.borrow().outcome {
                Some(Err(error)) => error.to_string(),
                Some(Ok(())) | None => format!("the name `{}` has no addresses", edge.name),
            };
            return Err(Refused::new(Reject::NameUnresolved, error));
        }
        Ok(replicas)
    }

    /// Takes over what is known of a service now.
    fn copy(&self, worker: &Worker, edge: &Arc<Edge>) -> Rc<[Arc<Replica>]> {
        let version = edge.replicas.version();
        let snapshot: Snapshot = edge.replicas.snapshot();
        let replicas: Rc<[Arc<Replica>]> = snapshot.iter().cloned().collect();
        let addresses: Vec<SocketAddr> = replicas.iter().map(|replica| replica.address()).collect();
        worker.upstreams.keep(&edge.name, &addresses);
        let copy = Copy { edge: Arc::clone(edge), version, replicas: Rc::clone(&replicas) };
        self.copies.borrow_mut().insert(edge.name.clone(), copy);
        replicas
    }

    /// Has the name asked for, and waits for the first answer.
    async fn ask(&self, edge: &Arc<Edge>) -> Result<(), Refused> {
        let gone = || Refused::new(Reject::NameUnresolved, "the resolver has stopped");
        let mut known = edge.known.subscribe();
        self.resolver.asks.send(Arc::clone(edge)).await.map_err(|_| gone())?;
        let first = known.wait_for(|known| known.outcome.is_some());
        match tokio::time::timeout(limits::RESOLVE * 2, first).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                let error = format!("the name `{}` gave no answer in time", edge.name);
                Err(Refused::new(Reject::NameUnresolved, error))
            }
        }
    }

    /// Forgets the services that are in the mesh file no more.
    pub(crate) fn keep(&self, is_there: impl Fn(&ServiceName) -> bool) {
        self.copies.borrow_mut().retain(|name, _| is_there(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(before: &[&str], found: Found, expected: &[&str], good: bool) {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let began = Instant::now();
        let later = began + limits::RESOLVE_EVERY;
        let mut known =
            Known { addresses: parse(before).into(), outcome: Some(Ok(())), confirmed: Some(began) };
        update(&mut known, found, &ServiceName::parse("profile").unwrap(), later);
        assert_eq!(*known.addresses, *parse(expected));
        assert_eq!(known.outcome.unwrap().is_ok(), good);
        assert_eq!(known.confirmed, Some(if good { later } else { began }));
    }

    #[test]
    fn a_name_that_is_gone_has_no_addresses() {
        check(&["10.0.0.1"], Found::Nobody, &[], false);
    }

    #[test]
    fn a_failed_lookup_keeps_the_last_good_answer() {
        check(&["10.0.0.1"], Found::Failed("SERVFAIL".into()), &["10.0.0.1"], false);
    }

    #[test]
    fn an_answer_replaces_the_last_one() {
        check(&["10.0.0.1"], Found::Addresses(vec!["10.0.0.2".parse().unwrap()]), &["10.0.0.2"], true);
    }
}
