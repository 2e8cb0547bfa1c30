//! `kiro certs`: how do certificates come to be, for whom, and which are there?
//!
//! It works the same on a host and in a container with nothing but this binary: no user database, no shell, only the files named on
//! the command line and the ids that the process runs under.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use kiro_pki::{Entry, Options, Owners, Report};
use time::OffsetDateTime;

/// The ids in containers when root makes the certificates. They belong to nobody on a usual host, whose users start at 1000.
const DEFAULT_OWNERS: Owners = Owners { sidecar_uid: 10_001, app_uid: 10_002, gid: 10_001 };

const SIDECAR_UID: &str = "KIRO_SIDECAR_UID";
const APP_UID: &str = "KIRO_APP_UID";
const GID: &str = "KIRO_GID";

/// Make the mesh's certificates and edge secrets, renew those that are due, and tighten modes
#[derive(Debug, clap::Args)]
pub(crate) struct CertsArgs {
    #[command(subcommand)]
    command: Option<CertsCommand>,
    /// Directory for the certificates
    #[arg(long, global = true, value_name = "DIR", default_value = "certs")]
    out: PathBuf,
    /// Mesh file that names the services
    #[arg(long, value_name = "FILE", default_value = "docker/mesh/mesh.yaml")]
    mesh: PathBuf,
    /// File that Compose reads variables from; the ids of sidecars and applications are set in it
    #[arg(long, value_name = "FILE", default_value = ".env")]
    env_file: PathBuf,
    /// Renew a leaf that ends within this many days; 90 renews all
    #[arg(long, value_name = "DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=90))]
    renew_within: u32,
}

#[derive(Debug, clap::Subcommand)]
enum CertsCommand {
    /// List the certificates with their names, ends and keys
    Show {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
}

/// Runs `kiro certs` or `kiro certs show`.
///
/// # Errors
/// Names the file and what mends it.
pub(crate) fn run(args: CertsArgs) -> anyhow::Result<()> {
    let now = OffsetDateTime::now_utc();
    let mut out = std::io::stdout().lock();
    match args.command {
        Some(CertsCommand::Show { json: true }) => {
            serde_json::to_writer_pretty(&mut out, &kiro_pki::show(&args.out, now)?)?;
            writeln!(out)?;
            Ok(())
        }
        Some(CertsCommand::Show { json: false }) => print_table(&mut out, &kiro_pki::show(&args.out, now)?),
        None => make(&args, now, &mut out),
    }
}

fn make(args: &CertsArgs, now: OffsetDateTime, out: &mut impl Write) -> anyhow::Result<()> {
    let path = args.mesh.display();
    let text = std::fs::read_to_string(&args.mesh).with_context(|| {
        format!("cannot read the mesh file {path}: name another with --mesh, or run this where it lies")
    })?;
    let mesh = kiro_core::mesh::parse(&text)
        .map_err(|problems| anyhow::anyhow!("{path} has problems\n{problems}"))?;
    let env = read_env(&args.env_file)?;
    let runner =
        Runner { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() };
    let owners = owners(&env, runner);
    let renew_within = Duration::from_secs(u64::from(args.renew_within) * 24 * 60 * 60);
    let options = Options { owners: Some(owners), renew_within, now };
    let report = kiro_pki::provision(&mesh, &args.out, &options)?;
    print_report(out, &report, &args.out)?;

    // After the files, so that Compose never hears of ids that the files do not have.
    let written = kiro_pki::write_if_changed(&args.env_file, with_ids(&env, owners).as_bytes(), 0o644)?;
    let Owners { sidecar_uid, app_uid, gid } = owners;
    let file = args.env_file.display();
    let what = if written { "written" } else { "unchanged" };
    writeln!(out, "{file}: {what}, {SIDECAR_UID}={sidecar_uid} {APP_UID}={app_uid} {GID}={gid}")?;
    if gid == 0 {
        writeln!(
            out,
            "note: your group is root's, and so will be the containers'; better run this under another one"
        )?;
    }
    Ok(())
}

fn print_report(out: &mut impl Write, report: &Report, dir: &Path) -> anyhow::Result<()> {
    for change in &report.changes {
        writeln!(out, "{change}")?;
    }
    for note in &report.notes {
        writeln!(out, "note: {note}")?;
    }
    let (changes, kept) = (report.changes.len(), report.kept);
    if report.is_unchanged() {
        writeln!(out, "{}: nothing to do, {kept} files are good as they are", dir.display())?;
    } else {
        writeln!(out, "{}: {changes} changes, {kept} files kept", dir.display())?;
    }
    Ok(())
}

/// Who runs this.
#[derive(Debug, Clone, Copy)]
struct Runner {
    uid: u32,
    gid: u32,
}

/// The ids that containers run under. Root can give files to anybody: to whom the file says, or else to the default ids. Others can
/// give nothing away: the sidecar runs as they do, and the application as some other user of the same group.
fn owners(env: &str, runner: Runner) -> Owners {
    let (sidecar, app, gid) = (id_in(env, SIDECAR_UID), id_in(env, APP_UID), id_in(env, GID));
    if runner.uid == 0 {
        return match (sidecar, app, gid) {
            (Some(sidecar_uid), Some(app_uid), Some(gid)) if sidecar_uid != app_uid => {
                Owners { sidecar_uid, app_uid, gid }
            }
            _ => DEFAULT_OWNERS,
        };
    }
    let app_uid = app.filter(|app| *app != runner.uid).unwrap_or(neighbour(runner.uid));
    Owners { sidecar_uid: runner.uid, app_uid, gid: runner.gid }
}

/// Some other id: the next one, but for the two that mean "no user" in 16 and 32 bits.
fn neighbour(uid: u32) -> u32 {
    match uid.saturating_add(1) {
        0xffff | u32::MAX => uid - 1,
        next => next,
    }
}

fn read_env(path: &Path) -> anyhow::Result<String> {
    match std::fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes).ok().with_context(|| {
            format!("{}: is not text in UTF-8; mend it, or name another file with --env-file", path.display())
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => bail!(
            "{}: cannot read it: {error}; mend that, or name another file with --env-file",
            path.display()
        ),
    }
}

/// The variable that a line sets, and what to.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    let (name, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
    let value = value.split(" #").next().unwrap_or_default().trim();
    Some((name.trim(), value.trim_matches(['"', '\''])))
}

