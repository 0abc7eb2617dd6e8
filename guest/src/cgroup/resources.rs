//! Converts OCI `LinuxResources` (in cgroup v1 terms) to cgroup v2 files, as runc does.
//!
//! Devices are handled in [`super::devices`].

use super::Cgroup;
use super::error::CgroupError;
use oci_spec::runtime::LinuxResources;

/// A file and the value to write.
pub(crate) type Setting = (String, String);

/// The kernel's default CPU period, in µs.
const DEFAULT_PERIOD_US: u64 = 100_000;
/// Maximum number of settings of a spec, including `unified`.
const MAX_SETTINGS: usize = 256;

/// Applies `resources` to a container's cgroup.
///
/// # Errors
/// If a setting is invalid or rejected by the kernel; the error names its file. Earlier settings remain applied.
pub(crate) fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<(), CgroupError> {
    for (file, value) in settings(resources)? {
        if cgroup.path().join(&file).exists() || !holds_without_file(&file, &value) {
            cgroup.write(&file, &value)?;
        }
    }
    Ok(())
}

/// Returns whether a limit holds even if the kernel lacks its file: without swap any limit of it does, and without
/// huge pages the kubelet's limit of zero.
fn holds_without_file(file: &str, value: &str) -> bool {
    file == "memory.swap.max" || (file.starts_with("hugetlb.") && value == "0")
}

/// Returns the files to write, in order.
pub(crate) fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, CgroupError> {
    let mut list = Vec::new();
    cpu_settings(resources, &mut list)?;
    memory_settings(resources, &mut list)?;
    if let Some(pids) = resources.pids() {
        list.push(("pids.max".to_owned(), limit(pids.limit())));
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        list.push((
            format!(
                "hugetlb.{}.max",
                plain_name("hugepageLimits", huge.page_size())?
            ),
            huge.limit().to_string(),
        ));
    }
    // Written last, so that explicit v2 settings override converted ones.
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        list.push((plain_name("unified", file)?.to_owned(), value.clone()));
    }
    if list.len() > MAX_SETTINGS {
        return Err(refused(
            "unified",
            format!("more than {MAX_SETTINGS} settings"),
        ));
    }
    Ok(list)
}

fn cpu_settings(resources: &LinuxResources, list: &mut Vec<Setting>) -> Result<(), CgroupError> {
    let Some(cpu) = resources.cpu() else {
        return Ok(());
    };
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        list.push((
            "cpu.weight".to_owned(),
            weight_of_shares(shares).to_string(),
        ));
    }
    if let Some(idle) = cpu.idle() {
        list.push(("cpu.idle".to_owned(), idle.to_string()));
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            _ => "max".to_owned(),
        };
        list.push((
            "cpu.max".to_owned(),
            format!("{quota} {}", period.unwrap_or(DEFAULT_PERIOD_US)),
        ));
    }
    if let Some(burst) = cpu.burst() {
        list.push(("cpu.max.burst".to_owned(), burst.to_string()));
    }
    for (file, set) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(set) = set.as_ref().filter(|set| !set.is_empty()) {
            list.push((file.to_owned(), set.clone()));
        }
    }
    Ok(())
}

fn memory_settings(resources: &LinuxResources, list: &mut Vec<Setting>) -> Result<(), CgroupError> {
    let Some(memory) = resources.memory() else {
        return Ok(());
    };
    let hard = memory.limit().filter(|limit| *limit != 0);
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0)
        && let Some(value) = swap_max(hard, swap)?
    {
        list.push(("memory.swap.max".to_owned(), value));
    }
    if let Some(hard) = hard {
        list.push(("memory.max".to_owned(), limit(hard)));
    }
    if let Some(soft) = memory.reservation().filter(|soft| *soft != 0) {
        list.push(("memory.low".to_owned(), limit(soft)));
    }
    Ok(())
}

