//! NRI's LinuxResources: merging, validation against a VM, and conversion from and to OCI and CRI.
//!
//! Ownership of the fields is in [`super::owners`].

use super::unsupported::Unsupported;
use boxlite_proto::cri::v1::LinuxContainerResources;
use boxlite_proto::nri::v1alpha1::{
    Field, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources, OptionalInt64, OptionalUInt64,
};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// Returns all fields that are set, with their keys.
pub(crate) fn fields(resources: &LinuxResources) -> Vec<(Field, String)> {
    let memory = resources.memory.unwrap_or_default();
    let cpu = resources.cpu.clone().unwrap_or_default();
    let set = [
        (memory.limit.is_some(), Field::MemLimit),
        (memory.reservation.is_some(), Field::MemReservation),
        (memory.swap.is_some(), Field::MemSwapLimit),
        (cpu.shares.is_some(), Field::CpuShares),
        (cpu.quota.is_some(), Field::CpuQuota),
        (cpu.period.is_some(), Field::CpuPeriod),
        (!cpu.cpus.is_empty(), Field::CpuSetCpUs),
        (!cpu.mems.is_empty(), Field::CpuSetMems),
        (resources.pids.is_some(), Field::PidsLimit),
    ];
    let mut fields: Vec<(Field, String)> = set
        .into_iter()
        .filter(|(is_set, _)| *is_set)
        .map(|(_, field)| (field, String::new()))
        .collect();
    let unified = resources.unified.keys();
    fields.extend(unified.map(|key| (Field::CgroupsUnified, key.clone())));
    fields
}

/// Sets the fields of `from` in `into`.
pub(crate) fn overlay(into: &mut LinuxResources, from: &LinuxResources) {
    if let Some(from) = &from.memory {
        let into = into.memory.get_or_insert_default();
        set(&mut into.limit, from.limit);
        set(&mut into.reservation, from.reservation);
        set(&mut into.swap, from.swap);
    }
    if let Some(from) = &from.cpu {
        let into = into.cpu.get_or_insert_default();
        set(&mut into.shares, from.shares);
        set(&mut into.quota, from.quota);
        set(&mut into.period, from.period);
        for (into, from) in [(&mut into.cpus, &from.cpus), (&mut into.mems, &from.mems)] {
            if !from.is_empty() {
                from.clone_into(into);
            }
        }
    }
    set(&mut into.pids, from.pids);
    into.unified.extend(from.unified.clone());
}

fn set<T>(into: &mut Option<T>, from: Option<T>) {
    if from.is_some() {
        *into = from;
    }
}

/// Rejects resources that have no meaning in this VM. `vcpus` is the number of its vCPUs.
pub(crate) fn check(resources: &LinuxResources, vcpus: u32) -> Result<(), Unsupported> {
    let memory = resources.memory.unwrap_or_default();
    let cpu = resources.cpu.clone().unwrap_or_default();
    let old = "belongs to cgroup v1 and the guest has v2";
    let real = "the guest has no real-time group scheduling";
    let hardware = "concerns host hardware that a VM does not have";
    let hugepages = !resources.hugepage_limits.is_empty();
    for (is_set, field, reason) in [
        (memory.kernel.is_some(), "memory.kernel", old),
        (memory.kernel_tcp.is_some(), "memory.kernel_tcp", old),
        (memory.swappiness.is_some(), "memory.swappiness", old),
        (
            memory.disable_oom_killer.is_some(),
            "memory.disable_oom_killer",
            old,
        ),
        (memory.use_hierarchy.is_some(), "memory.use_hierarchy", old),
        (cpu.realtime_runtime.is_some(), "cpu.realtime_runtime", real),
        (cpu.realtime_period.is_some(), "cpu.realtime_period", real),
        (
            hugepages,
            "hugepage_limits",
            "the guest has no reserved hugepages",
        ),
        (resources.blockio_class.is_some(), "blockio_class", hardware),
        (resources.rdt_class.is_some(), "rdt_class", hardware),
        (
            !resources.devices.is_empty(),
            "devices",
            "host devices are not available in a VM",
        ),
    ] {
        if is_set {
            return Err(Unsupported {
                field: format!("linux.resources.{field}"),
                reason: reason.to_owned(),
            });
        }
    }
    numbers(&cpu.cpus, "cpu.cpus", vcpus, "virtual CPUs")?;
    numbers(&cpu.mems, "cpu.mems", 1, "memory nodes")
}

