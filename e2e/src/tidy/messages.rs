//! Log messages and error texts: a subject and a verb in lower case with fields for data, and one mood.
//!
//! Reads the arguments of the macros across lines, without a parser: parentheses and string literals are enough.

use super::{fail, sources};
use regex::Regex;

/// Beginnings of error texts that have a standard form: "failed to <verb> <object>".
const NONSTANDARD_OPENINGS: [&str; 5] =
    ["cannot ", "could not ", "couldn't ", "can't ", "unable to "];
/// Texts in which another runtime's words are kept, because clients compare them.
const KEPT: [&str; 2] = ["unable to find user", "unable to find group"];

/// A macro call or attribute: its line, and the text between its parentheses.
struct Call {
    line: usize,
    arguments: String,
}

/// Returns the calls in `text` whose opening, up to the parenthesis, matches `opening`.
fn calls(text: &str, opening: &Regex) -> Vec<Call> {
    let found = opening.find_iter(text);
    found
        .map(|start| Call {
            line: text[..start.start()].matches('\n').count() + 1,
            arguments: arguments(&text[start.end()..]),
        })
        .collect()
}

/// Returns the text up to the parenthesis that closes the call.
fn arguments(text: &str) -> String {
    let (mut depth, mut quoted, mut escaped) = (1_usize, false, false);
    for (at, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '(' | '[' | '{' if !quoted => depth += 1,
            ')' | ']' | '}' if !quoted => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return text[..at].to_owned();
        }
    }
    text.to_owned()
}

/// Returns the last string literal of a log macro's arguments, which is its message unless a field follows.
fn message(arguments: &str) -> Option<String> {
    let literal = Regex::new(r#"(?s)(?:^|[,\s])"((?:[^"\\]|\\.)*)"\s*,?\s*(?:$|,[^"]*$)"#);
    let literal = literal.expect("a valid pattern");
    literal.captures(arguments).map(|c| c[1].to_owned())
}

/// Returns the rule that a log message breaks.
fn log_mistake(message: &str) -> Option<&'static str> {
    let first = message.split_whitespace().next().unwrap_or_default();
    let capitals = first.chars().filter(char::is_ascii_uppercase).count();
    let begins_with_capital = first.starts_with(|c: char| c.is_ascii_uppercase());
    if message.split_whitespace().count() < 2 {
        Some("has a single word: write a subject and a verb")
    } else if begins_with_capital && capitals < 2 {
        Some("begins with a capital letter")
    } else if message.ends_with(['.', '!', ':']) {
        Some("ends with punctuation")
    } else if message.contains('{') {
        Some("contains data: use fields")
    } else {
        None
    }
}

/// Returns the rule that an error text breaks.
fn error_mistake(text: &str) -> Option<&'static str> {
    let first = text.split_whitespace().next().unwrap_or_default();
    let capitals = first.chars().filter(char::is_ascii_uppercase).count();
    let begins_with_capital = first.starts_with(|c: char| c.is_ascii_uppercase());
    if KEPT.iter().any(|kept| text.starts_with(kept)) {
        None
    } else if NONSTANDARD_OPENINGS.iter().any(|o| text.starts_with(o)) {
        Some("opens differently from \"failed to <verb> <object>\"")
    } else if text.ends_with(" failed") {
        Some("ends with \"failed\": write \"failed to <verb> <object>\"")
    } else if text.ends_with('.') {
        Some("ends with a period")
    } else if begins_with_capital && capitals < 2 {
        Some("begins with a capital letter")
    } else {
        None
    }
}

/// Files whose messages and errors operators see: all programs, without their tests.
fn is_product(path: &str) -> bool {
    let is_test = path.ends_with("tests.rs") || path.contains("/tests/");
    !path.starts_with("e2e/") && !is_test
}

#[test]
fn log_messages_have_subject_verb_and_fields() {
    let opening = Regex::new(r"\btracing::(?:trace|debug|info|warn|error)!\(").expect("valid");
    let mut mistakes = Vec::new();
    let mut count = 0;
    for (path, text) in sources().into_iter().filter(|(path, _)| is_product(path)) {
        for call in calls(&text, &opening) {
            count += 1;
            match message(&call.arguments) {
                None => mistakes.push(format!("{path}:{}: has no message", call.line)),
                Some(message) => mistakes.extend(
                    log_mistake(&message)
                        .map(|mistake| format!("{path}:{}: {message:?} {mistake}", call.line)),
                ),
            }
        }
    }
    assert!(count > 100, "only {count} log messages were found");
    fail(&mistakes);
}

#[test]
fn log_macros_are_called_by_their_full_path() {
    let bare = Regex::new(r"(?:^|[^:\w])(?:trace|debug|info|warn|error)!\(").expect("valid");
    let mut mistakes = Vec::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| is_product(path)) {
        for (at, line) in text.lines().enumerate() {
            if bare.is_match(line) && !line.trim_start().starts_with("//") {
                mistakes.push(format!("{path}:{}: {}", at + 1, line.trim()));
            }
        }
    }
    fail(&mistakes);
}

#[test]
fn error_texts_have_one_mood() {
    let opening = Regex::new(r"#\[error\(").expect("a valid pattern");
    let literal = Regex::new(r#"(?s)^\s*"((?:[^"\\]|\\.)*)""#).expect("a valid pattern");
    let mut mistakes = Vec::new();
    let mut count = 0;
    for (path, text) in sources().into_iter().filter(|(path, _)| is_product(path)) {
        for call in calls(&text, &opening) {
            let Some(text) = literal.captures(&call.arguments).map(|c| c[1].to_owned()) else {
                continue;
            };
            count += 1;
            if let Some(mistake) = error_mistake(&text) {
                mistakes.push(format!("{path}:{}: {text:?} {mistake}", call.line));
            }
        }
    }
    assert!(count > 100, "only {count} error texts were found");
    fail(&mistakes);
}

#[test]
fn message_rules_find_mistakes() {
    for good in [
        "failed to remove cgroup",
        "NRI plugin registered",
        "ExecSync output truncated",
    ] {
        assert_eq!(log_mistake(good), None, "{good}");
    }
    for bad in [
        "accept",
        "Failed to remove cgroup",
        "failed to stop.",
        "failed after {seconds} s",
    ] {
        assert!(log_mistake(bad).is_some(), "{bad}");
    }
    for bad in [
        "cannot read it",
        "{step} failed",
        "Failed to read",
        "it is full.",
    ] {
        assert!(error_mistake(bad).is_some(), "{bad}");
    }
    let arguments = arguments("id, %error, \"a \\\"b\\\" (c\"\n); more");
    assert_eq!(message(&arguments).as_deref(), Some("a \\\"b\\\" (c"));
}
