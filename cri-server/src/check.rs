//! `boxlite-cri check`: tests whether this machine can run pods, and reports missing parts. Changes nothing but the cached
//! answer of the KVM probe.
//!
//! Exit code: 0 if pods can run, 1 if something they need is missing.

use crate::cni::Cni;
use crate::config::{Config, WithoutCni};
use crate::layout::Layout;
use crate::output::{Output, print};
use crate::vmm;
use boxlite_proto::vmm::VmmKind;
use boxlite_runtime::vmm_probe::VmmChoice;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// VMM that needs a part.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Need {
    Always,
    Only(VmmKind),
}

/// A file or program of the installation.
#[derive(Debug)]
struct Part {
    name: &'static str,
    path: PathBuf,
    need: Need,
    /// Reason why it cannot be used; `None` if it can.
    problem: Option<String>,
}

/// Result of all checks.
#[derive(Debug)]
struct Report {
    /// The chosen VMM, or the reason why none can be chosen.
    vmm: Result<VmmChoice, String>,
    parts: Vec<Part>,
    /// Name and file of the network configuration, or the reason for its absence.
    network: Result<(String, PathBuf), String>,
}

/// Runs the checks and prints the report.
pub(crate) async fn check(config: Config, output: Output) -> ExitCode {
    let report = Report::new(&config).await;
    let text = match output {
        Output::Text => report.text(),
        Output::Json => format!("{:#}\n", report.json()),
    };
    let code = match report.ready() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    };
    print(&text, code)
}

/// Runs the checks and returns the report as one JSON object.
pub(crate) async fn report_json(config: &Config) -> String {
    format!("{:#}\n", Report::new(config).await.json())
}

impl Report {
    async fn new(config: &Config) -> Self {
        let vmm = vmm::choose(config).await;
        let layout = Layout::new(&config.root, &config.state);
        let network = Cni::new(&config.cni, &layout).ready();
        Self {
            vmm: vmm.map_err(|error| boxlite_runtime::report(&error)),
            parts: parts(config),
            network: network
                .map(|conf| (conf.name, conf.source))
                .map_err(|error| boxlite_runtime::report(&error)),
        }
    }

    /// Returns whether pods can run. A missing network is not a failure: a node gets it after its runtime.
    fn ready(&self) -> bool {
        let usable = |part: &Part| part.problem.is_none() || self.needs(part) == Some(false);
        self.vmm.is_ok() && self.parts.iter().all(usable)
    }

    /// Returns whether pods need this part; `None` if that depends on the VMM and none was chosen.
    fn needs(&self, part: &Part) -> Option<bool> {
        match (&part.need, &self.vmm) {
            (Need::Always, _) => Some(true),
            (Need::Only(kind), Ok(choice)) => Some(choice.kind == *kind),
            (Need::Only(_), Err(_)) => None,
        }
    }

    fn text(&self) -> String {
        let mut text = match &self.vmm {
            Ok(choice) => format!("{choice}\n"),
            Err(error) => format!("no VMM can be chosen: {error}\n"),
        };
        for part in &self.parts {
            let (state, reason) = match (&part.problem, self.needs(part), &part.need) {
                (None, ..) => ("found", String::new()),
                (Some(problem), Some(true), _) => ("MISSING", format!(": {problem}")),
                (Some(problem), None, Need::Only(kind)) => {
                    ("missing", format!(": {problem}; needed by {kind}"))
                }
                (Some(problem), ..) => ("missing", format!(": {problem}; not needed for this VMM")),
            };
            let (name, path) = (part.name, part.path.display());
            let _ = writeln!(text, "{name:<20} {state:<8} {path}{reason}");
        }
        let _ = match &self.network {
            Ok((name, source)) => writeln!(
                text,
                "{:<20} {:<8} {} ({name})",
                "network",
                "found",
                source.display()
            ),
            Err(error) => writeln!(text, "{:<20} {:<8} {error}", "network", "not yet"),
        };
        let ready = self.ready();
        let _ = writeln!(text, "pods {} run", if ready { "can" } else { "cannot" });
        text
    }

