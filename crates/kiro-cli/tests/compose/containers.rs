//! How the containers are shut in, and what Compose says where certificates are missing.

use crate::support::{PODS, every_container, inspect, must, run, service};

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn no_container_can_do_more_than_it_needs() {
    for container in every_container() {
        let seen = inspect(&container);
        let (host, config) = (&seen["HostConfig"], &seen["Config"]);
        let user = config["User"].as_str().unwrap();
        assert!(!user.is_empty() && !user.starts_with("0:") && user != "0", "{container} runs as `{user}`");
        assert_eq!(host["ReadonlyRootfs"], true, "{container}");
        assert_eq!(host["CapDrop"], serde_json::json!(["ALL"]), "{container}");
        assert_eq!(host["SecurityOpt"], serde_json::json!(["no-new-privileges:true"]), "{container}");
        assert_eq!(host["Privileged"], false, "{container}");
        assert_eq!(host["RestartPolicy"]["Name"], "unless-stopped", "{container}");
        assert_eq!(host["LogConfig"]["Config"]["max-file"], "3", "{container}");
        for (port, bindings) in host["PortBindings"].as_object().unwrap() {
            for binding in bindings.as_array().unwrap() {
                assert_eq!(binding["HostIp"], "127.0.0.1", "{container} {port}");
            }
        }
    }
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn a_container_sees_its_own_secrets_alone_and_can_write_nowhere() {
    for pod in PODS {
        let service = service(pod);
        for (container, expected) in [
            (format!("{pod}-pod"), vec![]),
            (format!("{pod}-proxy"), vec![format!("certs/{service}"), "docker/mesh".to_owned()]),
            (pod.to_owned(), vec![format!("certs/{service}-app")]),
        ] {
            let seen = inspect(&container);
            let mounts = seen["Mounts"].as_array().unwrap();
            let mut sources: Vec<_> = mounts.iter().map(|mount| mount["Source"].as_str().unwrap()).collect();
            sources.sort_unstable();
            assert_eq!(sources.len(), expected.len(), "{container}: {sources:?}");
            for (source, end) in sources.iter().zip(&expected) {
                assert!(source.ends_with(&format!("/{end}")), "{container}: {source}");
            }
            assert!(mounts.iter().all(|mount| mount["RW"] == false), "{container}");
        }
    }
    let users = |suffix: &str| PODS.map(|pod| inspect(&format!("{pod}{suffix}"))["Config"]["User"].clone());
    assert_ne!(users("-proxy"), users(""), "an application runs as somebody else than its sidecar");
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn images_are_small() {
    for image in ["kiro-proxy", "kiro-pod", "kiro-demo"] {
        let size: u64 =
            must("docker", &["image", "inspect", "--format", "{{.Size}}", image]).trim().parse().unwrap();
        println!("{image}: {:.1} MB", size as f64 / 1e6);
        assert!(size < 15_000_000, "{image}: {size}");
    }
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn without_certificates_compose_says_what_to_do_and_blocks_nothing_else() {
    // As on a fresh clone: no .env. A project of its own, so that what runs stays.
    let compose = |arguments: &[&str]| {
        run(
            "docker",
            &[&["compose", "--env-file", "/dev/null", "--project-name", "kiro-fresh"], arguments].concat(),
        )
    };
    let up = compose(&["create", "profile-1-proxy"]);
    assert_ne!(up.code, Some(0));
    assert!(up.said.contains("RUN make certs"), "{}", up.said);
    for arguments in [&["config", "--quiet"][..], &["down"]] {
        let ran = compose(arguments);
        assert_eq!(ran.code, Some(0), "{arguments:?}: {}", ran.said);
    }
}