/// Returns v2's `memory.swap.max`, which counts swap alone, from v1's `memsw`, which counts memory and swap together.
fn swap_max(hard: Option<i64>, swap: i64) -> Result<Option<String>, CgroupError> {
    match (hard, swap) {
        (_, swap) if swap < 0 => Ok(Some("max".to_owned())),
        // A swap limit without a memory limit is rejected, as in runc.
        (None, _) => Err(refused("memory.swap", "requires memory.limit")),
        (Some(hard), _) if hard < 0 => Err(refused(
            "memory.swap",
            "requires a memory.limit that is not unlimited",
        )),
        (Some(hard), swap) if swap < hard => Err(refused(
            "memory.swap",
            format!("{swap} is below memory.limit {hard}"),
        )),
        (Some(hard), swap) => Ok(Some((swap - hard).to_string())),
    }
}

/// Maps [2, 262144] to [1, 10000] as OCI runtimes do since 2025: quadratic in the logarithm, so that the defaults
/// 1024 and 100 correspond.
fn weight_of_shares(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
}

/// Formats a limit; negative values mean no limit.
fn limit(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

/// Checks that a cgroup file's name is not a path.
fn plain_name<'a>(field: &str, name: &'a str) -> Result<&'a str, CgroupError> {
    let plain = !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if !plain || name.contains("..") || name.starts_with("cgroup.") {
        return Err(refused(field, format!("{name:?} is not a resource file")));
    }
    Ok(name)
}

fn refused(field: &str, reason: impl Into<String>) -> CgroupError {
    CgroupError::Resource {
        field: field.to_owned(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(json: &str) -> Vec<Setting> {
        settings(&serde_json::from_str(json).unwrap()).unwrap()
    }

    fn refusal(json: &str) -> String {
        settings(&serde_json::from_str(json).unwrap())
            .unwrap_err()
            .to_string()
    }

    fn pair(file: &str, value: &str) -> Setting {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn settings_convert_cpu_quota_and_period() {
        assert_eq!(
            converted(r#"{"cpu":{"quota":50000,"period":100000}}"#),
            [pair("cpu.max", "50000 100000")]
        );
        assert_eq!(
            converted(r#"{"cpu":{"quota":50000}}"#),
            [pair("cpu.max", "50000 100000")]
        );
        assert_eq!(
            converted(r#"{"cpu":{"quota":-1,"period":20000}}"#),
            [pair("cpu.max", "max 20000")]
        );
        assert_eq!(
            converted(r#"{"cpu":{"quota":0,"period":0,"shares":0}}"#),
            []
        );
    }

    #[test]
    fn weight_of_shares_maps_defaults_and_bounds() {
        assert_eq!(weight_of_shares(0), 1);
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(1024), 100);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
        let mut before = 0;
        for shares in 2..262_144u64 {
            let weight = weight_of_shares(shares);
            assert!(weight >= before, "{shares}");
            before = weight;
        }
    }

    #[test]
    fn apply_accepts_limits_of_missing_swap_and_hugetlb() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            path: dir.path().to_owned(),
        };
        let text = r#"{"memory":{"limit":100,"swap":100},"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#;
        apply(&cgroup, &serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(cgroup.read("memory.max").unwrap(), "100");
        assert!(cgroup.read("memory.swap.max").is_none());
        assert!(cgroup.read("hugetlb.2MB.max").is_none());
        let text = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4096}]}"#;
        apply(&cgroup, &serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(cgroup.read("hugetlb.2MB.max").unwrap(), "4096");
    }

    #[test]
    fn settings_convert_swap_without_memory() {
        assert_eq!(
            converted(r#"{"memory":{"limit":100,"swap":150}}"#),
            [pair("memory.swap.max", "50"), pair("memory.max", "100")]
        );
        assert_eq!(
            converted(r#"{"memory":{"limit":-1,"swap":-1}}"#)[0],
            pair("memory.swap.max", "max")
        );
        assert!(refusal(r#"{"memory":{"limit":100,"swap":50}}"#).contains("below"));
        assert!(refusal(r#"{"memory":{"swap":50}}"#).contains("memory.limit"));
    }

    #[test]
    fn settings_unified_is_last_and_not_a_path() {
        let list = converted(r#"{"pids":{"limit":7},"unified":{"memory.oom.group":"1"}}"#);
        assert_eq!(list, [pair("pids.max", "7"), pair("memory.oom.group", "1")]);
        for file in ["../pids.max", "a/b", "cgroup.procs", ""] {
            assert!(
                refusal(&format!(r#"{{"unified":{{"{file}":"1"}}}}"#))
                    .contains("not a resource file"),
                "{file}"
            );
        }
    }
}
