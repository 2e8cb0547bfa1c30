//! How is a pod's network broken? By rules and queues inside its namespace, which end with it.

use std::process::Command;
use std::time::Duration;

use rustix::process::Pid;

use crate::command::{Heed, run};

/// How long a rule may take to be set.
const SET: Duration = Duration::from_secs(10);
/// A table of our own: to take it away is to undo all of it.
const TABLE: &str = "kiro_chaos";
/// Docker's DNS, as every container of a network of its own sees it. The packets themselves go to another port of that address.
const DNS: &str = "127.0.0.11";

/// What becomes of a pod's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Nothing gets in or out: a cable that was pulled, so nobody says no.
    Cut,
    /// So many of a hundred are lost, each way.
    Loss(u8),
    /// Docker's DNS is silent.
    DnsSilent,
    /// Everything that goes out does so later.
    Delay(Duration),
}

impl Rule {
    /// Sets it in the namespace of a process.
    pub(crate) fn set(self, pod: Pid) -> anyhow::Result<()> {
        match self {
            Self::Delay(by) => {
                let by = format!("{}ms", by.as_millis());
                inside(pod, &["tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", &by])
            }
            Self::Cut | Self::Loss(_) | Self::DnsSilent => inside(pod, &["nft", &self.table()]),
        }
    }

    /// Takes it away. A namespace that has ended took it along.
    pub(crate) fn clear(self, pod: Pid) -> anyhow::Result<()> {
        match self {
            Self::Delay(_) => inside(pod, &["tc", "qdisc", "del", "dev", "eth0", "root"]),
            Self::Cut | Self::Loss(_) | Self::DnsSilent => {
                inside(pod, &["nft", "delete", "table", "inet", TABLE])
            }
        }
    }

    /// Why it can't be set on this machine, if it can't; tried on a pod, and undone.
    pub(crate) fn impossible(self, pod: Pid) -> Option<String> {
        match self.set(pod) {
            Ok(()) => self.clear(pod).err().map(|error| format!("{error:#}")),
            Err(error) => {
                let tool = if matches!(self, Self::Delay(_)) { "tc with netem in the kernel" } else { "nft" };
                // What was tried is long; what the tool said of it stands last.
                let said = format!("{error:#}");
                let said = said.rsplit_once("): ").map_or(said.as_str(), |(_, said)| said);
                Some(format!("needs {tool}: {}", first_line(said)))
            }
        }
    }

    /// Its rules, as nft reads them. The loopback interface is the pod's own affair.
    fn table(self) -> String {
        let (ours, theirs) = match self {
            Self::Loss(percent) => {
                let lost = format!("numgen random mod 100 < {percent} drop");
                (format!("iifname != \"lo\" {lost}"), format!("oifname != \"lo\" {lost}"))
            }
            Self::DnsSilent => (format!("ip saddr {DNS} drop"), format!("ip daddr {DNS} drop")),
            Self::Cut | Self::Delay(_) => {
                ("iifname != \"lo\" drop".to_owned(), "oifname != \"lo\" drop".to_owned())
            }
        };
        format!(
            "table inet {TABLE} {{ chain in {{ type filter hook input priority 0; {ours}; }}; \
             chain out {{ type filter hook output priority 0; {theirs}; }}; }}"
        )
    }
}

fn inside(pod: Pid, arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("nsenter");
    command.args(["--net", "--target", &pod.as_raw_nonzero().to_string(), "--"]).args(arguments);
    run(&mut command, SET, Heed::Nothing).map(|_| ())
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_spare_what_they_are_not_about() {
        assert_eq!(
            Rule::Loss(5).table(),
            "table inet kiro_chaos { chain in { type filter hook input priority 0; iifname != \"lo\" numgen random mod 100 < 5 drop; }; \
             chain out { type filter hook output priority 0; oifname != \"lo\" numgen random mod 100 < 5 drop; }; }"
        );
        assert!(Rule::DnsSilent.table().contains("ip daddr 127.0.0.11 drop"));
        assert!(Rule::Cut.table().contains("oifname != \"lo\" drop"));
    }
}
