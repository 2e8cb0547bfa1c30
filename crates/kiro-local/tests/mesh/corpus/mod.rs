//! One request in, one request out: what `tests/corpus/*.txt` says of each case, and what holds for all of them.
//!
//! `UPDATE_EXPECTED=1` writes the expectations anew; then read them beside the RFCs before they are committed. A wrong behaviour that
//! is merely written down is still wrong.

mod backend;
mod fixture;
mod http1;
mod http2;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use backend::Backend;
use fixture::{Case, Fixture, Front};
use tokio::net::TcpStream;

use crate::hostile::{Leaf, MESH, client, handshake};
use crate::support::{Answer, Spec, World, eventually, raw};

/// What came of a case at one front.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// The client's side, in the corpus' words.
    lines: Vec<String>,
    /// Final answers, the probe's included.
    answers: usize,
    /// Those of 2xx and 101.
    served: usize,
    /// Those of 2xx that did not break off.
    whole: usize,
    /// Whether a 400 came by the sidecar or its library.
    bad_request: bool,
    /// Whether the last answer said that the connection ends.
    says_close: bool,
    /// Whether the last answer was a 101.
    switched: bool,
    /// Whether the probe was answered.
    probed: bool,
    last_body: Vec<u8>,
    /// What is wrong whatever was expected.
    faults: Vec<String>,
}

impl Outcome {
    fn answered(&mut self, status: u16) {
        self.answers += 1;
        self.served += usize::from((200..300).contains(&status) || status == 101);
        self.bad_request |= status == 400;
    }
}

/// `callee` takes requests from `caller` and, by its ingress, from outside; `caller` may not call `other`.
fn spec(top: &'static str) -> Spec {
    Spec {
        top,
        services: vec![
            ("caller", "app: { port: {port} }"),
            ("callee", "app: { port: {port} }, ingress: { port: {ingress} }"),
            ("other", "app: { port: {port} }"),
            ("db", "app: { port: {port}, protocol: tcp }"),
        ],
        allow: "  - { from: caller, to: callee }\n  - { from: ingress, to: callee }\n  - { from: caller, to: db }",
    }
}

struct Stage {
    world: World,
    backend: Backend,
    played: usize,
}

impl Stage {
    async fn start(top: &'static str) -> Self {
        let world = World::start(spec(top)).await;
        let backend = Backend::start(world.listen("callee").await);
        Self { world, backend, played: 0 }
    }

    fn address(&self, front: Front) -> SocketAddr {
        match front {
            Front::Outbound | Front::Outbound2 => self.world.addresses("caller").outbound,
            Front::Ingress | Front::Ingress2 => self.world.addresses("callee").ingress.unwrap(),
            Front::Peer => self.world.addresses("callee").inbound,
        }
    }

    /// Meets a front as the case's client.
    async fn meet(&self, case: &Case, front: Front, probe: &str) -> Result<Outcome, String> {
        let address = self.address(front);
        if !front.is_http2() {
            return http1::play(address, case, probe, &self.backend).await;
        }
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        if front != Front::Peer {
            return http2::play(stream, case, (probe, "http"), &self.backend).await;
        }
        let config = client(&self.world, Some(&Leaf::of(&self.world, "caller")), MESH);
        let stream =
            handshake(stream, "callee", &Arc::new(config)).await.map_err(|error| error.to_string())?;
        http2::play(stream, case, (probe, "https"), &self.backend).await
    }

    /// Plays a case and gives what came of it, in the corpus' words.
    async fn play(&mut self, case: &Case, front: Front) -> Result<Played, String> {
        self.played += 1;
        let probe = format!("/probe/{}", self.played);
        let fence = format!("/fence/{}", self.played);
        self.backend.begin(&case.app);
        let outcome = self.meet(case, front, &probe).await?;
        // Another client's request: it is served whatever the case has done, and ends what the case is accounted for.
        let by = if front == Front::Peer { Front::Outbound } else { front };
        let request =
            format!("GET http://callee{fence} HTTP/1.1\r\nHost: callee\r\nConnection: close\r\n\r\n");
        let fenced = Answer::parse(&raw(self.address(by), request.as_bytes()).await);
        if (fenced.status, &fenced.body) != (200, &fence) {
            return Err(format!("the next client's request got {fenced:?}"));
        }
        let (mut seen, unframed) = self.backend.seen();
        let mut faults = outcome.faults.clone();
        faults.extend(unframed.into_iter().map(|what| format!("the application got {what}")));
        let caller = if matches!(front, Front::Ingress | Front::Ingress2) { "ingress" } else { "caller" };
        faults.extend(
            seen.iter()
                .filter(|seen| !seen.line.contains("/fence/"))
                .filter_map(|seen| seen.check(caller).err()),
        );
        let whole = seen.iter().filter(|seen| seen.whole && !seen.line.contains("/fence/")).count();
        if (whole > outcome.answers && !case.app.breaks)
            || (case.app.answer.is_none() && whole > outcome.served)
        {
            faults.push(format!(
                "the application got {whole} requests, the client {} answers",
                outcome.answers
            ));
        }
        if outcome.bad_request && outcome.probed && case.app.answer.is_none() && !front.is_http2() {
            faults.push("a connection that goes on after a 400".to_owned());
        }
        let is_own =
            |line: &str| line == format!("GET {fence}") || (outcome.probed && line == format!("GET {probe}"));
        // Whether the head of a body without an end has come so far is a matter of luck, but for a case that waits for it.
        let waits = case.steps.iter().any(|step| matches!(step, fixture::Step::AwaitSeen));
        seen.retain(|seen| !is_own(&seen.line) && (seen.whole || waits));
        let mut lines = outcome.lines;
        let mut answers = outcome.answers;
        if case.app.breaks {
            if outcome.whole > usize::from(outcome.probed) {
                faults.push("a whole answer, where the application gave none".to_owned());
            }
            // The access line of what broke off without an answer is written all the same.
            (lines, answers) = (vec!["< broken off".to_owned()], answers.max(1));
        }
        let by_stream = matches!(front, Front::Outbound2 | Front::Ingress2);
        let mut seen: Vec<String> = seen.iter().map(|seen| format!("> {}", seen.show(by_stream))).collect();
        if by_stream {
            // Which of two streams comes first is nobody's promise.
            seen.sort();
        }
        lines.extend(seen);
        Ok(Played { case: 0, front, lines, faults, answers, fence })
    }

