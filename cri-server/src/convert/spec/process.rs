//! `process` of a container's spec: arguments, environment, working directory, user, privileges.

use super::capabilities::capabilities;
use super::user::user;
use super::{ConvertError, Source};
use crate::convert::signal;
use boxlite_proto::cri::v1::LinuxContainerSecurityContext;
use oci_spec::image::ImageConfiguration;
use serde_json::{Value, json};

/// PATH of a container whose image and request set none, as in containerd.
pub(super) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Range of /proc/<pid>/oom_score_adj.
const OOM_RANGE: std::ops::RangeInclusive<i64> = -1000..=1000;

/// Returns the `process` object.
pub(crate) fn process(
    source: &Source<'_>,
    security: &LinuxContainerSecurityContext,
) -> Result<Value, ConvertError> {
    let image = source.image_config();
    let mut process = json!({
        "terminal": source.config.tty,
        "user": user(security, image.user().as_deref().unwrap_or_default())?,
        "args": arguments(source)?,
        "env": environment(source)?,
        "cwd": directory(source)?,
        "capabilities": capabilities(security)?,
        "noNewPrivileges": security.no_new_privs,
    });
    let resources = source
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref());
    if let Some(adjustment) = resources
        .map(|resources| resources.oom_score_adj)
        .filter(|adj| *adj != 0)
    {
        if !OOM_RANGE.contains(&adjustment) {
            return Err(ConvertError::invalid(
                "oom_score_adj",
                adjustment.to_string(),
                "must be -1000 to 1000",
            ));
        }
        process["oomScoreAdj"] = json!(adjustment);
    }
    Ok(process)
}

/// Returns the command line. As in Kubernetes, `command` replaces entrypoint and cmd, and `args` alone replaces cmd.
fn arguments(source: &Source<'_>) -> Result<Vec<String>, ConvertError> {
    let image = source.image_config();
    let (command, args) = (&source.config.command, &source.config.args);
    let mut words = if command.is_empty() {
        // `ENTRYPOINT [""]` resets the entrypoint of a base image in Docker and containerd.
        let entrypoint = image.entrypoint().clone().unwrap_or_default();
        if entrypoint == [""] {
            Vec::new()
        } else {
            entrypoint
        }
    } else {
        command.clone()
    };
    if !args.is_empty() {
        words.extend(args.iter().cloned());
    } else if command.is_empty() {
        words.extend(image.cmd().clone().unwrap_or_default());
    }
    if words.first().is_none_or(String::is_empty) {
        return Err(ConvertError::Missing(
            "config.command, which the image does not provide either,",
        ));
    }
    no_nul("config.command", &words)?;
    Ok(words)
}

/// Returns the environment: defaults, the image's, then the request's; a later variable replaces an earlier one in
/// place.
fn environment(source: &Source<'_>) -> Result<Vec<String>, ConvertError> {
    let mut list = vec![format!("PATH={DEFAULT_PATH}")];
    let hostname = source.sandbox.hostname();
    if !hostname.is_empty() {
        list.push(format!("HOSTNAME={hostname}"));
    }
    if source.config.tty {
        list.push("TERM=xterm".into());
    }
    for entry in source.image_config().env().iter().flatten() {
        if entry.contains('=') {
            set(&mut list, entry.clone());
        } else {
            // As in containerd, an entry without a value removes the variable.
            list.retain(|have| have.split('=').next() != Some(entry.as_str()));
        }
    }
    for entry in &source.config.envs {
        if entry.key.is_empty() || entry.key.contains('=') {
            return Err(ConvertError::invalid(
                "config.envs",
                entry.key.clone(),
                "not a valid variable name",
            ));
        }
        let value = String::from_utf8_lossy(&entry.value);
        if matches!(value, std::borrow::Cow::Owned(_)) {
            // JSON, and thus the OCI spec, cannot represent other bytes; containerd replaces them, too. The value may
            // be secret and is not logged.
            tracing::warn!(
                key = entry.key,
                "replacing invalid UTF-8 in environment variable"
            );
        }
        set(&mut list, format!("{}={value}", entry.key));
    }
    no_nul("config.envs", &list)
        .map_err(|_| ConvertError::invalid("config.envs", "", "variable contains a NUL"))?;
    Ok(list)
}

fn set(list: &mut Vec<String>, entry: String) {
    let name = entry
        .split_once('=')
        .map_or(entry.as_str(), |(name, _)| name);
    let same =
        |have: &&mut String| have.split_once('=').map_or(have.as_str(), |(name, _)| name) == name;
    match list.iter_mut().find(same) {
        Some(have) => *have = entry,
        None => list.push(entry),
    }
}

fn directory(source: &Source<'_>) -> Result<String, ConvertError> {
    let wanted = &source.config.working_dir;
    let image = source
        .image_config()
        .working_dir()
        .clone()
        .unwrap_or_default();
    let directory = [wanted.as_str(), image.as_str(), "/"]
        .into_iter()
        .find(|directory| !directory.is_empty())
        .unwrap_or("/");
    if !directory.starts_with('/') {
        return Err(ConvertError::invalid(
            "working_dir",
            directory,
            "must be an absolute path",
        ));
    }
    no_nul("working_dir", &[directory.to_owned()])?;
    Ok(directory.to_owned())
}

fn no_nul(field: &'static str, words: &[String]) -> Result<(), ConvertError> {
    match words.iter().find(|word| word.contains('\0')) {
        Some(word) => Err(ConvertError::invalid(field, word.clone(), "contains a NUL")),
        None => Ok(()),
    }
}

/// Returns the signal number of the image's StopSignal.
pub(crate) fn image_stop_signal(image: &ImageConfiguration) -> Option<u32> {
    let text = image.config().as_ref()?.stop_signal().clone()?;
    let number = signal::from_text(&text);
    if number.is_none() {
        tracing::warn!(signal = text, "unknown StopSignal in image, using SIGTERM");
    }
    number
}