    fn json(&self) -> Value {
        let parts = self.parts.iter().map(|part| {
            json!({
                "name": part.name,
                "path": part.path,
                "found": part.problem.is_none(),
                "problem": part.problem,
                "needed": self.needs(part),
            })
        });
        json!({
            "ready": self.ready(),
            "vmm": match &self.vmm {
                Ok(choice) => json!({
                    "kind": choice.kind,
                    "acceleration": choice.acceleration,
                    "reason": choice.reason,
                }),
                Err(error) => json!({"error": error}),
            },
            "parts": parts.collect::<Vec<_>>(),
            "network": match &self.network {
                Ok((name, source)) => json!({"name": name, "file": source}),
                Err(error) => json!({"error": error}),
            },
        })
    }
}

fn parts(config: &Config) -> Vec<Part> {
    let paths = &config.paths;
    let qemu = Need::Only(VmmKind::Qemu);
    let part = |name, path: &Path, need: &Need, program| Part {
        name,
        path: path.to_owned(),
        need: need.clone(),
        problem: problem(path, program),
    };
    let mut parts = vec![
        part("shim", &config.shim, &Need::Always, true),
        part("guest agent", &paths.guest, &Need::Always, true),
        part("guest kernel", &paths.libkrunfw, &Need::Always, false),
        part("qemu", &paths.qemu, &qemu, true),
        part("virtiofsd", &paths.virtiofsd, &qemu, true),
        part("vhost-device-vsock", &paths.vhost_device_vsock, &qemu, true),
    ];
    if config.network.without_cni == WithoutCni::Passt {
        parts.push(part("passt", &paths.passt, &Need::Always, true));
    }
    parts
}

/// Returns the reason why a file cannot be used; `None` if it can.
fn problem(path: &Path, program: bool) -> Option<String> {
    match std::fs::metadata(path) {
        Err(error) => Some(error.to_string()),
        Ok(metadata) if !metadata.is_file() => Some("not a file".into()),
        Ok(metadata) if program && metadata.permissions().mode() & 0o111 == 0 => {
            Some("not executable".into())
        }
        Ok(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::vmm::Acceleration;

    #[test]
    fn problem_distinguishes_missing_directory_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x");
        assert!(problem(&file, false).unwrap().contains("No such file"));
        assert_eq!(problem(dir.path(), false).unwrap(), "not a file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(problem(&file, false), None);
        assert_eq!(problem(&file, true).unwrap(), "not executable");
    }

    fn report(vmm: Result<VmmKind, &str>, missing: Need) -> Report {
        Report {
            vmm: vmm.map_err(str::to_owned).map(|kind| VmmChoice {
                kind,
                acceleration: Acceleration::Tcg,
                reason: "because".to_owned(),
            }),
            parts: vec![Part {
                name: "virtiofsd",
                path: "/x".into(),
                need: missing,
                problem: Some("gone".to_owned()),
            }],
            network: Err("no network".to_owned()),
        }
    }

    #[test]
    fn part_of_another_vmm_is_not_needed() {
        let helper = || Need::Only(VmmKind::Qemu);
        let krun = report(Ok(VmmKind::Krun), helper());
        assert!(krun.ready());
        let text = krun.text();
        assert!(
            text.contains("missing  /x: gone; not needed for this VMM\n"),
            "{text}"
        );
        assert!(text.ends_with("pods can run\n"), "{text}");
        assert_eq!(krun.json()["parts"][0]["needed"], false);

        let qemu = report(Ok(VmmKind::Qemu), helper());
        assert!(!qemu.ready());
        assert!(qemu.text().contains("MISSING  /x: gone\n"));
        let always = report(Ok(VmmKind::Krun), Need::Always);
        assert!(!always.ready());
    }

    #[test]
    fn need_is_open_while_no_vmm_is_chosen() {
        let none = report(Err("no shim"), Need::Only(VmmKind::Qemu));
        assert!(!none.ready());
        let text = none.text();
        assert!(text.contains("no VMM can be chosen: no shim"), "{text}");
        assert!(
            text.contains("missing  /x: gone; needed by qemu\n"),
            "{text}"
        );
        assert!(!text.contains("not needed"), "{text}");
        let json = none.json();
        assert_eq!(json["parts"][0]["needed"], Value::Null);
        assert_eq!(json["vmm"]["error"], "no shim");
    }

    #[test]
    fn json_has_choice_parts_and_verdict() {
        let json = report(Ok(VmmKind::Qemu), Need::Always).json();
        assert_eq!(json["ready"], false);
        assert_eq!(json["vmm"]["kind"], "qemu");
        assert_eq!(json["vmm"]["acceleration"], "tcg");
        assert_eq!(json["parts"][0]["problem"], "gone");
        assert_eq!(json["network"]["error"], "no network");
    }
}