/// Validates a list such as `0-3,7`, all below `count`: the guest numbers its CPUs from 0.
fn numbers(list: &str, field: &str, count: u32, what: &str) -> Result<(), Unsupported> {
    if list.is_empty() {
        return Ok(());
    }
    let invalid = |reason: String| Unsupported {
        field: format!("linux.resources.{field} = {list:?}"),
        reason,
    };
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| {
            text.trim()
                .parse::<u32>()
                .map_err(|_| invalid("not a list of numbers".to_owned()))
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(invalid("not a list of numbers".to_owned()));
        }
        if last >= count {
            return Err(invalid(format!(
                "the pod's VM has {count} {what}, numbered from 0"
            )));
        }
    }
    Ok(())
}

/// Returns OCI's LinuxResources with the fields that are set.
pub(crate) fn oci(resources: &LinuxResources) -> Value {
    let mut object = Map::new();
    let mut group = |name: &str, entries: Vec<(&str, Option<Value>)>| {
        let set: Map<String, Value> = entries
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?)))
            .collect();
        if !set.is_empty() {
            object.insert(name.to_owned(), Value::Object(set));
        }
    };
    let memory = resources.memory.unwrap_or_default();
    let signed = |value: &Option<OptionalInt64>| value.as_ref().map(|value| json!(value.value));
    let unsigned = |value: &Option<OptionalUInt64>| value.as_ref().map(|value| json!(value.value));
    let text = |value: &String| (!value.is_empty()).then(|| json!(value));
    group(
        "memory",
        vec![
            ("limit", signed(&memory.limit)),
            ("reservation", signed(&memory.reservation)),
            ("swap", signed(&memory.swap)),
        ],
    );
    let cpu = resources.cpu.clone().unwrap_or_default();
    group(
        "cpu",
        vec![
            ("shares", unsigned(&cpu.shares)),
            ("quota", signed(&cpu.quota)),
            ("period", unsigned(&cpu.period)),
            ("cpus", text(&cpu.cpus)),
            ("mems", text(&cpu.mems)),
        ],
    );
    let pids = resources.pids.as_ref().map(|pids| json!(pids.limit));
    group("pids", vec![("limit", pids)]);
    if !resources.unified.is_empty() {
        object.insert("unified".into(), json!(resources.unified));
    }
    Value::Object(object)
}

/// Converts OCI's LinuxResources.
pub(crate) fn from_oci(resources: &Value) -> LinuxResources {
    let signed = |value: &Value| value.as_i64().map(|value| OptionalInt64 { value });
    let unsigned = |value: &Value| value.as_u64().map(|value| OptionalUInt64 { value });
    let (memory, cpu) = (&resources["memory"], &resources["cpu"]);
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(&memory["limit"]),
            reservation: signed(&memory["reservation"]),
            swap: signed(&memory["swap"]),
            ..Default::default()
        }),
        cpu: Some(LinuxCpu {
            shares: unsigned(&cpu["shares"]),
            quota: signed(&cpu["quota"]),
            period: unsigned(&cpu["period"]),
            cpus: text(&cpu["cpus"]),
            mems: text(&cpu["mems"]),
            ..Default::default()
        }),
        pids: resources["pids"]["limit"]
            .as_i64()
            .map(|limit| LinuxPids { limit }),
        unified: text_map(&resources["unified"]),
        ..Default::default()
    }
}

/// Returns the value if it is a string, otherwise an empty one.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Returns the entries of an object of strings, or an empty map for any other value.
pub(crate) fn text_map(object: &Value) -> HashMap<String, String> {
    object
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), text(value)))
        .collect()
}

/// Converts CRI's resources, where 0 and "" are unset.
pub(crate) fn from_cri(resources: &LinuxContainerResources) -> LinuxResources {
    let signed = |value: i64| (value != 0).then_some(OptionalInt64 { value });
    let unsigned = |value: i64| {
        u64::try_from(value)
            .ok()
            .filter(|value| *value != 0)
            .map(|value| OptionalUInt64 { value })
    };
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(resources.memory_limit_in_bytes),
            swap: signed(resources.memory_swap_limit_in_bytes),
            ..Default::default()
        }),
        cpu: Some(LinuxCpu {
            shares: unsigned(resources.cpu_shares),
            quota: signed(resources.cpu_quota),
            period: unsigned(resources.cpu_period),
            cpus: resources.cpuset_cpus.clone(),
            mems: resources.cpuset_mems.clone(),
            ..Default::default()
        }),
        unified: resources.unified.clone(),
        ..Default::default()
    }
}

