//! Container adjustments of NRI plugins: validation against the limits of a VM, and application to the OCI spec.
//!
//! Operates on one merged adjustment; conflicts between plugins are resolved in [`super::collect`]. A name prefixed
//! with `-` is a removal. The spec is edited as JSON, the form that the specification defines, and parsed back into
//! its type.

use super::resources;
use super::unsupported::Unsupported;
use boxlite_proto::nri::v1alpha1::{
    ContainerAdjustment, Hooks, LinuxContainerAdjustment, LinuxDevice,
};
use oci_spec::runtime::Spec;
use serde_json::{Map, Value, json};
use std::path::{Component, Path};

/// Prefixes of annotations that the runtime, the shim and the guest exchange.
const RESERVED: [&str; 2] = ["boxlite.", "io.boxlite."];
/// Character devices of the guest's kernel: null, zero, full, random, urandom, tun, fuse.
const DEVICES: [(i64, i64); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (10, 200), (10, 229)];
/// Range of /proc/<pid>/oom_score_adj.
const OOM_RANGE: std::ops::RangeInclusive<i64> = -1000..=1000;

fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Unsupported {
    Unsupported {
        field: field.into(),
        reason: reason.into(),
    }
}

/// Returns a key without its removal mark, and whether it had one.
pub(crate) fn unmarked(key: &str) -> (&str, bool) {
    match key.strip_prefix('-') {
        Some(key) => (key, true),
        None => (key, false),
    }
}

/// Rejects an adjustment that no VM can provide. `vcpus` is the number of vCPUs of the pod's VM.
pub(crate) fn check(adjust: &ContainerAdjustment, vcpus: u32) -> Result<(), Unsupported> {
    for key in adjust.annotations.keys() {
        let (name, _) = unmarked(key);
        if RESERVED.iter().any(|prefix| name.starts_with(prefix)) {
            return Err(unsupported(
                format!("annotations {name:?}"),
                "reserved for the runtime",
            ));
        }
    }
    if let Some(hook) = adjust.hooks.as_ref().and_then(first_hook) {
        return Err(unsupported(
            format!("hooks {hook:?}"),
            "hooks are host programs and cannot enter a container in a VM",
        ));
    }
    if let Some(device) = adjust.cdi_devices.first() {
        return Err(unsupported(
            format!("CDI_devices {:?}", device.name),
            "host devices are not available in a VM",
        ));
    }
    for mount in &adjust.mounts {
        let (target, _) = unmarked(&mount.destination);
        if !clean(target) {
            return Err(unsupported(
                format!("mounts {target:?}"),
                "destination must be an absolute path below / without ..",
            ));
        }
    }
    for entry in &adjust.env {
        let (name, _) = unmarked(&entry.key);
        // Without the value, which may be secret.
        if name.is_empty() || name.contains(['=', '\0']) || entry.value.contains('\0') {
            return Err(unsupported(
                format!("env {name:?}"),
                "invalid variable name or value",
            ));
        }
    }
    if adjust.args.iter().any(|arg| arg.contains('\0')) {
        return Err(unsupported("args", "argument contains a NUL"));
    }
    match &adjust.linux {
        Some(linux) => check_linux(linux, vcpus),
        None => Ok(()),
    }
}

