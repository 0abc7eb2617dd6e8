//! Passes the git commit to the program as `BOXLITE_COMMIT`: of the environment, the checkout, or the source archive, for which
//! git writes it into the file COMMIT (.gitattributes); else `unknown`.

use std::path::Path;
use std::process::Command;

/// Digits of the printed commit.
const COMMIT_DIGITS: usize = 12;

fn main() {
    println!("cargo:rerun-if-env-changed=BOXLITE_COMMIT");
    let commit = std::env::var("BOXLITE_COMMIT")
        .ok()
        .filter(|commit| !commit.is_empty())
        .or_else(|| git(&["rev-parse", "HEAD"]))
        .or_else(archived)
        .map(|commit| commit.chars().take(COMMIT_DIGITS).collect())
        .unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=BOXLITE_COMMIT={commit}");
    // A commit, a checkout or a rebase appends to this file. Without it, only a change of this script runs it again.
    match git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| Path::new(log).exists()) {
        Some(log) => println!("cargo:rerun-if-changed={log}"),
        None => println!("cargo:rerun-if-changed=build.rs"),
    }
}

/// Output of git in this directory; `None` if git fails, is missing, or the checkout belongs to another project that merely
/// contains this source tree.
fn git(args: &[&str]) -> Option<String> {
    let manifest = Path::new(&std::env::var_os("CARGO_MANIFEST_DIR")?).join("..");
    manifest.join(".git").exists().then_some(())?;
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}

/// Commit of a source archive; `None` in a checkout, which has a placeholder in the file.
fn archived() -> Option<String> {
    let file = Path::new(&std::env::var_os("CARGO_MANIFEST_DIR")?).join("COMMIT");
    let text = std::fs::read_to_string(file).ok()?;
    let commit = text.trim();
    (!commit.is_empty() && commit.chars().all(|c| c.is_ascii_hexdigit())).then(|| commit.to_owned())
}
