use super::*;

fn refused(change: impl FnOnce(&mut RetrySettings)) -> String {
    let mut settings = RetrySettings::default();
    change(&mut settings);
    RetryPolicy::new(settings).unwrap_err().to_string()
}

#[test]
fn a_policy_that_makes_no_sense_says_what_to_write() {
    assert_eq!(refused(|s| s.retries = 0), "0 retries: write 1 to 10, or leave the declaration out");
    assert_eq!(refused(|s| s.retries = 11), "11 retries: write 1 to 10, or leave the declaration out");
    assert!(refused(|s| s.methods = Some(Vec::new())).starts_with("a list of 0 methods: write 1 to 16"));
    assert!(refused(|s| s.methods = Some(vec![Method::GET; 17])).starts_with("a list of 17 methods"));
    assert!(refused(|s| s.statuses = vec![StatusCode::BAD_GATEWAY; 17]).starts_with("a list of 17 statuses"));
    for status in [StatusCode::OK, StatusCode::NOT_FOUND, StatusCode::FORBIDDEN] {
        assert!(refused(|s| s.statuses.push(status)).contains("no failure that another try would mend"));
    }
    assert!(refused(|s| s.per_try_timeout = Some(Duration::ZERO)).starts_with("a timeout of 0 for each try"));
    for (base, max) in [(0, 250), (25, 24), (25, 60_001)] {
        let text = refused(|s| {
            s.backoff_base = Duration::from_millis(base);
            s.backoff_max = Duration::from_millis(max);
        });
        assert!(text.starts_with("a back-off from "), "{text}");
    }
    let everything = RetrySettings {
        retries: RETRIES_MAX,
        methods: Some(vec![Method::POST; LISTED_MAX]),
        statuses: vec![StatusCode::TOO_MANY_REQUESTS; LISTED_MAX],
        per_try_timeout: Some(Duration::from_nanos(1)),
        backoff_base: BACKOFF_MAX,
        backoff_max: BACKOFF_MAX,
    };
    assert!(RetryPolicy::new(everything).is_ok());
}

#[test]
fn by_default_what_rfc_9110_calls_idempotent_may_be_repeated() {
    let policy = RetryPolicy::new(RetrySettings::default()).unwrap();
    for (method, may) in [
        (Method::GET, true),
        (Method::HEAD, true),
        (Method::OPTIONS, true),
        (Method::TRACE, true),
        (Method::PUT, true),
        (Method::DELETE, true),
        (Method::POST, false),
        (Method::PATCH, false),
        (Method::CONNECT, false),
        (Method::from_bytes(b"REPORT").unwrap(), false),
        (Method::from_bytes(b"get").unwrap(), false),
    ] {
        assert_eq!(policy.may_repeat(&method), may, "{method}");
    }
    // What the mesh file lists is taken at its word, and nothing is added to it.
    let methods = Some(vec![Method::POST]);
    let policy = RetryPolicy::new(RetrySettings { methods, ..RetrySettings::default() }).unwrap();
    assert!(policy.may_repeat(&Method::POST));
    assert!(!policy.may_repeat(&Method::GET));
}

#[test]
fn the_back_off_doubles_up_to_its_bound() {
    let policy = RetryPolicy::new(RetrySettings::default()).unwrap();
    let waits: Vec<u128> =
        [0, 1, 2, 3, 4, 5, 6, 40, u32::MAX].map(|made| policy.backoff_ceiling(made).as_millis()).into();
    assert_eq!(waits, [25, 25, 50, 100, 200, 250, 250, 250, 250]);
}
