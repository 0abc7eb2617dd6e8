//! The flags of the shim protocol, in the syntax of Go's package `flag`, with which containerd writes them.
//!
//! * A flag begins with one or two dashes. Its value is the next argument or follows `=`.
//! * A switch such as `-debug` is true without a value; `=true` and `=false` set it.
//! * The first argument without a dash, or the one after `--`, is the action. Later arguments are ignored.
//!
//! Unknown flags are errors, so this file lists every flag that containerd passes. [`crate::cli`] checks which ones an
//! action requires.

use std::ffi::{OsStr, OsString};

/// Flags and action of a shim; empty or false if not given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// `-namespace`: containerd namespace.
    pub namespace: String,
    /// `-id`: sandbox or container id.
    pub id: String,
    /// `-address`: containerd's gRPC socket.
    pub address: String,
    /// `-publish-binary`: containerd's binary, which publishes events.
    pub publish_binary: String,
    /// `-bundle`: bundle directory.
    pub bundle: String,
    /// `-socket`: path of the listening socket.
    pub socket: String,
    /// `-debug`: log debug messages.
    pub debug: bool,
    /// `-info`: print the RuntimeInfo message.
    pub info: bool,
    /// `-v`: print the version.
    pub version: bool,
    /// First argument after the flags.
    pub action: String,
}

/// Errors of the flags.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FlagError {
    /// The flag does not exist.
    #[error("unknown flag {flag:?}")]
    Unknown { flag: String },
    /// The value is missing.
    #[error("missing value of flag -{name}")]
    MissingValue { name: String },
    /// The value of a switch is not a boolean.
    #[error("invalid value {value:?} of flag -{name}: expected true or false")]
    InvalidSwitch { name: String, value: String },
    /// An argument is not UTF-8.
    #[error("invalid argument {argument:?}: not UTF-8")]
    NotUtf8 { argument: OsString },
}

/// Destination of a flag's value.
enum Slot<'a> {
    Text(&'a mut String),
    Switch(&'a mut bool),
}

impl Flags {
    /// Parses the arguments after the program's name. The last of several equal flags applies.
    ///
    /// # Errors
    /// An unknown flag, a missing or invalid value, or an argument that is not UTF-8.
    pub fn parse<A: AsRef<OsStr>>(args: &[A]) -> Result<Self, FlagError> {
        let mut flags = Self::default();
        let mut args = args.iter().map(AsRef::as_ref);
        while let Some(arg) = args.next() {
            let arg = utf8(arg)?;
            let name = match arg.strip_prefix('-') {
                None | Some("") => {
                    flags.action = arg.to_owned();
                    break;
                }
                Some("-") => {
                    flags.action = args.next().map(utf8).transpose()?.unwrap_or("").to_owned();
                    break;
                }
                Some(name) => name.strip_prefix('-').unwrap_or(name),
            };
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (name, None),
            };
            match flags.slot(name) {
                None => {
                    return Err(FlagError::Unknown {
                        flag: arg.to_owned(),
                    });
                }
                Some(Slot::Switch(on)) => {
                    *on = value.map_or(Ok(true), |value| switch(name, value))?;
                }
                Some(Slot::Text(text)) => {
                    let value = match value {
                        Some(value) => value,
                        None => utf8(args.next().ok_or_else(|| FlagError::MissingValue {
                            name: name.to_owned(),
                        })?)?,
                    };
                    value.clone_into(text);
                }
            }
        }
        Ok(flags)
    }

    fn slot(&mut self, name: &str) -> Option<Slot<'_>> {
        Some(match name {
            "namespace" => Slot::Text(&mut self.namespace),
            "id" => Slot::Text(&mut self.id),
            "address" => Slot::Text(&mut self.address),
            "publish-binary" => Slot::Text(&mut self.publish_binary),
            "bundle" => Slot::Text(&mut self.bundle),
            "socket" => Slot::Text(&mut self.socket),
            "debug" => Slot::Switch(&mut self.debug),
            "info" => Slot::Switch(&mut self.info),
            "v" | "version" => Slot::Switch(&mut self.version),
            _ => return None,
        })
    }
}

