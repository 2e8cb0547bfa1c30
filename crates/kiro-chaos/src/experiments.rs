//! What is broken, and what is promised for it?
//!
//! Where something else can do the work, nobody sees an error but those whose request was in the hands of what died: a request that may
//! have been processed is not sent again unless it was declared that it may be. Where nothing else can, the promise says what a caller
//! gets and how fast.

use std::time::Duration;

use crate::faults::{Fault, Skew};
use crate::judge::Expect::{
    self, BackWithinMs, ErrorsMax, ErrorsPercentMax, GoodputMinPercent, NoneLost, P50MaxMs, P99,
    QuietAfterMs, Says, ShareMaxPercent, ToldWithinMs,
};
use crate::netns::Rule;

/// Requests a second where an experiment has no reason for others: enough to see a pause of some milliseconds, little enough for a
/// laptop.
const RATE: u32 = 200;
/// For what is planned, as an update is. The bound is 1,000; a machine of two cores that also makes the load is at its end there.
const ROLLING_RATE: u32 = 400;

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Experiment {
    /// Its name, as `--only` takes it.
    pub(crate) name: &'static str,
    /// What is done, and what is promised, for people.
    pub(crate) promise: &'static str,
    /// How it is made.
    pub(crate) kind: Kind,
    /// The promise, for this program.
    pub(crate) expects: &'static [Expect],
}

/// How an experiment is made.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// A fault under load.
    Fault {
        /// What is broken.
        fault: Fault,
        /// How long it lasts, where that can be chosen; else how long is looked for what comes after it.
        seconds: u64,
        /// Requests a second.
        rate: u32,
        /// The replica of Profile that it is about.
        replica: Option<&'static str>,
    },
    /// Three times what the mesh can do.
    Overload,
    /// Containers that have nothing to do are told to end.
    IdleStop {
        /// How long each may take, in milliseconds.
        within_ms: f64,
    },
}

const fn fault(fault: Fault, seconds: u64) -> Kind {
    Kind::Fault { fault, seconds, rate: RATE, replica: Some("profile-1") }
}

const fn elsewhere(fault: Fault, seconds: u64) -> Kind {
    Kind::Fault { fault, seconds, rate: RATE, replica: None }
}

const fn rolling(fault: Fault, seconds: u64) -> Kind {
    Kind::Fault { fault, seconds, rate: ROLLING_RATE, replica: Some("profile-1") }
}

/// What a planned or harmless thing may cost: nothing that a user sees.
const UNSEEN: Expect = P99 { times: 3.0, floor_ms: 150.0 };

