//! The VM's cgroup on the host, for the shim and the VMM, on cgroup v1 and v2.
//!
//! ```text
//! <QoS class>/<pod>/boxlite-<id>   if the pod's limits of memory and CPU hold the VM with its processes
//! <QoS class>/boxlite-<id>         otherwise, with separate limits: the pod's would kill the VM, or keep it from booting
//! ```
//!
//! A pod whose RuntimeClass declares no overhead has limits for its containers alone. The second form keeps the VM within the
//! node's allocatable memory and the QoS class. On v1 it is chosen for the hierarchies of memory and CPU separately; on v2, which
//! has one hierarchy, the pod's other CPU settings are copied.
//!
//! Best effort: if the host refuses (read-only mounts, missing privileges) the reason is logged and the pod runs in the cgroup
//! of the shim. The kubelet sets limits on the pod's cgroup. Only directories created here are removed.

use boxlite_sys::mountinfo::mounts;
use boxlite_sys::process::family;
use std::collections::BTreeSet;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// Interval at which removal of a directory with dying processes is retried.
const REMOVE_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Memory limit on v2 and v1.
const V2_MEMORY_FILE: &str = "memory.max";
const V1_MEMORY_FILE: &str = "memory.limit_in_bytes";
/// Settings copied from the pod's cgroup to one beside it: on v2, and on v1 in the hierarchy of the CPU.
const V2_COPIED_FILES: [&str; 5] = [
    "cpu.weight",
    "cpu.max",
    "cpuset.cpus",
    "cpuset.mems",
    "io.weight",
];
const V1_COPIED_FILES: [&str; 3] = ["cpu.shares", V1_PERIOD_FILE, V1_QUOTA_FILE];
/// Quota and period in one file on v2, and the two files of v1.
const V2_CPU_FILE: &str = "cpu.max";
const V1_QUOTA_FILE: &str = "cpu.cfs_quota_us";
const V1_PERIOD_FILE: &str = "cpu.cfs_period_us";
/// Smallest CPU limit that holds a VM, in thousandths of a CPU. Below it a VM takes minutes to boot and to answer, since the
/// guest's kernel and agent and the VMM count to the limit.
const MIN_MILLICPUS: u64 = 250;
/// CPU limit of a VM beside a pod with a smaller one. Such a VM has one vCPU unless an annotation gives it more.
const MILLICPUS_BESIDE: u64 = 1000;
/// Maximum number of processes and threads, in both versions, and its value. The shim and a VM have about 100; one thread more
/// for each block device and exported mount.
const PIDS_FILE: &str = "pids.max";
const MAX_PIDS: &str = "4096";
/// v1 cpuset files that must be set before a directory accepts processes.
const CPUSET_FILES: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// The cgroups that this shim joined.
#[derive(Debug, Default)]
pub struct Joined {
    /// Directories created, parents first, removed at the end.
    pub made: Vec<PathBuf>,
    /// `cgroup.procs` of the previous cgroup, one per joined hierarchy.
    back: Vec<PathBuf>,
    /// `cgroup.procs` of the joined cgroup, one per hierarchy.
    procs: Vec<PathBuf>,
}

impl Joined {
    /// Moves this process back and removes the created directories. The VM must have ended.
    pub fn leave(&mut self, limit: Duration) {
        for procs in self.back.drain(..) {
            if let Err(error) = std::fs::write(&procs, "0") {
                tracing::debug!(procs = %procs.display(), %error, "failed to return to the previous cgroup");
            }
        }
        remove(&self.made, limit);
        self.made.clear();
    }

    /// Moves a process that started earlier, and its descendants, into the joined cgroups. Repeated until a pass finds no
    /// further process, since one that is not moved yet may fork.
    pub fn bring(&self, pid: i32) {
        let mut moved = BTreeSet::new();
        loop {
            let found = family(pid);
            let new: Vec<i32> = found.difference(&moved).copied().collect();
            if new.is_empty() {
                return;
            }
            for procs in &self.procs {
                for pid in &new {
                    // A process that has exited meanwhile is refused with ESRCH.
                    if let Err(error) = std::fs::write(procs, pid.to_string()) {
                        tracing::info!(pid, procs = %procs.display(), %error, "failed to move process into the pod's cgroup");
                    }
                }
            }
            moved.extend(new);
        }
    }
}