fn check_linux(linux: &LinuxContainerAdjustment, vcpus: u32) -> Result<(), Unsupported> {
    let named = |is_set: bool, field: &str, reason: &str| match is_set {
        true => Err(unsupported(format!("linux.{field}"), reason)),
        false => Ok(()),
    };
    named(
        !linux.namespaces.is_empty(),
        "namespaces",
        "host namespaces do not exist in a VM",
    )?;
    named(
        !linux.net_devices.is_empty(),
        "net_devices",
        "a VM has the interfaces of its pod's network only",
    )?;
    named(
        linux.rdt.as_ref().is_some_and(|rdt| {
            rdt.clos_id.is_some() || rdt.schemata.is_some() || rdt.enable_monitoring.is_some()
        }),
        "rdt",
        "resource groups of the host CPU do not apply in a VM",
    )?;
    named(
        linux.memory_policy.is_some(),
        "memory_policy",
        "a VM has a single memory node",
    )?;
    named(
        linux.seccomp_policy.is_some(),
        "seccomp_policy",
        "not supported; the seccomp profile of the pod applies",
    )?;
    named(
        linux.io_priority.is_some(),
        "io_priority",
        "not supported in the guest",
    )?;
    named(
        linux.scheduler.is_some(),
        "scheduler",
        "not supported in the guest",
    )?;
    for device in &linux.devices {
        check_device(device)?;
    }
    if let Some(score) = &linux.oom_score_adj
        && !OOM_RANGE.contains(&score.value)
    {
        return Err(unsupported(
            format!("linux.oom_score_adj = {}", score.value),
            "must be -1000 to 1000",
        ));
    }
    match &linux.resources {
        Some(wanted) => resources::check(wanted, vcpus),
        None => Ok(()),
    }
}

fn check_device(device: &LinuxDevice) -> Result<(), Unsupported> {
    let (path, removed) = unmarked(&device.path);
    let field = format!("linux.devices {path:?}");
    if !clean(path) || !path.starts_with("/dev/") {
        return Err(unsupported(field, "must be a path below /dev"));
    }
    let known = device.r#type == "c" || device.r#type == "u";
    if removed || (known && DEVICES.contains(&(device.major, device.minor))) {
        return Ok(());
    }
    Err(unsupported(
        format!(
            "{field} ({} {}:{})",
            device.r#type, device.major, device.minor
        ),
        "host devices are not available in a VM; it provides null, zero, full, random, urandom, tun and fuse",
    ))
}

fn first_hook(hooks: &Hooks) -> Option<&str> {
    [
        &hooks.prestart,
        &hooks.create_runtime,
        &hooks.create_container,
        &hooks.start_container,
        &hooks.poststart,
        &hooks.poststop,
    ]
    .into_iter()
    .flatten()
    .map(|hook| hook.path.as_str())
    .next()
}

fn clean(path: &str) -> bool {
    let path = Path::new(path);
    path.is_absolute()
        && path != Path::new("/")
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        && !path.as_os_str().as_encoded_bytes().contains(&0)
}

