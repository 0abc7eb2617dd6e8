//! Strict syntax check of the log filter.
//!
//! tracing-subscriber's `EnvFilter` accepts `a=b=c` and logs nothing for it; a filter that does not parse as written is rejected
//! here with a reason.

use boxlite_config::value;
use toml::Value;
use tracing_subscriber::EnvFilter;

/// Level names; tracing also takes the numbers 0 (off) to 5 (trace).
const LEVELS: &str = "off, error, warn, info, debug or trace";

/// Reads the key `log_level`.
pub(crate) fn read(value: &Value) -> Result<String, String> {
    check(value::text(value)?)
}

/// Returns the filter if every directive of it is `level`, `target` or `target=level`, where the target may have a
/// `[span{field=value}]`.
pub(crate) fn check(filter: &str) -> Result<String, String> {
    for directive in directives(filter) {
        check_directive(directive.trim())?;
    }
    EnvFilter::try_new(filter)
        .map(|_| filter.to_owned())
        .map_err(|error| format!("invalid log filter: {error}"))
}

/// Splits at the commas outside brackets.
fn directives(filter: &str) -> Vec<&str> {
    let mut depth = 0usize;
    filter
        .split(move |c| {
            match c {
                '[' | '{' => depth += 1,
                ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            c == ',' && depth == 0
        })
        .collect()
}

fn check_directive(directive: &str) -> Result<(), String> {
    let invalid = |reason: &str| Err(format!("invalid log filter: {directive:?} {reason}"));
    let (target, level) = match directive.rfind(']') {
        Some(end) => {
            let target = directive.split('[').next().unwrap_or_default();
            match &directive[end + 1..] {
                "" => (target, None),
                rest => match rest.strip_prefix('=') {
                    Some(level) => (target, Some(level)),
                    None => return invalid("has text after the span"),
                },
            }
        }
        None if directive.is_empty() => return invalid("is an empty directive"),
        None => match directive.split_once('=') {
            Some(("", _)) => return invalid("has no target before ="),
            Some((target, level)) => (target, Some(level)),
            None => (directive, None),
        },
    };
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | ':' | '.');
    if !target.chars().all(allowed) {
        return invalid("is not level, target or target=level");
    }
    match level {
        Some(level) if level.parse::<tracing::metadata::LevelFilter>().is_err() => Err(format!(
            "invalid log filter: {level:?} in {directive:?} is not {LEVELS}"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_accepts_filters_documented_by_tracing() {
        for filter in [
            "info",
            "boxlite_cri=debug,info",
            "boxlite_cri::service=trace, warn",
            "off",
            "boxlite_cri[call{method=\"Version\"}]=debug,info",
            "[call]=trace",
            "boxlite_cri[call]",
            "3",
        ] {
            assert_eq!(check(filter).as_deref(), Ok(filter));
        }
    }

    #[test]
    fn check_rejects_malformed_directives() {
        for (filter, reason) in [
            ("a=b=c", "\"b=c\" in \"a=b=c\" is not off, error"),
            ("info,a=loud", "\"loud\""),
            ("=info", "no target"),
            ("", "empty directive"),
            ("info,", "empty directive"),
            ("a b", "not level, target"),
            ("a[b]c", "after the span"),
        ] {
            let error = check(filter).unwrap_err();
            assert!(error.contains(reason), "{filter}: {error}");
        }
    }
}
