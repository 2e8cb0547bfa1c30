//! PostgreSQL by psql.

use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;

use rustix::process::{Signal, geteuid};
use tempfile::TempDir;

use super::world;
use crate::support::process::{Client, Server, command, run, run_with, wait_for};
use crate::support::tools;
use crate::support::world::World;

/// A fresh cluster behind a sidecar. The fields end in their order, the data last.
struct Database {
    _server: Server,
    world: World,
    _data: TempDir,
}

/// PostgreSQL refuses to run as root; root runs it as this user, who needs no name.
const NOBODY: u32 = 65_534;

fn as_nobody(program: &Path) -> Command {
    // Not in the directory of the tests, which nobody may not see.
    if !geteuid().is_root() {
        let mut command = command(program);
        command.current_dir("/");
        return command;
    }
    let mut setpriv = command("setpriv");
    let id = NOBODY.to_string();
    setpriv.args(["--reuid", &id, "--regid", &id, "--clear-groups"]).arg(program).current_dir("/");
    setpriv
}

fn start() -> Option<Database> {
    let places = ["/usr/lib/postgresql", "bin"];
    let initdb = tools::program_in(places, "initdb", "postgresql")?;
    let postgres = tools::program_in(places, "postgres", "postgresql")?;
    tools::program("psql", "postgresql-client")?;
    let world = world();
    let data = tempfile::tempdir().unwrap();
    if geteuid().is_root() {
        chown(data.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let mut init = as_nobody(&initdb);
    init.args(["--auth=trust", "--username=kiro", "--no-sync", "--encoding=UTF8", "--locale=C", "--pgdata"]);
    run(init.arg(data.path())).success();
    let mut serve = as_nobody(&postgres);
    let port = world.ports("app").app.to_string();
    serve.arg("-D").arg(data.path()).args(["-p", &port, "-h", "127.0.0.1"]);
    serve.args(["-c", "unix_socket_directories=", "-c", "fsync=off"]);
    // SIGQUIT is its immediate shutdown.
    let mut server = Server::start("postgres", &world.path(""), &mut serve).ending_by(Signal::QUIT);
    server.ready_when_it_says("database system is ready to accept connections");
    Some(Database { _server: server, world, _data: data })
}

impl Database {
    fn psql(&self, commands: &[&str]) -> Command {
        let mut psql = command("psql");
        let port = self.world.ports("app").local;
        psql.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"]);
        psql.arg(format!("host=127.0.0.1 port={port} user=kiro dbname=postgres sslmode=disable"));
        for command in commands {
            psql.args(["--command", command]);
        }
        psql
    }

    fn ask(&self, query: &str) -> String {
        run(&mut self.psql(&[query])).success()
    }
}

#[test]
#[ignore = "make conformance: needs PostgreSQL"]
fn queries_are_answered() {
    let Some(database) = start() else { return };
    assert_eq!(database.ask("select 6 * 7, 'Grüße'"), "42|Grüße\n");
    let many = database.ask("select count(*), sum(n) from generate_series(1, 100000) n");
    assert_eq!(many, "100000|5000050000\n");
    let line = database.world.line("app", "the connection", |line| line["method"] == "CONNECT");
    assert_eq!((&line["caller"], &line["policy"]), (&"caller".into(), &"allowed".into()), "{line}");
}

#[test]
#[ignore = "make conformance: needs PostgreSQL"]
fn copies_of_megabytes_go_both_ways() {
    let Some(database) = start() else { return };
    database.ask("create table numbers (n int, word text)");
    let rows: String = (0..300_000).map(|number| format!("{number}\tthe word of {number}\n")).collect();
    run_with(&mut database.psql(&["copy numbers from stdin"]), rows.as_bytes()).success();
    let copied = run(&mut database.psql(&["copy numbers to stdout"])).success();
    assert!(copied == rows, "{} bytes came back of {}, or others", copied.len(), rows.len());
}

#[test]
#[ignore = "make conformance: needs PostgreSQL"]
fn notifications_reach_a_listener() {
    let Some(database) = start() else { return };
    let mut listener = Client::start(&mut database.psql(&[]));
    listener.write("listen news;\nselect 'listens';\n");
    assert_eq!(listener.line(), "listens");
    database.ask("notify news, 'it is here'");
    // psql tells of notifications after each command.
    wait_for("the notification", || {
        listener.write("select 'asked';\n");
        listener.line().contains("\"it is here\"").then_some(())
    });
}

#[test]
#[ignore = "make conformance: needs PostgreSQL"]
fn a_query_that_runs_is_cancelled_by_a_second_connection() {
    let Some(database) = start() else { return };
    let client = Client::start(&mut database.psql(&["select pg_sleep(50)"]));
    wait_for("the query runs", || {
        let query =
            "select count(*) from pg_stat_activity where state = 'active' and query = 'select pg_sleep(50)'";
        (database.ask(query) == "1\n").then_some(())
    });
    // Ctrl-C: psql sends a cancel request on a connection of its own.
    client.signal(Signal::INT);
    let (status, _, stderr) = client.end();
    assert!(!status.success() && stderr.contains("canceling statement due to user request"), "{stderr}");
}

#[test]
#[ignore = "make conformance: needs PostgreSQL"]
fn a_client_that_is_killed_is_seen_by_the_server_at_once() {
    let Some(database) = start() else { return };
    let sessions = "select count(*) from pg_stat_activity where application_name = 'doomed'";
    let mut client = Client::start(database.psql(&[]).env("PGAPPNAME", "doomed"));
    client.write("select 'here';\n");
    assert_eq!(client.line(), "here");
    assert_eq!(database.ask(sessions), "1\n");
    client.kill();
    wait_for("the server lets the session go", || (database.ask(sessions) == "0\n").then_some(()));
}
