//! What does one line of `splits` say, and may whoever calls a service call each of its versions?

use std::collections::BTreeSet;

use http::{HeaderName, HeaderValue};

use super::super::problem::{Found, Read, Reported};
use super::super::read::{Fields, Spot};
use super::super::{Allow, Protocol, Source, SplitLine};
use super::faults::http_service;
use super::{Declared, DeclaredService};
use crate::fields;
use crate::identity::ServiceName;
use crate::shaping::{HeaderRoute, HeaderTest, Split};

const FIX: &str = "write a line like `- { to: profile, versions: { profile: 90, profile-v2: 10 } }`";

/// Reads all lines, in the light of those of `allow`.
pub(super) fn lines(
    spot: &Spot<'_>,
    declared: &Declared,
    allow: Option<&[Allow]>,
    found: &mut Found,
) -> Read<Vec<SplitLine>> {
    let fix = format!("{FIX}, or leave `splits` out");
    let named = |line: Spot<'_>, _: &mut Found| {
        Ok(line.get("to").and_then(|spot| spot.word_if_right()).map(str::to_owned))
    };
    let split: BTreeSet<String> = spot.list(&fix, found, named)?.into_iter().flatten().collect();
    let mut seen = BTreeSet::new();
    spot.filled_list(&fix, found, |line, found| {
        let read = Line { declared, allow, split: &split }.read(&line, found)?;
        if let (false, Some(spot)) = (seen.insert(read.to.clone()), line.get("to")) {
            let what = format!("a second line for `{}`", read.to);
            return Err(spot.wrong(what, "write all of its versions in one line", found));
        }
        Ok(read)
    })
}

struct Line<'a> {
    declared: &'a Declared,
    /// None where they are wrong, which is told already.
    allow: Option<&'a [Allow]>,
    /// All names that are split.
    split: &'a BTreeSet<String>,
}

impl Line<'_> {
    fn read(&self, spot: &Spot<'_>, found: &mut Found) -> Read<SplitLine> {
        let fields = spot.fields(&["to", "versions", "headers", "sticky"], FIX, found)?;
        let to = fields.required("to", "add `to: ` and the service that is split", found, |spot, found| {
            http_service(&spot, self.declared, found).cloned()
        });
        let sticky = fields.optional("sticky", found, |spot, found| sticky(&spot, found));
        let to = to?;
        let fix = "add `versions: { profile: 90, profile-v2: 10 }`, with weights that add up to 100";
        let versions =
            fields.required("versions", fix, found, |spot, found| self.versions(&spot, &to, found))?;
        let names: Vec<&ServiceName> = versions.iter().map(|(_, version)| version).collect();
        let headers = fields.optional("headers", found, |spot, found| {
            let fix = "write routes like `- { name: x-canary, present: true, to: profile-v2 }`, or leave `headers` out";
            spot.filled_list(fix, found, |spot, found| header(&spot, &names, found))
        })?;
        let weighed = Split::new(versions.iter().map(|(weight, version)| (*weight, version.clone())));
        let wrong = |what: String, fix: &str, found: &mut Found| match fields.get("versions") {
            Some(spot) => spot.wrong(what, fix, found),
            None => fields.lacks(&what, fix, found),
        };
        let weighed = weighed.map_err(|_| {
            let sum: u32 = versions.iter().map(|(weight, _)| weight).sum();
            wrong(format!("the weights add up to {sum}"), "write percentages that add up to 100", found)
        })?;
        if names.as_slice() == [&to] {
            let fix = "add the other version, or take the line out";
            return Err(wrong("a service that is split into itself alone".to_owned(), fix, found));
        }
        self.check_callers(&fields, &to, &names, found)?;
        Ok(SplitLine { to, versions: weighed, headers: headers.unwrap_or_default(), sticky: sticky? })
    }

    fn versions(
        &self,
        spot: &Spot<'_>,
        to: &ServiceName,
        found: &mut Found,
    ) -> Read<Vec<(u32, ServiceName)>> {
        let entries = spot.entries(
            "write the versions with their weights, like `{ profile: 90, profile-v2: 10 }`",
            found,
        )?;
        let read: Vec<_> = entries
            .iter()
            .map(|entry| {
                let spot = spot.entry(entry);
                let weight = spot.number(0..=100, found);
                let unknown = |fix: String, found: &mut Found| {
                    spot.wrong_key(&entry.key, "no service of this mesh", fix, found)
                };
                let (name, service) = self.declared.find_or(&entry.key, unknown, found)?;
                self.check_version(&spot, to, (name, service.protocol()), found)?;
                Ok((weight?, name.clone()))
            })
            .collect();
        read.into_iter().collect()
    }

    fn check_version(
        &self,
        spot: &Spot<'_>,
        to: &ServiceName,
        (name, protocol): (&ServiceName, Option<Protocol>),
        found: &mut Found,
    ) -> Read<()> {
        if name != to && self.split.contains(name.as_str()) {
            let fix = format!("name the versions of `{name}` themselves: a split is not split again");
            return Err(spot.wrong_key(name.as_str(), "a version that is split itself", fix, found));
        }
        let of_to = self.declared.services.get(to).and_then(DeclaredService::protocol);
        if let (Some(protocol), Some(of_to)) = (protocol, of_to)
            && protocol != of_to
        {
            let what = format!("it speaks another protocol than `{to}`");
            return Err(spot.wrong_key(
                name.as_str(),
                what,
                "give all versions the same `app.protocol`",
                found,
            ));
        }
        Ok(())
    }

    /// Whoever may call the name may call what stands behind it. The policy asks about the version that was chosen, at both ends.
    fn check_callers(
        &self,
        fields: &Fields<'_>,
        to: &ServiceName,
        versions: &[&ServiceName],
        found: &mut Found,
    ) -> Read<()> {
        let (Some(allow), Some(spot)) = (self.allow, fields.get("versions")) else { return Ok(()) };
        let mut problem: Option<Reported> = None;
        for caller in callers(allow, to) {
            if versions.contains(&caller) {
                let what = format!("`{caller}` may call `{to}`, of which it is a version");
                let fix =
                    format!("take the line `from: {caller}, to: {to}` out of `allow`: it would call itself");
                problem = Some(spot.wrong(what, fix, found));
                continue;
            }
            for version in versions.iter().filter(|version| !may_call(allow, caller, version)) {
                let what = format!("`{caller}` may call `{to}`, and not its version `{version}`");
                let fix = format!(
                    "add the line `- {{ from: {caller}, to: {version} }}` to `allow`, with the methods and paths that it has for `{to}`"
                );
                problem = Some(spot.wrong(what, fix, found));
            }
        }
        problem.map_or(Ok(()), Err)
    }
}