    /// How many access lines each case has made: those between two fences, at each front.
    async fn logged(&self, played: &[Played]) -> BTreeMap<String, usize> {
        let fences = |lines: &[serde_json::Value]| -> BTreeMap<String, usize> {
            let mut counts = BTreeMap::new();
            let mut since: BTreeMap<String, usize> = BTreeMap::new();
            for line in lines {
                let log = format!("{} {}", line["service"], line["direction"]);
                match line["path"].as_str() {
                    Some(path) if path.starts_with("/fence/") => {
                        let count = since.remove(&log).unwrap_or_default();
                        counts.insert(format!("{log} {path}"), count);
                    }
                    _ => *since.entry(log).or_default() += 1,
                }
            }
            counts
        };
        let mut counts = BTreeMap::new();
        eventually("a line for each request", || {
            counts = fences(&self.world.logs.lines());
            let all = played.iter().all(|played| counts.contains_key(&played.log()));
            async move { all }
        })
        .await;
        counts
    }
}

/// A case that was played at a front.
struct Played {
    case: usize,
    front: Front,
    /// What came, in the corpus' words.
    lines: Vec<String>,
    faults: Vec<String>,
    answers: usize,
    fence: String,
}

impl Played {
    /// The access line that ends the case.
    fn log(&self) -> String {
        let log = match self.front {
            Front::Outbound | Front::Outbound2 => r#""caller" "outbound""#,
            Front::Ingress | Front::Ingress2 => r#""callee" "ingress""#,
            Front::Peer => r#""callee" "inbound""#,
        };
        format!("{log} {}", self.fence)
    }
}

/// Plays the cases of a file in a mesh; compares, or writes anew. It gives what is wrong.
async fn check_file(stage: &mut Stage, file: &str, only: &str) -> (usize, Vec<String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let fixture = Fixture::parse(file, &text).unwrap_or_else(|error| panic!("{error}"));
    let mut wrong = Vec::new();
    let mut all = Vec::new();
    for (place, case) in fixture.cases.iter().enumerate().filter(|(_, case)| case.name.contains(only)) {
        for &front in &case.at {
            match stage.play(case, front).await {
                Ok(played) => all.push(Played { case: place, ..played }),
                Err(error) => wrong.push(format!("{} `{}` at {front}: {error}", case.place, case.name)),
            }
        }
    }
    let logged = stage.logged(&all).await;
    let mut got = vec![BTreeMap::new(); fixture.cases.len()];
    let count = all.len();
    for mut played in all {
        let case = &fixture.cases[played.case];
        let what = format!("{} `{}` at {}", case.place, case.name, played.front);
        let lines = logged[&played.log()];
        if lines != played.answers {
            played.lines.push(format!("< {lines} lines in the log for {} answers", played.answers));
        }
        wrong.extend(played.faults.iter().map(|fault| format!("{what}: {fault}")));
        let expected = case.expected.get(&played.front).cloned().unwrap_or_default();
        if !updates() && played.lines != expected {
            let (expected, came) = (expected.join("\n    "), played.lines.join("\n    "));
            wrong.push(format!("{what}\n  expected:\n    {expected}\n  came:\n    {came}"));
        }
        got[played.case].insert(played.front, played.lines);
    }
    if updates() && only.is_empty() {
        std::fs::write(&path, fixture.render(&got)).unwrap();
    }
    (count, wrong)
}

fn updates() -> bool {
    std::env::var_os("UPDATE_EXPECTED").is_some()
}

/// Plays files in one mesh. `ONLY=words` plays the cases with these words in their name.
async fn check(files: &[&str], top: &'static str, at_least: usize) {
    let mut stage = Stage::start(top).await;
    let only = std::env::var("ONLY").unwrap_or_default();
    let (mut count, mut wrong) = (0, Vec::new());
    for file in files {
        let (played, found) = check_file(&mut stage, file, &only).await;
        count += played;
        wrong.extend(found);
    }
    assert!(wrong.is_empty(), "{} things are wrong in {count} cases:\n{}", wrong.len(), wrong.join("\n"));
    assert!(count >= at_least || !only.is_empty(), "{count} cases are left");
    assert!(stage.world.stop().await);
}

const HTTP1: &[&str] = &["framing.txt", "heads.txt", "answers.txt"];

#[tokio::test]
async fn http_1() {
    check(HTTP1, "", 1300).await;
}

#[tokio::test]
async fn http_2() {
    check(&["http2.txt"], "", 100).await;
}

/// What signatures change is who is believed, and nothing about framing.
#[tokio::test]
async fn http_1_without_signatures() {
    if !updates() {
        check(HTTP1, "signatures: off", 1300).await;
    }
}

/// Without signatures, so that raw frames get past them: what is malformed is refused before anybody asks for one.
#[tokio::test]
async fn http_2_of_a_peer() {
    check(&["peer.txt"], "signatures: off", 40).await;
}