fn utf8(argument: &OsStr) -> Result<&str, FlagError> {
    argument.to_str().ok_or_else(|| FlagError::NotUtf8 {
        argument: argument.to_owned(),
    })
}

/// Reads a boolean in the spellings that Go accepts.
fn switch(name: &str, value: &str) -> Result<bool, FlagError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(FlagError::InvalidSwitch {
            name: name.to_owned(),
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn parse_reads_arguments_of_containerd_start() {
        let flags = Flags::parse(&[
            "-namespace",
            "k8s.io",
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            "abc",
            "-debug",
            "start",
        ]);
        let expected = Flags {
            namespace: "k8s.io".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            publish_binary: "/usr/bin/containerd".to_owned(),
            id: "abc".to_owned(),
            debug: true,
            action: "start".to_owned(),
            ..Flags::default()
        };
        assert_eq!(flags, Ok(expected));
    }

    #[test]
    fn parse_reads_arguments_of_containerd_delete() {
        let args = [
            "-namespace",
            "ns",
            "-id",
            "a",
            "-bundle",
            "/run/b",
            "delete",
        ];
        let flags = Flags::parse(&args).expect("valid");
        assert_eq!(
            (flags.bundle.as_str(), flags.action.as_str()),
            ("/run/b", "delete")
        );
    }

    #[test]
    fn parse_accepts_every_form_of_a_flag() {
        for args in [
            &["-id", "a", "start"][..],
            &["--id", "a", "start"],
            &["-id=a", "start"],
            &["--id=a", "start", "-id", "b"],
            &["-id", "b", "-id", "a", "--", "start"],
        ] {
            let flags = Flags::parse(args).expect("valid");
            assert_eq!(
                (flags.id.as_str(), flags.action.as_str()),
                ("a", "start"),
                "{args:?}"
            );
        }
    }

    #[test]
    fn parse_value_may_be_empty_or_begin_with_a_dash() {
        let flags = Flags::parse(&["-publish-binary", "", "-id", "-v", "-bundle=a=b"]);
        let expected = Flags {
            id: "-v".to_owned(),
            bundle: "a=b".to_owned(),
            ..Flags::default()
        };
        assert_eq!(flags, Ok(expected));
    }

    #[test]
    fn parse_switch_takes_no_next_argument() {
        let flags = Flags::parse(&["-info", "-debug=0", "-v=T", "true"]).expect("valid");
        assert!(flags.info && flags.version && !flags.debug);
        assert_eq!(flags.action, "true");
    }

    #[test]
    fn parse_invalid_arguments_name_the_flag() {
        for (args, message) in [
            (&["-cgroup", "x"][..], r#"unknown flag "-cgroup""#),
            (&["---id", "x"], r#"unknown flag "---id""#),
            (&["-=x"], r#"unknown flag "-=x""#),
            (&["-v", "-id"], "missing value of flag -id"),
            (
                &["-debug=yes"],
                r#"invalid value "yes" of flag -debug: expected true or false"#,
            ),
        ] {
            let error = Flags::parse(args).expect_err("invalid");
            assert_eq!(error.to_string(), message);
        }
        let binary = [OsStr::new("-id"), OsStr::from_bytes(b"\xff")];
        assert!(matches!(
            Flags::parse(&binary),
            Err(FlagError::NotUtf8 { .. })
        ));
    }

    proptest! {
        #[test]
        fn parse_returns_the_written_values(
            id in ".*", namespace in ".*", equals in any::<bool>(), debug in any::<bool>(),
        ) {
            let mut args = if equals {
                vec![format!("-id={id}"), format!("--namespace={namespace}")]
            } else {
                vec!["-id".to_owned(), id.clone(), "-namespace".to_owned(), namespace.clone()]
            };
            args.push(format!("-debug={debug}"));
            args.push("start".to_owned());
            let expected = Flags { id, namespace, debug, action: "start".to_owned(), ..Flags::default() };
            prop_assert_eq!(Flags::parse(&args), Ok(expected));
        }
    }
}
