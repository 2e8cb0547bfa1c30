//! How is it made sure that no request reaches the application unchecked?
//!
//! By types: only [`authorize_peer`] and [`authorize_ingress`] make a [`Permitted`], only [`verify`] and [`trust_ingress`] make
//! a [`Trusted`], and what sends to the application takes nothing else. Their fields are private to this module, so a path that
//! leaves a check out does not compile.

use std::marker::PhantomData;
use std::rc::Rc;

use http::request;
use kiro_core::identity::ServiceName;
use kiro_core::mesh::Signatures;
use kiro_core::policy::{Call, CallKind, Caller, Verdict};
use kiro_core::signature::{BodyProof, Head, Verified, strip};

use crate::body::AppBody;
use crate::exchange::{Direction, Exchange};
use crate::headers::{Admitted, Kind, path_of};
use crate::inbound::PeerConnection;
use crate::reject::{Refused, Reject};
use crate::tunnel::Claim;

/// A request from another sidecar.
#[derive(Debug)]
pub(crate) struct FromPeer;

/// A request from outside the mesh.
#[derive(Debug)]
pub(crate) struct FromIngress;

/// A request that the policy allows.
#[derive(Debug)]
pub(crate) struct Permitted<Source, B> {
    admitted: Admitted<B>,
    source: PhantomData<Source>,
}

/// A request that may go to the application.
#[derive(Debug)]
pub(crate) struct Trusted<B> {
    admitted: Admitted<B>,
    rule: BodyRule,
}

/// What has still to be checked of a trusted request's body.
#[derive(Debug)]
pub(crate) enum BodyRule {
    /// Nothing signs it: an ingress, or `signatures: off`.
    Unsigned,
    /// There must be none.
    Empty,
    /// It must have this digest, and nothing of it may pass before that is known.
    Digest([u8; 32]),
    /// It must end with a trailer signature.
    Trailers(Verified),
}

impl<B> Trusted<B> {
    /// What the request asks for.
    pub(crate) fn kind(&self) -> Kind {
        self.admitted.kind
    }

    /// The version of HTTP that its client speaks.
    pub(crate) fn version(&self) -> http::Version {
        self.admitted.head.version
    }

    /// A field of its head.
    pub(crate) fn header(&self, name: &http::HeaderName) -> Option<&http::HeaderValue> {
        self.admitted.head.headers.get(name)
    }

    /// All fields of its head.
    pub(crate) fn headers(&self) -> &http::HeaderMap {
        &self.admitted.head.headers
    }

    /// Its raw path, and whether that can be read in two ways.
    pub(crate) fn path(&self) -> (&str, bool) {
        (self.admitted.path(), self.admitted.ambiguous)
    }

    /// What it is allowed for, to be judged again while it is an open stream.
    pub(crate) fn claim(&self, exchange: &Exchange) -> Claim {
        let via = exchange.via();
        claim_of(&self.admitted, via.direction, via.caller.as_ref().map(ServiceName::as_str))
    }

    /// Takes the body out, with what it has still to prove, so that one can be put in that proves it.
    pub(crate) fn take_body(self) -> (Trusted<()>, B, BodyRule) {
        let Admitted { head, body, kind, ambiguous } = self.admitted;
        let admitted = Admitted { head, body: (), kind, ambiguous };
        (Trusted { admitted, rule: BodyRule::Unsigned }, body, self.rule)
    }
}

impl Trusted<()> {
    /// The length of the body, where the head tells it.
    pub(crate) fn length(&self) -> Option<u64> {
        crate::app::length(&self.admitted.head.headers)
    }

    /// Puts the body in that goes to the application.
    pub(crate) fn with_body(self, body: AppBody) -> Trusted<AppBody> {
        let Admitted { head, body: (), kind, ambiguous } = self.admitted;
        Trusted { admitted: Admitted { head, body, kind, ambiguous }, rule: self.rule }
    }
}

impl Trusted<AppBody> {
    /// Takes the request apart, to send it.
    pub(crate) fn into_parts(self) -> (request::Parts, AppBody, Kind) {
        (self.admitted.head, self.admitted.body, self.admitted.kind)
    }
}