/// A mounted hierarchy and this process's cgroup in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    own: PathBuf,
    cpuset: bool,
    /// File with the memory limit; `None` if this hierarchy does not account memory.
    memory_file: Option<&'static str>,
    /// Version of the CPU limit's files; `None` if this hierarchy does not schedule CPUs.
    cpu: Option<CpuFiles>,
}

/// Files with a CPU limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CpuFiles {
    V1,
    V2,
}

impl CpuFiles {
    /// Returns quota and period of a cgroup in µs; `None` without a limit.
    fn read(self, dir: &Path) -> Option<(u64, u64)> {
        let read = |file| std::fs::read_to_string(dir.join(file)).ok();
        let (quota, period) = match self {
            Self::V2 => {
                let text = read(V2_CPU_FILE)?;
                let (quota, period) = text.trim().split_once(' ')?;
                (quota.to_owned(), period.to_owned())
            }
            Self::V1 => (read(V1_QUOTA_FILE)?, read(V1_PERIOD_FILE)?),
        };
        // Without a limit the quota is "max" or -1.
        Some((quota.trim().parse().ok()?, period.trim().parse().ok()?))
    }

    /// Returns true if the CPU limit of the pod is too small for a VM.
    fn is_too_small(self, pod: &Path) -> bool {
        self.read(pod)
            .is_some_and(|(quota, period)| quota * 1000 < period * MIN_MILLICPUS)
    }

    /// Returns the files and values that a cgroup beside the pod's gets.
    fn beside(self, pod: &Path) -> Vec<(&'static str, String)> {
        let (copied, file): (&[&'static str], _) = match self {
            Self::V1 => (&V1_COPIED_FILES, V1_QUOTA_FILE),
            Self::V2 => (&V2_COPIED_FILES, V2_CPU_FILE),
        };
        let mut settings: Vec<_> = copied
            .iter()
            .filter_map(|&file| {
                let value = std::fs::read_to_string(pod.join(file)).ok()?;
                (!value.trim().is_empty()).then_some((file, value.trim().to_owned()))
            })
            .collect();
        if let Some((_, period)) = self.read(pod)
            && self.is_too_small(pod)
        {
            let quota = period * MILLICPUS_BESIDE / 1000;
            settings.retain(|(copied, _)| *copied != file);
            settings.push(match self {
                Self::V1 => (file, quota.to_string()),
                Self::V2 => (file, format!("{quota} {period}")),
            });
        }
        settings
    }
}

impl Hierarchy {
    /// Returns the cgroup to create the VM's in: the pod's, or the one above it if the pod's memory limit is below `need` bytes
    /// or its CPU limit too small.
    fn parent(&self, pod: &Path, need: u64) -> Parent {
        let limit = self.memory_file.and_then(|file| {
            let text = std::fs::read_to_string(self.mount.join(pod).join(file)).ok()?;
            text.trim().parse::<u64>().ok()
        });
        let too_small = limit.is_some_and(|limit| limit < need)
            || self
                .cpu
                .is_some_and(|cpu| cpu.is_too_small(&self.mount.join(pod)));
        match pod.parent() {
            Some(above) if too_small => Parent {
                path: above.to_owned(),
                beside: true,
            },
            _ => Parent {
                path: pod.to_owned(),
                beside: false,
            },
        }
    }