/// An id that a person or an earlier run set. The last line counts, as it does for Compose; root is nobody's id.
fn id_in(env: &str, name: &str) -> Option<u32> {
    let last = env.lines().filter_map(assignment).rfind(|(found, _)| *found == name);
    last.and_then(|(_, value)| value.parse().ok()).filter(|id| *id != 0)
}

/// The file with the three ids set, and every other line as it was.
fn with_ids(env: &str, owners: Owners) -> String {
    let ids = [(SIDECAR_UID, owners.sidecar_uid), (APP_UID, owners.app_uid), (GID, owners.gid)];
    let mut text = String::with_capacity(env.len() + 256);
    for line in env.split_inclusive('\n') {
        let set =
            assignment(line).and_then(|(name, value)| Some((ids.iter().find(|(id, _)| *id == name)?, value)));
        match set {
            Some(((name, id), value)) if value != id.to_string() => {
                let end = line.strip_prefix(line.trim_end_matches(['\r', '\n'])).unwrap_or("\n");
                text.push_str(&format!("{name}={id}{end}"));
            }
            _ => text.push_str(line),
        }
    }
    let missing: Vec<_> =
        ids.iter().filter(|(name, _)| !env.lines().filter_map(assignment).any(|(n, _)| n == *name)).collect();
    if missing.is_empty() {
        return text;
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str("# Who sidecars and applications run as, so that each can read its own keys in certs/ (set by `kiro certs`).\n");
    for (name, id) in missing {
        text.push_str(&format!("{name}={id}\n"));
    }
    text
}

/// Two lines a certificate: what a person looks for, and what they compare.
fn print_table(out: &mut impl Write, entries: &[Entry]) -> anyhow::Result<()> {
    let rows: Vec<[String; 5]> = entries.iter().map(row).collect();
    let head = ["CERTIFICATE", "USE", "NAMES", "ENDS", "KEY"].map(str::to_owned);
    let mut widths = [0; 5];
    for row in std::iter::once(&head).chain(&rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut line = |cells: &[String; 5]| -> std::io::Result<()> {
        let cells = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    line(&head)?;
    for (row, entry) in rows.iter().zip(entries) {
        line(row)?;
        let (subject, serial) = (&entry.subject, &entry.serial);
        line(&[
            format!("  {subject}, serial {serial}, sha256 {}", entry.fingerprint),
            "".into(),
            "".into(),
            "".into(),
            "".into(),
        ])?;
    }
    Ok(())
}

fn row(entry: &Entry) -> [String; 5] {
    let usage = match entry.usage {
        kiro_pki::Use::Authority => "authority",
        kiro_pki::Use::Sidecar => "sidecar",
        kiro_pki::Use::App => "app",
        kiro_pki::Use::Ingress => "ingress",
    };
    let usage = match entry.key_usage.as_slice() {
        [] => usage.to_owned(),
        uses => format!("{usage} ({})", uses.join(", ")),
    };
    let end = match entry.days_left {
        days if days < 0 => format!("{}, ENDED", entry.not_after.date()),
        days => format!("{}, {days} days left", entry.not_after.date()),
    };
    let key = match (&entry.key.mode, entry.key.ok) {
        (None, _) => "MISSING".to_owned(),
        (Some(mode), true) => format!("{mode} ok"),
        (Some(mode), false) => format!("{mode} TOO OPEN, run `kiro certs`"),
    };
    let stranger = if entry.issued_here { "" } else { " (another authority)" };
    let names = format!("{}{stranger}", entry.sans.join(" "));
    [entry.path.display().to_string(), usage, names, end, key]
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: Runner = Runner { uid: 1000, gid: 100 };
    const ROOT: Runner = Runner { uid: 0, gid: 0 };

    fn ids(sidecar_uid: u32, app_uid: u32, gid: u32) -> Owners {
        Owners { sidecar_uid, app_uid, gid }
    }

    #[test]
    fn an_ordinary_user_gives_their_own_id_to_the_sidecar_and_another_to_the_application() {
        assert_eq!(owners("", USER), ids(1000, 1001, 100));
        assert_eq!(owners("KIRO_SIDECAR_UID=7\nKIRO_APP_UID=4711\nKIRO_GID=7\n", USER), ids(1000, 4711, 100));
        for useless in ["KIRO_APP_UID=1000", "KIRO_APP_UID=0", "KIRO_APP_UID=me", "KIRO_APP_UID="] {
            assert_eq!(owners(useless, USER), ids(1000, 1001, 100), "{useless}");
        }
        for uid in [65534, u32::MAX - 1] {
            assert_eq!(owners("", Runner { uid, gid: 1 }).app_uid, uid - 1);
        }
    }

    #[test]
    fn root_takes_the_ids_of_the_file_or_ids_of_nobody_and_never_its_own() {
        assert_eq!(owners("", ROOT), ids(10_001, 10_002, 10_001));
        assert_eq!(
            owners("KIRO_SIDECAR_UID=5\nKIRO_APP_UID=\"6\"\nexport KIRO_GID = 7 # mine\n", ROOT),
            ids(5, 6, 7)
        );
        for useless in [
            "KIRO_SIDECAR_UID=0\nKIRO_APP_UID=6\nKIRO_GID=7",
            "KIRO_SIDECAR_UID=5\nKIRO_APP_UID=5\nKIRO_GID=7",
        ] {
            assert_eq!(owners(useless, ROOT), DEFAULT_OWNERS, "{useless}");
        }
    }

    #[test]
    fn other_lines_of_the_file_stay_byte_for_byte() {
        let before = "# mine\r\nA=1 # KIRO_GID=3\nKIRO_SIDECAR_UID=9\r\n\nexport KIRO_APP_UID=2\nB='x\ny'";
        let after = with_ids(before, ids(1, 2, 3));
        let added = "# Who sidecars and applications run as, so that each can read its own keys in certs/ (set by `kiro certs`).\n";
        let kept = "# mine\r\nA=1 # KIRO_GID=3\nKIRO_SIDECAR_UID=1\r\n\nexport KIRO_APP_UID=2\nB='x\ny'\n";
        assert_eq!(after, format!("{kept}{added}KIRO_GID=3\n"));
        assert_eq!(with_ids(&after, ids(1, 2, 3)), after, "a second run changes nothing");
        assert_eq!(owners(&after, ROOT), ids(1, 2, 3));
    }

    #[test]
    fn the_file_starts_with_the_ids_alone() {
        let text = with_ids("", ids(1, 2, 3));
        assert_eq!(
            text.lines().skip(1).collect::<Vec<_>>(),
            ["KIRO_SIDECAR_UID=1", "KIRO_APP_UID=2", "KIRO_GID=3"]
        );
    }

    const MESH: &str = "\
trust_domain: kiro.mesh
services:
  dashboard: { app: { port: 8001 }, ingress: { port: 8080, names: [dashboard.example] } }
  profile: { app: { port: 8002 } }
allow:
  - { from: ingress, to: dashboard }
";

    fn args(dir: &Path) -> CertsArgs {
        std::fs::write(dir.join("mesh.yaml"), MESH).unwrap();
        let (out, mesh, env_file) = (dir.join("certs"), dir.join("mesh.yaml"), dir.join(".env"));
        CertsArgs { command: None, out, mesh, env_file, renew_within: 30 }
    }

    fn made(args: &CertsArgs) -> String {
        let mut out = Vec::new();
        make(args, OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap(), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_run_says_what_it_did_and_a_second_that_there_was_nothing_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let args = args(dir.path());
        let first = made(&args);
        assert!(
            first.contains("created")
                && first.contains("profile-app/leaf.pem")
                && first.contains("valid until 2027-"),
            "{first}"
        );
        assert!(first.contains(".env: written, KIRO_SIDECAR_UID="), "{first}");
        let env = std::fs::read_to_string(&args.env_file).unwrap();
        let second = made(&args);
        assert!(second.contains("nothing to do") && second.contains(".env: unchanged"), "{second}");
        assert_eq!(second.lines().count(), 2, "{second}");
        assert_eq!(std::fs::read_to_string(&args.env_file).unwrap(), env);
    }

    #[test]
    fn what_is_wrong_with_the_mesh_file_is_told_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let args = args(dir.path());
        std::fs::write(&args.mesh, "services: 1\n").unwrap();
        let now = OffsetDateTime::UNIX_EPOCH;
        let error = make(&args, now, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("mesh.yaml has problems\n"), "{error}");
        std::fs::remove_file(&args.mesh).unwrap();
        let error = make(&args, now, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("--mesh"), "{error}");
        assert!(!args.out.exists() && !args.env_file.exists());
    }

    #[test]
    fn the_table_has_what_a_person_looks_for() {
        let dir = tempfile::tempdir().unwrap();
        let args = args(dir.path());
        made(&args);
        let key = args.out.join("profile/leaf.key");
        std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap() + time::Duration::days(9);
        let mut out = Vec::new();
        print_table(&mut out, &kiro_pki::show(&args.out, now).unwrap()).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 1 + 2 * 6, "{text}");
        assert!(lines[0].starts_with("CERTIFICATE ") && lines[1].contains("ca/ca.pem"), "{text}");
        let profile = lines.iter().find(|line| line.contains("profile/leaf.pem")).unwrap();
        for cell in [
            "sidecar (server, client)",
            "DNS:profile URI:spiffe://kiro.mesh/profile",
            "81 days left",
            "0644 TOO OPEN",
        ] {
            assert!(profile.contains(cell), "{cell}: {profile}");
        }
        assert!(
            text.contains("0640 ok") && text.contains(", serial ") && text.contains(", sha256 "),
            "{text}"
        );
    }

    #[test]
    fn the_command_line_is_as_documented() {
        use clap::Parser as _;
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            certs: CertsArgs,
        }
        let parsed = Cli::try_parse_from(["certs", "show", "--json", "--out", "elsewhere"]).unwrap().certs;
        assert!(matches!(parsed.command, Some(CertsCommand::Show { json: true })));
        assert_eq!(parsed.out, Path::new("elsewhere"));
        let parsed = Cli::try_parse_from(["certs"]).unwrap().certs;
        assert_eq!(
            (parsed.mesh.to_str(), parsed.env_file.to_str(), parsed.renew_within),
            (Some("docker/mesh/mesh.yaml"), Some(".env"), 30)
        );
        assert!(Cli::try_parse_from(["certs", "--renew-within", "91"]).is_err());
    }
}
