//! When is a slow client given up, and who learns of it? That takes a minute, so one of each kind stands still at a pair of its own
//! while everything else is measured.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kiro_hostile::frames::RST_STREAM;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf};
use tokio::task::JoinSet;

use super::attacker::{Io, Open, Target, drain, head, open};
use super::attacks::{Attack, Door};
use super::script::{POST, Signed, large_get, script, slow_head};
use super::verdict::identity;
use crate::identity::CALLEE;
use crate::pairs::kiro::Events;
use crate::plan::named;
use crate::stop;

/// Who is not given up within this is not given up at all.
const AT_MOST: Duration = Duration::from_secs(90);
/// How much later it may be on a machine that is busy.
const BUSY_S: f64 = 5.0;
/// How often a slow head gets a byte more, and how often an interruption is looked for.
const DRIP: Duration = Duration::from_secs(1);
/// How long the line may take to come through the log's pipe.
const LINE: Duration = Duration::from_secs(2);

named! {
    /// What is begun and not ended.
    Slow {
        /// A head, of which a byte comes each second.
        Head = "head",
        /// The preface of HTTP/2.
        Preface = "preface",
        /// A TLS handshake.
        Handshake = "TLS handshake",
        /// A body.
        Body = "body",
        /// An answer that is not read, on HTTP/2.
        Answer = "answer",
    }
}

impl Slow {
    const fn doors(self) -> &'static [Door] {
        match self {
            Self::Head | Self::Body => &[Door::Outbound, Door::Ingress],
            Self::Preface | Self::Answer => &[Door::Outbound, Door::Ingress, Door::Inbound],
            Self::Handshake => &[Door::Handshake],
        }
    }

    /// What the line says, and after how long the project says that it comes.
    pub(super) const fn stated(self, door: Door) -> (&'static str, u64) {
        match self {
            Self::Head => ("request_timeout", 30),
            Self::Preface => ("preface_timeout", if matches!(door, Door::Inbound) { 10 } else { 30 }),
            Self::Handshake => ("tls_timeout", 10),
            // The application waits for it, and its time is the service's.
            Self::Body if matches!(door, Door::Ingress) => ("app_timeout", 15),
            Self::Body => ("request_timeout", 60),
            // Its connection goes on, for the others on it.
            Self::Answer => ("idle", 60),
        }
    }

    /// The attack that takes the same way in.
    const fn way(self) -> Attack {
        match self {
            Self::Head => Attack::SlowHeads,
            Self::Preface => Attack::SlowPrefaces,
            Self::Handshake => Attack::SlowHandshakes,
            Self::Body => Attack::EndlessTrailersH1,
            Self::Answer => Attack::ZeroWindows,
        }
    }

    fn opening(self, signed: &Signed) -> anyhow::Result<Vec<u8>> {
        Ok(match self {
            Self::Head => slow_head(1),
            Self::Preface | Self::Handshake => script(self.way(), signed)?.opening,
            Self::Body => {
                format!("POST {POST} HTTP/1.1\r\nHost: {CALLEE}\r\nContent-Length: 9\r\n\r\nx").into_bytes()
            }
            Self::Answer => [script(self.way(), signed)?.opening, large_get(1, signed)].concat(),
        })
    }
}

/// How one of them ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Given {
    /// What stood still.
    pub(crate) what: Slow,
    /// Where.
    pub(crate) door: Door,
    /// After how long its connection or stream ended; none if it has not within 90 s.
    pub(crate) after_s: Option<f64>,
    /// Why, by the line.
    pub(crate) reason: Option<String>,
    /// Whom the line names.
    pub(crate) named: Option<String>,
}

impl Given {
    /// Whether it ended when it was to, and somebody can see whose it was.
    pub(crate) fn is_well(&self) -> bool {
        let (reason, stated) = self.what.stated(self.door);
        self.named.is_some()
            && self.reason.as_deref() == Some(reason)
            && self.after_s.is_some_and(|after| after <= stated as f64 + BUSY_S)
    }
}

/// They stand still.
#[derive(Debug)]
pub(crate) struct Patience(JoinHandle<anyhow::Result<Vec<Given>>>);