    /// Sets the limits of a cgroup beside the pod's.
    fn limit_beside(&self, pod: &Path, dir: &Path, need: u64) {
        let memory = self.memory_file.map(|file| (file, need.to_string()));
        let cpu = self.cpu.map(|cpu| cpu.beside(pod)).unwrap_or_default();
        for (file, value) in memory.into_iter().chain(cpu) {
            if let Err(error) = std::fs::write(dir.join(file), value) {
                tracing::warn!(dir = %dir.display(), file, %error, "failed to set up the VM's cgroup");
            }
        }
    }
}

/// Cgroup in which the VM's is created.
#[derive(Debug, PartialEq, Eq)]
struct Parent {
    path: PathBuf,
    /// The VM's cgroup is beside the pod's and gets separate limits.
    beside: bool,
}

/// Moves this process and its future children into `boxlite-<first 12 of id>` of every hierarchy: below `parent`, the pod's
/// cgroup, or beside it if its memory limit is below `need` bytes or its CPU limit too small. An empty parent changes nothing.
pub fn join(parent: &str, id: &str, need: u64) -> Joined {
    let mut joined = Joined::default();
    if parent.is_empty() {
        return joined;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let name = format!("boxlite-{}", id.get(..12).unwrap_or(id));
    for hierarchy in hierarchies(&mounts, &own) {
        if let Err(error) = join_one(&hierarchy, parent, &name, need, &mut joined) {
            tracing::info!(mount = %hierarchy.mount.display(), parent, %error, "failed to join cgroup");
        }
    }
    joined
}

fn join_one(
    hierarchy: &Hierarchy,
    parent: &str,
    name: &str,
    need: u64,
    joined: &mut Joined,
) -> io::Result<()> {
    let mut dir = hierarchy.mount.clone();
    let pod = Path::new(parent.trim_start_matches('/'));
    let parent = hierarchy.parent(pod, need);
    let path = parent.path.join(name);
    for part in path.components() {
        let Component::Normal(part) = part else {
            if part == Component::RootDir {
                continue;
            }
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "invalid cgroup parent: contains dot components",
            ));
        };
        let above = dir.clone();
        dir.push(part);
        match std::fs::create_dir(&dir) {
            Ok(()) => joined.made.push(dir.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error),
        }
        if hierarchy.cpuset {
            for file in CPUSET_FILES {
                std::fs::write(dir.join(file), std::fs::read(above.join(file))?)?;
            }
        }
    }
    if parent.beside {
        hierarchy.limit_beside(&hierarchy.mount.join(pod), &dir, need);
    }
    let pids = dir.join(PIDS_FILE);
    // Missing in other hierarchies of v1, and on v2 if the controller is not enabled.
    if pids.exists()
        && let Err(error) = std::fs::write(&pids, MAX_PIDS)
    {
        tracing::warn!(file = %pids.display(), %error, "failed to limit the VM's processes");
    }
    let procs = dir.join("cgroup.procs");
    std::fs::write(&procs, "0")?;
    joined.procs.push(procs);
    joined
        .back
        .push(hierarchy.mount.join(&hierarchy.own).join("cgroup.procs"));
    Ok(())
}

/// Pairs cgroup mounts (mountinfo) with this process's cgroups (/proc/self/cgroup).
fn hierarchies(mountinfo: &str, own: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for mount in mounts(mountinfo) {
        let (kind, options) = (mount.kind, mount.super_options);
        if kind != "cgroup" && kind != "cgroup2" {
            continue;
        }
        let path = own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let same = match kind {
                "cgroup2" => controllers.is_empty(),
                _ => {
                    !controllers.is_empty()
                        && controllers
                            .split(',')
                            .all(|name| options.split(',').any(|option| option == name))
                }
            };
            same.then_some(path)
        });
        let Some(path) = path else { continue };
        // In a bind mount of a part of a hierarchy, the paths of /proc/self/cgroup start above the mount.
        let path = Path::new(path)
            .strip_prefix(mount.root)
            .unwrap_or(Path::new(""));
        let has = |controller| options.split(',').any(|option| option == controller);
        found.push(Hierarchy {
            mount: mount.point,
            own: path.strip_prefix("/").unwrap_or(path).to_owned(),
            cpuset: has("cpuset"),
            memory_file: match kind {
                "cgroup2" => Some(V2_MEMORY_FILE),
                _ if has("memory") => Some(V1_MEMORY_FILE),
                _ => None,
            },
            cpu: match kind {
                "cgroup2" => Some(CpuFiles::V2),
                _ if has("cpu") => Some(CpuFiles::V1),
                _ => None,
            },
        });
    }
    found
}

