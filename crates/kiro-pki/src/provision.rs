//! How does a directory come to hold what the mesh file calls for, and no run after the first change what is good?
//!
//! First everything is looked at and decided, and whatever can't be decided is an error before a single file has changed. Then it is
//! written. A run that is cut off leaves whole files only, and the next one goes on from there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kiro_core::mesh::Mesh;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::authority::Authority;
use crate::edges;
use crate::error::PkiError;
use crate::files::{Access, Folder, Settled};
use crate::layout::{self, Holder, HolderRole, INGRESS, Kind};
use crate::report::{Action, Report};
use crate::standing::{Standing, judge};
use crate::{LEAF_LIFETIME, RENEW_WITHIN};

/// Other people may look into the directory, and nobody but its owner put anything there.
const ROOT_ACCESS: Access = Access { mode: 0o755, uid: None, gid: None };
const NEW_AUTHORITY: &str = ".kiro-new-ca";

/// Whom the files are for. Only root can give files away: for anybody else the files stay their own, and only the group is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owners {
    /// The user that sidecars run as.
    pub sidecar_uid: u32,
    /// The user that applications run as: another one.
    pub app_uid: u32,
    /// The group that both share.
    pub gid: u32,
}

/// How a run goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whom the files are for; `None` leaves owners as they come.
    pub owners: Option<Owners>,
    /// A leaf that ends within this time is renewed.
    pub renew_within: Duration,
    /// What time it is.
    pub now: OffsetDateTime,
}

impl Options {
    /// The defaults, at a given time.
    pub fn at(now: OffsetDateTime) -> Self {
        Self { owners: None, renew_within: RENEW_WITHIN, now }
    }
}

/// What is to be done in one directory.
struct Plan {
    holder: Holder,
    pairs: Vec<Standing>,
    ca: Copy,
    edges: Option<Copy>,
}

/// A file whose whole content is known beforehand.
struct Copy {
    name: &'static str,
    kind: Kind,
    bytes: Zeroizing<Vec<u8>>,
    /// `None`: what lies there is the same already.
    write: Option<(Action, String)>,
}

/// Brings `dir` to what `mesh` calls for: keeps the authority, the edge secrets and every leaf that still does, issues the others,
/// and tightens modes. A second run changes nothing.
pub fn provision(mesh: &Mesh, dir: &Path, options: &Options) -> Result<Report, PkiError> {
    let mut report = Report::default();
    let root = open_root(dir, &mut report)?;
    root.lock()?;
    let found = Authority::read(&root)?;
    let is_new = found.is_none();
    let authority = match found {
        Some(authority) => authority,
        None => Authority::generate(&mesh.trust_domain, options.now)?,
    };
    check_authority(&authority, mesh, &root, options.now, &mut report)?;
    let plans = layout::holders(mesh, &authority, options.now)?
        .into_iter()
        .map(|holder| plan(&root, holder, mesh, &authority, options))
        .collect::<Result<Vec<_>, _>>()?;

    sweep(&root, &mut report)?;
    write_authority(&root, &authority, is_new, &mut report)?;
    for plan in &plans {
        apply(&root, plan, &authority, options, &mut report)?;
    }
    note_what_is_left(&root, &plans, &mut report)?;
    Ok(report)
}

fn open_root(dir: &Path, report: &mut Report) -> Result<Folder, PkiError> {
    let fresh = match Folder::open(dir)? {
        Some(folder) => {
            let settled = folder.settle(ROOT_ACCESS, false)?;
            // Whoever mounts a directory of it needs no right on the whole, so a closed one is fine.
            note_settled(dir, &Settled { missing: 0, ..settled }, report);
            return Ok(folder);
        }
        None => std::fs::create_dir(dir),
    };
    fresh.map_err(|error| PkiError::io(dir, "create", error))?;
    report.change(Action::Created, dir, "");
    let folder = Folder::open(dir)?.ok_or_else(|| PkiError::io(dir, "open", rustix::io::Errno::NOENT))?;
    folder.settle(ROOT_ACCESS, true)?;
    Ok(folder)
}

fn check_authority(
    authority: &Authority,
    mesh: &Mesh,
    root: &Folder,
    now: OffsetDateTime,
    report: &mut Report,
) -> Result<(), PkiError> {
    let path = root.path().join(layout::AUTHORITY_DIR).join(layout::CA_CERTIFICATE);
    if *authority.trust_domain() != mesh.trust_domain {
        let (authority, mesh) =
            (authority.trust_domain().as_str().to_owned(), mesh.trust_domain.as_str().to_owned());
        return Err(PkiError::TrustDomain { path, authority, mesh });
    }
    let facts = authority.facts();
    if facts.not_before > now {
        let what = format!("is not valid before {}, and this clock says {now}", facts.not_before);
        return Err(PkiError::file(path, what, "set the clock and run it again"));
    }
    let parent = root.path().join(layout::AUTHORITY_DIR);
    let anew = format!(
        "move {} away and run `kiro certs` again: it then makes a new authority and issues every leaf and edge secret anew, \
         and all sidecars have to be restarted together",
        parent.display()
    );
    if facts.not_after <= now {
        return Err(PkiError::file(
            path,
            format!("ended on {}, and no leaf of it is worth anything", facts.not_after.date()),
            anew,
        ));
    }
    if facts.not_after - now < LEAF_LIFETIME {
        report.notes.push(format!(
            "{}: ends on {}, and every leaf with it; {anew}",
            path.display(),
            facts.not_after.date()
        ));
    }
    Ok(())
}