/// Asks the policy about a request from another sidecar.
pub(crate) fn authorize_peer<B>(
    connection: &PeerConnection,
    admitted: Admitted<B>,
    exchange: &mut Exchange,
) -> Result<Permitted<FromPeer, B>, Refused> {
    authorize(Caller::Service(connection.peer.as_str()), admitted, exchange)
}

/// Asks the policy about a request from outside the mesh.
pub(crate) fn authorize_ingress<B>(
    admitted: Admitted<B>,
    exchange: &mut Exchange,
) -> Result<Permitted<FromIngress, B>, Refused> {
    authorize(Caller::Ingress, admitted, exchange)
}

fn authorize<Source, B>(
    caller: Caller<'_>,
    admitted: Admitted<B>,
    exchange: &mut Exchange,
) -> Result<Permitted<Source, B>, Refused> {
    let verdict = exchange.state().policy.authorize_inbound(caller, &call_of(&admitted));
    exchange.policy(verdict);
    match verdict {
        Verdict::Allowed | Verdict::Audited(_) => Ok(Permitted { admitted, source: PhantomData }),
        Verdict::Denied(denial) => Err(Reject::Denied(denial).into()),
    }
}

/// What an admitted request is allowed for, to be judged again while it is an open stream.
pub(crate) fn claim_of<B>(admitted: &Admitted<B>, direction: Direction, peer: Option<&str>) -> Claim {
    let call = call_of(admitted);
    Claim {
        direction,
        peer: peer.map(Box::from),
        method: call.method.into(),
        path: call.path.into(),
        ambiguous: call.ambiguous,
        kind: call.kind,
    }
}

/// A request as the policy sees it.
pub(crate) fn call_of<B>(admitted: &Admitted<B>) -> Call<'_> {
    Call {
        method: admitted.method(),
        path: admitted.path(),
        ambiguous: admitted.ambiguous,
        kind: match admitted.kind {
            Kind::Plain | Kind::WebSocket => CallKind::Request,
            Kind::Tunnel => CallKind::Tunnel,
        },
    }
}

/// Verifies the signature of a request from another sidecar and takes it out.
pub(crate) fn verify<B>(
    permitted: Permitted<FromPeer, B>,
    connection: &Rc<PeerConnection>,
    exchange: &mut Exchange,
) -> Result<Trusted<B>, Refused> {
    let mut admitted = permitted.admitted;
    if exchange.state().signatures == Signatures::Off {
        exchange.signature("off");
        strip(&mut admitted.head.headers);
        return Ok(Trusted { admitted, rule: BodyRule::Unsigned });
    }
    let head = signed_head(&admitted.head, exchange.state().me.as_str());
    let verified = connection
        .verify(&head, &admitted.head.headers, exchange.began_unix_seconds())
        .map_err(|error| Refused::new(Reject::Signature(error.code()), error.to_string()))?;
    exchange.signature("verified");
    strip(&mut admitted.head.headers);
    let rule = match (admitted.kind, &verified.body) {
        // The handshake alone is signed; what flows after it is not a body.
        (Kind::Tunnel | Kind::WebSocket, _) => BodyRule::Unsigned,
        (Kind::Plain, BodyProof::Empty) => BodyRule::Empty,
        (Kind::Plain, BodyProof::Digest(digest)) => BodyRule::Digest(*digest),
        (Kind::Plain, BodyProof::Trailers) => BodyRule::Trailers(verified),
    };
    Ok(Trusted { admitted, rule })
}

/// Lets a permitted request from outside the mesh pass: nobody there has a key, and the policy has said what may come.
pub(crate) fn trust_ingress<B>(permitted: Permitted<FromIngress, B>) -> Trusted<B> {
    Trusted { admitted: permitted.admitted, rule: BodyRule::Unsigned }
}

/// A head as both ends of an edge sign it.
pub(crate) fn signed_head<'a>(head: &'a request::Parts, authority: &'a str) -> Head<'a> {
    Head { method: head.method.as_str(), authority, path: path_of(head), query: head.uri.query() }
}