/// Returns the spec with the adjustment applied.
pub(crate) fn apply(adjust: &ContainerAdjustment, spec: Spec) -> Result<Spec, Unsupported> {
    let unreadable = |error: serde_json::Error| {
        unsupported(
            "adjustment",
            format!("results in an invalid OCI spec: {error}"),
        )
    };
    let mut document = serde_json::to_value(spec).map_err(unreadable)?;
    let annotations = adjust.annotations.iter();
    edit_map(
        &mut document,
        &["annotations"],
        annotations.map(|(key, value)| (key.as_str(), json!(value))),
    );
    mounts(adjust, &mut document);
    environment(adjust, &mut document);
    if !adjust.args.is_empty() {
        document["process"]["args"] = json!(adjust.args);
    }
    let limits = adjust.rlimits.iter().map(|limit| {
        let entry = json!({"type": limit.r#type, "hard": limit.hard, "soft": limit.soft});
        (limit.r#type.as_str(), entry)
    });
    edit_list(&mut document, &["process", "rlimits"], "type", limits);
    if let Some(linux) = &adjust.linux {
        apply_linux(linux, &mut document);
    }
    serde_json::from_value(document).map_err(unreadable)
}

fn apply_linux(linux: &LinuxContainerAdjustment, document: &mut Value) {
    let devices = linux.devices.iter().map(|device| {
        let mut entry = json!({
            "path": device.path, "type": device.r#type, "major": device.major, "minor": device.minor,
        });
        if let Some(mode) = &device.file_mode {
            // OCI has the permission bits only.
            entry["fileMode"] = json!(mode.value & 0o7777);
        }
        if let Some(uid) = &device.uid {
            entry["uid"] = json!(uid.value);
        }
        if let Some(gid) = &device.gid {
            entry["gid"] = json!(gid.value);
        }
        (device.path.as_str(), entry)
    });
    edit_list(document, &["linux", "devices"], "path", devices);
    let sysctl = linux.sysctl.iter();
    edit_map(
        document,
        &["linux", "sysctl"],
        sysctl.map(|(key, value)| (key.as_str(), json!(value))),
    );
    if let Some(score) = &linux.oom_score_adj {
        document["process"]["oomScoreAdj"] = json!(score.value);
    }
    if let Some(wanted) = &linux.resources {
        let mut all = resources::from_oci(&document["linux"]["resources"]);
        resources::overlay(&mut all, wanted);
        if let Value::Object(groups) = resources::oci(&all) {
            for (group, value) in groups {
                document["linux"]["resources"][group] = value;
            }
        }
    }
    if !linux.cgroups_path.is_empty() {
        tracing::info!(
            path = linux.cgroups_path,
            "ignoring cgroup path of NRI plugin: the container's cgroup is in its VM"
        );
    }
}

fn mounts(adjust: &ContainerAdjustment, document: &mut Value) {
    if adjust.mounts.is_empty() {
        return;
    }
    let wanted = adjust.mounts.iter().map(|mount| {
        let mut entry = json!({"destination": mount.destination, "options": mount.options});
        for (key, value) in [("type", &mount.r#type), ("source", &mount.source)] {
            if !value.is_empty() {
                entry[key] = json!(value);
            }
        }
        (mount.destination.as_str(), entry)
    });
    edit_list(document, &["mounts"], "destination", wanted);
    // A nested mount comes after its parent; the sort is stable.
    if let Some(list) = document["mounts"].as_array_mut() {
        list.sort_by_key(|mount| {
            let target = mount["destination"].as_str().unwrap_or_default();
            Path::new(target).components().count()
        });
    }
}

fn environment(adjust: &ContainerAdjustment, document: &mut Value) {
    let mut list: Vec<String> = document["process"]["env"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.as_str().map(str::to_owned))
        .collect();
    for entry in &adjust.env {
        let (name, removed) = unmarked(&entry.key);
        let at = list.iter().position(|have| name_of(have) == name);
        let new = format!("{name}={}", entry.value);
        match (at, removed) {
            (Some(at), true) => drop(list.remove(at)),
            (Some(at), false) => list[at] = new,
            (None, true) => {}
            (None, false) => list.push(new),
        }
    }
    document["process"]["env"] = json!(list);
}

/// Returns the name in `NAME=value`.
pub(crate) fn name_of(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(name, _)| name)
}

/// Returns the value at `path` of the document, and creates it if missing.
fn place<'a>(document: &'a mut Value, path: &[&str]) -> &'a mut Value {
    path.iter().fold(document, |value, key| &mut value[*key])
}

/// Removes and sets entries of an object.
fn edit_map<'a>(
    document: &mut Value,
    path: &[&str],
    wanted: impl Iterator<Item = (&'a str, Value)>,
) {
    let mut wanted: Vec<_> = wanted.collect();
    if wanted.is_empty() {
        return;
    }
    // Removals first: an entry that is both removed and set remains.
    wanted.sort_by_key(|(key, _)| !unmarked(key).1);
    let target = place(document, path);
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    for (key, value) in wanted {
        match unmarked(key) {
            (name, true) => {
                if let Some(map) = target.as_object_mut() {
                    map.remove(name);
                }
            }
            (name, false) => target[name] = value,
        }
    }
}

/// Removes entries of a list by their `key`, and appends those that are not removals.
fn edit_list<'a>(
    document: &mut Value,
    path: &[&str],
    key: &str,
    wanted: impl Iterator<Item = (&'a str, Value)>,
) {
    let mut wanted: Vec<_> = wanted.collect();
    if wanted.is_empty() {
        return;
    }
    wanted.sort_by_key(|(name, _)| !unmarked(name).1);
    let target = place(document, path);
    let mut list = target.as_array().cloned().unwrap_or_default();
    for (name, value) in wanted {
        let (name, removed) = unmarked(name);
        list.retain(|entry| entry[key] != name);
        if !removed {
            list.push(value);
        }
    }
    *target = Value::Array(list);
}
