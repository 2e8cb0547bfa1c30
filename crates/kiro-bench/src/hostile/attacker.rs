//! Who sends what the scripts say, at a bounded rate, from one thread of its own?

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use kiro_core::signature::Signer;
use kiro_hostile::frames;
use rustix::time::{ClockId, clock_gettime};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::attacks::{Attack, Door, Shape};
use super::keys::{Keys, signed};
use super::script::{LARGE, POST, Script, Signed, large_get, script};
use crate::identity::CALLEE;

/// Frames are sent in lots of so long: finer than that the timer is not.
const LOT: Duration = Duration::from_millis(2);
/// How long a connection whose script has ended is left open for the sidecar to end it.
const LEFT_OPEN: Duration = Duration::from_secs(1);
/// The same where nobody ends it, so that a control comes again as often as the attack does.
const LEFT_OPEN_AT_SINK: Duration = Duration::from_millis(10);
/// How often a slow client says a byte.
const SLOW: Duration = Duration::from_secs(1);
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(5);

/// Whom it is done to.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// Which way in.
    pub(crate) door: Door,
    /// Where that is.
    pub(crate) address: SocketAddr,
    /// Whether it is only something that reads.
    pub(crate) sink: bool,
    /// What the attacker shows.
    pub(crate) keys: Keys,
}

/// What an attack came to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Toll {
    /// Connections that were made.
    pub(crate) connections: u64,
    /// Those that the other end has ended.
    pub(crate) cut: u64,
    /// Frames, chunks or lines that were sent.
    pub(crate) frames: u64,
    /// The attacker's own addresses.
    pub(crate) locals: BTreeSet<String>,
    /// What the attacker itself has cost.
    pub(crate) cpu: Duration,
}

/// An attack under way.
#[derive(Debug)]
pub(crate) struct Attacker {
    thread: JoinHandle<anyhow::Result<Toll>>,
    /// It ends when this does.
    stop: oneshot::Sender<()>,
}

impl Attacker {
    /// Begins.
    pub(crate) fn start(attack: Attack, target: Target) -> anyhow::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("attacker".to_owned())
            .spawn(move || run(attack, &target, stopped))
            .context("no thread for the attacker")?;
        Ok(Self { thread, stop })
    }

    /// Ends it and says what it came to.
    pub(crate) fn end(self) -> anyhow::Result<Toll> {
        drop(self.stop);
        self.thread.join().map_err(|_| anyhow::anyhow!("the attacker has panicked"))?
    }
}

fn run(attack: Attack, target: &Target, stopped: oneshot::Receiver<()>) -> anyhow::Result<Toll> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime for the attacker")?;
    let toll = Ledger::default();
    let outcome = runtime.block_on(async {
        let attacking = async {
            match attack.shape(target.door) {
                Shape::Frames { rate, again } => frames(attack, target, rate, again, &toll).await,
                Shape::Crowd { connections, rate } => crowd(attack, target, connections, rate, &toll).await,
                Shape::Streams { connections, streams, rate } => {
                    let each = rate / u32::try_from(connections).unwrap_or(1).max(1);
                    streams_of(attack, target, connections, streams, each, &toll).await
                }
            }
        };
        tokio::select! { outcome = attacking => outcome, _ = stopped => Ok(()) }
    });
    outcome?;
    let mut toll = toll.lock().clone();
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    toll.cpu = Duration::new(
        u64::try_from(spent.tv_sec).unwrap_or_default(),
        u32::try_from(spent.tv_nsec).unwrap_or_default(),
    );
    Ok(toll)
}

/// A toll that the tasks of an attack share.
#[derive(Debug, Clone, Default)]
struct Ledger(Arc<Mutex<Toll>>);

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Toll> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets so many a second pass.
struct Pace {
    next: Instant,
    every: Duration,
}

impl Pace {
    fn of(rate: u32) -> Self {
        Self { next: Instant::now(), every: Duration::from_secs(1) / rate.max(1) }
    }