fn plan(
    root: &Folder,
    holder: Holder,
    mesh: &Mesh,
    authority: &Authority,
    options: &Options,
) -> Result<Plan, PkiError> {
    let folder = root.open_child(&holder.directory)?;
    let folder = folder.as_ref();
    let judged = |pair| judge(folder, pair, authority, options.renew_within, options.now);
    let pairs = holder.pairs.iter().map(judged).collect::<Result<_, _>>()?;
    let ca = Zeroizing::new(authority.ca_pem().to_vec());
    let ca = copy(folder, layout::CA_CERTIFICATE, Kind::Public, ca, |_, _| {
        Ok("it was not the authority's certificate".to_owned())
    })?;
    let edges = match holder.role {
        HolderRole::App => None,
        HolderRole::Sidecar => {
            let bytes = authority.edges_json(mesh.services.keys(), &holder.service)?;
            Some(copy(folder, layout::EDGES, Kind::Secret, bytes, edges::difference)?)
        }
    };
    Ok(Plan { holder, pairs, ca, edges })
}

fn copy(
    folder: Option<&Folder>,
    name: &'static str,
    kind: Kind,
    bytes: Zeroizing<Vec<u8>>,
    difference: impl FnOnce(&[u8], &[u8]) -> Result<String, String>,
) -> Result<Copy, PkiError> {
    let found = folder.map(|folder| folder.read(name)).transpose()?.flatten();
    let write = match (found, folder) {
        (Some(found), _) if *found.bytes == *bytes => None,
        (Some(found), Some(folder)) => {
            let reason = difference(&found.bytes, &bytes).map_err(|what| {
                PkiError::file(
                    folder.path().join(name),
                    what,
                    "move it away and run `kiro certs` again to have a new one",
                )
            })?;
            Some((Action::Rewritten, reason))
        }
        _ => Some((Action::Created, String::new())),
    };
    Ok(Copy { name, kind, bytes, write })
}

/// Half-written files of a run that was cut off hold keys that nobody should keep.
fn sweep(root: &Folder, report: &mut Report) -> Result<(), PkiError> {
    let mut swept: Vec<PathBuf> = root.sweep()?.into_iter().map(|name| root.path().join(name)).collect();
    for name in root.names()? {
        if let Some(folder) = root.open_child_if_directory(&name)? {
            swept.extend(folder.sweep()?.into_iter().map(|inner| folder.path().join(inner)));
        }
    }
    for path in swept {
        report.change(Action::Removed, path, "half-written, left by a run that was cut off");
    }
    Ok(())
}

/// The authority's three files appear together or not at all: half an authority would be an error for ever after.
fn write_authority(
    root: &Folder,
    authority: &Authority,
    is_new: bool,
    report: &mut Report,
) -> Result<(), PkiError> {
    let path = root.path().join(layout::AUTHORITY_DIR);
    let (public, secret) = (layout::authority_access(Kind::Public), layout::authority_access(Kind::Secret));
    let files = [(layout::CA_CERTIFICATE, public), (layout::CA_KEY, secret), (layout::EDGE_MASTER, secret)];
    if is_new {
        let folder = root.create_child(NEW_AUTHORITY)?;
        folder.settle(layout::authority_access(Kind::Directory), true)?;
        folder.write(layout::CA_CERTIFICATE, authority.ca_pem(), public)?;
        folder.write(layout::CA_KEY, &authority.key_pem(), secret)?;
        folder.write(layout::EDGE_MASTER, &authority.edge_master().encode(), secret)?;
        root.rename(NEW_AUTHORITY, layout::AUTHORITY_DIR)?;
        let reason = |what: &str| format!("{what}, until {}", authority.not_after().date());
        report.change(
            Action::Created,
            path.join(layout::CA_CERTIFICATE),
            reason("the authority's certificate"),
        );
        report.change(
            Action::Created,
            path.join(layout::CA_KEY),
            "its key: keep it secret, and a copy of it safe",
        );
        report.change(Action::Created, path.join(layout::EDGE_MASTER), "what the edge secrets derive from");
        return Ok(());
    }
    let Some(folder) = root.open_child(layout::AUTHORITY_DIR)? else { return Ok(()) };
    note_settled(folder.path(), &folder.settle(layout::authority_access(Kind::Directory), false)?, report);
    for (name, access) in files {
        settle_file(&folder, name, access, report)?;
        report.kept += 1;
    }
    Ok(())
}