/// Returns CRI's resources, for updates and statuses. Fields that the CRI lacks are represented by their cgroup
/// files.
pub(crate) fn cri(resources: &LinuxResources) -> LinuxContainerResources {
    let signed = |value: &Option<OptionalInt64>| value.as_ref().map_or(0, |value| value.value);
    let unsigned = |value: &Option<OptionalUInt64>| {
        value
            .as_ref()
            .map_or(0, |value| i64::try_from(value.value).unwrap_or(i64::MAX))
    };
    let memory = resources.memory.unwrap_or_default();
    let cpu = resources.cpu.clone().unwrap_or_default();
    let mut unified = resources.unified.clone();
    if let Some(pids) = &resources.pids {
        let limit = match pids.limit {
            limit if limit < 0 => "max".to_owned(),
            limit => limit.to_string(),
        };
        unified.entry("pids.max".into()).or_insert(limit);
    }
    if let Some(reservation) = memory.reservation.filter(|low| low.value > 0) {
        unified
            .entry("memory.low".into())
            .or_insert(reservation.value.to_string());
    }
    LinuxContainerResources {
        cpu_period: unsigned(&cpu.period),
        cpu_quota: signed(&cpu.quota),
        cpu_shares: unsigned(&cpu.shares),
        memory_limit_in_bytes: signed(&memory.limit),
        memory_swap_limit_in_bytes: signed(&memory.swap),
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        unified,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> LinuxResources {
        from_oci(&json!({
            "memory": {"limit": 100, "swap": 150},
            "cpu": {"shares": 2, "quota": -1, "period": 1000, "cpus": "0-1"},
            "pids": {"limit": 7},
            "unified": {"memory.high": "9"},
        }))
    }

    #[test]
    fn resources_round_trip_oci_and_cri() {
        assert_eq!(from_oci(&oci(&some())), some());
        let as_cri = cri(&some());
        assert_eq!(
            (as_cri.cpu_quota, as_cri.memory_swap_limit_in_bytes),
            (-1, 150)
        );
        assert_eq!(as_cri.unified["pids.max"], "7");
        let mut back = from_cri(&as_cri);
        back.pids = Some(LinuxPids { limit: 7 });
        back.unified.remove("pids.max");
        assert_eq!(back, some());
        assert_eq!(oci(&LinuxResources::default()), json!({}));
    }

    #[test]
    fn overlay_changes_set_fields_only() {
        let mut into = some();
        let from = from_oci(&json!({"memory": {"limit": 200}, "unified": {"pids.max": "3"}}));
        overlay(&mut into, &from);
        let result = oci(&into);
        assert_eq!(result["memory"], json!({"limit": 200, "swap": 150}));
        assert_eq!(
            result["unified"],
            json!({"memory.high": "9", "pids.max": "3"})
        );
        assert_eq!(result["cpu"]["cpus"], "0-1");
        let names: Vec<Field> = fields(&from).into_iter().map(|(field, _)| field).collect();
        assert_eq!(names, [Field::MemLimit, Field::CgroupsUnified]);
    }

    #[test]
    fn unsupported_resources_are_rejected_by_name() {
        assert!(check(&some(), 2).is_ok());
        let text = check(&some(), 1).unwrap_err().to_string();
        assert!(
            text.contains("\"0-1\"") && text.contains("has 1 virtual CPUs"),
            "{text}"
        );
        for cpus in ["x", "1-", "3-1", "0,,1", "99999999999"] {
            let wrong = from_oci(&json!({"cpu": {"cpus": cpus}}));
            assert!(check(&wrong, 4).is_err(), "{cpus}");
        }
        let mut rdt = some();
        rdt.rdt_class = Some(Default::default());
        let text = check(&rdt, 2).unwrap_err().to_string();
        assert!(text.contains("linux.resources.rdt_class"), "{text}");
    }
}
