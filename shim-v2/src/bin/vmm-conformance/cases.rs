//! The cases, in the order of a VM's life. Each starts its own VM and returns a note with its measurements.

use super::harness::{Bench, Error, Result, Running, USER};
use boxlite_proto::boxlite::v1::{AttachRequest, ContainerInitRequest, Rootfs};
use boxlite_proto::vmm::{Disk, VmmKind};
use boxlite_shim_v2::vmm::BootError;
use futures::StreamExt;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::future::Future;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, Instant};

type Outcome = Pin<Box<dyn Future<Output = Result<String>>>>;
type Case = fn(VmmKind) -> Outcome;

/// Maximum time until the end of a VM is noticed.
const MAX_DEATH_DELAY: Duration = Duration::from_secs(2);
/// Timeout of a call that the agent answers at once.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) const ALL: &[(&str, Case)] = &[
    ("boot-ready-ping", |kind| Box::pin(boot(kind))),
    ("init-disk-share-nic", |kind| Box::pin(init(kind))),
    ("late-share-mount", |kind| Box::pin(late_mount(kind))),
    ("debug-console", |kind| Box::pin(debug_console(kind))),
    ("jail", |kind| Box::pin(jail(kind))),
    ("shutdown", |kind| Box::pin(shutdown(kind))),
    ("kill-noticed", |kind| Box::pin(kill(kind))),
    ("shim-death", |kind| Box::pin(shim_death(kind))),
    ("helper-death", |kind| Box::pin(helper_death(kind))),
    ("dead-agent-console", |kind| Box::pin(dead_agent(kind))),
    ("missing-kernel", |kind| Box::pin(missing_kernel(kind))),
    ("too-many-devices", |kind| Box::pin(too_many_devices(kind))),
    ("bad-spec", |kind| Box::pin(bad_spec(kind))),
];

fn check(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(message().into()) }
}

async fn boot(kind: VmmKind) -> Result<String> {
    let mut times = Vec::new();
    for _ in 0..3 {
        let running = Bench::new(&kind)?.boot().await?;
        running.guest.guest().ping(CALL_TIMEOUT).await?;
        times.push(running.ready_after.as_millis());
        check(running.child.exited().is_none(), || {
            "the VM has ended".to_owned()
        })?;
    }
    Ok(format!("ready after {times:?} ms"))
}

async fn init(kind: VmmKind) -> Result<String> {
    let running = Bench::new(&kind)?.boot().await?;
    let answer = running.init().await?;
    let pss = pss_of_tree(running.child.pid());
    // A closed port answers with a reset, which proves that frames pass the tap both ways and that the guest has its address.
    let dial = tokio::net::TcpStream::connect("10.199.0.2:9");
    match tokio::time::timeout(CALL_TIMEOUT, dial).await {
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
        other => return Err(format!("dialling the guest: {other:?}").into()),
    }
    Ok(format!(
        "kernel {}, {:?}; PSS {pss} MiB",
        answer.kernel_release, answer.devices
    ))
}

/// Kernel messages appear on the console only if requested.
async fn debug_console(kind: VmmKind) -> Result<String> {
    let talks = |running: &Running| {
        let console = running.child.console_tail(usize::MAX);
        console.iter().any(|line| line.contains("Run /init"))
    };
    let mut bench = Bench::new(&kind)?;
    bench.spec.debug_console = true;
    let running = bench.boot().await?;
    check(talks(&running), || {
        "no kernel message on the console".to_owned()
    })?;
    drop(running);
    let quiet = Bench::new(&kind)?.boot().await?;
    check(!talks(&quiet), || {
        "kernel messages without debug_console".to_owned()
    })?;
    Ok(String::new())
}

