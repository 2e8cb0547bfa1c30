//! The mesh file, right and wrong: each test is a file and what is read from it or said of it.

use std::borrow::Cow;
use std::time::Duration;

use super::*;
use crate::breaker::BreakerSettings;
use crate::concurrency::{Adaptive, ConcurrencySettings, Limit, QueueSettings};
use crate::health::HealthSettings;
use crate::rate::{PolicyName, RateSettings};
use crate::retry::{RetryPolicy, RetrySettings};

/// The file of the design, without the key `retries`.
const SAMPLE: &str = r#"
trust_domain: kiro.mesh
signatures: required
services:
  dashboard:
    app: { port: 8001, tls: mutual }
    ingress: { port: 8080, tls_port: 8443 }
  profile:
    app: { port: 8002, tls: mutual }
    traffic: { timeout: 2s }
  auth:
    app: { port: 8003, tls: mutual }
allow:
  - { from: ingress, to: dashboard }
  - { from: dashboard, to: profile, methods: [GET], paths: ["/profiles/*"] }
  - { from: dashboard, to: auth }
  - { from: profile, to: auth, methods: [POST], paths: [/verify] }
"#;

fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

/// Checks what is said of a file; lines are counted from the one after the opening quote.
#[track_caller]
fn check(text: &str, expected: &str) {
    let text = text.strip_prefix('\n').unwrap_or(text);
    let problems = parse(text).expect_err("the file should be refused");
    assert_eq!(problems.to_string().trim(), expected.trim(), "\n{problems}\n");
}

#[test]
fn the_sample_is_read() {
    let mesh = parse(SAMPLE).unwrap();
    assert_eq!(mesh.trust_domain.as_str(), "kiro.mesh");
    assert_eq!((mesh.signatures, mesh.mode), (Signatures::Required, Mode::Enforce));
    let services: Vec<_> = mesh.services.keys().map(ServiceName::as_str).collect();
    assert_eq!(services, ["auth", "dashboard", "profile"]);
    let dashboard = &mesh.services["dashboard"];
    assert_eq!(
        dashboard.app,
        App { port: 8001, tls: AppTls::Mutual, protocol: Protocol::Http1, header_case: HeaderCase::Lower }
    );
    let ingress = Ingress {
        port: Some(8080),
        tls_port: Some(8443),
        names: Vec::new(),
        trust_forwarded: false,
        healthz: false,
    };
    assert_eq!(dashboard.ingress, Some(ingress));
    assert_eq!(dashboard.traffic.timeout, Timeout::After(Duration::from_secs(15)));
    let expected = Traffic { timeout: Timeout::After(Duration::from_secs(2)), ..Traffic::default() };
    assert_eq!(mesh.services["profile"].traffic, expected);
    let lines: Vec<_> = mesh.allow.iter().map(|line| (line.from.clone(), line.to.as_str())).collect();
    let service = |text| Source::Service(name(text));
    let expected = [
        (Source::Ingress, "dashboard"),
        (service("dashboard"), "profile"),
        (service("dashboard"), "auth"),
        (service("profile"), "auth"),
    ];
    assert_eq!(lines, expected);
    assert_eq!(mesh.allow[1].methods, Some(vec!["GET".to_owned()]));
    assert_eq!(mesh.allow[1].paths, Some(vec![PathPattern::parse("/profiles/*").unwrap()]));
    assert_eq!((&mesh.allow[2].methods, &mesh.allow[2].paths), (&None, &None));
}

