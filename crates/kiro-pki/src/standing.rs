//! Does the certificate that lies here still do, or is another to be issued?

use std::time::Duration;

use rcgen::PublicKeyData as _;
use time::OffsetDateTime;

use crate::authority::{Authority, LeafSpec};
use crate::error::PkiError;
use crate::facts::Facts;
use crate::files::{Folder, Found};
use crate::layout::Pair;
use crate::report::Action;
use crate::{AUTHORITY_NAME, pem};

/// What is to happen with a certificate and its key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Good,
    /// Somebody else's, and welcome to stay; the text is a note for the person, where there is something to note.
    Theirs(Option<String>),
    Issue(Action, String),
}

/// Judges a pair. A file that is broken, or foreign where it must not be, is an error: it is not ours to throw away.
pub(crate) fn judge(
    folder: Option<&Folder>,
    pair: &Pair,
    authority: &Authority,
    renew_within: Duration,
    now: OffsetDateTime,
) -> Result<Standing, PkiError> {
    let Some(folder) = folder else { return Ok(Standing::Issue(Action::Created, String::new())) };
    let names = pair.names;
    let fix = format!(
        "move {} and {} away and run `kiro certs` again to have new ones",
        names.certificate, names.key
    );
    let broken = |name: &str, what: String| PkiError::file(folder.path().join(name), what, fix.clone());
    let (certificate, key) = (folder.read(names.certificate)?, folder.read(names.key)?);
    let Some(certificate) = certificate else {
        return match key {
            None => Ok(Standing::Issue(Action::Created, String::new())),
            Some(_) => Ok(Standing::Issue(Action::Reissued, format!("{} was missing", names.certificate))),
        };
    };
    let facts = Facts::from_pem(&certificate.bytes).map_err(|what| broken(names.certificate, what))?;
    let ours = facts.issuer_name.as_deref() == Some(AUTHORITY_NAME);
    if !ours && !names.may_be_theirs {
        let what = format!("is not from {AUTHORITY_NAME} (its issuer is `{}`)", facts.issuer);
        return Err(broken(names.certificate, what));
    }
    let Some(key) = key else {
        if !ours {
            return Err(broken(
                names.key,
                format!("is missing, and {} is not from {AUTHORITY_NAME}", names.certificate),
            ));
        }
        return Ok(Standing::Issue(Action::Reissued, format!("{} was missing", names.key)));
    };
    let fits = key_fits(&key, &facts).map_err(|what| broken(names.key, what))?;
    match (ours, fits) {
        (true, true) => Ok(judge_ours(&facts, &pair.spec, authority, renew_within, now)),
        (true, false) => Ok(Standing::Issue(Action::Reissued, format!("{} did not fit it", names.key))),
        (false, true) => Ok(judge_theirs(&facts, now)),
        (false, false) => Err(broken(names.key, format!("does not fit {}", names.certificate))),
    }
}

fn key_fits(key: &Found, facts: &Facts) -> Result<bool, String> {
    Ok(pem::parse_key(&key.bytes)?.subject_public_key_info() == facts.public_key)
}

fn judge_ours(
    facts: &Facts,
    spec: &LeafSpec,
    authority: &Authority,
    renew_within: Duration,
    now: OffsetDateTime,
) -> Standing {
    let reissue = |reason: String| Standing::Issue(Action::Reissued, reason);
    if !facts.is_signed_by(authority.facts()) {
        return reissue("another authority had issued it".to_owned());
    }
    let (mut has, mut wanted) = (facts.sans.clone(), spec.sans());
    has.sort();
    wanted.sort();
    if has != wanted {
        let list =
            |sans: &[crate::facts::San]| sans.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        return reissue(format!("its names were {}, wanted are {}", list(&facts.sans), list(&spec.sans())));
    }
    if (facts.server, facts.client, facts.authority) != (spec.server, spec.client, false) {
        return reissue("it had another use".to_owned());
    }
    if facts.not_before > now {
        return reissue(format!("by this clock ({now}) it was not valid before {}", facts.not_before));
    }
    // At the authority's end a new leaf may end no later than the old one: renewing it on every run would gain nothing.
    let gains = spec.not_after.unix_timestamp() > facts.not_after.unix_timestamp();
    if gains && facts.not_after - now <= renew_within {
        let reason = if facts.not_after <= now { "it ended on" } else { "it would have ended on" };
        return Standing::Issue(Action::Renewed, format!("{reason} {}", facts.not_after.date()));
    }
    Standing::Good
}

fn judge_theirs(facts: &Facts, now: OffsetDateTime) -> Standing {
    let note =
        (facts.not_after <= now).then(|| format!("it ended on {}; replace it", facts.not_after.date()));
    Standing::Theirs(note)
}