/// Returns the proportional memory (PSS) of a process tree in MiB.
fn pss_of_tree(root: i32) -> u64 {
    let mut todo = vec![root];
    let mut kib = 0;
    while let Some(pid) = todo.pop() {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = rollup
            .lines()
            .find(|line| line.starts_with("Pss:"))
            .unwrap_or_default();
        kib += line
            .split_ascii_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .unwrap_or(0);
        let children =
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        todo.extend(
            children
                .split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    kib / 1024
}

/// A root made of bind mounts added to the share while the VM runs: the guest runs the host's programs.
async fn late_mount(kind: VmmKind) -> Result<String> {
    let running = Bench::new(&kind)?.boot().await?;
    running.init().await?;
    let root = running.share().join("r/late");
    for name in ["usr", "proc", "dev", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(name))?;
    }
    for (name, to) in [
        ("bin", "usr/bin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
    ] {
        symlink(to, root.join(name))?;
    }
    let none: Option<&str> = None;
    mount(
        Some("/usr"),
        &root.join("usr"),
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )?;
    let text = "arrived after boot\n";
    let file = running.bench.file("late", text.as_bytes())?;
    fs::write(root.join("etc/late"), "")?;
    mount(
        Some(&file),
        &root.join("etc/late"),
        none,
        MsFlags::MS_BIND,
        none,
    )?;

    let printed = run_container(&running, "r/late", &["/usr/bin/cat", "/etc/late"]).await;
    umount2(&root.join("etc/late"), MntFlags::MNT_DETACH)?;
    umount2(&root.join("usr"), MntFlags::MNT_DETACH)?;
    let printed = printed?;
    check(printed == text, || format!("the guest read {printed:?}"))?;
    Ok(String::new())
}

async fn run_container(running: &Running, directory: &str, args: &[&str]) -> Result<String> {
    let spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": { "user": { "uid": 0, "gid": 0 }, "args": args, "cwd": "/", "env": ["PATH=/usr/bin"], "noNewPrivileges": true },
        "root": { "path": "rootfs", "readonly": false },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
        ],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] },
    });
    let (id, containers, execution) =
        ("late", running.guest.container(), running.guest.execution());
    let with_console = |error: &(dyn std::error::Error + 'static)| -> Error {
        format!(
            "{}; console: {}",
            boxlite_sys::report::report(error),
            running.child.console_tail(20).join(" | ")
        )
        .into()
    };
    let request = ContainerInitRequest {
        container_id: id.to_owned(),
        spec_json: serde_json::to_vec(&spec)?.into(),
        rootfs: Some(Rootfs {
            directory: directory.to_owned(),
            ..Rootfs::default()
        }),
        ..ContainerInitRequest::default()
    };
    containers
        .init(request)
        .await
        .map_err(|error| with_console(&error))?;
    containers
        .start(id, false)
        .await
        .map_err(|error| with_console(&error))?;
    let request = AttachRequest {
        container_id: id.to_owned(),
        ..AttachRequest::default()
    };
    let mut output = execution.attach(request).await?;
    let mut printed = Vec::new();
    while let Some(chunk) = output.next().await {
        let chunk = chunk?;
        printed.extend_from_slice(&chunk.data);
        if chunk.eof {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&printed).into_owned())
}

/// View and privileges of the processes of a VM.
async fn jail(kind: VmmKind) -> Result<String> {
    let bench = Bench::new(&kind)?;
    let leak = bench.file("leak", b"")?;
    let inherited = fs::File::open(&leak)?;
    fcntl(&inherited, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let running = bench.boot().await?;
    drop(inherited);
    let pid = running.child.pid();
    let root = format!("/proc/{pid}/root");
    for hidden in [
        "home",
        "root/.ssh",
        "var",
        "boot",
        "sys",
        "etc/passwd",
        "etc/shadow",
        "dev/mem",
        "dev/vda",
    ] {
        let path = Path::new(&root).join(hidden);
        check(fs::symlink_metadata(&path).is_err(), || {
            format!("the VMM sees /{hidden}")
        })?;
    }
    let written = fs::write(Path::new(&root).join("written"), "x");
    check(written.is_err(), || {
        "the jail's root is writable".to_owned()
    })?;
    let mut processes = vec![pid.to_string()];
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    processes.extend(children.split_ascii_whitespace().map(str::to_owned));
    let mut notes = Vec::new();
    for process in &processes {
        notes.push(check_privileges(process, &kind)?);
        check_descriptors(process, &leak)?;
    }
    check_mounts(&running)?;
    for namespace in ["mnt", "pid", "ipc", "uts", "user"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{namespace}"));
        check(of(&pid.to_string())? != of("self")?, || {
            format!("it shares our {namespace} namespace")
        })?;
    }
    Ok(notes.join("; "))
}

/// Checks one process and returns its line of the table in docs/security.md.
fn check_privileges(process: &str, kind: &VmmKind) -> Result<String> {
    /// CAP_SYS_ADMIN, SYS_PTRACE, SYS_MODULE, SYS_RAWIO, NET_ADMIN, MKNOD, DAC_READ_SEARCH.
    const FORBIDDEN: u64 = 1 << 21 | 1 << 19 | 1 << 16 | 1 << 17 | 1 << 12 | 1 << 27 | 1 << 2;
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let field = |name: &str| {
        let line = status
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        line.split_ascii_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    };
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        let held = u64::from_str_radix(&field(set), 16)?;
        check(held & FORBIDDEN == 0, || {
            format!("{} has {set} {held:x}", field("Name:"))
        })?;
    }
    let name = field("Name:");
    check(field("NoNewPrivs:") == "1", || {
        format!("{name} may gain privileges")
    })?;
    // libkrun serves files itself.
    let serves_files = name == "virtiofsd" || *kind == VmmKind::Krun;
    let held = field("CapEff:");
    check(serves_files || u64::from_str_radix(&held, 16)? == 0, || {
        format!("{name} has capabilities {held}")
    })?;
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        check(status.contains("Seccomp:\t2"), || {
            format!("a thread of {name} has no system call filter")
        })?;
    }
    let limits = fs::read_to_string(format!("/proc/{process}/limits"))?;
    let hard_limit = |resource: &str| -> String {
        let line = limits.lines().find_map(|line| line.strip_prefix(resource));
        let mut columns = line.unwrap_or_default().split_ascii_whitespace();
        columns.nth(1).unwrap_or_default().to_owned()
    };
    check(hard_limit("Max core file size") == "0", || {
        format!("{name} may dump core")
    })?;
    check(
        serves_files || hard_limit("Max file size") != "unlimited",
        || format!("{name} may write files of any size"),
    )?;
    let ids = [field("Uid:"), field("Gid:")];
    let expected = if serves_files { 0 } else { USER }.to_string();
    check(ids.iter().all(|id| *id == expected), || {
        format!("{name} has user and group {ids:?}, not {expected}")
    })?;
    // Two of the jail and an allow-list. The child that only waits for QEMU has no allow-list.
    let filters = field("Seccomp_filters:");
    let waits = *kind == VmmKind::Qemu && name.starts_with("containerd-shim");
    let least = if waits { 2 } else { 3 };
    check(filters.parse().is_ok_and(|n: u32| n >= least), || {
        format!("{name} has {filters} system call filters")
    })?;
    Ok(format!(
        "{name} uid {expected} caps {held} seccomp 2 ({filters} filters) no_new_privs 1"
    ))
}