/// Removes directories made by [`join`], last first, and waits at most `limit` for dying processes to leave them. Parents
/// in use by others remain.
pub fn remove(made: &[PathBuf], limit: Duration) {
    let deadline = Instant::now() + limit;
    for dir in made.iter().rev() {
        loop {
            match std::fs::remove_dir(dir) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => {
                    let dying = error.kind() == io::ErrorKind::ResourceBusy && !has_children(dir);
                    if !dying || Instant::now() >= deadline {
                        tracing::debug!(dir = %dir.display(), %error, "failed to remove cgroup");
                        break;
                    }
                    std::thread::sleep(REMOVE_POLL_INTERVAL);
                }
            }
        }
    }
}

fn has_children(dir: &Path) -> bool {
    std::fs::read_dir(dir)
        .map(|entries| {
            entries
                .flatten()
                .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        })
        .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
25 20 0:22 / /sys rw,nosuid - sysfs sysfs rw
30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
33 25 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
";
    const OWN: &str = "7:cpu,cpuacct:/a/b\n5:cpuset:/\n0::/c\n";

    #[test]
    fn hierarchies_pairs_mounts_with_own_cgroups() {
        let found = hierarchies(MOUNTS, OWN);
        let seen: Vec<_> = found
            .iter()
            .map(|h| {
                (
                    h.mount.to_str().unwrap_or(""),
                    h.own.to_str().unwrap_or(""),
                    h.cpuset,
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("/sys/fs/cgroup/cpu,cpuacct", "a/b", false),
                ("/sys/fs/cgroup/cpuset", "", true),
                ("/sys/fs/cgroup/unified", "c", false),
            ]
        );
    }

    #[test]
    fn join_one_parent_with_dots_creates_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let hierarchy = Hierarchy {
            mount: dir.path().join("m"),
            own: PathBuf::new(),
            cpuset: false,
            memory_file: None,
            cpu: None,
        };
        std::fs::create_dir(&hierarchy.mount).expect("mkdir");
        let mut joined = Joined::default();
        let error =
            join_one(&hierarchy, "../out", "boxlite-x", 0, &mut joined).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(joined.made.is_empty());
    }

    /// A hierarchy of plain files with a pod below a QoS class, and the pod's directory.
    fn hierarchy(dir: &Path, memory_file: Option<&'static str>) -> (Hierarchy, PathBuf) {
        let pod = dir.join("kubepods/burstable/podx");
        std::fs::create_dir_all(&pod).expect("mkdir");
        let hierarchy = Hierarchy {
            mount: dir.to_owned(),
            own: PathBuf::new(),
            cpuset: false,
            memory_file,
            cpu: memory_file.and_then(|file| (file == V2_MEMORY_FILE).then_some(CpuFiles::V2)),
        };
        (hierarchy, pod)
    }

    fn join_pod(hierarchy: &Hierarchy, need: u64) -> Joined {
        let mut joined = Joined::default();
        let pod = "/kubepods/burstable/podx";
        join_one(hierarchy, pod, "boxlite-x", need, &mut joined).expect("joined");
        joined
    }

    #[test]
    fn join_one_within_the_pods_limit_stays_in_the_pod() {
        for limit in ["max", "640"] {
            let dir = tempfile::tempdir().expect("tempdir");
            let (hierarchy, pod) = hierarchy(dir.path(), Some(V2_MEMORY_FILE));
            std::fs::write(pod.join(V2_MEMORY_FILE), limit).expect("write");
            let joined = join_pod(&hierarchy, 640);
            assert_eq!(joined.made, [pod.join("boxlite-x")]);
            assert!(!pod.join("boxlite-x").join(V2_MEMORY_FILE).exists());
        }
    }

    #[test]
    fn join_one_beyond_the_pods_limit_is_beside_it() {
        for (file, copied) in [(V2_MEMORY_FILE, true), (V1_MEMORY_FILE, false)] {
            let dir = tempfile::tempdir().expect("tempdir");
            let (hierarchy, pod) = hierarchy(dir.path(), Some(file));
            std::fs::write(pod.join(file), "639\n").expect("write");
            std::fs::write(pod.join("cpu.weight"), "79\n").expect("write");
            std::fs::write(pod.join(V2_CPU_FILE), "300000 100000\n").expect("write");
            let joined = join_pod(&hierarchy, 640);
            let beside = dir.path().join("kubepods/burstable/boxlite-x");
            assert_eq!(joined.made, [beside.as_path()]);
            let read = |file| std::fs::read_to_string(beside.join(file)).ok();
            assert_eq!(read(file).as_deref(), Some("640"));
            assert_eq!(read("cpu.weight").as_deref(), copied.then_some("79"));
            assert_eq!(
                read(V2_CPU_FILE).as_deref(),
                copied.then_some("300000 100000")
            );
            assert!(beside.join("cgroup.procs").exists());
        }
    }

    #[test]
    fn join_one_with_small_v1_quota_is_beside_the_pod() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut hierarchy, pod) = hierarchy(dir.path(), None);
        hierarchy.cpu = Some(CpuFiles::V1);
        let set = |file, value| std::fs::write(pod.join(file), value).expect("write");
        set(V1_PERIOD_FILE, "100000\n");
        set("cpu.shares", "10\n");
        for quota in ["-1\n", "25000\n"] {
            set(V1_QUOTA_FILE, quota);
            assert_eq!(join_pod(&hierarchy, 0).made, [pod.join("boxlite-x")]);
            std::fs::remove_dir_all(pod.join("boxlite-x")).expect("remove");
        }
        set(V1_QUOTA_FILE, "24999\n");
        let beside = dir.path().join("kubepods/burstable/boxlite-x");
        assert_eq!(join_pod(&hierarchy, 0).made, [beside.as_path()]);
        let read = |file| std::fs::read_to_string(beside.join(file)).expect("read");
        assert_eq!(read(V1_QUOTA_FILE), "100000");
        assert_eq!(read("cpu.shares"), "10");
    }

    #[test]
    fn join_one_with_small_v2_quota_is_beside_the_pod() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (hierarchy, pod) = hierarchy(dir.path(), Some(V2_MEMORY_FILE));
        std::fs::write(pod.join(V2_MEMORY_FILE), "max\n").expect("write");
        std::fs::write(pod.join(V2_CPU_FILE), "max 100000\n").expect("write");
        assert_eq!(join_pod(&hierarchy, 640).made, [pod.join("boxlite-x")]);
        std::fs::write(pod.join(V2_CPU_FILE), "1000 50000\n").expect("write");
        let beside = dir.path().join("kubepods/burstable/boxlite-x");
        assert_eq!(join_pod(&hierarchy, 640).made, [beside.as_path()]);
        let read = |file| std::fs::read_to_string(beside.join(file)).expect("read");
        assert_eq!(read(V2_CPU_FILE), "50000 50000");
        assert_eq!(read(V2_MEMORY_FILE), "640");
    }

    #[test]
    fn bring_moves_the_whole_family() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 60 & echo $!; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("sh");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        io::BufRead::read_line(&mut io::BufReader::new(stdout), &mut line).expect("a pid");
        let grandchild: i32 = line.trim().parse().expect("a number");
        let pid = child.id().cast_signed();
        assert_eq!(family(pid), BTreeSet::from([pid, grandchild]));
        // A plain file keeps the last write only.
        let procs = dir.path().join("cgroup.procs");
        let joined = Joined {
            procs: vec![procs.clone()],
            ..Joined::default()
        };
        joined.bring(pid);
        let last = pid.max(grandchild).to_string();
        assert_eq!(std::fs::read_to_string(procs).expect("written"), last);
        let killed = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(grandchild),
            nix::sys::signal::Signal::SIGKILL,
        );
        killed.expect("killed");
        child.wait().expect("sh ends with its child");
    }

    #[test]
    fn join_one_without_memory_accounting_stays_in_the_pod() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (hierarchy, pod) = hierarchy(dir.path(), None);
        assert_eq!(join_pod(&hierarchy, 640).made, [pod.join("boxlite-x")]);
    }
}