    async fn turn(&mut self) {
        tokio::time::sleep_until(self.next).await;
        // Who was kept waiting does not make up for it with a burst.
        self.next = Instant::now().max(self.next + self.every);
    }
}

/// What frames can be written to.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Io for S {}

/// A connection through its door.
pub(crate) struct Open {
    /// Its bytes.
    pub(crate) io: Box<dyn Io>,
    /// What signs on it, where the door asks for that.
    pub(crate) signer: Option<Signer>,
    /// The attacker's address.
    pub(crate) local: String,
}

/// Connects, and goes through TLS where the attack is behind it.
pub(crate) async fn open(attack: Attack, target: &Target) -> io::Result<Open> {
    let connecting = tokio::time::timeout(CONNECT, TcpStream::connect(target.address));
    let stream = connecting.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    let local = stream.local_addr()?.to_string();
    let config = match (target.door, attack) {
        (Door::Inbound, _) => &target.keys.with_leaf,
        (Door::Handshake, Attack::NoLeaf) => &target.keys.without_leaf,
        (Door::Outbound | Door::Ingress | Door::Handshake, _) => {
            return Ok(Open { io: Box::new(stream), signer: None, local });
        }
    };
    let server = ServerName::try_from(CALLEE).map_err(io::Error::other)?;
    let tls = TlsConnector::from(Arc::clone(config)).connect(server, stream).await?;
    let signer = target.keys.signer(tls.get_ref().1).map_err(io::Error::other)?;
    Ok(Open { io: Box::new(tls), signer: Some(signer), local })
}

/// What the one request of an attack's script carries.
pub(crate) fn head(attack: Attack, open: &mut Open) -> anyhow::Result<Signed> {
    let (method, path) = if attack == Attack::ZeroWindows { ("GET", LARGE) } else { ("POST", POST) };
    open.signer.as_mut().map_or(Ok(Signed::new()), |signer| signed(signer, method, path))
}

/// One connection after the other.
async fn frames(attack: Attack, target: &Target, rate: u32, again: u32, toll: &Ledger) -> anyhow::Result<()> {
    let mut pace = Pace::of(again);
    loop {
        pace.turn().await;
        // A sidecar may refuse in the handshake: that is an end like any other.
        let Ok(mut open) = open(attack, target).await else {
            let mut toll = toll.lock();
            toll.connections += 1;
            toll.cut += 1;
            continue;
        };
        {
            let mut toll = toll.lock();
            toll.connections += 1;
            toll.locals.insert(std::mem::take(&mut open.local));
        }
        let script = script(attack, &head(attack, &mut open)?)?;
        let http1 = attack == Attack::EndlessTrailersH1;
        let (read, write) = tokio::io::split(open.io);
        let left_open = if target.sink { LEFT_OPEN_AT_SINK } else { LEFT_OPEN };
        let writing = async {
            // Who has been cut off can't write any more, and reads of it.
            let _ = send(write, script, rate, http1, toll).await;
            tokio::time::sleep(left_open).await;
        };
        tokio::select! {
            () = drain(read) => toll.lock().cut += 1,
            () = writing => {}
        }
    }
}

async fn send(
    mut write: WriteHalf<Box<dyn Io>>,
    script: Script,
    rate: u32,
    http1: bool,
    toll: &Ledger,
) -> io::Result<WriteHalf<Box<dyn Io>>> {
    write.write_all(&script.opening).await?;
    write.flush().await?;
    let start = Instant::now();
    let lot = f64::from(rate) * LOT.as_secs_f64();
    let (mut waiting, mut waiting_frames, mut sent) = (Vec::new(), 0_u32, 0_u32);
    for piece in script.pieces {
        let count = if http1 { 1 } else { frames::count(&piece) };
        waiting.extend(piece);
        waiting_frames += u32::try_from(count).unwrap_or(u32::MAX);
        if f64::from(waiting_frames) < lot {
            continue;
        }
        sent += waiting_frames;
        toll.lock().frames += u64::from(waiting_frames);
        write.write_all(&waiting).await?;
        write.flush().await?;
        waiting.clear();
        waiting_frames = 0;
        tokio::time::sleep_until(start + Duration::from_secs_f64(f64::from(sent) / f64::from(rate))).await;
    }
    write.write_all(&waiting).await?;
    write.flush().await?;
    toll.lock().frames += u64::from(waiting_frames);
    // Dropped here, it would end its half.
    Ok(write)
}