/// Checks that the only writable mounts of the jail are those of the VM, and the only devices the listed ones. A file server
/// that is led out of the share reaches these.
fn check_mounts(running: &Running) -> Result<()> {
    const DEVICES: [&str; 6] = [
        "/dev/null",
        "/dev/zero",
        "/dev/random",
        "/dev/urandom",
        "/dev/kvm",
        "/dev/net/tun",
    ];
    let spec = &running.bench.spec;
    let mut writable: Vec<&Path> = spec.disks.iter().map(|disk| disk.path.as_path()).collect();
    writable.push(&spec.work_dir);
    let path = format!("/proc/{}/mountinfo", running.child.pid());
    let table = fs::read_to_string(path)?;
    check(table.lines().count() > writable.len(), || table.clone())?;
    for line in table.lines() {
        let mut fields = line.split_ascii_whitespace().skip(4);
        let at = fields.next().unwrap_or_default();
        let options: Vec<&str> = fields.next().unwrap_or_default().split(',').collect();
        let is = |option| options.contains(&option);
        check(is("nosuid"), || format!("not nosuid: {line}"))?;
        let device = DEVICES.contains(&at);
        check(is("nodev") || device, || format!("not nodev: {line}"))?;
        let vm = writable.contains(&Path::new(at));
        check(is("ro") || device || vm, || format!("writable: {line}"))?;
        check(is("noexec") || is("ro"), || {
            format!("written and executed: {line}")
        })?;
        let proc = at == "/proc" && spec.kind == VmmKind::Qemu || at == "/proc/self/fd";
        check(!at.starts_with("/proc") || proc, || {
            format!("visible: {line}")
        })?;
    }
    Ok(())
}

/// Checks that a process did not inherit a file of ours.
fn check_descriptors(process: &str, leak: &Path) -> Result<()> {
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        let target = fs::read_link(entry.path()).unwrap_or_default();
        check(target != leak, || {
            format!("{process} has our descriptor {:?}", entry.file_name())
        })?;
    }
    Ok(())
}

async fn shutdown(kind: VmmKind) -> Result<String> {
    let running = Bench::new(&kind)?.boot().await?;
    running.init().await?;
    running
        .guest
        .guest()
        .shutdown(Duration::from_secs(1))
        .await?;
    let start = Instant::now();
    let exit = tokio::time::timeout(CALL_TIMEOUT, running.child.wait()).await?;
    check(exit.code == Some(0), || format!("ended with {exit}"))?;
    Ok(format!(
        "ended {} ms after the call",
        start.elapsed().as_millis()
    ))
}

async fn kill(kind: VmmKind) -> Result<String> {
    let running = Bench::new(&kind)?.boot().await?;
    let start = Instant::now();
    running.child.kill();
    let exit = tokio::time::timeout(MAX_DEATH_DELAY, running.child.wait()).await?;
    check(exit.signal == Some(9), || format!("ended with {exit}"))?;
    running.child.kill();
    Ok(format!("noticed after {} ms", start.elapsed().as_millis()))
}

