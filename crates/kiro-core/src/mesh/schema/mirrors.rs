//! What does one line of `mirrors` say, and may whoever calls a service send its copies?

use std::collections::BTreeSet;

use super::super::problem::{Found, Read};
use super::super::read::Spot;
use super::super::{Allow, MirrorLine};
use super::faults::http_service;
use super::splits::{callers, may_call};
use super::{Declared, DeclaredService};
use crate::identity::ServiceName;
use crate::shaping::Mirror;

const FIX: &str = "write a line like `- { to: profile, copy_to: profile-v2, percent: 5 }`";

/// Reads all lines, in the light of those of `allow`; none where they are wrong, which is told already.
pub(super) fn lines(
    spot: &Spot<'_>,
    declared: &Declared,
    allow: Option<&[Allow]>,
    found: &mut Found,
) -> Read<Vec<MirrorLine>> {
    let mut seen = BTreeSet::new();
    spot.filled_list(&format!("{FIX}, or leave `mirrors` out"), found, |line, found| {
        let read = read(&line, declared, allow, found)?;
        if let (false, Some(spot)) = (seen.insert(read.to.clone()), line.get("to")) {
            let what = format!("a second line for `{}`", read.to);
            return Err(spot.wrong(what, "take one of the lines out: a request is copied once", found));
        }
        Ok(read)
    })
}

fn read(
    spot: &Spot<'_>,
    declared: &Declared,
    allow: Option<&[Allow]>,
    found: &mut Found,
) -> Read<MirrorLine> {
    let fields = spot.fields(&["to", "copy_to", "percent"], FIX, found)?;
    let service = |spot: Spot<'_>, found: &mut Found| http_service(&spot, declared, found).cloned();
    let to = fields.required("to", "add `to: ` and the service whose calls are copied", found, service);
    let copy_to = fields.required("copy_to", "add `copy_to: ` and where the copies go", found, service);
    let fix = "add `percent: 5`, or `percent: 100` for all requests";
    let share = fields.required("percent", fix, found, |spot, found| spot.share(found));
    let (to, copy_to) = (to?, copy_to?);
    if let Some(spot) = fields.get("copy_to") {
        check(&spot, declared, (&to, &copy_to), allow, found)?;
    }
    Ok(MirrorLine { to, mirror: Mirror { to: copy_to, share: share? } })
}

fn check(
    spot: &Spot<'_>,
    declared: &Declared,
    (to, copy_to): (&ServiceName, &ServiceName),
    allow: Option<&[Allow]>,
    found: &mut Found,
) -> Read<()> {
    if to == copy_to {
        let fix = "name another service, or take the line out";
        return Err(spot.wrong("copies for the service that gets the requests", fix, found));
    }
    let protocol = |name: &ServiceName| declared.services.get(name).and_then(DeclaredService::protocol);
    if let (Some(of_to), Some(of_copy)) = (protocol(to), protocol(copy_to))
        && of_to != of_copy
    {
        let what = format!("it speaks another protocol than `{to}`");
        return Err(spot.wrong(what, "give both the same `app.protocol`", found));
    }
    let allow = allow.unwrap_or_default();
    let mut result = Ok(());
    // A service that gets copies makes none of its own calls.
    for caller in callers(allow, to).into_iter().filter(|caller| *caller != copy_to) {
        if !may_call(allow, caller, copy_to) {
            let what =
                format!("`{caller}` may call `{to}`, and not `{copy_to}`, to which it would send copies");
            let fix = format!(
                "add the line `- {{ from: {caller}, to: {copy_to} }}` to `allow`, with the methods and paths that it has for `{to}`"
            );
            result = Err(spot.wrong(what, fix, found));
        }
    }
    result
}