/// Reads until the other end has ended it.
pub(crate) async fn drain(mut read: ReadHalf<Box<dyn Io>>) {
    let mut buffer = vec![0; 16 * 1024];
    while read.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
}

/// Many that stay.
async fn crowd(
    attack: Attack,
    target: &Target,
    connections: usize,
    rate: u32,
    toll: &Ledger,
) -> anyhow::Result<()> {
    let mut pace = Pace::of(rate);
    let mut there = JoinSet::new();
    for _ in 0..connections {
        pace.turn().await;
        let (target, toll) = (target.clone(), toll.clone());
        there.spawn(async move {
            let Ok(open) = open(attack, &target).await else { return };
            {
                let mut toll = toll.lock();
                toll.connections += 1;
                toll.locals.insert(open.local);
            }
            let Ok(script) = script(attack, &Signed::new()) else { return };
            let (read, write) = tokio::io::split(open.io);
            let mut writing = pin!(slowly(write, script));
            tokio::select! {
                () = drain(read) => toll.lock().cut += 1,
                () = &mut writing => {}
            }
        });
    }
    while there.join_next().await.is_some() {}
    std::future::pending().await
}

/// Says the first all at once, and the rest piece by piece; a script that ends keeps its connection.
async fn slowly(mut write: WriteHalf<Box<dyn Io>>, script: Script) {
    let mut ok = write.write_all(&script.opening).await.is_ok() && write.flush().await.is_ok();
    for piece in script.pieces {
        tokio::time::sleep(SLOW).await;
        ok = ok && write.write_all(&piece).await.is_ok() && write.flush().await.is_ok();
    }
    std::future::pending().await
}

/// Many requests whose answers nobody lets come.
async fn streams_of(
    attack: Attack,
    target: &Target,
    connections: usize,
    streams: u32,
    rate: u32,
    toll: &Ledger,
) -> anyhow::Result<()> {
    let mut there = JoinSet::new();
    for _ in 0..connections {
        let mut open = open(attack, target).await.context("cannot connect to ask for answers")?;
        let toll = toll.clone();
        {
            let mut toll = toll.lock();
            toll.connections += 1;
            toll.locals.insert(std::mem::take(&mut open.local));
        }
        there.spawn(async move {
            let Open { io, mut signer, .. } = open;
            let (read, mut write) = tokio::io::split(io);
            let asking = async {
                let mut pace = Pace::of(rate);
                let opening = script(attack, &Signed::new())?.opening;
                write.write_all(&opening).await?;
                for number in 0..streams {
                    pace.turn().await;
                    let signed = match &mut signer {
                        Some(signer) => signed(signer, "GET", LARGE)?,
                        None => Signed::new(),
                    };
                    write.write_all(&large_get(2 * number + 1, &signed)).await?;
                    write.flush().await?;
                    toll.lock().frames += 1;
                }
                std::future::pending::<anyhow::Result<()>>().await
            };
            tokio::select! {
                () = drain(read) => toll.lock().cut += 1,
                // Who has been cut off can't write any more.
                _ = asking => toll.lock().cut += 1,
            }
        });
    }
    while there.join_next().await.is_some() {}
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pace_lets_so_many_pass_and_makes_up_for_nothing() {
        let start = Instant::now();
        let mut pace = Pace::of(100);
        for _ in 0..101 {
            pace.turn().await;
        }
        assert_eq!(start.elapsed().as_millis(), 1000);
        tokio::time::sleep(Duration::from_secs(5)).await;
        let late = Instant::now();
        for _ in 0..3 {
            pace.turn().await;
        }
        assert!(late.elapsed() >= Duration::from_millis(10), "{:?}", late.elapsed());
    }
}
