//! Where is a service at the moment?
//!
//! One resolver for the process asks for each name in use every few seconds, whatever the TTL says, and at once when a connect
//! fails. NXDOMAIN is an answer (nobody is there); any other failure keeps the last good answer. Each worker has a copy of the
//! addresses, so that a request asks nobody.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use kiro_core::identity::ServiceName;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::spawn_local;

use crate::limits;
use crate::reject::{Refused, Reject};
use crate::state::Peer;
use crate::worker::Worker;

/// What is known of a name.
#[derive(Debug, Clone, Default)]
struct Answer {
    addresses: Arc<[IpAddr]>,
    /// Why there is none, or why the addresses are old; absent before the first lookup has ended.
    outcome: Option<Result<(), Arc<str>>>,
}

struct Ask {
    name: ServiceName,
    reply: oneshot::Sender<Watched>,
}

#[derive(Clone)]
struct Watched {
    answers: watch::Receiver<Answer>,
    again: Arc<Notify>,
}

/// The way from workers to the resolver.
#[derive(Clone)]
pub(crate) struct Resolver {
    asks: mpsc::Sender<Ask>,
}

impl Resolver {
    /// Starts the resolver on the current runtime. The system's configuration is read on first use: a mesh whose services all
    /// have `endpoints` needs none.
    pub(crate) fn start() -> Self {
        // One ask a name and worker: the bound is only reached by a mesh of thousands starting at once, which then waits.
        let (asks, mut received) = mpsc::channel::<Ask>(256);
        tokio::spawn(async move {
            let mut names: HashMap<ServiceName, Watched> = HashMap::new();
            let mut lookup: Option<Arc<TokioResolver>> = None;
            while let Some(ask) = received.recv().await {
                let watched = match names.get(&ask.name) {
                    Some(watched) => watched.clone(),
                    None => {
                        let resolver = resolver(&mut lookup);
                        let usable = resolver.is_ok();
                        let watched = follow(ask.name.clone(), resolver);
                        // A configuration that can't be read now may be there at the next request.
                        if usable {
                            names.insert(ask.name, watched.clone());
                        }
                        watched
                    }
                };
                let _ = ask.reply.send(watched);
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

fn follow(name: ServiceName, resolver: Result<Arc<TokioResolver>, Arc<str>>) -> Watched {
    let (sender, answers) = watch::channel(Answer::default());
    let again = Arc::new(Notify::new());
    let asked = Arc::clone(&again);
    tokio::spawn(async move {
        let resolver = match resolver {
            Ok(resolver) => resolver,
            Err(error) => {
                sender.send_replace(Answer { outcome: Some(Err(error)), ..Answer::default() });
                return;
            }
        };
        while !sender.is_closed() {
            let found = look_up(&resolver, &name).await;
            sender.send_if_modified(|answer| update(answer, found, &name));
            let _ = tokio::time::timeout(limits::RESOLVE_EVERY, asked.notified()).await;
            // However many connects fail, a name is asked for a few times a second at the most.
            tokio::time::sleep(limits::RESOLVE_EVERY / 20).await;
        }
    });
    Watched { answers, again }
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

/// Takes an answer in; true where something changed.
fn update(answer: &mut Answer, found: Found, name: &ServiceName) -> bool {
    let (addresses, outcome) = match found {
        Found::Addresses(addresses) => (Arc::from(addresses), Ok(())),
        Found::Nobody => {
            (Arc::from([]), Err(Arc::from(format!("the name `{name}` does not exist (NXDOMAIN)"))))
        }
        Found::Failed(error) => {
            (Arc::clone(&answer.addresses), Err(Arc::from(format!("the name `{name}`: {error}"))))
        }
    };
    let changed = answer.addresses != addresses || answer.outcome.as_ref() != Some(&outcome);
    if changed && let Err(error) = &outcome {
        tracing::warn!(target: "kiro::discover", name = name.as_str(), kept = addresses.len(), %error, "lookup failed");
    }
    (answer.addresses, answer.outcome) = (addresses, Some(outcome));
    changed
}

/// A worker's copy of what is known.
pub(crate) struct Names {
    resolver: Resolver,
    known: RefCell<HashMap<ServiceName, Known>>,
    turn: Cell<usize>,
}

struct Known {
    addresses: Rc<[SocketAddr]>,
    again: Arc<Notify>,
}

impl Names {
    /// A copy that knows nothing yet.
    pub(crate) fn new(resolver: Resolver) -> Self {
        Self { resolver, known: RefCell::default(), turn: Cell::new(0) }
    }

    /// The addresses of a peer, never empty.
    pub(crate) async fn addresses(
        &self,
        worker: &Rc<Worker>,
        peer: &Peer,
    ) -> Result<Rc<[SocketAddr]>, Refused> {
        if !peer.endpoints.is_empty() {
            return Ok(Rc::from(&*peer.endpoints));
        }
        if let Some(known) = self.known.borrow().get(&peer.name)
            && !known.addresses.is_empty()
        {
            return Ok(Rc::clone(&known.addresses));
        }
        self.ask(worker, peer).await
    }

    /// Where to begin among `count` addresses, each worker in its own turn.
    pub(crate) fn turn(&self, count: usize) -> usize {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        turn.checked_rem(count).unwrap_or(0)
    }

    /// Asks for a name again at once: a connect has failed.
    pub(crate) fn look_again(&self, name: &ServiceName) {
        if let Some(known) = self.known.borrow().get(name) {
            known.again.notify_one();
        }
    }

    async fn ask(&self, worker: &Rc<Worker>, peer: &Peer) -> Result<Rc<[SocketAddr]>, Refused> {
        let gone = || Refused::new(Reject::NameUnresolved, "the resolver has stopped");
        let (reply, answer) = oneshot::channel();
        self.resolver.asks.send(Ask { name: peer.name.clone(), reply }).await.map_err(|_| gone())?;
        let mut watched = answer.await.map_err(|_| gone())?;
        let first = watched.answers.wait_for(|answer| answer.outcome.is_some());
        let answer = match tokio::time::timeout(limits::RESOLVE * 2, first).await {
            Ok(Ok(answer)) => answer.clone(),
            Ok(Err(_)) | Err(_) => {
                return Err(Refused::new(
                    Reject::NameUnresolved,
                    format!("the name `{}` gave no answer in time", peer.name),
                ));
            }
        };
        let port = worker.settings.peer_port;
        let addresses = with_port(&answer.addresses, port);
        let newly = self
            .known
            .borrow_mut()
            .insert(
                peer.name.clone(),
                Known { addresses: Rc::clone(&addresses), again: Arc::clone(&watched.again) },
            )
            .is_none();
        if newly {
            spawn_local(keep_up(Rc::clone(worker), peer.name.clone(), watched.answers, port));
        }
        if addresses.is_empty() {
            let error = answer.outcome.and_then(Result::err).unwrap_or_else(|| Arc::from("no addresses"));
            return Err(Refused::new(Reject::NameUnresolved, error.to_string()));
        }
        Ok(addresses)
    }
}

async fn keep_up(worker: Rc<Worker>, name: ServiceName, mut answers: watch::Receiver<Answer>, port: u16) {
    while answers.changed().await.is_ok() {
        let addresses = with_port(&answers.borrow_and_update().addresses, port);
        worker.upstreams.keep(&name, &addresses);
        if let Some(known) = worker.names.known.borrow_mut().get_mut(&name) {
            known.addresses = addresses;
        }
    }
    // Nobody looks this name up any more: the next request asks for it anew, rather than to stay with what was last known.
    worker.names.known.borrow_mut().remove(&name);
}

fn with_port(addresses: &[IpAddr], port: u16) -> Rc<[SocketAddr]> {
    addresses.iter().map(|address| SocketAddr::new(*address, port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(before: &[&str], found: Found, expected: &[&str], good: bool) {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let mut answer = Answer { addresses: parse(before).into(), outcome: Some(Ok(())) };
        update(&mut answer, found, &ServiceName::parse("profile").unwrap());
        assert_eq!(*answer.addresses, *parse(expected));
        assert_eq!(answer.outcome.unwrap().is_ok(), good);
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
