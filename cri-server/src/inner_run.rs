//! Support for tests that change network or mounts: each re-executes itself in private namespaces.
//!
//! It checks only that the inner run took place and passed. Called by the tests of `cni` and of `service`.

use std::process::Command;

/// Environment variable that is set in the inner run.
const INSIDE: &str = "BOXLITE_TEST_INSIDE";

/// Returns false in the outer run, which has run the inner one. `test` is the full path of the calling test.
pub(crate) fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("1 passed"),
        "the inner run had no such test: {text}"
    );
    false
}