impl Patience {
    /// Begins; `target` gives each door's address.
    pub(crate) fn start(target: impl Fn(Door) -> Target, events: Arc<Events>) -> anyhow::Result<Self> {
        let all: Vec<(Slow, Target)> = Slow::ALL
            .iter()
            .flat_map(|slow| slow.doors().iter().map(|door| (*slow, target(*door))).collect::<Vec<_>>())
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("no runtime for slow clients")?;
        let thread = std::thread::Builder::new()
            .name("patience".to_owned())
            .spawn(move || runtime.block_on(together(all, events)))
            .context("no thread for slow clients")?;
        Ok(Self(thread))
    }

    /// Waits for the last of them.
    pub(crate) fn end(self) -> anyhow::Result<Vec<Given>> {
        self.0.join().map_err(|_| anyhow::anyhow!("the slow clients have panicked"))?
    }
}

async fn together(all: Vec<(Slow, Target)>, events: Arc<Events>) -> anyhow::Result<Vec<Given>> {
    let mut there = JoinSet::new();
    for (slow, target) in all {
        let events = Arc::clone(&events);
        there.spawn(async move {
            let outcome = one(slow, &target, &events).await;
            outcome.with_context(|| format!("a slow {slow} at {}", target.door))
        });
    }
    let mut given = Vec::new();
    while let Some(one) = there.join_next().await {
        given.push(one.context("a slow client has panicked")??);
    }
    given.sort_by_key(|given| (given.what, given.door));
    Ok(given)
}

async fn one(slow: Slow, target: &Target, events: &Events) -> anyhow::Result<Given> {
    let mut open = open(slow.way(), target).await.context("cannot connect")?;
    let signed = head(slow.way(), &mut open)?;
    let Open { io, local, .. } = open;
    let (read, mut write) = tokio::io::split(io);
    let begin = Instant::now();
    write.write_all(&slow.opening(&signed)?).await?;
    write.flush().await?;
    let dripping = async {
        loop {
            tokio::time::sleep(DRIP).await;
            if slow == Slow::Head {
                // Who has been cut off reads of it.
                let _ = write.write_all(b"a").await;
            }
            if stop::asked() || begin.elapsed() > AT_MOST {
                return;
            }
        }
    };
    let ended = async { if slow == Slow::Answer { until_reset(read).await } else { drain(read).await } };
    let cut = tokio::select! { () = ended => true, () = dripping => false };
    stop::check()?;
    let after_s = cut.then(|| begin.elapsed().as_secs_f64());
    let is_its = |line: &Value| match line["remote"].as_str() {
        Some(remote) => remote == local && word(line).is_some(),
        None => line["direction"] == target.door.name() && of(slow, line) && word(line).is_some(),
    };
    let until = Instant::now() + LINE;
    let (reason, named) = loop {
        // The last one: a handshake that went well has its line too.
        match events.since(0).iter().rfind(|line| is_its(line)) {
            Some(line) => break (word(line).map(str::to_owned), identity(line, target.door)),
            None if Instant::now() > until => break (None, None),
            None => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    Ok(Given { what: slow, door: target.door, after_s, reason, named })
}

/// Why somebody was given up, by a line.
fn word(line: &Value) -> Option<&str> {
    ["reason", "reject", "ended"].into_iter().find_map(|field| line[field].as_str())
}

/// Reads frames until one resets a stream, or the other end has ended the connection.
async fn until_reset(mut read: ReadHalf<Box<dyn Io>>) {
    let mut head = [0; 9];
    while read.read_exact(&mut head).await.is_ok() {
        let [a, b, c, kind, ..] = head;
        if kind == RST_STREAM {
            return;
        }
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        if read.read_exact(&mut payload).await.is_err() {
            return;
        }
    }
}

/// Whether an application's line can be of this: it has no address, and a head that never came has no method.
fn of(slow: Slow, line: &Value) -> bool {
    line["method"]
        == match slow {
            Slow::Body => "POST",
            Slow::Answer => "GET",
            Slow::Head | Slow::Preface | Slow::Handshake => "",
        }
}