/// Killing the shim ends its VM and every helper.
async fn shim_death(kind: VmmKind) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let mut shim = tokio::process::Command::new(std::env::current_exe()?);
    shim.arg("hold")
        .arg(kind.to_string())
        .arg(directory.path())
        .kill_on_drop(true);
    let mut shim = shim.spawn()?;
    let note = directory.path().join("pid");
    while !note.exists() {
        if let Some(status) = shim.try_wait()? {
            return Err(format!("the shim ended: {status}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let vmm = fs::read_to_string(&note)?;
    let mut processes: Vec<String> = vec![vmm.clone()];
    let children = fs::read_to_string(format!("/proc/{vmm}/task/{vmm}/children"))?;
    processes.extend(children.split_ascii_whitespace().map(str::to_owned));
    shim.kill().await?;
    let start = Instant::now();
    while processes.iter().any(|process| alive(process)) {
        check(start.elapsed() < MAX_DEATH_DELAY, || {
            format!("{processes:?} outlive their shim")
        })?;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    umount2(&directory.path().join("share"), MntFlags::MNT_DETACH)?;
    Ok(format!(
        "{} processes gone after {} ms",
        processes.len(),
        start.elapsed().as_millis()
    ))
}

fn alive(process: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // A zombie only waits for its parent.
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

/// The exit of any process started by the VMM ends the VM.
async fn helper_death(kind: VmmKind) -> Result<String> {
    let mut notes = Vec::new();
    let mut index = 0;
    loop {
        let running = Bench::new(&kind)?.boot().await?;
        let pid = running.child.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let Some(helper) = children.split_ascii_whitespace().nth(index) else {
            return Ok(format!("{notes:?}"));
        };
        let name = fs::read_to_string(format!("/proc/{helper}/comm"))?;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(helper.parse()?),
            nix::sys::signal::Signal::SIGKILL,
        )?;
        let start = Instant::now();
        let exit = tokio::time::timeout(MAX_DEATH_DELAY, running.child.wait()).await;
        let exit = exit.map_err(|_| format!("the end of {name} goes unnoticed"))?;
        check(exit.code != Some(0), || {
            format!("the end of {name} looks like a clean exit")
        })?;
        notes.push(format!(
            "{} {} ms",
            name.trim(),
            start.elapsed().as_millis()
        ));
        index += 1;
    }
}

async fn dead_agent(kind: VmmKind) -> Result<String> {
    let mut bench = Bench::new(&kind)?;
    bench.spec.installation.guest = bench.file("agent", b"no program at all\n")?;
    let (ready, child) = bench.spawn()?;
    let waited = tokio::time::timeout(Duration::from_secs(90), ready.wait(&child)).await;
    child.kill();
    match waited? {
        Err(BootError::Died { console, .. }) => {
            let text = console.join("\n");
            check(text.contains("init"), || {
                format!("the console's last lines do not name the cause: {text:?}")
            })?;
            Ok(format!("{} lines", console.len()))
        }
        other => Err(format!("a VM without an agent: {other:?}").into()),
    }
}

/// Starts a VM that cannot start and checks that its error contains the given words.
async fn refused(bench: Bench, words: &[&str]) -> Result<String> {
    let (ready, child) = bench.spawn()?;
    let start = Instant::now();
    let waited = tokio::time::timeout(CALL_TIMEOUT, ready.wait(&child)).await;
    child.kill();
    let Err(error) = waited? else {
        return Err("it started".into());
    };
    let took = start.elapsed();
    let text = error.to_string();
    for word in words {
        check(text.contains(word), || {
            format!("{word:?} is not in {text:?}")
        })?;
    }
    Ok(format!("after {} ms", took.as_millis()))
}

async fn missing_kernel(kind: VmmKind) -> Result<String> {
    let mut bench = Bench::new(&kind)?;
    bench.spec.installation.libkrunfw = "/nowhere/libkrunfw.so.5".into();
    refused(bench, &["/nowhere/libkrunfw.so.5", "not found"]).await
}

async fn too_many_devices(kind: VmmKind) -> Result<String> {
    let mut bench = Bench::new(&kind)?;
    for index in 0..12 {
        let path = bench.file(&format!("disk{index}"), &[0; 4096])?;
        bench.spec.disks.push(Disk {
            path,
            serial: format!("extra{index}"),
            read_only: true,
        });
    }
    refused(bench, &["device slots", "disk extra11", "NIC tap0"]).await
}

async fn bad_spec(kind: VmmKind) -> Result<String> {
    let mut bench = Bench::new(&kind)?;
    bench.spec.memory_mib = 1;
    refused(bench, &["memory_mib", "at least 64 MiB"]).await
}
