//! Was an abuser dealt with as it is to be, and does the log say who it was? Pure, so that each rule has its test.

use std::collections::BTreeSet;

use serde_json::Value;

use super::attacks::{Door, Expected};
use crate::identity::{CALLER, TRUST_DOMAIN};

/// What the log says of an attack.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Said {
    /// Lines that name the attacker with the reason that was expected.
    pub(crate) lines: u64,
    /// Lines that were not written, by those that were.
    pub(crate) suppressed: u64,
    /// Whom they name.
    pub(crate) named: Option<String>,
}

/// Reads the lines that came while it was on; `locals` are the attacker's own addresses.
pub(crate) fn said(lines: &[Value], expected: Expected, door: Door, locals: &BTreeSet<String>) -> Said {
    let is_its = |line: &&Value| {
        let from = line["remote"].as_str().is_some_and(|remote| locals.contains(remote));
        let has =
            |field: &str, words: &[&str]| line[field].as_str().is_some_and(|word| words.contains(&word));
        match expected {
            Expected::Cut(reasons) | Expected::Refused(reasons) => from && has("reason", reasons),
            // An application's line has no address: it is its sidecar's own.
            Expected::Rejected(codes) => {
                line["direction"] == door.name() && has("reject", codes) && (from || line["remote"].is_null())
            }
            Expected::Served | Expected::Later => from,
        }
    };
    let mut said = Said::default();
    for line in lines.iter().filter(is_its) {
        said.lines += 1;
        said.suppressed += line["suppressed"].as_u64().unwrap_or_default();
        said.named = said.named.or_else(|| identity(line, door));
    }
    said
}

/// Whom a line names, if that is who it was: a sidecar by its identity, an application by its service, anybody else by an address.
pub(crate) fn identity(line: &Value, door: Door) -> Option<String> {
    match door {
        Door::Inbound => {
            let own = format!("spiffe://{TRUST_DOMAIN}/{CALLER}");
            let by_request = line["caller"] == CALLER && line["caller_proof"] == "mtls";
            if line["identity"] == *own { Some(own) } else { by_request.then(|| format!("{CALLER} (mtls)")) }
        }
        Door::Outbound => (line["caller"] == CALLER)
            .then(|| format!("{CALLER} ({})", line["caller_proof"].as_str().unwrap_or("no proof"))),
        Door::Ingress | Door::Handshake => {
            let address = line["remote"].as_str().is_some_and(|remote| !remote.is_empty());
            address.then(|| "its address".to_owned())
        }
    }
}

/// What is wrong with how an abuser was dealt with, if anything is.
pub(crate) fn complaint(expected: Expected, cut: u64, counted: u64, said: &Said) -> Option<String> {
    match expected {
        Expected::Served | Expected::Later => None,
        Expected::Cut(_) | Expected::Refused(_) | Expected::Rejected(_) if cut == 0 => {
            Some("not cut off".to_owned())
        }
        Expected::Cut(_) | Expected::Refused(_) | Expected::Rejected(_) if said.lines == 0 => {
            Some("no line".to_owned())
        }
        Expected::Cut(_) if counted == 0 => Some("not counted".to_owned()),
        Expected::Cut(_) | Expected::Refused(_) | Expected::Rejected(_) => {
            said.named.is_none().then(|| "not named".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CUT: Expected = Expected::Cut(&["rapid_reset"]);

    fn locals() -> BTreeSet<String> {
        BTreeSet::from(["127.0.0.1:5".to_owned()])
    }

    #[test]
    fn a_line_counts_if_it_has_the_reason_and_the_address() {
        let good = json!({"reason": "rapid_reset", "remote": "127.0.0.1:5", "suppressed": 3,
            "identity": "spiffe://bench.mesh/caller"});
        let other = json!({"reason": "rapid_reset", "remote": "127.0.0.1:6"});
        let wrong = json!({"reason": "protocol", "remote": "127.0.0.1:5"});
        let found = said(&[other, good.clone(), wrong], CUT, Door::Inbound, &locals());
        let named = Some("spiffe://bench.mesh/caller".to_owned());
        assert_eq!(found, Said { lines: 1, suppressed: 3, named });
        // At another door another name is asked for.
        assert_eq!(said(std::slice::from_ref(&good), CUT, Door::Outbound, &locals()).named, None);
        assert_eq!(said(&[good], CUT, Door::Ingress, &locals()).named.as_deref(), Some("its address"));
    }

    #[test]
    fn each_rule_has_its_complaint() {
        let good = Said { lines: 1, suppressed: 0, named: Some("x".to_owned()) };
        assert_eq!(complaint(CUT, 1, 1, &good), None);
        assert_eq!(complaint(Expected::Later, 0, 0, &Said::default()), None);
        for (cut, counted, said, word) in [
            (0, 1, good.clone(), "not cut off"),
            (1, 0, good.clone(), "not counted"),
            (1, 1, Said::default(), "no line"),
            (1, 1, Said { named: None, ..good }, "not named"),
        ] {
            assert_eq!(complaint(CUT, cut, counted, &said).as_deref(), Some(word));
        }
    }
}
