//! Bar charts, readable on light and on dark ground.

use std::fmt::Write as _;

use crate::report::table::number;
use crate::stats::Spread;

/// A bar, with a line over it from the smallest to the largest round.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bar {
    /// Whose.
    pub(crate) label: String,
    /// How long, and how sure.
    pub(crate) spread: Spread,
    /// Whether it is one of Kiro's.
    pub(crate) ours: bool,
}

const WIDTH: f64 = 720.0;
const LABELS: f64 = 190.0;
const NUMBERS: f64 = 90.0;
const ROW: f64 = 30.0;
const BAR: f64 = 18.0;
const TOP: f64 = 52.0;

/// Colours by what the reader's screen is set to; text and bars differ from both grounds.
const STYLE: &str = "<style>\
text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-size:15px;font-weight:600}.small{font-size:12px;fill:#57606a}\
.ours{fill:#0969da}.theirs{fill:#8c959f}.reach{stroke:#24292f;stroke-width:1.5}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.ours{fill:#4493f8}.theirs{fill:#6e7681}.reach{stroke:#e6edf3}}\
</style>";

/// Draws one chart. Bars start at nothing, so that lengths compare as figures do.
pub(crate) fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    let height = TOP + ROW * bars.len() as f64 + 8.0;
    let longest = bars.iter().map(|bar| bar.spread.max).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABELS - NUMBERS) / longest;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>{title}</title>\n{STYLE}\n<text class=\"title\" x=\"0\" y=\"18\">{title}</text>\n\
         <text class=\"small\" x=\"0\" y=\"36\">{unit}; the thin line reaches from the smallest round to the largest</text>\n",
        title = escaped(title),
        unit = escaped(unit),
    );
    for (index, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * index as f64;
        let (length, middle) = (bar.spread.median * scale, y + BAR / 2.0);
        let (from, to) = (LABELS + bar.spread.min * scale, LABELS + bar.spread.max * scale);
        let class = if bar.ours { "ours" } else { "theirs" };
        // Writing to a String does not fail.
        let _ = writeln!(
            svg,
            "<text x=\"{x:.0}\" y=\"{text:.1}\" text-anchor=\"end\">{label}</text>\
             <rect class=\"{class}\" x=\"{LABELS}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\"/>\
             <line class=\"reach\" x1=\"{from:.1}\" y1=\"{middle:.1}\" x2=\"{to:.1}\" y2=\"{middle:.1}\"/>\
             <text x=\"{number_x:.1}\" y=\"{text:.1}\">{number}</text>",
            x = LABELS - 8.0,
            text = y + 13.5,
            label = escaped(&bar.label),
            number_x = to.max(LABELS + length) + 6.0,
            number = number(Some(bar.spread.median)),
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_figures() {
        let bar = |label: &str, median: f64, ours| Bar {
            label: label.to_owned(),
            spread: Spread { median, min: median / 2.0, max: median },
            ours,
        };
        let svg = bars("a < b", "µs", &[bar("kiro", 20.0, true), bar("other", 40.0, false)]);
        assert!(svg.contains("a &lt; b") && !svg.contains("a < b"));
        let full = WIDTH - LABELS - NUMBERS;
        assert!(svg.contains(&format!("class=\"theirs\" x=\"190\" y=\"82.0\" width=\"{full:.1}\"")), "{svg}");
        assert!(
            svg.contains(&format!("class=\"ours\" x=\"190\" y=\"52.0\" width=\"{:.1}\"", full / 2.0)),
            "{svg}"
        );
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }

    #[test]
    fn no_bars_are_no_trouble() {
        assert!(bars("empty", "ms", &[]).ends_with("</svg>\n"));
    }
}
