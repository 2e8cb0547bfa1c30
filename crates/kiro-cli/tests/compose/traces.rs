//! What Jaeger has of a request: one joined trace.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use serde_json::Value;

use crate::support::{curl, ingress, port, wait_for};

/// A hop is the sidecar's span and the service's: ingress, dashboard, and for each of its calls the outbound and inbound sidecars
/// and the service that is called; profile's own call adds the same again.
const SPANS_MIN: usize = 14;

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn a_request_is_one_joined_trace() {
    let mine = format!("{:016x}{:016x}", std::process::id(), 0x4b69_726f_u64);
    let traceparent = format!("traceparent: 00-{mine}-00000000000000aa-01");
    assert_eq!(curl(&["--header", &traceparent, &ingress("/dashboard/alice")]).0, 200);

    let url = format!("http://127.0.0.1:{}/api/traces/{mine}", port("KIRO_JAEGER_PORT", 16686));
    let mut before = 0;
    // Whole when every exporter has sent its batch: no more come for two looks at least five seconds after each other.
    let trace = wait_for("the whole trace in Jaeger", Duration::from_secs(60), || {
        let (status, body) = curl(&[&url]);
        let found: Value = serde_json::from_str(&body).ok()?;
        let count = found["data"][0]["spans"].as_array().map_or(0, Vec::len);
        let whole = status == 200 && count >= SPANS_MIN && count == before;
        before = count;
        if !whole {
            std::thread::sleep(Duration::from_secs(3));
        }
        whole.then(|| found["data"][0].clone())
    });

    let spans = trace["spans"].as_array().unwrap();
    let service =
        |span: &Value| trace["processes"][span["processID"].as_str().unwrap()]["serviceName"].clone();
    let by_id: HashMap<&str, &Value> =
        spans.iter().map(|span| (span["spanID"].as_str().unwrap(), span)).collect();
    let parent = |span: &Value| span["references"][0]["spanID"].as_str().map(str::to_owned);

    let mut services = BTreeSet::new();
    let mut from_outside = 0;
    for span in spans {
        assert_eq!(span["traceID"].as_str().unwrap().trim_start_matches('0'), mine.trim_start_matches('0'));
        services.insert(service(span).as_str().unwrap().to_owned());
        match parent(span) {
            Some(parent) if by_id.contains_key(parent.as_str()) => {}
            other => {
                assert_eq!(other.as_deref(), Some("00000000000000aa"), "a span without its parent: {span}");
                from_outside += 1;
            }
        }
    }
    assert_eq!(from_outside, 1, "one root, which continues the caller's");
    assert_eq!(
        services.iter().map(String::as_str).collect::<Vec<_>>(),
        ["auth", "auth-proxy", "dashboard", "dashboard-proxy", "profile", "profile-proxy"]
    );
    show(spans, &by_id, service, parent);
}

/// The tree, for a person.
fn show(
    spans: &[Value],
    by_id: &HashMap<&str, &Value>,
    service: impl Fn(&Value) -> Value,
    parent: impl Fn(&Value) -> Option<String>,
) {
    let mut sorted: Vec<&Value> = spans.iter().collect();
    sorted.sort_by_key(|span| span["startTime"].as_u64());
    println!();
    for span in sorted {
        let mut depth = 0;
        let mut at = parent(span);
        while let Some(found) = at.as_deref().and_then(|id| by_id.get(id)) {
            depth += 1;
            at = parent(found);
        }
        let kind = span["tags"].as_array().unwrap().iter().find(|tag| tag["key"] == "span.kind");
        let kind = kind.and_then(|tag| tag["value"].as_str()).unwrap_or("-");
        let (name, took) = (span["operationName"].as_str().unwrap(), span["duration"].as_u64().unwrap());
        println!(
            "{:indent$}{} {kind} {name} {took} µs",
            "",
            service(span).as_str().unwrap(),
            indent = 2 * depth
        );
    }
}