#[test]
fn every_key_is_read() {
    let mesh = parse(
        r#"%YAML 1.2
---
trust_domain: "other_mesh-1"
signatures: off
mode: audit
services:
  web:
    app:
      port: 1
      tls: none
      protocol: http1
    ingress:
      tls_port: 65535
      names: [www.example.com, 'shop.example']
      trust_forwarded: true
      healthz: true
    traffic:
      timeout: off
      retries: { count: 3, methods: [POST], statuses: [503], per_try: 500ms }
      breaker: { failures: 25%, requests: 10, open: 2s }
      concurrency: { max: 50, queue: 10, adaptive: true }
      routes:
      - { methods: [GET], paths: [/reports/**], timeout: 30s, retries: 0 }
    health: { http: "/healthz?deep=1", interval: 2s, timeout: 500ms, healthy: 1, unhealthy: 4 }
    endpoints: ["127.0.0.1:15006", "[::1]:443"]
    metrics: open
  "db":
    app: { port: 5432, protocol: tcp }
    traffic: { timeout: 250ms }
    metrics: closed
    local_port: 15432
allow:
- from: ingress
  to: web
- { from: web, to: db }
limits:
- { from: ingress, to: web, rate: 100/s }
- name: searches
  from: "*"
  to: web
  methods: [POST]
  paths: [/search/**]
  rate: 600/m
  burst: 20
  per: header:X-User
...
"#,
    )
    .unwrap();
    assert_eq!((mesh.signatures, mesh.mode), (Signatures::Off, Mode::Audit));
    let web = Service {
        app: App { port: 1, tls: AppTls::None, protocol: Protocol::Http1, header_case: HeaderCase::Lower },
        ingress: Some(Ingress {
            port: None,
            tls_port: Some(65535),
            names: vec!["www.example.com".to_owned(), "shop.example".to_owned()],
            trust_forwarded: true,
            healthz: true,
        }),
        traffic: Traffic {
            timeout: Timeout::Off,
            retries: Some(
                RetryPolicy::new(RetrySettings {
                    retries: 3,
                    methods: Some(vec![http::Method::POST]),
                    statuses: vec![http::StatusCode::SERVICE_UNAVAILABLE],
                    per_try_timeout: Some(Duration::from_millis(500)),
                    ..RetrySettings::default()
                })
                .unwrap(),
            ),
            breaker: Some(BreakerSettings {
                failures_percent: 25,
                requests_min: 10,
                open_base: Duration::from_secs(2),
                ..BreakerSettings::default()
            }),
            concurrency: Some(ConcurrencySettings {
                limit: Limit::Adaptive(Adaptive::new(4, 50).unwrap()),
                queue: QueueSettings { max_waiting: 10, ..QueueSettings::default() },
                ..ConcurrencySettings::default()
            }),
            routes: vec![Route {
                methods: Some(vec!["GET".to_owned()]),
                paths: Some(vec![PathPattern::parse("/reports/**").unwrap()]),
                timeout: Some(Timeout::After(Duration::from_secs(30))),
                retries: Some(RetryPolicy::undeclared()),
            }],
        },
        health: Some(HealthCheck {
            question: Question::Http("/healthz?deep=1".to_owned()),
            settings: HealthSettings::default()
                .with_times(Duration::from_secs(2), Duration::from_millis(500))
                .and_then(|settings| settings.with_thresholds(1, 4))
                .unwrap(),
        }),
        endpoints: vec!["127.0.0.1:15006".parse().unwrap(), "[::1]:443".parse().unwrap()],
        metrics: Metrics::Open,
        local_port: None,
    };
    assert_eq!(mesh.services["web"], web);
    let db = Service {
        app: App { port: 5432, tls: AppTls::None, protocol: Protocol::Tcp, header_case: HeaderCase::Lower },
        ingress: None,
        traffic: Traffic { timeout: Timeout::After(Duration::from_millis(250)), ..Traffic::default() },
        health: None,
        endpoints: Vec::new(),
        metrics: Metrics::Closed,
        local_port: Some(15432),
    };
    assert_eq!(mesh.services["db"], db);
    let per_second = RateLine {
        name: PolicyName::new("ingress.web").unwrap(),
        from: LimitedSource::Ingress,
        to: name("web"),
        methods: None,
        paths: None,
        rate: RateSettings::new(100, Duration::from_secs(1), None).unwrap(),
        per: None,
        line: 37,
    };
    let searches = RateLine {
        name: PolicyName::new("searches").unwrap(),
        from: LimitedSource::Anybody,
        to: name("web"),
        methods: Some(vec!["POST".to_owned()]),
        paths: Some(vec![PathPattern::parse("/search/**").unwrap()]),
        rate: RateSettings::new(600, Duration::from_secs(60), Some(20)).unwrap(),
        per: Some(Per::Header(http::HeaderName::from_static("x-user"))),
        line: 38,
    };
    assert_eq!(mesh.limits, [per_second, searches]);
}

#[test]
fn what_is_left_out_has_its_default() {
    for allow in ["", "allow:\n  []\n"] {
        let mesh = parse(&format!("trust_domain: d\nservices: {{ a: {{ app: {{ port: 80 }} }} }}\n{allow}"))
            .unwrap();
        assert_eq!((mesh.signatures, mesh.mode), (Signatures::Required, Mode::Enforce));
        assert_eq!(mesh.allow, []);
        assert_eq!(mesh.limits, []);
        let service = &mesh.services["a"];
        assert_eq!(
            service.app,
            App { port: 80, tls: AppTls::None, protocol: Protocol::Http1, header_case: HeaderCase::Lower }
        );
        assert_eq!(service.traffic.timeout, Timeout::After(Duration::from_secs(15)));
        assert_eq!((service.metrics, &service.ingress, service.endpoints.len()), (Metrics::Closed, &None, 0));
    }
}

#[test]
fn a_word_alone_means_the_defaults() {
    let mesh = parse(
        "trust_domain: d\nservices: { a: { app: { port: 80 }, traffic: { retries: 3, breaker: on } } }",
    )
    .unwrap();
    let traffic = &mesh.services["a"].traffic;
    let retries = RetryPolicy::new(RetrySettings { retries: 3, ..RetrySettings::default() }).unwrap();
    assert_eq!(traffic.retries, Some(retries));
    assert_eq!(traffic.breaker, Some(BreakerSettings::default()));
}

#[test]
fn a_limit_of_what_is_under_way_is_a_number_or_more() {
    let read = |concurrency: &str| {
        let traffic = format!("traffic: {{ concurrency: {concurrency} }}");
        let text = format!("trust_domain: d\nservices: {{ a: {{ app: {{ port: 80 }}, {traffic} }} }}");
        parse(&text).unwrap().services["a"].traffic.concurrency.unwrap()
    };
    let fixed = |max| Limit::Fixed(std::num::NonZeroU32::new(max).unwrap());
    let adaptive = |min, max| Limit::Adaptive(Adaptive::new(min, max).unwrap());
    let defaults = ConcurrencySettings::default();
    assert_eq!(read("7"), ConcurrencySettings { limit: fixed(7), ..defaults });
    let none = QueueSettings { max_waiting: 0, ..defaults.queue };
    assert_eq!(
        read("{ max: 7, queue: 0 }"),
        ConcurrencySettings { limit: fixed(7), queue: none, ..defaults }
    );
    assert_eq!(read("{ adaptive: true }").limit, adaptive(4, 1000));
    // A bound below the least that is usual is a bound all the same.
    assert_eq!(read("{ max: 2, adaptive: true }").limit, adaptive(2, 2));
}

#[test]
fn a_check_asks_one_thing() {
    let check = |app: &str, health: &str, question: Question| {
        let mesh = parse(&format!(
            "trust_domain: d\nservices: {{ a: {{ app: {{ port: 80{app} }}, health: {{ {health} }} }} }}"
        ));
        let found =
            mesh.unwrap_or_else(|problems| panic!("{problems}")).services["a"].health.clone().unwrap();
        assert_eq!(found.question, question);
        found.settings
    };
    let http = || Question::Http("/ok".to_owned());
    assert_eq!(check("", "http: /ok", http()), HealthSettings::default());
    check(", protocol: h2", "http: /ok", http());
    check(", protocol: grpc", "http: /ok", http());
    check(", protocol: grpc", "grpc: true", Question::Grpc(String::new()));
    check(", protocol: h2", "grpc: shop.v1.Orders", Question::Grpc("shop.v1.Orders".to_owned()));
    for app in ["", ", protocol: h2", ", protocol: grpc", ", protocol: tcp"] {
        check(app, "tcp: true", Question::Tcp);
    }
    // Who wants to know it soon need not write the timeout too.
    let soon = check("", "http: /ok, interval: 200ms", http());
    assert_eq!((soon.interval(), soon.timeout()), (Duration::from_millis(200), Duration::from_millis(200)));
}

#[test]
fn callers_find_tcp_services_on_their_loopback() {
    let mesh = parse(
        r#"
trust_domain: d
services:
  web: { app: { port: 80 } }
  mail: { app: { port: 25, protocol: tcp } }
  db: { app: { port: 5432, protocol: tcp } }
  cache: { app: { port: 6379, protocol: tcp }, local_port: 16379 }
  replica: { app: { port: 5432, protocol: tcp }, local_port: 15432 }
allow:
  - { from: web, to: db }
  - { from: web, to: cache }
  - { from: web, to: db }
  - { from: web, to: replica }
  - { from: replica, to: mail }
  - { from: db, to: web }
"#,
    )
    .unwrap();
    let of = |caller: &str| -> Vec<(String, u16)> {
        let ports = mesh.local_ports(&name(caller));
        ports.into_iter().map(|(callee, port)| (callee.to_string(), port)).collect()
    };
    let pairs = |pairs: &[(&str, u16)]| -> Vec<(String, u16)> {
        pairs.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect()
    };
    assert_eq!(of("web"), pairs(&[("cache", 16379), ("db", 5432), ("replica", 15432)]));
    // A port below 1024 is where containers may bind it, and where others can't, that is told when it is tried.
    assert_eq!(of("replica"), pairs(&[("mail", 25)]));
    // Whom a line does not name, and what speaks HTTP, has no port.
    assert_eq!((of("cache"), of("db")), (Vec::new(), Vec::new()));
}

#[test]
fn local_ports_that_collide_are_told_for_each_caller() {
    // Nobody reaches both `db` and `other`, and `lone` reaches nothing: no ports of theirs collide.
    check(
        r#"
trust_domain: d
services:
  web: { app: { port: 5432 }, ingress: { port: 8080, tls_port: 6379 } }
  job: { app: { port: 8000 } }
  lone: { app: { port: 5432 } }
  db: { app: { port: 5432, protocol: tcp } }
  db2: { app: { port: 5432, protocol: tcp } }
  cache: { app: { port: 7000, protocol: tcp }, local_port: 6379 }
  queue: { app: { port: 7000, protocol: tcp }, local_port: 6379 }
  other: { app: { port: 5432, protocol: tcp } }
allow:
  - { from: ingress, to: web }
  - { from: web, to: db }
  - { from: web, to: cache }
  - { from: job, to: db }
  - { from: job, to: db2 }
  - { from: job, to: cache }
  - { from: job, to: queue }
  - { from: queue, to: other }
"#,
        r#"
line 6, column 22: services.db.app.port: `5432`: `web` is to find `db` at this port of its pod, where it has its own `app.port`
  fix: write `local_port: ` beside `app`, with a port that is free in the pods of `db`'s callers
line 7, column 23: services.db2.app.port: `5432`: `job` is to find `db2` at this port of its pod, where it has `db`
  fix: write `local_port: ` beside `app`, with a port that is free in the pods of `db2`'s callers
line 8, column 60: services.cache.local_port: `6379`: `web` is to find `cache` at this port of its pod, where it has its own `ingress.tls_port`
  fix: choose another `local_port`, one that is free in the pods of `cache`'s callers
line 9, column 60: services.queue.local_port: `6379`: `job` is to find `queue` at this port of its pod, where it has `cache`
  fix: choose another `local_port`, one that is free in the pods of `queue`'s callers
"#,
    );
}

/// Each change to the sample in `refused.txt` is refused with the words that stand below it. A line `- …` is a text that stands
/// once in the sample, `+ …` is what replaces it. With `UPDATE_EXPECTED=1` the words are written anew.
#[test]
fn what_is_wrong_is_told_with_line_path_value_and_fix() {
    let fixtures = include_str!("refused.txt");
    let sample = SAMPLE.trim_start();
    let mut rewritten = Vec::new();
    let mut cases = 0;
    for block in fixtures.trim_end().split("\n\n") {
        if block.starts_with('#') {
            rewritten.push(block.to_owned());
            continue;
        }
        let lines = |sign: &str| -> Vec<&str> {
            let rest =
                |line: &'static str| Some(line.strip_prefix(sign)?.strip_prefix(' ').unwrap_or_default());
            block.lines().filter_map(rest).collect()
        };
        let (from, to) = (lines("-").join("\n"), lines("+").join("\n"));
        assert_eq!(sample.matches(&from).count(), 1, "`{from}` should stand once in the sample");
        let told = match parse(&sample.replace(&from, &to)) {
            Ok(_) => "accepted".to_owned(),
            Err(problems) => problems.to_string(),
        };
        let change = block.lines().take_while(|line| line.starts_with(['-', '+']));
        let change: String = change.flat_map(|line| [line, "\n"]).collect();
        rewritten.push(change + &told);
        cases += 1;
    }
    let rewritten = rewritten.join("\n\n") + "\n";
    if std::env::var_os("UPDATE_EXPECTED").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/src/mesh/refused.txt"), &rewritten).unwrap();
    } else {
        for (told, expected) in rewritten.split("\n\n").zip(fixtures.split("\n\n")) {
            assert_eq!(told.trim_end(), expected.trim_end(), "\n{told}\n");
        }
    }
    assert!(cases > 100, "{cases} cases are left");
    assert!(!rewritten.contains("accepted"), "{rewritten}");
}

#[test]
fn all_problems_are_told_at_once_in_the_files_order() {
    check(
        r#"
trust_domian: kiro.mesh
signatures: maybe
services:
  Profile:
    app: { port: 99999, tls: yes }
  auth:
    app: { port: 15001 }
    traffic: { timeout: 0s, retires: 2 }
  dashboard:
    ingress: { names: [WWW.example.com] }
allow:
  - { from: dashbord, to: auth, methods: [get], paths: [verify] }
  - { from: Profile, to: auth }
  - { to: auth }
"#,
        r#"
line 1, column 1: trust_domian: `trust_domian`: an unknown key
  fix: write `trust_domain` if that was meant, or take the key out
line 1, column 1: the key `trust_domain` is missing
  fix: add `trust_domain: kiro.mesh`, or a name that no other mesh of yours has
line 2, column 13: signatures: `maybe`: not one of `required`, `off`
  fix: write one of `required`, `off`
line 4, column 3: services.Profile: `Profile`: not a service's name
  fix: the name has 'P': write it with the letters a to z, digits and hyphens alone
line 5, column 18: services.Profile.app.port: `99999`: not a port
  fix: write a number from 1 to 65535
line 5, column 30: services.Profile.app.tls: `yes`: not one of `none`, `mutual`
  fix: write one of `none`, `mutual`
line 7, column 18: services.auth.app.port: `15001`: a port that the sidecar's outbound listener has already
  fix: choose another one that is free in the pod
line 8, column 25: services.auth.traffic.timeout: `0s`: no time at all
  fix: write a whole number with `ms`, `s` or `m` behind it, like `2s`, from 1ms to 60m; or `off`
line 8, column 29: services.auth.traffic.retires: `retires`: an unknown key
  fix: write `retries` if that was meant, or take the key out
line 9, column 3: services.dashboard: the key `app` is missing
  fix: add `app: { port: 8080 }`, with the port of the application
line 10, column 5: services.dashboard.ingress: the ingress has no port
  fix: write `port: 8080` for HTTP, `tls_port: 8443` for TLS, or both
line 10, column 5: services.dashboard.ingress: an ingress that no line of `allow` opens
  fix: add the line `- { from: ingress, to: dashboard }` to `allow`, or take the ingress out
line 10, column 24: services.dashboard.ingress.names[0]: `WWW.example.com`: not a bare DNS name
  fix: write `www.example.com`
line 12, column 13: allow[0].from: `dashbord`: no service of this mesh
  fix: write `dashboard` if that was meant, or add the service under `services`
line 12, column 43: allow[0].methods[0]: `get`: a method in lower case
  fix: write `GET`: methods are compared as they are
line 12, column 57: allow[0].paths[0]: `verify`: not a path pattern
  fix: the pattern does not start with `/`: put one before it
line 14, column 5: allow[2]: the key `from` is missing
  fix: add `from: ` and a service, or `from: ingress`
"#,
    );
}

#[test]
fn control_characters_are_refused_where_they_stand() {
    // The parser would take NUL for the end of the file, and every line after it would be lost.
    for (character, shown) in
        [('\0', "\\0"), ('\u{1b}', "\\u{1b}"), ('\u{7f}', "\\u{7f}"), ('\u{85}', "\\u{85}")]
    {
        let text = format!("trust_domain: d\nservices: # {character}\n  a: {{ app: {{ port: 80 }} }}\n");
        let what = "a control character, which YAML does not allow\n  fix: take it out";
        check(&text, &format!("line 2, column 13: `{shown}`: {what}"));
    }
}

#[test]
fn a_file_without_a_mesh_is_empty() {
    let fix = "fix: start with `trust_domain: kiro.mesh` and a map `services:`";
    for text in ["", "# nothing", "---", "~", "--- # nothing\n...\n", "\u{feff}"] {
        check(text, &format!("line 1, column 1: the file is empty\n  {fix}"));
    }
    check("mesh", &format!("line 1, column 1: `mesh`: a map of keys and values is wanted here\n  {fix}"));
}

#[test]
fn what_is_not_closed_is_told_at_the_end_of_the_file() {
    let Problems(problems) = parse("a: 1\nservices: { b: 2").expect_err("not closed");
    let places: Vec<_> =
        problems.iter().map(|problem| (problem.line, problem.column, problem.value.as_str())).collect();
    assert_eq!(places, [(2, 17, "services: { b: 2")]);
}

#[test]
fn a_large_file_is_not_read() {
    let sample = SAMPLE.trim_start();
    let text = format!("{sample}{}", "#".repeat(tree::FILE_BYTES_MAX - sample.len()));
    assert_eq!(text.len(), tree::FILE_BYTES_MAX);
    assert!(parse(&text).is_ok());
    let fix = "check that it is the mesh file, and split the mesh if it is";
    check(
        &format!("{text}#"),
        &format!("line 1, column 1: the file has 1048577 bytes, more than 1048576\n  fix: {fix}"),
    );
}

#[test]
fn depth_is_bounded_before_anything_recurses() {
    for text in ["[".repeat(500_000), "- ".repeat(500_000), "{ a: ".repeat(200_000), "? ".repeat(500_000)] {
        let Problems(problems) = parse(&text).expect_err("too deep");
        assert_eq!(problems.len(), 1, "{problems:?}");
    }
}

#[test]
fn a_file_of_nothing_but_mistakes_is_told_in_short() {
    let lines: String = (0..20_000).map(|line| format!("{line}: x\n")).collect();
    let Problems(problems) = parse(&lines).expect_err("all keys are unknown");
    assert_eq!(problems.len(), 101);
    assert_eq!(problems.last().unwrap().what, "19902 more problems are left out");
}

#[test]
fn many_wrong_words_beside_many_services_are_told_soon() {
    // Names that differ first at their ends are the dearest to compare; all with all would take minutes.
    let services: String =
        (0..9000).map(|n| format!("  {}{n}: {{ app: {{ port: 1 }} }}\n", "a".repeat(55))).collect();
    let lines: String =
        (0..2000).map(|n| format!("  - {{ from: {}{n}, to: x }}\n", "a".repeat(52))).collect();
    let text = format!("trust_domain: d\nservices:\n{services}allow:\n{lines}");
    let Problems(problems) = parse(&text).expect_err("no service of that name");
    assert_eq!(problems.last().unwrap().what, "3900 more problems are left out");
}

#[test]
fn the_tree_of_a_file_keeps_no_spare_room() {
    fn check(node: &tree::Node<'_>) {
        match &node.value {
            tree::Value::Word { text: Cow::Owned(text), .. } => {
                assert_eq!(text.capacity(), text.len(), "{text}")
            }
            tree::Value::List(items) => {
                assert_eq!(items.capacity(), items.len());
                items.iter().for_each(check);
            }
            tree::Value::Map(entries) => {
                assert_eq!(entries.capacity(), entries.len());
                entries.iter().for_each(|entry| check(&entry.node));
            }
            tree::Value::Word { .. } | tree::Value::Empty | tree::Value::Broken(_) => {}
        }
    }
    let text =
        "allow:\n  - { from: a, to: b, methods: [GET], paths: [\"/a/*\"] }\n  - { from: ingress, to: a }\n";
    check(&tree::read(text, &mut Found::default()).unwrap());
}

#[test]
fn faults_are_read() {
    use http::StatusCode;

    use crate::shaping::{Fault, Share};

    let faults = "\
faults:
- { from: dashboard, to: profile, methods: [GET], paths: [/a/*], delay: 100ms, delay_percent: 0.25 }
- { from: '*', to: auth, abort: 429, abort_percent: 100, delay: 60s, delay_percent: 2.5 }
";
    let mesh = parse(&format!("{SAMPLE}{faults}")).unwrap_or_else(|problems| panic!("{problems}"));
    let share = |parts| Share::new(parts).unwrap();
    let delayed = |parts, ms| Fault::default().with_delay(share(parts), Duration::from_millis(ms)).unwrap();
    let expected = [
        FaultLine {
            from: Some(name("dashboard")),
            to: name("profile"),
            methods: Some(vec!["GET".to_owned()]),
            paths: Some(vec![PathPattern::parse("/a/*").unwrap()]),
            fault: delayed(25, 100),
        },
        FaultLine {
            from: None,
            to: name("auth"),
            methods: None,
            paths: None,
            fault: delayed(250, 60_000).with_abort(share(10_000), StatusCode::TOO_MANY_REQUESTS).unwrap(),
        },
    ];
    assert_eq!(mesh.faults, expected);
    assert_eq!(parse(SAMPLE).unwrap().faults, []);
}

/// Checks what is said of a line below `key`, beside a service `db` that speaks no HTTP.
#[track_caller]
fn check_beside_tcp(key: &str, line: &str, expected: &str) {
    let db = "services:\n  db: { app: { port: 5432, protocol: tcp } }";
    let text = SAMPLE.trim_start().replace("services:", db);
    check(&format!("{text}{key}:\n- {line}\n"), expected);
}

#[test]
fn what_is_for_requests_alone_is_refused_for_tcp_services() {
    check_beside_tcp(
        "faults",
        "{ from: '*', to: db, abort: 503, abort_percent: 1 }",
        "line 19, column 20: faults[0].to: `db`: `db` is `protocol: tcp`, where nobody sees requests
  fix: name a service whose application speaks HTTP, or take the line out",
    );
    let told = "line 19, column 43: splits[0].versions.db: `db`: it speaks another protocol than `profile`
  fix: give all versions the same `app.protocol`";
    check_beside_tcp("splits", "{ to: profile, versions: { profile: 90, db: 10 } }", told);
    let told =
        "line 19, column 27: mirrors[0].copy_to: `db`: `db` is `protocol: tcp`, where nobody sees requests
  fix: name a service whose application speaks HTTP, or take the line out";
    check_beside_tcp("mirrors", "{ to: profile, copy_to: db, percent: 5 }", told);
}

#[test]
fn splits_are_read() {
    use http::{HeaderName, HeaderValue};

    use crate::shaping::{HeaderRoute, HeaderTest, Split};

    let splits = "\
splits:
- to: profile
  versions: { profile: 90, auth: 10 }
  headers:
  - { name: x-canary, equals: 'yes', to: auth }
  - { name: x-user, prefix: test-, to: auth }
  - { name: x-old, present: true, to: profile }
  sticky: header:x-user
";
    let mesh = parse(&format!("{SAMPLE}{splits}")).unwrap_or_else(|problems| panic!("{problems}"));
    let header = HeaderName::from_static;
    let route = |name, test, to| HeaderRoute { name: header(name), test, to: self::name(to) };
    let expected = SplitLine {
        to: name("profile"),
        versions: Split::new([(90, name("profile")), (10, name("auth"))]).unwrap(),
        headers: vec![
            route("x-canary", HeaderTest::Exact(HeaderValue::from_static("yes")), "auth"),
            route("x-user", HeaderTest::Prefix(HeaderValue::from_static("test-")), "auth"),
            route("x-old", HeaderTest::Present, "profile"),
        ],
        sticky: Some(header("x-user")),
    };
    assert_eq!(mesh.splits, [expected]);
}

#[test]
fn mirrors_are_read() {
    use crate::shaping::{Mirror, Share};

    let mirrors = "mirrors:\n- { to: profile, copy_to: auth, percent: 5 }\n";
    let mesh = parse(&format!("{SAMPLE}{mirrors}")).unwrap_or_else(|problems| panic!("{problems}"));
    let mirror = Mirror { to: name("auth"), share: Share::new(500).unwrap() };
    assert_eq!(mesh.mirrors, [MirrorLine { to: name("profile"), mirror }]);
}
