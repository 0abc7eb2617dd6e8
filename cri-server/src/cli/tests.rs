//! Tests of the command line.

use super::*;

fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from([&["boxlite-cri"], args].concat())
}

#[test]
fn command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn malformed_log_level_is_refused_with_the_reason() {
    let error = parse(&["serve", "--log-level", "a=b=c"]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("--log-level") && text.contains("a=b=c") && text.contains("not off, error"),
        "{text}"
    );
    assert_eq!(error.exit_code(), 2);
    assert!(parse(&["serve", "--log-level", "boxlite_cri=debug,info"]).is_ok());
}

#[test]
fn help_explains_the_program_and_each_command() {
    let text = Cli::command().render_long_help().to_string();
    for words in [
        "every pod in a virtual machine",
        "--container-runtime-endpoint",
        "Examples:",
        "78 invalid configuration",
    ] {
        assert!(text.contains(words), "{words} is missing:\n{text}");
    }
    assert!(!text.contains(env!("CARGO_PKG_DESCRIPTION")), "{text}");
    for command in Cli::command().get_subcommands() {
        assert!(command.get_about().is_some(), "{}", command.get_name());
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{argument}");
        }
    }
}

#[test]
fn version_names_program_version_and_commit() {
    let commit = VERSION.split_once(" (commit ").unwrap();
    assert_eq!(commit.0, env!("CARGO_PKG_VERSION"));
    let commit = commit.1.trim_end_matches(')');
    let hash = commit.len() == 12 && commit.chars().all(|c| c.is_ascii_hexdigit());
    assert!(hash || commit == "unknown", "{commit}");
}

#[test]
fn options_override_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    std::fs::write(&file, "root = '/a'\nstate = '/b'\nlog_level = 'warn'").unwrap();
    let file = file.to_str().unwrap();
    let cli = parse(&[
        "serve",
        "--config",
        file,
        "--root",
        "/c",
        "--log-level",
        "debug",
    ])
    .unwrap();
    let Command::Serve(options) = cli.command else {
        panic!("serve expected");
    };
    let config = options.load().unwrap();
    assert_eq!(config.root, Path::new("/c"));
    assert_eq!(config.state, Path::new("/b"));
    assert_eq!(config.log_level, "debug");
}

#[test]
fn default_file_follows_the_prefix() {
    let text = default_file(Some(Path::new("/opt/boxlite")));
    for path in [
        "/opt/boxlite/libexec/boxlite/boxlite-guest",
        "/opt/boxlite/bin/containerd-shim-boxlite-v2",
        "/opt/boxlite/lib/boxlite/libkrunfw.so.5",
        "/opt/boxlite/libexec/boxlite/virtiofsd",
    ] {
        assert!(text.contains(path), "{path}");
    }
    assert!(
        !text.contains('@') && !text.contains("/usr/local"),
        "{text}"
    );
}

#[test]
fn completions_offer_the_commands() {
    use clap_complete::Shell::{Bash, Fish, Zsh};
    for shell in [Bash, Zsh, Fish] {
        let script = completions(shell);
        for command in ["serve", "check", "status", "config", "version"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}
