//! [`Report`]: the results of one run as a JUnit XML file, the form that public CI services display.

use crate::failure::{During, Result};
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// Result of one case.
pub(crate) enum Outcome {
    /// The case passed.
    Passed,
    /// The case failed, with this text.
    Failed(String),
    /// The case did not run, for this reason.
    Skipped(String),
}

struct Entry {
    /// `<module>::<function>`.
    name: String,
    duration: Duration,
    outcome: Outcome,
}

/// Results of one run, in order.
#[derive(Default)]
pub(crate) struct Report {
    entries: Vec<Entry>,
}

impl Report {
    /// Adds the result of one case.
    pub(crate) fn add(&mut self, name: &str, duration: Duration, outcome: Outcome) {
        self.entries.push(Entry {
            name: name.to_owned(),
            duration,
            outcome,
        });
    }

    /// Writes the file and creates its directory.
    pub(crate) fn write(&self, suite: &str, path: &Path) -> Result {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).during(parent.display())?;
        }
        std::fs::write(path, self.xml(suite)).during(path.display())
    }

    fn xml(&self, suite: &str) -> String {
        let count = |wanted: fn(&Outcome) -> bool| {
            let matching = self.entries.iter().filter(|e| wanted(&e.outcome));
            matching.count()
        };
        let failed = count(|o| matches!(o, Outcome::Failed(_)));
        let skipped = count(|o| matches!(o, Outcome::Skipped(_)));
        let seconds: f64 = self.entries.iter().map(|e| e.duration.as_secs_f64()).sum();
        // The schema requires `errors`, although no case ends with one.
        let mut xml = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n<testsuite name=\"{}\" tests=\"{}\" failures=\"{failed}\" errors=\"0\" skipped=\"{skipped}\" time=\"{seconds:.3}\">\n",
            escape(suite),
            self.entries.len(),
        );
        for entry in &self.entries {
            let (class, name) = entry.name.rsplit_once("::").unwrap_or(("", &entry.name));
            let content = match &entry.outcome {
                Outcome::Passed => String::new(),
                Outcome::Failed(text) => format!(
                    "<failure message=\"{}\">{}</failure>",
                    escape(text.lines().next().unwrap_or_default()),
                    escape(text)
                ),
                Outcome::Skipped(reason) => {
                    format!("<skipped message=\"{}\"/>", escape(reason))
                }
            };
            let _ = writeln!(
                xml,
                "<testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\">{content}</testcase>",
                escape(class),
                escape(name),
                entry.duration.as_secs_f64(),
            );
        }
        xml.push_str("</testsuite>\n</testsuites>\n");
        xml
    }
}

/// Escapes text for elements and attributes. Characters that XML cannot represent become U+FFFD.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            '\t' => escaped.push('\t'),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xml_counts_and_escapes_every_outcome() {
        let mut report = Report::default();
        report.add("exec::a", Duration::from_millis(1500), Outcome::Passed);
        report.add(
            "exec::b",
            Duration::from_secs(2),
            Outcome::Failed("1 < 2 & \"x\"\n\u{1b}[0m\u{ffff}".into()),
        );
        report.add("logs::c", Duration::ZERO, Outcome::Skipped("no KVM".into()));
        let xml = report.xml("qemu");
        for part in [
            "name=\"qemu\" tests=\"3\" failures=\"1\" errors=\"0\" skipped=\"1\" time=\"3.500\"",
            "<testcase classname=\"exec\" name=\"a\" time=\"1.500\"></testcase>",
            "<failure message=\"1 &lt; 2 &amp; &quot;x&quot;\">1 &lt; 2 &amp; &quot;x&quot;&#10;\u{fffd}[0m\u{fffd}</failure>",
            "<skipped message=\"no KVM\"/>",
        ] {
            assert!(xml.contains(part), "{part} not found in {xml}");
        }
    }
}