fn apply(
    root: &Folder,
    plan: &Plan,
    authority: &Authority,
    options: &Options,
    report: &mut Report,
) -> Result<(), PkiError> {
    let holder = &plan.holder;
    let access = |kind| holder.access(kind, options.owners);
    let (folder, fresh) = match root.open_child(&holder.directory)? {
        Some(folder) => (folder, false),
        None => (root.create_child(&holder.directory)?, true),
    };
    note_settled(folder.path(), &folder.settle(access(Kind::Directory), fresh)?, report);
    for (pair, standing) in holder.pairs.iter().zip(&plan.pairs) {
        let path = folder.path().join(pair.names.certificate);
        match standing {
            Standing::Good => report.kept += 2,
            Standing::Theirs(note) => {
                report.kept += 2;
                let note = note.as_deref().unwrap_or("it is used as it is, and renewing it is up to you");
                report.notes.push(format!("{}: not from this authority; {note}", path.display()));
            }
            Standing::Issue(action, reason) => {
                let issued = authority.issue(&pair.spec)?;
                // The key first: a sidecar that looks in between finds a pair that does not fit, keeps its old one and looks again.
                put(&folder, pair.names.key, &issued.key_pem, access(Kind::Secret))?;
                put(&folder, pair.names.certificate, &issued.leaf_pem, access(Kind::Public))?;
                let until = format!("valid until {}", pair.spec.not_after.date());
                let reason = if reason.is_empty() { until } else { format!("{reason}; {until}") };
                report.change(*action, path, reason);
            }
        }
        settle_file(&folder, pair.names.key, access(Kind::Secret), report)?;
        settle_file(&folder, pair.names.certificate, access(Kind::Public), report)?;
    }
    for copy in std::iter::once(&plan.ca).chain(&plan.edges) {
        match &copy.write {
            None => report.kept += 1,
            Some((action, reason)) => {
                put(&folder, copy.name, &copy.bytes, access(copy.kind))?;
                report.change(*action, folder.path().join(copy.name), reason.clone());
            }
        }
        settle_file(&folder, copy.name, access(copy.kind), report)?;
    }
    Ok(())
}

/// Writes a file that takes another's place no more open than that one was.
fn put(folder: &Folder, name: &str, bytes: &[u8], access: Access) -> Result<(), PkiError> {
    let mode = folder.read(name)?.map_or(access.mode, |found| found.mode & access.mode);
    folder.write(name, bytes, Access { mode, ..access })
}

fn settle_file(folder: &Folder, name: &str, access: Access, report: &mut Report) -> Result<(), PkiError> {
    let path = folder.path().join(name);
    if let Some(found) = folder.read(name)? {
        note_settled(&path, &found.settle(&path, access)?, report);
    }
    Ok(())
}

fn note_settled(path: &Path, settled: &Settled, report: &mut Report) {
    let Settled { mode_before, mode, owner_changed, missing } = *settled;
    let fresh = mode & !mode_before != 0;
    if !fresh && mode != mode_before {
        report.change(
            Action::Tightened,
            path,
            format!("mode {mode_before:04o} was too open, now {mode:04o}"),
        );
    } else if !fresh && owner_changed {
        report.change(Action::Given, path, "to the user and group that read it in containers");
    }
    if missing & 0o044 != 0 {
        let wanted = mode | missing;
        report.notes.push(format!(
            "{}: mode {mode:04o} may be too closed for its reader, and is left as it is; `chmod {wanted:o} {}` opens it as far as needed",
            path.display(),
            path.display()
        ));
    }
}

/// Nothing is removed on a person's behalf; they are told what has no use any more.
fn note_what_is_left(root: &Folder, plans: &[Plan], report: &mut Report) -> Result<(), PkiError> {
    for name in root.names()? {
        let known = name == layout::AUTHORITY_DIR || plans.iter().any(|plan| plan.holder.directory == name);
        let Some(folder) = root.open_child_if_directory(&name)?.filter(|_| !known) else { continue };
        if folder.names()?.iter().any(|file| file == layout::LEAF.certificate) {
            report.notes.push(format!(
                "{}: no service of the mesh file has it; remove it if nobody needs it",
                folder.path().display()
            ));
        }
    }
    for plan in
        plans.iter().filter(|plan| plan.holder.role == HolderRole::Sidecar && !plan.holder.has_ingress())
    {
        let Some(folder) = root.open_child(&plan.holder.directory)? else { continue };
        for name in
            folder.names()?.iter().filter(|name| [INGRESS.certificate, INGRESS.key].contains(&name.as_str()))
        {
            let path = folder.path().join(name);
            report.notes.push(format!(
                "{}: the service has no ingress; remove it if nobody needs it",
                path.display()
            ));
        }
    }
    Ok(())
}
