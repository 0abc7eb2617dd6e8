//! Style of comments, documentation, messages and test names: plain technical English, as described in CONTRIBUTING.md.
//!
//! The patterns find constructions that slow down readers, for example clauses used as nouns ("what was asked for") or
//! indefinite persons for programs ("whoever waits"). A few uses are legitimate, hence a limit per 1,000 words instead of a
//! ban.

use super::{fail, texts};
use regex::Regex;

/// Maximum number of pattern matches per 1,000 words of comments and documentation.
const MAX_MATCHES_PER_1000_WORDS: f64 = 1.0;
/// Maximum number of doc comments that open with a question word.
const MAX_QUESTION_OPENINGS: usize = 45;
/// Maximum number of log messages of a single word.
const MAX_ONE_WORD_LOGS: usize = 0;
/// Maximum number of function names longer than [`MAX_TEST_NAME`].
const MAX_LONG_NAMES: usize = 0;
/// Maximum length of a test name in characters.
const MAX_TEST_NAME: usize = 60;

/// Patterns by name. All are case-insensitive.
const PATTERNS: [(&str, &str); 7] = [
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
    (
        "is none",
        r"\b(is|are|was) none\b|\banew\b|\bfor good\b|\bno more of\b|\bthe like\b|\bof (no )?use\b|\bis (not )?here\b|\bas it (is|was)\b|\b(who|which) (asks|wants|uses|waits)\b|\bis (he|she)\b|\bin words\b",
    ),
];

/// A pattern match.
struct Match {
    path: String,
    line: usize,
    pattern: &'static str,
    text: String,
}

/// Splits the prose out of source lines.
struct Prose {
    comment: Regex,
    message: Regex,
    inline_code: Regex,
    shell_comment: Regex,
    proto_comment: Regex,
}

impl Prose {
    fn new() -> Self {
        let regex = |pattern| Regex::new(pattern).expect("a valid pattern");
        Self {
            comment: regex(r#"(?:^|[^:"\w])//[/!]?(.*)$"#),
            message: regex(
                r#"(?:error\(|(?:trace|debug|info|warn|error)!\(|bail|expect|reason = |println!\(|context\().*?"((?:[^"\\]|\\.)*)""#,
            ),
            inline_code: regex("`[^`]*`"),
            shell_comment: regex(r"(?:^|\s)#(.*)$"),
            proto_comment: regex(r"//(.*)$"),
        }
    }

    /// Returns the prose that counts as words, and the messages that are only searched.
    fn of_line(&self, path: &str, line: &str) -> (String, String) {
        let capture = |regex: &Regex| {
            let found = regex.captures(line).and_then(|c| c.get(1));
            found.map_or(String::new(), |m| m.as_str().to_owned())
        };
        if path.ends_with(".rs") {
            let messages = self.message.captures_iter(line).map(|c| c[1].to_owned());
            (
                capture(&self.comment),
                messages.collect::<Vec<_>>().join(" "),
            )
        } else if path.ends_with(".md") {
            let text = self.inline_code.replace_all(line, "").into_owned();
            (text, String::new())
        } else if path.ends_with(".proto") {
            (capture(&self.proto_comment), String::new())
        } else {
            (capture(&self.shell_comment), String::new())
        }
    }
}

/// Returns true for files whose prose is checked.
fn is_checked(path: &str, text: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    matches!(
        extension,
        "rs" | "md" | "proto" | "toml" | "sh" | "yaml" | "yml"
    ) || name == "Makefile"
        || text.starts_with("#!/bin/")
}

#[test]
fn prose_is_below_the_limit_of_style_patterns() {
    let prose = Prose::new();
    let patterns = PATTERNS.map(|(name, pattern)| {
        let regex = Regex::new(&format!("(?i){pattern}")).expect("a valid pattern");
        (name, regex)
    });
    let (mut words, mut matches) = (0_usize, Vec::new());
    for (path, text) in texts() {
        if !is_checked(&path, &text) {
            continue;
        }
        for (at, line) in text.lines().enumerate() {
            let (counted, searched) = prose.of_line(&path, line);
            words += counted.split_whitespace().count();
            let searched = format!("{counted} {searched}");
            for (name, regex) in &patterns {
                matches.extend(regex.find_iter(&searched).map(|_| Match {
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
    let opening = Regex::new(r"^\s*//[/!] (What|Whether|Who|How|Where|Whom|Whose|Why)\b")
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
fn log_messages_have_more_than_one_word() {
    let one_word = Regex::new(r#"\b(?:trace|debug|info|warn|error)!\((?:.*, )?"\w+"\s*\)"#)
        .expect("a valid pattern");
    let mut mistakes = Vec::new();
    for (path, text) in super::sources() {
        for (at, line) in text.lines().enumerate() {
            if one_word.is_match(line) {
                mistakes.push(format!("{path}:{}: {}", at + 1, line.trim()));
            }
        }
    }
    println!("{} log messages of one word", mistakes.len());
    if mistakes.len() > MAX_ONE_WORD_LOGS {
        fail(&mistakes);
    }
}

#[test]
fn test_names_have_at_most_sixty_characters() {
    let function = Regex::new(r"^\s*(?:async )?fn (\w+)\(").expect("a valid pattern");
    let mut mistakes = Vec::new();
    for (path, text) in super::sources() {
        for (at, line) in text.lines().enumerate() {
            let name = function
                .captures(line)
                .map_or("", |c| c.get(1).map_or("", |m| m.as_str()));
            if name.len() > MAX_TEST_NAME {
                mistakes.push(format!(
                    "{path}:{}: {name} has {} characters, at most {MAX_TEST_NAME}",
                    at + 1,
                    name.len()
                ));
            }
        }
    }
    println!("{} names over {MAX_TEST_NAME} characters", mistakes.len());
    if mistakes.len() > MAX_LONG_NAMES {
        fail(&mistakes);
    }
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
        ("the mount is made anew", "is none"),
    ] {
        let (_, pattern) = PATTERNS.iter().find(|(n, _)| *n == name).expect(name);
        let regex = Regex::new(&format!("(?i){pattern}")).expect("a valid pattern");
        assert!(regex.is_match(example), "{name}: {example}");
    }
}
