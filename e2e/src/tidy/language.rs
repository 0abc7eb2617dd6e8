//! Style of comments, documentation and names: plain technical English, as described in CONTRIBUTING.md.
//!
//! The patterns find constructions that slow down readers, for example clauses used as nouns ("what was asked for") or
//! indefinite persons for programs ("whoever waits"). A few uses are legitimate, hence a limit per 1,000 words instead of a
//! ban. Messages are checked in [`super::messages`], the vocabulary in [`super::vocabulary`].

use super::{fail, texts};
use regex::Regex;

/// Maximum number of pattern matches per 1,000 words of comments and documentation.
const MAX_MATCHES_PER_1000_WORDS: f64 = 0.35;
/// Maximum number of doc comments that open with a question word.
const MAX_QUESTION_OPENINGS: usize = 5;
/// Maximum length of a function's name in characters; test names are the long ones.
const MAX_NAME_CHARS: usize = 60;
/// Minimum number of words in the name of a test, which says a unit and its behavior.
const MIN_TEST_NAME_WORDS: usize = 3;

/// Patterns by name. All are case-insensitive.
const PATTERNS: [(&str, &str); 9] = [
    ("clause as noun", r"\b(what|whatever)\b"),
    ("told", r"\b(told|tell|tells|telling)\b"),
    (
        "indefinite person",
        r"\b(nobody|somebody|anybody|whoever|whom)\b",
    ),
    ("of its own", r"\bof (its|their|his|her|one's|our) own\b"),
    (
        "where for if",
        r"(^|[.;:,(] ?)where (a|an|the|it|one|there|no|that|this|they|both|all|its|none|nothing|only|several|each|he|she|nobody|neither|other|two|more|some)\b",
    ),
    ("is left", r"\b(is|are|was|were|be|been) left\b"),
    ("stands, stays", r"\b(stands|stand|stays|stay|stayed)\b"),
    ("is no", r"\b\w+ (is|are|was|were) no \w+"),
    (
        "is none",
        r"\b(is|are|was) none\b|\banew\b|\bfor good\b|\bno more of\b|\bthe like\b|\bof (no )?use\b|\bis (not )?here\b|\bas it (is|was)\b|\b(who|which) (asks|wants|uses|waits)\b|\bis (he|she)\b|\bin words\b",
    ),
];

/// Matches that are good English.
const EXCEPTIONS: &str = r"(?i)\bthere (is|are|was|were) no |\bno (longer|more)\b";

/// A pattern match.
struct Match {
    path: String,
    line: usize,
    pattern: &'static str,
    text: String,
}

/// Splits the prose out of source lines.
pub(super) struct Prose {
    comment: Regex,
    message: Regex,
    inline_code: Regex,
    shell_comment: Regex,
    slash_comment: Regex,
}

