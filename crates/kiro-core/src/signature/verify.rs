//! The called side: believes a request's signature, or says why not.

use hmac::Mac as _;
use http::HeaderMap;

use super::covered::{Covered, by_trailers};
use super::key::{ConnectionKey, KeyId};
use super::{
    BodyProof, Form, Head, LIFETIME_SECONDS, Nonce, SKEW_SECONDS_MAX, SignatureError, base, dictionary,
    digest, member,
};
use crate::replay::ReplayWindow;

/// Verifies what comes in on one connection.
#[derive(Debug)]
pub struct Verifier {
    keys: Vec<NamedKey>,
    window: ReplayWindow,
}

#[derive(Debug)]
struct NamedKey {
    keyid: String,
    key: ConnectionKey,
}

/// A head whose signature holds. Only [`Verifier::verify`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The head's place in its connection's counter.
    pub nonce: Nonce,
    /// What is known of the body.
    pub body: BodyProof,
    key: usize,
}

impl Verifier {
    /// A verifier of the given edge's keys, one for each epoch, all derived for this connection. Whoever calls has seen to it
    /// that source and target are the two ends of the connection: a keyid that is not among them is unknown.
    #[must_use]
    pub fn new(keys: Vec<(KeyId, ConnectionKey)>) -> Self {
        let keys = keys.into_iter().map(|(keyid, key)| NamedKey { keyid: keyid.to_string(), key }).collect();
        Self { keys, window: ReplayWindow::new() }
    }

    /// Verifies the signature of a head.
    ///
    /// # Errors
    /// Says which check failed. A nonce is used up only by a head that passes all of them.
    pub fn verify(
        &mut self,
        head: &Head<'_>,
        headers: &HeaderMap,
        now_unix: u64,
    ) -> Result<Verified, SignatureError> {
        let ours = dictionary::find(headers)?.ok_or(SignatureError::Missing)?;
        let covered = Covered::by_head(head, headers).map_err(SignatureError::Component)?;
        let parameters = member::parse_head(ours.input, covered.lines())?;
        let mac = digest::bytes_of(ours.signature).ok_or(SignatureError::Malformed("signature"))?;

        let (index, named) = self.key(parameters.key.keyid).ok_or(SignatureError::UnknownKey)?;
        parameters.key.check_algorithm_and_tag(Form::Head)?;
        let computed = base::mac(&named.key, Form::Head, covered.lines(), ours.input);
        computed.verify_slice(&mac).map_err(|_| SignatureError::Mismatch)?;

        check_times(parameters.created, parameters.expires, now_unix)?;
        let body = covered.body().map_err(SignatureError::Malformed)?;
        let nonce = parameters.key.nonce;
        if !self.window.accept(nonce.0) {
            return Err(SignatureError::Replayed);
        }
        Ok(Verified { nonce, body, key: index })
    }

    /// Verifies the trailers of a streamed body whose bytes have the given SHA-256.
    ///
    /// # Errors
    /// Says which check failed.
    pub fn verify_trailers(
        &self,
        verified: &Verified,
        digest: &[u8; 32],
        trailers: &HeaderMap,
    ) -> Result<(), SignatureError> {
        let ours = dictionary::find(trailers)?.ok_or(SignatureError::TrailersMissing)?;
        let lines = by_trailers(trailers).map_err(SignatureError::Component)?;
        let parameters = member::parse_trailers(ours.input, &lines)?;
        let mac = digest::bytes_of(ours.signature).ok_or(SignatureError::Malformed("signature"))?;

        let named = self.keys.get(verified.key).ok_or(SignatureError::UnknownKey)?;
        if parameters.keyid != named.keyid.as_bytes() || parameters.nonce != verified.nonce {
            return Err(SignatureError::TrailersOfAnother);
        }
        parameters.check_algorithm_and_tag(Form::Trailers)?;
        let computed = base::mac(&named.key, Form::Trailers, lines.iter(), ours.input);
        computed.verify_slice(&mac).map_err(|_| SignatureError::Mismatch)?;

        match digest::sha256_of_last(trailers) {
            Some(signed) if signed == *digest => Ok(()),
            Some(_) => Err(SignatureError::DigestMismatch),
            None => Err(SignatureError::Malformed("content-digest")),
        }
    }

    fn key(&self, keyid: &[u8]) -> Option<(usize, &NamedKey)> {
        self.keys.iter().enumerate().find(|(_, named)| named.keyid.as_bytes() == keyid)
    }
}

fn check_times(created: u64, expires: u64, now: u64) -> Result<(), SignatureError> {
    if !(created..=created.saturating_add(LIFETIME_SECONDS)).contains(&expires) {
        return Err(SignatureError::Malformed("expires is before created or too long after it"));
    }
    if created > now.saturating_add(SKEW_SECONDS_MAX) {
        return Err(SignatureError::NotYetValid { created, expires, now });
    }
    if now > expires.saturating_add(SKEW_SECONDS_MAX) {
        return Err(SignatureError::Expired { created, expires, now });
    }
    Ok(())
}
