//! [`readme`]: the chart's README, from the comments of values.yaml. Reads the subset of YAML that values.yaml uses: nested
//! mappings of two spaces, comments above keys, and block scalars or lists below a key.

/// Row of the table.
#[derive(Debug, PartialEq, Eq)]
struct Value {
    path: String,
    default: String,
    text: String,
}

/// Marker in the template that the table replaces.
const MARKER: &str = "@VALUES@";

/// Returns the template with a table of all values.
pub(crate) fn readme(template: &str, values: &str) -> String {
    let mut table = String::from("| value | default | meaning |\n|---|---|---|\n");
    for value in parse(values) {
        let default = match value.default.as_str() {
            "" => String::new(),
            default => format!("`{default}`"),
        };
        table.push_str(&format!(
            "| `{}` | {default} | {} |\n",
            value.path, value.text
        ));
    }
    template.replace(MARKER, table.trim_end())
}

/// Returns the commented keys. A key without a comment belongs to the default of the one above.
fn parse(values: &str) -> Vec<Value> {
    let (mut found, mut comment) = (Vec::<Value>::new(), Vec::new());
    let mut parents: Vec<&str> = Vec::new();
    for line in values.lines() {
        let text = line.trim_start();
        let depth = (line.len() - text.len()) / 2;
        if let Some(words) = text.strip_prefix("# ") {
            comment.push(words);
        } else if text.is_empty() {
            comment.clear();
        } else if let Some((key, value)) = text.split_once(':').filter(|_| !comment.is_empty()) {
            parents.truncate(depth);
            parents.push(key);
            found.push(Value {
                path: parents.join("."),
                default: value.trim().trim_end_matches('|').trim().to_owned(),
                text: comment.join(" "),
            });
            comment.clear();
        } else if let Some(last) = found.last_mut() {
            let separator = if last.default.is_empty() { "" } else { ", " };
            last.default.push_str(&format!("{separator}{text}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn readme_lists_nested_values_with_defaults() {
        let values = "# Image.\nimage:\n  # Its name.\n  name: a\n\n# Two\n# lines.\nmemory:\n  cpu: 1\n  ram: 2\n";
        assert_eq!(
            readme("Values:\n@VALUES@\nend", values),
            "Values:\n| value | default | meaning |\n|---|---|---|\n| `image` |  | Image. |\n\
             | `image.name` | `a` | Its name. |\n| `memory` | `cpu: 1, ram: 2` | Two lines. |\nend"
        );
    }

    /// `make chart-update` writes the file.
    #[test]
    fn chart_readme_matches_its_values() {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/boxlite");
        let read = |name: &str| std::fs::read_to_string(chart.join(name)).expect(name);
        let expected = readme(&read("README.md.in"), &read("values.yaml"));
        assert_eq!(read("README.md"), expected, "run make chart-update");
    }
}