impl Prose {
    pub(super) fn new() -> Self {
        let regex = |pattern| Regex::new(pattern).expect("a valid pattern");
        Self {
            comment: regex(r#"(?:^|[^:"\w])//[/!]?(.*)$"#),
            message: regex(r#""((?:[^"\\]|\\.)*)""#),
            inline_code: regex("`[^`]*`"),
            shell_comment: regex(r"(?:^|\s)#(.*)$"),
            slash_comment: regex(r"//(.*)$"),
        }
    }

    /// Returns the prose that counts as words, and the text of strings, which is only searched. A string of one word is
    /// data.
    pub(super) fn of_line(&self, path: &str, line: &str) -> (String, String) {
        let capture = |regex: &Regex| {
            let found = regex.captures(line).and_then(|c| c.get(1));
            found.map_or(String::new(), |m| m.as_str().to_owned())
        };
        if path.ends_with(".rs") {
            let strings = self.message.captures_iter(line).map(|c| c[1].to_owned());
            let texts: Vec<_> = strings.filter(|s| s.contains(' ')).collect();
            (capture(&self.comment), texts.join(" | "))
        } else if path.ends_with(".md") {
            let text = self.inline_code.replace_all(line, "").into_owned();
            (text, String::new())
        } else if [".proto", ".go", ".c"].iter().any(|e| path.ends_with(e)) {
            (capture(&self.slash_comment), String::new())
        } else {
            (capture(&self.shell_comment), String::new())
        }
    }
}

/// Returns true for files whose prose is checked. This module's examples break the rules on purpose.
pub(super) fn is_checked(path: &str, text: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    let is_prose = matches!(
        extension,
        "rs" | "md" | "proto" | "go" | "c" | "toml" | "sh" | "yaml" | "yml"
    );
    !path.starts_with("e2e/src/tidy/")
        && (is_prose || name == "Makefile" || text.starts_with("#!/bin/"))
}

#[test]
fn prose_is_below_the_limit_of_style_patterns() {
    let prose = Prose::new();
    let patterns = PATTERNS.map(|(name, pattern)| {
        let regex = Regex::new(&format!("(?i){pattern}")).expect("a valid pattern");
        (name, regex)
    });
    let exceptions = Regex::new(EXCEPTIONS).expect("a valid pattern");
    let variable = Regex::new(r"\{\w*(:[^}]*)?\}").expect("a valid pattern");
    let (mut words, mut matches) = (0_usize, Vec::new());
    for (path, text) in texts() {
        if !is_checked(&path, &text) {
            continue;
        }
        for (at, line) in text.lines().enumerate() {
            let (counted, searched) = prose.of_line(&path, line);
            words += counted.split_whitespace().count();
            let searched = format!("{counted} {}", variable.replace_all(&searched, "{}"));
            for (name, regex) in &patterns {
                let found = regex.find_iter(&searched);
                let found = found.filter(|m| !exceptions.is_match(m.as_str()));
                matches.extend(found.map(|_| Match {
                    path: path.clone(),
                    line: at + 1,
                    pattern: name,
                    text: line.trim().to_owned(),
                }));
            }
        }
    }
    let per_1000 = matches.len() as f64 * 1000.0 / words.max(1) as f64;
    println!(
        "{words} words, {} matches, {per_1000:.2} per 1,000",
        matches.len()
    );
    if per_1000 > MAX_MATCHES_PER_1000_WORDS {
        let mut mistakes: Vec<_> = matches
            .iter()
            .map(|m| format!("{}:{}: {}: {}", m.path, m.line, m.pattern, m.text))
            .collect();
        mistakes.push(format!(
            "{per_1000:.2} style matches per 1,000 words, at most {MAX_MATCHES_PER_1000_WORDS}: rewrite some of these lines"
        ));
        fail(&mistakes);
    }
}

#[test]
fn doc_comments_open_with_a_verb_or_noun() {
    let opening =
        Regex::new(r"^\s*//[/!] (What|Whether|Who|How|When|Where|Which|Whom|Whose|Why)\b")
            .expect("a valid pattern");
    let doc = Regex::new(r"^\s*//[/!]").expect("a valid pattern");
    let mut mistakes = Vec::new();
    for (path, text) in super::sources() {
        let mut follows_doc = false;
        for (at, line) in text.lines().enumerate() {
            if !follows_doc && opening.is_match(line) {
                mistakes.push(format!("{path}:{}: {}", at + 1, line.trim()));
            }
            follows_doc = doc.is_match(line);
        }
    }
    println!("{} doc comments open with a question word", mistakes.len());
    if mistakes.len() > MAX_QUESTION_OPENINGS {
        fail(&mistakes);
    }
}

#[test]
fn names_of_functions_and_tests_have_the_right_length() {
    let function = Regex::new(r"^\s*(?:pub(?:\([^)]*\))? )?(?:async )?fn (\w+)\b").expect("valid");
    let test = Regex::new(r"^\s*#\[(?:tokio::)?test\b").expect("a valid pattern");
    let coined = Regex::new(r"^(what|who)_|_(what|whatever|told|nobody|whoever)_");
    let coined = coined.expect("a valid pattern");
    let mut mistakes = Vec::new();
    for (path, text) in super::sources() {
        let mut is_test = false;
        for (at, line) in text.lines().enumerate() {
            is_test |= test.is_match(line);
            let Some(captures) = function.captures(line) else {
                continue;
            };
            let name = &captures[1];
            if name.len() > MAX_NAME_CHARS {
                mistakes.push(format!(
                    "{path}:{}: {name} has {} characters, at most {MAX_NAME_CHARS}",
                    at + 1,
                    name.len()
                ));
            }
            if is_test && coined.is_match(name) {
                mistakes.push(format!("{path}:{}: {name}: name the unit first", at + 1));
            }
            if is_test && name.split('_').count() < MIN_TEST_NAME_WORDS {
                mistakes.push(format!(
                    "{path}:{}: {name} says no behavior: <unit>_<condition>_<result>",
                    at + 1
                ));
            }
            is_test = false;
        }
    }
    fail(&mistakes);
}

/// The macro `case!` takes the name from the function; a case made otherwise could have another one.
#[test]
fn case_names_are_function_names() {
    let made = Regex::new(r"\bcase_at\(|\bCase(::<\w+>)? \{$").expect("a valid pattern");
    let mut mistakes = Vec::new();
    for (path, text) in super::sources() {
        if !path.starts_with("e2e/src/") || path == "e2e/src/runner.rs" {
            continue;
        }
        for (at, line) in text.lines().enumerate() {
            if made.is_match(line) && !path.starts_with("e2e/src/tidy/") {
                mistakes.push(format!("{path}:{}: a case made without case!", at + 1));
            }
        }
    }
    fail(&mistakes);
}

#[test]
fn style_patterns_match_their_examples() {
    for (example, name) in [
        ("the rest of what was asked for", "clause as noun"),
        ("plugins are told in order", "told"),
        ("whoever waits for it", "indefinite person"),
        ("a node of its own", "of its own"),
        ("refused, where it cannot run", "where for if"),
        ("nothing is left", "is left"),
        ("the old file stays open", "stands, stays"),
        ("the file is no socket", "is no"),
        ("the mount is made anew", "is none"),
    ] {
        let (_, pattern) = PATTERNS.iter().find(|(n, _)| *n == name).expect(name);
        let regex = Regex::new(&format!("(?i){pattern}")).expect("a valid pattern");
        assert!(regex.is_match(example), "{name}: {example}");
    }
    let exceptions = Regex::new(EXCEPTIONS).expect("a valid pattern");
    assert!(exceptions.is_match("there is no socket"));
    assert!(!exceptions.is_match("the file is no socket"));
}
