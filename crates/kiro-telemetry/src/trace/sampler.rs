//! Which traces are kept? `OTEL_TRACES_SAMPLER` says, by the rules of the OpenTelemetry specification.

use super::TracingError;

const VARIABLE: &str = "OTEL_TRACES_SAMPLER";
const ARGUMENT: &str = "OTEL_TRACES_SAMPLER_ARG";

/// A decision on each trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    root: Root,
    /// Whether a span does as its parent did.
    parent_based: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Root {
    AlwaysOn,
    AlwaysOff,
    Ratio(f64),
}

impl Sampler {
    /// The default: as the parent, and every trace that begins here.
    pub const PARENT_BASED_ALWAYS_ON: Self = Self { root: Root::AlwaysOn, parent_based: true };
    /// As the parent, and none that begins here.
    pub const PARENT_BASED_ALWAYS_OFF: Self = Self { root: Root::AlwaysOff, parent_based: true };

    /// Reads the values of `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`.
    pub fn parse(name: &str, argument: Option<&str>) -> Result<Self, TracingError> {
        let (kind, parent_based) = match name.strip_prefix("parentbased_") {
            Some(kind) => (kind, true),
            None => (name, false),
        };
        let root = match kind {
            "always_on" => Root::AlwaysOn,
            "always_off" => Root::AlwaysOff,
            "traceidratio" => Root::Ratio(parse_ratio(argument)?),
            _ => {
                return Err(TracingError::Variable {
                    variable: VARIABLE,
                    value: name.to_owned(),
                    allowed: "always_on, always_off, traceidratio, parentbased_always_on, \
                              parentbased_always_off, parentbased_traceidratio",
                });
            }
        };
        Ok(Self { root, parent_based })
    }

    /// For a trace that begins here, or whose decision we make anew.
    pub(super) fn root(self, trace_id: u128) -> bool {
        match self.root {
            Root::AlwaysOn => true,
            Root::AlwaysOff => false,
            Root::Ratio(ratio) => is_within(ratio, trace_id),
        }
    }

    /// For a span under another one.
    pub(super) fn child(self, trace_id: u128, parent_sampled: bool) -> bool {
        if self.parent_based { parent_sampled } else { self.root(trace_id) }
    }
}

fn parse_ratio(argument: Option<&str>) -> Result<f64, TracingError> {
    // The specification's default.
    let Some(argument) = argument else { return Ok(1.0) };
    match argument.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        Ok(_) | Err(_) => Err(TracingError::Variable {
            variable: ARGUMENT,
            value: argument.to_owned(),
            allowed: "a number from 0 to 1",
        }),
    }
}

/// The same rule as the SDKs' (63 of the trace id's bits against the ratio), so that every service that samples by
/// ratio keeps the same traces.
fn is_within(ratio: f64, trace_id: u128) -> bool {
    let bound = (ratio * (1_u64 << 63) as f64) as u64;
    // The cast keeps the lower half.
    ratio >= 1.0 || (trace_id as u64) >> 1 < bound
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(name: &str, argument: Option<&str>) -> Sampler {
        Sampler::parse(name, argument).unwrap()
    }

    #[test]
    fn each_by_its_name() {
        let low = 1_u128;
        let high = u128::from(u64::MAX);
        // Name, argument, root of a low id, root of a high id, child of a sampled, child of an unsampled (high id).
        let table = [
            ("always_on", None, true, true, true, true),
            ("always_off", None, false, false, false, false),
            ("traceidratio", Some("0.5"), true, false, false, false),
            ("traceidratio", None, true, true, true, true),
            ("parentbased_always_on", None, true, true, true, false),
            ("parentbased_always_off", None, false, false, true, false),
            ("parentbased_traceidratio", Some("0.5"), true, false, true, false),
        ];
        for (name, argument, root_low, root_high, of_sampled, of_unsampled) in table {
            let sampler = sampler(name, argument);
            assert_eq!(sampler.root(low), root_low, "{name}");
            assert_eq!(sampler.root(high), root_high, "{name}");
            assert_eq!(sampler.child(high, true), of_sampled, "{name}");
            assert_eq!(sampler.child(high, false), of_unsampled, "{name}");
        }
    }

    #[test]
    fn a_ratio_keeps_that_part_and_decides_as_the_sdk_does() {
        use opentelemetry::trace::{SpanKind, TraceId};
        use opentelemetry_sdk::trace::{Sampler as SdkSampler, SamplingDecision, ShouldSample};
        let mut rng = fastrand::Rng::with_seed(3);
        for ratio in [0.0, 0.01, 0.3, 1.0] {
            let ours = sampler("traceidratio", Some(&ratio.to_string()));
            let theirs = SdkSampler::TraceIdRatioBased(ratio);
            let mut kept = 0;
            for _ in 0..20_000 {
                let trace_id = rng.u128(1..);
                let id = TraceId::from_bytes(trace_id.to_be_bytes());
                let decision = theirs.should_sample(None, id, "", &SpanKind::Server, &[], &[]).decision;
                assert_eq!(ours.root(trace_id), decision == SamplingDecision::RecordAndSample);
                kept += u32::from(ours.root(trace_id));
            }
            assert!((f64::from(kept) / 20_000.0 - ratio).abs() < 0.02, "{kept} of 20000 for {ratio}");
        }
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let error = Sampler::parse("sometimes", None).unwrap_err().to_string();
        assert!(error.contains("OTEL_TRACES_SAMPLER=\"sometimes\""), "{error}");
        assert!(error.contains("parentbased_traceidratio"), "{error}");
        for argument in ["1.5", "-0.1", "half", "NaN", ""] {
            let error = Sampler::parse("parentbased_traceidratio", Some(argument)).unwrap_err().to_string();
            assert!(error.contains(&format!("OTEL_TRACES_SAMPLER_ARG={argument:?}")), "{error}");
        }
        assert!(Sampler::parse("parentbased_jaeger_remote", None).is_err());
    }
}
