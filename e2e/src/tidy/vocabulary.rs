//! Vocabulary: one standard term per thing, in prose and in names.
//!
//! The left column are words of this project's past and coinages that a reader of containerd or Firecracker would have to
//! learn; the right column is the standard term.

use super::language::{Prose, is_checked};
use super::{fail, sources, texts};
use regex::Regex;

/// Expressions that prose does not use, and their standard terms. Case-insensitive.
const WORDS: [(&str, &str); 19] = [
    (r"papers?\b", "documentation"),
    (r"(network|user-mode|ethernet) cards?\b", "NIC, slirp NIC"),
    (r"host names?\b", "hostname"),
    (r"keepers?\b", "mounter, owner"),
    (r"wish(es)?\b", "request"),
    (r"flights? (board|map)\b", "single flight"),
    (r"surroundings\b", "environment"),
    (r"enclaves?\b", "network namespace"),
    (r"shown mounts?\b", "mount export"),
    (r"homes? of (a|the) (test|suite)\b", "backend"),
    (r"the one place\b", "a plain statement"),
    (r"nowhere else\b", "a plain statement"),
    (r"no room\b", "no space left"),
    (r"over their heads\b", "while they run"),
    (r"without a word\b", "without a message"),
    (r"taken up again\b", "re-adopted"),
    (r"news of\b", "events, state"),
    (r"the call of an?\b", "the request"),
    (r"as far as the command\b", "a plain statement"),
];

/// Names of types that say nothing without their module's path, or were coined here, and their successors.
const NAMES: [(&str, &str); 26] = [
    ("Shown", "ExportedMount"),
    ("ShownMount", "ExportedMount"),
    ("Place", "SharePath, BindScope, RewriteContext"),
    ("Origin", "SandboxOwner"),
    ("Wish", "DeviceRequest, BindRequest"),
    ("Wishes", "PodOverrides"),
    ("Wanted", "RequestedStreams"),
    ("Room", "VmCapacity"),
    ("Flight", "SingleFlight"),
    ("Flights", "SingleFlight"),
    ("Board", "SingleFlight"),
    ("Told", "Emitted"),
    ("Way", "EventTransport"),
    ("Keeper", "HostMounter"),
    ("Hidden", "StartingGuard"),
    ("Describe", "UpdateMetadata"),
    ("Record", "PodMetadata, ContainerMetadata, ShimState"),
    ("Front", "ListenerMode"),
    ("Mirrors", "PortListeners"),
    ("World", "TestContext"),
    ("Surroundings", "TestEnv"),
    ("Enclave", "network namespace"),
    ("Trace", "LeakSnapshot"),
    ("Visit", "prefault_submounts"),
    ("Settle", "sync_share"),
    ("Pins", "submount_pins"),
];

/// Names of modules that were coined here.
const MODULES: [&str; 7] = ["flight", "home", "keeper", "pins", "place", "shown", "tell"];

/// Variables and fields of these names hide what they hold.
const VARIABLES: [&str; 8] = [
    "wish", "wishes", "told", "telling", "papers", "enclave", "keeper", "shown",
];

/// Names of constants that lack the quantity or the unit.
const BARE_CONSTANTS: [&str; 16] = [
    "LIMIT", "LOOK", "PAUSE", "QUEUE", "WAIT", "SIZE", "TIME", "PATIENCE", "INTERVAL", "TIMEOUT",
    "DELAY", "MAX", "COUNT", "LENGTH", "ROUNDS", "GRACE",
];

#[test]
fn prose_uses_standard_terms() {
    let prose = Prose::new();
    let words = WORDS.map(|(word, standard)| {
        let regex = Regex::new(&format!(r"(?i)\b{word}")).expect("a valid pattern");
        (regex, standard)
    });
    let mut mistakes = Vec::new();
    for (path, text) in texts() {
        if !is_checked(&path, &text) {
            continue;
        }
        for (at, line) in text.lines().enumerate() {
            let (comment, strings) = prose.of_line(&path, line);
            let searched = format!("{comment} {strings}");
            for (word, standard) in &words {
                if let Some(found) = word.find(&searched) {
                    mistakes.push(format!(
                        "{path}:{}: {:?}, write: {standard}",
                        at + 1,
                        found.as_str()
                    ));
                }
            }
        }
    }
    fail(&mistakes);
}

#[test]
fn types_and_modules_have_standard_names() {
    let defined = Regex::new(r"^\s*(?:pub(?:\([^)]*\))? )?(struct|enum|type|trait|mod) (\w+)")
        .expect("a valid pattern");
    let mut mistakes = Vec::new();
    for (path, text) in sources() {
        for (at, line) in text.lines().enumerate() {
            let Some(captures) = defined.captures(line) else {
                continue;
            };
            let (kind, name) = (&captures[1], &captures[2]);
            if kind == "mod" {
                if MODULES.contains(&name) {
                    mistakes.push(format!("{path}:{}: module {name}", at + 1));
                }
            } else if let Some((_, standard)) = NAMES.iter().find(|(old, _)| name == *old) {
                mistakes.push(format!("{path}:{}: {name}, write: {standard}", at + 1));
            }
        }
    }
    fail(&mistakes);
}

#[test]
fn variables_are_not_coined_words() {
    let string = Regex::new(r#""(?:[^"\\]|\\.)*""#).expect("a valid pattern");
    let word = Regex::new(&format!(r"\b({})\b", VARIABLES.join("|"))).expect("a valid pattern");
    let mut mistakes = Vec::new();
    for (path, text) in sources() {
        if path.starts_with("e2e/src/tidy/") {
            continue;
        }
        for (at, line) in text.lines().enumerate() {
            let code = string.replace_all(line, "");
            if word.is_match(code.split("//").next().unwrap_or_default()) {
                mistakes.push(format!("{path}:{}: {}", at + 1, line.trim()));
            }
        }
    }
    fail(&mistakes);
}

#[test]
fn constants_name_quantity_and_unit() {
    let defined = Regex::new(r"^\s*(?:pub(?:\([^)]*\))? )?const (\w+): (\w+)").expect("valid");
    let mut mistakes = Vec::new();
    for (path, text) in sources() {
        for (at, line) in text.lines().enumerate() {
            let Some(captures) = defined.captures(line) else {
                continue;
            };
            let (name, kind) = (&captures[1], &captures[2]);
            let is_bare = BARE_CONSTANTS.contains(&name);
            let is_limited_time = kind == "Duration" && name.ends_with("_LIMIT");
            if is_bare || is_limited_time {
                mistakes.push(format!("{path}:{}: {name}", at + 1));
            }
        }
    }
    fail(&mistakes);
}