/// The services that a line of `allow` lets call `to`.
pub(super) fn callers<'a>(allow: &'a [Allow], to: &ServiceName) -> BTreeSet<&'a ServiceName> {
    let of_it = allow.iter().filter(|line| line.to == *to);
    of_it
        .filter_map(|line| match &line.from {
            Source::Service(from) => Some(from),
            Source::Ingress => None,
        })
        .collect()
}

/// Whether a line lets one service call another, in whatever way.
pub(super) fn may_call(allow: &[Allow], from: &ServiceName, to: &ServiceName) -> bool {
    let is_it = |source: &Source| matches!(source, Source::Service(service) if service == from);
    allow.iter().any(|line| line.to == *to && is_it(&line.from))
}

fn header(spot: &Spot<'_>, versions: &[&ServiceName], found: &mut Found) -> Read<HeaderRoute<ServiceName>> {
    const FIX: &str = "write `equals: ` and a value, `prefix: ` and how it begins, or `present: true`";
    let fields = spot.fields(&["name", "equals", "prefix", "present", "to"], FIX, found)?;
    let name = fields.required("name", "add `name: ` and a header, like `x-canary`", found, |spot, found| {
        header_name(&spot, spot.word(NAME_FIX, found)?, found)
    });
    let equals = fields.optional("equals", found, |spot, found| header_value(&spot, found));
    let prefix = fields.optional("prefix", found, |spot, found| header_value(&spot, found));
    let present = fields.optional("present", found, |spot, found| match spot.boolean(found)? {
        true => Ok(()),
        false => Err(spot.wrong("a route for requests without a header", "write `present: true`", found)),
    });
    let to = fields.required("to", "add `to: ` and one of the `versions`", found, |spot, found| {
        let word = spot.word("write one of the `versions`", found)?;
        versions.iter().find(|version| version.as_str() == word).map(|version| (*version).clone()).ok_or_else(
            || {
                let fix = "write one of them, or add it there, with the weight 0 if headers alone lead to it";
                spot.wrong("not one of the `versions` of this line", fix, found)
            },
        )
    });
    let test = match (equals?, prefix?, present?) {
        (Some(value), None, None) => HeaderTest::Exact(value),
        (None, Some(value), None) => HeaderTest::Prefix(value),
        (None, None, Some(())) => HeaderTest::Present,
        (None, None, None) => {
            return Err(fields.lacks("it is not said what is asked of the header", FIX, found));
        }
        _ => return Err(fields.lacks("more than one thing is asked of the header", FIX, found)),
    };
    Ok(HeaderRoute { name: name?, test, to: to? })
}

const NAME_FIX: &str = "write a header's name in lower case, like `x-canary`";

fn header_name(spot: &Spot<'_>, text: &str, found: &mut Found) -> Read<HeaderName> {
    let name = HeaderName::from_bytes(text.as_bytes()).ok().filter(|name| name.as_str() == text);
    let name = name.ok_or_else(|| spot.wrong("not a header's name in lower case", NAME_FIX, found))?;
    if fields::is_own(&name) {
        let fix = "choose another header: what an application says with ours is taken out";
        return Err(spot.wrong("a header that applications can't set", fix, found));
    }
    Ok(name)
}

fn header_value(spot: &Spot<'_>, found: &mut Found) -> Read<HeaderValue> {
    const FIX: &str = "write a value, in quotes if it is no plain word";
    let text = spot.word(FIX, found)?;
    let value = HeaderValue::from_str(text).ok().filter(|value| !value.is_empty() && text.trim() == text);
    value.ok_or_else(|| spot.wrong("not a header's value", FIX, found))
}

/// `header:x-user`
fn sticky(spot: &Spot<'_>, found: &mut Found) -> Read<HeaderName> {
    const FIX: &str = "write `header:` and a header's name in lower case, like `sticky: header:x-user`";
    let text = spot.word(FIX, found)?;
    match text.strip_prefix("header:") {
        Some(name) => header_name(spot, name, found),
        None => Err(spot.wrong("not a header", FIX, found)),
    }
}
