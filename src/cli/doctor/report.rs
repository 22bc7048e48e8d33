//! What a check has to say, for people and for machines.

use std::fmt::Display;

use serde::Serialize;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// All is well.
    Ok,
    /// It works, or may be meant so; a person should look.
    Warning,
    /// Something is wrong.
    Failed,
    /// There was nothing to check.
    Skipped,
}

/// One line of the report. No secret is in it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Check {
    /// Its name, for machines.
    name: &'static str,
    status: Verdict,
    /// What was tried.
    tried: String,
    /// What came.
    found: String,
    /// What to do; empty where there is nothing to do.
    advice: String,
}

impl Check {
    /// All is well.
    pub(super) fn ok(name: &'static str, tried: impl Display, found: impl Display) -> Self {
        Self::new(name, Verdict::Ok, tried, found, "")
    }

    /// A person should look.
    pub(super) fn warning(
        name: &'static str,
        tried: impl Display,
        found: impl Display,
        advice: impl Display,
    ) -> Self {
        Self::new(name, Verdict::Warning, tried, found, advice)
    }

    /// Something is wrong.
    pub(super) fn failed(
        name: &'static str,
        tried: impl Display,
        found: impl Display,
        advice: impl Display,
    ) -> Self {
        Self::new(name, Verdict::Failed, tried, found, advice)
    }

    /// There is nothing to check.
    pub(super) fn skipped(name: &'static str, tried: impl Display, found: impl Display) -> Self {
        Self::new(name, Verdict::Skipped, tried, found, "")
    }

    fn new(
        name: &'static str,
        status: Verdict,
        tried: impl Display,
        found: impl Display,
        advice: impl Display,
    ) -> Self {
        // One line each, whatever another program has said.
        let line = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        Self {
            name,
            status,
            tried: line(tried.to_string()),
            found: line(found.to_string()),
            advice: line(advice.to_string()),
        }
    }

    /// Whether something is wrong.
    pub(super) fn is_failure(&self) -> bool {
        self.status == Verdict::Failed
    }

    /// The line for people.
    pub(super) fn line(&self) -> String {
        let mark = match self.status {
            Verdict::Ok => "ok",
            Verdict::Warning => "WARNING",
            Verdict::Failed => "FAILED",
            Verdict::Skipped => "skipped",
        };
        let said = [&self.tried, &self.found, &self.advice].map(String::as_str);
        let said: Vec<&str> = said.into_iter().filter(|part| !part.is_empty()).collect();
        format!("{mark:<7}  {:<16}  {}", self.name, said.join(" · "))
    }
}

/// All checks, for machines.
#[derive(Serialize)]
pub(super) struct Report {
    ok: bool,
    checks: Vec<Check>,
}

impl Report {
    /// `ok` unless one of `checks` failed.
    pub(super) fn of(checks: Vec<Check>) -> Self {
        Self { ok: !checks.iter().any(Check::is_failure), checks }
    }

    /// Whether nothing is wrong.
    pub(super) fn is_ok(&self) -> bool {
        self.ok
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_was_tried_what_came_and_what_to_do() {
        let check = Check::failed("redis", "load", "no\nanswer", "start it");
        assert_eq!(check.line(), "FAILED   redis             load · no answer · start it");
        assert_eq!(Check::ok("dns", "a", "b").line(), "ok       dns               a · b");
    }

    #[test]
    fn only_a_failure_makes_the_report_bad() {
        let warning = Check::warning("a", "", "", "");
        assert!(Report::of(vec![warning.clone(), Check::skipped("b", "", "")]).is_ok());
        assert!(!Report::of(vec![warning, Check::failed("c", "", "", "")]).is_ok());
    }
}
