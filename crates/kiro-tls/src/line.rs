//! What does the log say of a certificate?
//!
//! One line a handshake: a [`Line`] is made when it begins and used up when it ends, well or badly; one that is dropped on the
//! way (the caller's time limit) writes that. No secret passes through here: all that is written is public in a certificate or
//! negotiated in the clear.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use kiro_core::quota::LineQuota;

use crate::error::{HandshakeError, HandshakeErrorKind, Stage, explain};
use crate::facts::{LeafFacts, instant};
use crate::handshake::{HandshakeContext, TlsFacts};
use crate::verify::{Leg, PeerVerifier, Refusal, Side};

/// The reason in the line of a handshake that was given up.
const GIVEN_UP: &str = "tls_timeout";

pub(crate) struct Line<'a> {
    context: &'a HandshakeContext,
    pub(crate) side: Side,
    pub(crate) leg: Leg,
    expected: Option<String>,
    pub(crate) verifier: Option<Arc<PeerVerifier>>,
    /// Bounds the lines of failures; absent where no stranger can cause them.
    pub(crate) failures: Option<Arc<LineQuota>>,
    /// Nobody wants the line: see [`crate::LoopbackClient::without_lines`].
    pub(crate) silent: bool,
    written: bool,
}

/// How a handshake ended, in the words of the line.
struct Outcome<'a> {
    facts: Option<&'a LeafFacts>,
    tls: Option<TlsFacts>,
    failure: Option<Failure<'a>>,
}

struct Failure<'a> {
    reason: &'static str,
    cause: &'a str,
    fix: &'a str,
    /// Whether it is the certificate that was refused, and not the handshake around it.
    certificate: bool,
    /// Nobody needs to act: a port scan or a health check came and went.
    quiet: bool,
}

impl<'a> Line<'a> {
    pub(crate) fn new(context: &'a HandshakeContext, side: Side, leg: Leg, expected: Option<String>) -> Self {
        Self { context, side, leg, expected, verifier: None, failures: None, silent: false, written: false }
    }

    /// The peer has proven itself.
    pub(crate) fn verified(mut self, facts: &LeafFacts, tls: TlsFacts) {
        self.write(&Outcome { facts: Some(facts), tls: Some(tls), failure: None });
    }

    /// The handshake is complete and no certificate was asked for.
    pub(crate) fn nothing_to_verify(mut self) {
        self.written = true;
    }

    /// The handshake has ended with an error of socket or TLS; where the verifier has refused, its reason is the one that counts.
    pub(crate) fn failed(self, error: &io::Error, stage: Stage) -> HandshakeError {
        let refusal = self
            .verifier
            .as_ref()
            .and_then(|verifier| verifier.seen())
            .and_then(|seen| seen.verdict.as_ref().err().cloned());
        let quiet = stage == Stage::First && self.side == Side::Server;
        let certificate = refusal.is_some();
        let refusal = refusal.unwrap_or_else(|| explain(error, stage, self.side, self.leg));
        let quiet = quiet && refusal.kind == HandshakeErrorKind::Closed;
        self.end(refusal, None, certificate, quiet)
    }

    /// TLS was content, we are not.
    pub(crate) fn refused(self, refusal: Refusal, tls: Option<TlsFacts>) -> HandshakeError {
        self.end(refusal, tls, false, false)
    }

    fn end(
        mut self,
        refusal: Refusal,
        tls: Option<TlsFacts>,
        certificate: bool,
        quiet: bool,
    ) -> HandshakeError {
        let verifier = self.verifier.take();
        let facts =
            verifier.as_ref().and_then(|verifier| verifier.seen()).and_then(|seen| seen.facts.as_ref());
        let certificate = certificate || refusal.kind == HandshakeErrorKind::NoCertificate;
        let failure = Failure {
            reason: refusal.kind.code(),
            cause: &refusal.cause,
            fix: &refusal.fix,
            certificate,
            quiet,
        };
        self.write(&Outcome { facts, tls, failure: Some(failure) });
        HandshakeError::new(refusal, facts.cloned())
    }

    fn write(&mut self, outcome: &Outcome<'_>) {
        self.written = true;
        if self.silent {
            return;
        }
        let facts = outcome.facts;
        let failure = outcome.failure.as_ref();
        let suppressed = match (failure, &self.failures) {
            // A quiet one is below the level that is written.
            (Some(Failure { quiet: false, .. }), Some(failures)) => match failures.take(Instant::now()) {
                Some(suppressed) => (suppressed > 0).then_some(suppressed),
                None => return,
            },
            _ => None,
        };
        let (presented, sans) = (facts.map(LeafFacts::presented), facts.map(|facts| facts.sans.join(" ")));
        let (not_before, not_after) =
            (facts.map(|facts| instant(facts.not_before)), facts.map(|facts| instant(facts.not_after)));
        // The level is part of an event's callsite, so each has one of its own; the fields are the same.
        macro_rules! event {
            ($level:ident, $message:literal) => {
                tracing::$level!(
                    target: "kiro::certificate",
                    service = self.context.service.as_str(),
                    side = self.side.as_str(),
                    direction = self.context.direction,
                    local = self.context.local.map(tracing::field::display),
                    remote = self.context.remote.map(tracing::field::display),
                    presented,
                    expected = self.expected,
                    sans,
                    issuer = facts.map(|facts| facts.issuer.as_str()),
                    serial = facts.map(|facts| facts.serial.as_str()),
                    not_before,
                    not_after,
                    fingerprint = facts.map(|facts| facts.fingerprint.as_str()),
                    tls_version = outcome.tls.map(|tls| tls.version),
                    group = outcome.tls.map(|tls| tls.group),
                    cipher = outcome.tls.map(|tls| tls.cipher),
                    verdict = if failure.is_none() { "ok" } else { "refused" },
                    reason = failure.map(|failure| failure.reason),
                    cause = failure.map(|failure| failure.cause),
                    fix = failure.map(|failure| failure.fix),
                    suppressed,
                    $message
                )
            };
        }
        match failure {
            None => event!(info, "certificate verified"),
            Some(Failure { certificate: true, .. }) => event!(warn, "certificate refused"),
            Some(Failure { quiet: true, .. }) => event!(debug, "handshake failed"),
            Some(_) => event!(warn, "handshake failed"),
        }
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if self.written {
            return;
        }
        let verifier = self.verifier.take();
        let facts =
            verifier.as_ref().and_then(|verifier| verifier.seen()).and_then(|seen| seen.facts.as_ref());
        let failure = Failure {
            reason: GIVEN_UP,
            cause: "the handshake took too long, or we are stopping: it was given up",
            fix: "look at whether the peer is alive and speaks TLS on this port",
            certificate: false,
            quiet: false,
        };
        self.write(&Outcome { facts, tls: None, failure: Some(failure) });
    }
}
