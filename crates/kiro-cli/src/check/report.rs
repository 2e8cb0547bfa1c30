//! How is a finding shown? One line each as it is found, and what to do below it.

use crate::output::say;

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    problems: usize,
    warnings: usize,
}

impl Report {
    /// Something is as it should be.
    pub(super) fn good(&mut self, what: impl std::fmt::Display) {
        say(&format!("ok       {what}"));
    }

    /// Something will be a problem.
    pub(super) fn warn(&mut self, what: impl std::fmt::Display, fix: impl std::fmt::Display) {
        self.warnings += 1;
        say(&format!("warning  {what}"));
        say(&format!("         → {fix}"));
    }

    /// Something is a problem.
    pub(super) fn bad(&mut self, what: impl std::fmt::Display, fix: impl std::fmt::Display) {
        self.problems += 1;
        say(&format!("PROBLEM  {what}"));
        say(&format!("         → {fix}"));
    }

    /// A problem whose text says what to do.
    pub(super) fn bad_as_said(&mut self, what: impl std::fmt::Display) {
        self.problems += 1;
        for (number, line) in what.to_string().lines().enumerate() {
            say(&format!("{}{line}", if number == 0 { "PROBLEM  " } else { "         " }));
        }
    }

    /// The sum, and the exit code.
    pub(super) fn end(&self) -> u8 {
        match (self.problems, self.warnings) {
            (0, 0) => say("all is well"),
            (0, warnings) => say(&format!("nothing is wrong yet, {warnings} to look at")),
            (problems, warnings) => say(&format!("{problems} to mend, {warnings} to look at")),
        }
        u8::from(self.problems > 0)
    }
}