/// All of them, in the order of a run.
pub(crate) const ALL: &[Experiment] = &[
    Experiment {
        name: "kill-app",
        promise: "kill -9 of a replica's application: the other one takes over at once; only what was in its hands may fail",
        kind: fault(Fault::Kill("profile-1"), 8),
        expects: &[ErrorsMax(3), QuietAfterMs(100.0), NoneLost, BackWithinMs(5_000.0)],
    },
    Experiment {
        name: "kill-proxy",
        promise: "kill -9 of a replica's sidecar: the other one takes over at once; only what was in its hands may fail",
        kind: fault(Fault::Kill("profile-1-proxy"), 8),
        expects: &[ErrorsMax(3), QuietAfterMs(100.0), NoneLost, BackWithinMs(5_000.0)],
    },
    Experiment {
        name: "kill-pod",
        promise: "kill -9 of the owner of a replica's network: the other one takes over within 2.5 s, and the pod heals by itself",
        kind: fault(Fault::Kill("profile-1-pod"), 12),
        expects: &[
            ErrorsPercentMax(1.0),
            QuietAfterMs(2_500.0),
            ToldWithinMs(3_000.0),
            NoneLost,
            BackWithinMs(10_000.0),
        ],
    },
    Experiment {
        name: "kill-only-proxy",
        promise: "kill -9 of the only ingress: nobody waits, whoever comes is turned away at once, and it serves again within 3 s",
        kind: elsewhere(Fault::Kill("dashboard-proxy"), 8),
        expects: &[QuietAfterMs(3_000.0), ToldWithinMs(1_000.0)],
    },
    Experiment {
        name: "kill-only-app",
        promise: "kill -9 of the only Auth: its callers get 502 or 503 with a code within 500 ms, and good answers again within 3 s",
        kind: elsewhere(Fault::Kill("auth"), 8),
        expects: &[NoneLost, ToldWithinMs(500.0), QuietAfterMs(3_000.0)],
    },
    Experiment {
        name: "pause-app",
        promise: "a replica's application stands still (SIGSTOP): it is left alone after what it takes to see that, and tried again afterwards",
        kind: fault(Fault::Pause("profile-1"), 10),
        expects: &[
            ErrorsPercentMax(5.0),
            QuietAfterMs(3_000.0),
            ToldWithinMs(3_000.0),
            NoneLost,
            BackWithinMs(10_000.0),
        ],
    },
    Experiment {
        name: "pause-proxy",
        promise: "a replica's sidecar stands still (SIGSTOP): it is left alone after what it takes to see that, and tried again afterwards",
        kind: fault(Fault::Pause("profile-1-proxy"), 10),
        expects: &[
            ErrorsPercentMax(5.0),
            QuietAfterMs(3_000.0),
            ToldWithinMs(3_000.0),
            NoneLost,
            BackWithinMs(10_000.0),
        ],
    },
    Experiment {
        name: "slow-app",
        promise: "a replica's application is slower by some 100 ms: it gets few requests, and most users notice nothing",
        kind: fault(Fault::Slow("profile-1"), 8),
        expects: &[ErrorsMax(0), ShareMaxPercent(25.0), P50MaxMs(50.0)],
    },
    Experiment {
        name: "cut-network",
        promise: "a replica's network is cut, so that nobody says no: it is left alone after what it takes to see that, and comes back",
        kind: fault(Fault::Net(Rule::Cut, &["profile-1"]), 10),
        expects: &[
            ErrorsPercentMax(5.0),
            QuietAfterMs(3_000.0),
            ToldWithinMs(3_000.0),
            NoneLost,
            BackWithinMs(10_000.0),
        ],
    },
    Experiment {
        name: "lose-packets",
        promise: "5 % of a replica's packets are lost, each way: no error, though some wait",
        kind: fault(Fault::Net(Rule::Loss(5), &["profile-1"]), 10),
        expects: &[ErrorsMax(0), P99 { times: 3.0, floor_ms: 1_000.0 }],
    },
    Experiment {
        name: "delay-packets",
        promise: "what a replica sends comes 200 ms later: it gets few requests, and most users notice nothing",
        kind: fault(Fault::Net(Rule::Delay(Duration::from_millis(200)), &["profile-1"]), 10),
        expects: &[ErrorsMax(0), ShareMaxPercent(25.0), P50MaxMs(50.0)],
    },
    Experiment {
        name: "dns-silent",
        promise: "DNS does not answer anybody: what was last known is used, and nobody waits for it",
        kind: elsewhere(Fault::Net(Rule::DnsSilent, &["dashboard", "profile-1", "profile-2", "auth"]), 12),
        expects: &[ErrorsMax(0), UNSEEN],
    },
    Experiment {
        name: "leaf-not-yet-valid",
        promise: "a leaf that begins tomorrow is put in place: the one that is good stays, and the log says why",
        kind: elsewhere(Fault::Leaf(Skew::NotYet), 6),
        expects: &[ErrorsMax(0), UNSEEN, Says("profile-1-proxy", "certificates can't be renewed")],
    },
    Experiment {
        name: "leaf-expired",
        promise: "a leaf that ended yesterday is put in place: the one that is good stays, and the log says why",
        kind: elsewhere(Fault::Leaf(Skew::Expired), 6),
        expects: &[ErrorsMax(0), UNSEEN, Says("profile-1-proxy", "certificates can't be renewed")],
    },
    Experiment {
        name: "jaeger-dead",
        promise: "Jaeger is dead: no request notices",
        kind: elsewhere(Fault::Stop("jaeger"), 8),
        expects: &[ErrorsMax(0), UNSEEN],
    },
    Experiment {
        name: "jaeger-hangs",
        promise: "Jaeger takes spans and never answers: no request notices",
        kind: elsewhere(Fault::Pause("jaeger"), 12),
        expects: &[ErrorsMax(0), UNSEEN],
    },
    Experiment {
        name: "log-stalls",
        promise: "whoever reads the ingress's log stands still, as with a full disk: lines are lost, no request notices",
        kind: elsewhere(Fault::LogStalled("dashboard-proxy"), 8),
        expects: &[ErrorsMax(0), UNSEEN],
    },
    Experiment {
        name: "starve-proxy",
        promise: "a replica's sidecar has a tenth of a processor: no error, and half of the users notice nothing",
        kind: fault(Fault::Starved("profile-1-proxy"), 10),
        expects: &[ErrorsMax(0), P50MaxMs(50.0), P99 { times: 3.0, floor_ms: 500.0 }],
    },
    Experiment {
        name: "overload",
        promise: "three times what the mesh can do: it still does 90 % of that, and whoever is turned away knows it within a second",
        kind: Kind::Overload,
        expects: &[GoodputMinPercent(90.0), NoneLost, ToldWithinMs(1_000.0)],
    },
    Experiment {
        name: "recreate-replica",
        promise: "docker compose up --force-recreate of one replica of two: nothing is lost",
        kind: rolling(Fault::Recreate(&["profile-1-pod", "profile-1-proxy", "profile-1"]), 5),
        expects: &[ErrorsMax(0), BackWithinMs(30_000.0)],
    },
    Experiment {
        name: "recreate-proxy",
        promise: "the sidecar of one replica of two is replaced alone: nothing is lost",
        kind: rolling(Fault::Recreate(&["profile-1-proxy"]), 5),
        expects: &[ErrorsMax(0), BackWithinMs(30_000.0)],
    },
    Experiment {
        name: "stop-replica",
        promise: "docker compose stop of one replica of two, which ends its application first, and its return: nothing is lost",
        kind: rolling(Fault::ComposeStop(&["profile-1-pod", "profile-1-proxy", "profile-1"]), 4),
        expects: &[ErrorsMax(0), BackWithinMs(5_000.0)],
    },
    Experiment {
        name: "stop-idle",
        promise: "whoever has nothing to do ends within 100 ms of SIGTERM",
        kind: Kind::IdleStop { within_ms: 100.0 },
        expects: &[],
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_for_the_command_line_and_unique() {
        let names: BTreeSet<_> = ALL.iter().map(|experiment| experiment.name).collect();
        assert_eq!(names.len(), ALL.len());
        assert!(
            names.iter().all(|name| name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '-'))
        );
    }

    #[test]
    fn every_fault_has_a_promise_that_can_be_broken() {
        for experiment in ALL {
            let can_be = !experiment.expects.is_empty() || matches!(experiment.kind, Kind::IdleStop { .. });
            assert!(can_be && !experiment.promise.is_empty(), "{}", experiment.name);
        }
    }
}
