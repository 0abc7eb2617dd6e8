//! Reads a cgroup's statistics into [`CgroupStats`]; names are those of Documentation/admin-guide/cgroup-v2.rst.
//! Fields of missing files are 0.

use super::Cgroup;
use boxlite_proto::boxlite::v1::{BlkioStats, CgroupStats, HugetlbStats, Pressure, PressureLine};
use std::collections::HashMap;
use std::path::Path;

/// Directory of block devices by number.
const DEVICES: &str = "/sys/dev/block";

/// Reads all statistics of one cgroup.
pub(crate) fn read(cgroup: &Cgroup) -> CgroupStats {
    let cpu = keyed(cgroup, "cpu.stat");
    let events = keyed(cgroup, "memory.events");
    let of = |map: &HashMap<String, u64>, key: &str| map.get(key).copied().unwrap_or(0);
    CgroupStats {
        cpu_usage_usec: of(&cpu, "usage_usec"),
        cpu_user_usec: of(&cpu, "user_usec"),
        cpu_system_usec: of(&cpu, "system_usec"),
        cpu_nr_periods: of(&cpu, "nr_periods"),
        cpu_nr_throttled: of(&cpu, "nr_throttled"),
        cpu_throttled_usec: of(&cpu, "throttled_usec"),
        memory_current: single(cgroup, "memory.current"),
        memory_peak: single(cgroup, "memory.peak"),
        memory_max: single(cgroup, "memory.max"),
        memory_swap_current: single(cgroup, "memory.swap.current"),
        memory_stat: keyed(cgroup, "memory.stat"),
        memory_events_oom: of(&events, "oom"),
        memory_events_oom_kill: of(&events, "oom_kill"),
        pids_current: single(cgroup, "pids.current"),
        pids_max: single(cgroup, "pids.max"),
        io: cgroup
            .read("io.stat")
            .map(|text| parse_io(&text))
            .unwrap_or_default(),
        memory_events_max: of(&events, "max"),
        memory_swap_max: single(cgroup, "memory.swap.max"),
        memory_low: single(cgroup, "memory.low"),
        cpu_pressure: pressure(cgroup, "cpu.pressure"),
        memory_pressure: pressure(cgroup, "memory.pressure"),
        io_pressure: pressure(cgroup, "io.pressure"),
        hugetlb: hugetlb(cgroup),
    }
}

/// Reads a pressure file; `None` if the kernel has no PSI.
fn pressure(cgroup: &Cgroup, file: &str) -> Option<Pressure> {
    cgroup.read(file).map(|text| parse_pressure(&text))
}

/// Parses `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and `full …` if present.
fn parse_pressure(text: &str) -> Pressure {
    let mut pressure = Pressure::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let kind = words.next();
        let mut figures = PressureLine::default();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => figures.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => figures.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => figures.avg300 = value.parse().unwrap_or(0.0),
                "total" => figures.total_usec = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            Some("some") => pressure.some = Some(figures),
            Some("full") => pressure.full = Some(figures),
            _ => {}
        }
    }
    pressure
}

/// Returns one entry per page size. cgroup v2 does not record a peak.
fn hugetlb(cgroup: &Cgroup) -> Vec<HugetlbStats> {
    let entries = std::fs::read_dir(cgroup.path()).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names
        .filter_map(|file| {
            let page_size = hugetlb_page_size(&file)?.to_owned();
            Some(HugetlbStats {
                current: single(cgroup, &file),
                page_size,
            })
        })
        .collect()
}

/// Extracts `2MB` from `hugetlb.2MB.current`.
fn hugetlb_page_size(file: &str) -> Option<&str> {
    let size = file.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
    (!size.contains('.')).then_some(size)
}

/// Returns how many processes of this cgroup and its descendants the kernel has OOM-killed.
pub(crate) fn oom_kills(cgroup: &Cgroup) -> u64 {
    cgroup
        .read("memory.events")
        .map_or(0, |text| oom_kills_in(&text))
}

/// Parses the number of OOM kills from `memory.events`.
pub(crate) fn oom_kills_in(text: &str) -> u64 {
    parse_keyed(text).get("oom_kill").copied().unwrap_or(0)
}

/// Reads a file with a single number; `max` reads as the largest.
fn single(cgroup: &Cgroup, file: &str) -> u64 {
    match cgroup.read(file).as_deref().map(str::trim) {
        Some("max") => u64::MAX,
        Some(text) => text.parse().unwrap_or(0),
        None => 0,
    }
}

/// Reads a "flat keyed" file: one `name number` per line.
fn keyed(cgroup: &Cgroup, file: &str) -> HashMap<String, u64> {
    cgroup
        .read(file)
        .map(|text| parse_keyed(&text))
        .unwrap_or_default()
}

fn parse_keyed(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// Parses `io.stat`: `major:minor rbytes=… wbytes=… rios=… wios=… …` per line.
fn parse_io(text: &str) -> Vec<BlkioStats> {
    text.lines().filter_map(parse_io_line).collect()
}

fn parse_io_line(line: &str) -> Option<BlkioStats> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut stats = BlkioStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        device: device_name(&Path::new(DEVICES).join(format!("{major}:{minor}"))),
        ..BlkioStats::default()
    };
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => stats.rbytes = value,
            "wbytes" => stats.wbytes = value,
            "rios" => stats.rios = value,
            "wios" => stats.wios = value,
            _ => {}
        }
    }
    Some(stats)
}

/// Returns `/dev/vdb` from the link of its number, or an empty string if it does not exist.
fn device_name(link: &Path) -> String {
    std::fs::read_link(link)
        .ok()
        .and_then(|target| Some(format!("/dev/{}", target.file_name()?.to_str()?)))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_pressure_reads_some_and_full() {
        let text = "some avg10=1.50 avg60=0.10 avg300=0.00 total=77\nfull avg10=x total=5\n";
        let parsed = parse_pressure(text);
        let some = parsed.some.unwrap();
        assert_eq!((some.avg10, some.avg60, some.total_usec), (1.5, 0.1, 77));
        assert_eq!(parsed.full.unwrap().total_usec, 5);
        assert_eq!(parse_pressure("nonsense\n"), Pressure::default());
    }

    #[test]
    fn hugetlb_page_size_parses_file_names() {
        assert_eq!(hugetlb_page_size("hugetlb.2MB.current"), Some("2MB"));
        for file in [
            "hugetlb.2MB.rsvd.current",
            "hugetlb.2MB.max",
            "memory.current",
        ] {
            assert_eq!(hugetlb_page_size(file), None, "{file}");
        }
    }

    #[test]
    fn parse_io_skips_unknown_keys() {
        let text =
            "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n254:16\nnonsense\n";
        let parsed = parse_io(text);
        assert_eq!(parsed.len(), 2);
        assert_eq!(
            (parsed[0].major, parsed[0].rbytes, parsed[0].wios),
            (254, 4096, 2)
        );
        assert_eq!((parsed[1].minor, parsed[1].rbytes), (16, 0));
    }

    #[test]
    fn parse_keyed_skips_broken_lines() {
        let parsed = parse_keyed("usage_usec 12\nbroken\nuser_usec x\nsystem_usec 3\n");
        assert_eq!(parsed.len(), 2);
        assert_eq!(parsed["usage_usec"], 12);
    }
}
