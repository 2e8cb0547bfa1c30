//! A crash of any one container heals by itself.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{PODS, containers, curl, every_container, id, ingress, must, wait_for};

/// From the crash to the first request that is served by all that died.
const HEALED_WITHIN: Duration = Duration::from_secs(5);

/// The processes of containers, in one look: each look is a part of what is measured.
fn processes(ids: &[String]) -> Vec<i32> {
    let ids: Vec<_> = ids.iter().map(String::as_str).collect();
    let listed = must("docker", &[&["inspect", "--format", "{{.State.Pid}}"], &*ids].concat());
    listed.lines().map(|line| line.trim().parse().unwrap()).collect()
}

fn serves() -> bool {
    curl(&["--max-time", "1", &ingress("/dashboard/alice")]).0 == 200
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn a_crash_of_any_one_container_heals_by_itself() {
    for container in every_container() {
        wait_for("the mesh serves", Duration::from_secs(30), || serves().then_some(()));
        let pod = PODS.into_iter().find(|pod| container.starts_with(pod)).unwrap();
        // Who is gone with it: all who had joined the namespace, or itself alone.
        let victims =
            if container.ends_with("-pod") { containers(pod).to_vec() } else { vec![container.clone()] };
        let ids: Vec<_> = victims.iter().map(|victim| id(victim)).collect();
        let before = processes(&ids);

        // As a crash: `docker kill` would count as an operator's wish and switch the restart off.
        let crashing = processes(&[id(&container)])[0];
        match kill_process(Pid::from_raw(crashing).unwrap(), Signal::KILL) {
            Err(Errno::PERM) if std::env::var("CI").as_deref() != Ok("true") => {
                println!("SKIPPED: only root can crash a container's process from the host");
                return;
            }
            killed => killed.unwrap(),
        }
        let begin = Instant::now();
        let healed = wait_for(&format!("{container} healed"), Duration::from_secs(60), || {
            let all_new = processes(&ids).iter().zip(&before).all(|(now, before)| *now != 0 && now != before);
            (all_new && serves()).then(|| begin.elapsed())
        });
        println!("{container}: healed after {:.1} s", healed.as_secs_f64());
        assert!(healed < HEALED_WITHIN, "{container}: {healed:?}");
    }
}
