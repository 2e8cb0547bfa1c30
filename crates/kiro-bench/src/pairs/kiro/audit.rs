//! Did a run with everything on keep the rules? Pure, so that each rule has its test.

/// What a run left behind.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Audit {
    /// Requests that the client has had answered, those of the warm-up included.
    pub(crate) completed: u64,
    /// Requests that may have been under way when the client ended.
    pub(crate) cut_off_max: u64,
    /// Access lines read, of the caller's sidecar and the callee's.
    pub(crate) lines: [u64; 2],
    /// Requests that each has counted in its metrics.
    pub(crate) counted: [u64; 2],
    /// Lines that they say were lost.
    pub(crate) lines_lost: u64,
    /// Spans that they say they have handed on.
    pub(crate) spans_recorded: u64,
    /// Spans that they say were lost.
    pub(crate) spans_lost: u64,
    /// Spans that the collector has got.
    pub(crate) spans_received: u64,
    /// Scrapes that were answered, of both together.
    pub(crate) scrapes: u64,
    /// Scrapes that were not.
    pub(crate) scrapes_failed: u64,
    /// How long it was scraped, in whole seconds.
    pub(crate) seconds: u64,
}

/// The first rule that was broken.
pub(crate) fn verdict(audit: &Audit) -> Option<String> {
    let Audit { completed, cut_off_max, .. } = *audit;
    for ((who, lines), counted) in ["caller", "callee"].into_iter().zip(audit.lines).zip(audit.counted) {
        if lines != counted {
            return Some(format!("the {who}'s log has {lines} access lines, its metrics {counted} requests"));
        }
        if !(completed..=completed + cut_off_max).contains(&lines) {
            return Some(format!(
                "the {who}'s log has {lines} access lines for {completed} requests and at most {cut_off_max} cut off"
            ));
        }
    }
    if audit.lines_lost > 0 {
        return Some(format!("{} log lines lost", audit.lines_lost));
    }
    if audit.spans_lost > 0 {
        return Some(format!("{} spans lost", audit.spans_lost));
    }
    if audit.spans_recorded != audit.spans_received {
        return Some(format!("{} spans sent, {} received", audit.spans_recorded, audit.spans_received));
    }
    // One in a hundred is sampled: of so many requests, none at all means that nothing is.
    if completed > 2_000 && audit.spans_received == 0 {
        return Some(format!("no span of {completed} requests"));
    }
    if audit.scrapes_failed > 0 {
        return Some(format!("{} scrapes of the metrics failed", audit.scrapes_failed));
    }
    (audit.scrapes < 2 * audit.seconds)
        .then(|| format!("{} scrapes of two sidecars in {} s", audit.scrapes, audit.seconds))
}

/// The sum of a metric's samples, whatever their labels.
pub(crate) fn sum_of(metrics: &str, name: &str) -> u64 {
    let samples = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = match rest.strip_prefix('{') {
            Some(labelled) => labelled.rsplit_once("} ")?.1,
            None => rest.strip_prefix(' ')?,
        };
        value.split(' ').next()?.parse::<f64>().ok()
    });
    // Counts are far below 2^53.
    samples.sum::<f64>() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Audit {
        Audit {
            completed: 10_000,
            cut_off_max: 32,
            lines: [10_032, 10_020],
            counted: [10_032, 10_020],
            lines_lost: 0,
            spans_recorded: 400,
            spans_lost: 0,
            spans_received: 400,
            scrapes: 6,
            scrapes_failed: 0,
            seconds: 3,
        }
    }

    #[test]
    fn each_rule_makes_a_run_void() {
        assert_eq!(verdict(&good()), None);
        let broken = [
            (Audit { lines: [10_031, 10_020], ..good() }, "caller's log"),
            (Audit { lines: [9_999, 10_020], counted: [9_999, 10_020], ..good() }, "for 10000 requests"),
            (Audit { lines: [10_032, 10_033], counted: [10_032, 10_033], ..good() }, "callee's log"),
            (Audit { lines_lost: 1, ..good() }, "log lines lost"),
            (Audit { spans_lost: 1, ..good() }, "spans lost"),
            (Audit { spans_received: 399, ..good() }, "400 spans sent, 399 received"),
            (Audit { spans_recorded: 0, spans_received: 0, ..good() }, "no span"),
            (Audit { scrapes_failed: 1, ..good() }, "scrapes"),
            (Audit { scrapes: 5, ..good() }, "scrapes"),
        ];
        for (audit, word) in broken {
            let reason = verdict(&audit).unwrap_or_default();
            assert!(reason.contains(word), "{reason:?} lacks {word:?}");
        }
    }

    #[test]
    fn samples_are_summed_over_labels() {
        let text = "# TYPE kiro_requests counter\nkiro_requests_total{from=\"a\",to=\"} 9\"} 3\n\
            kiro_requests_total{from=\"b\"} 4 1700000000\nkiro_requests_totals 100\nkiro_log_lines_lost_total 2\n";
        assert_eq!(sum_of(text, "kiro_requests_total"), 7);
        assert_eq!(sum_of(text, "kiro_log_lines_lost_total"), 2);
        assert_eq!(sum_of(text, "kiro_spans_recorded_total"), 0);
    }
}
