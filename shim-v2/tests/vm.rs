//! Tests of the shim with a real VM on QEMU: boot, container, log, exit code, deaths of every kind.

mod common;

use common::{Shim, assert_gone, log_bytes, options, processes_with};
use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc;
use std::time::{Duration, Instant};

fn signal(pid: u32, signal: &str) {
    let sent = std::process::Command::new("kill")
        .args([signal, &pid.to_string()])
        .status()
        .expect("kill runs");
    assert!(sent.success());
}

fn code(error: &ttrpc::Error) -> ttrpc::Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn container_runs_logs_and_exits_with_its_code() {
    let shim = Shim::start("a1").await;
    let began = Instant::now();
    let mut options = options();
    options.cgroup_parent = "/boxlite-test-a1".to_owned();
    shim.create_sandbox(&options).await.expect("created");
    let pid = shim.start_sandbox().await.expect("started");
    assert!(pid > 0);
    // If the host accepts processes in new cgroups at all, the VM is in the pod's.
    if common::cgroups_are_writable() {
        let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
        let expected = format!("/boxlite-test-a1/boxlite-{}", &shim.id[..12]);
        assert!(own.contains(&expected), "{own}");
    }
    eprintln!(
        "StartSandbox {} ms: {:?}",
        began.elapsed().as_millis(),
        shim.status().await.info
    );
    assert_eq!(
        shim.start_sandbox().await.expect("joins"),
        pid,
        "a second start is the first"
    );

    shim.run("c1", "echo out; echo err >&2; printf tail; exit 7")
        .await;
    let exit = shim.wait("c1").await;
    assert_eq!(exit.exit_status, 7);
    let log = std::fs::read(shim.log_path("c1")).expect("log");
    assert_eq!(
        String::from_utf8_lossy(&log_bytes(&log, "stdout")),
        "out\ntail"
    );
    assert_eq!(String::from_utf8_lossy(&log_bytes(&log, "stderr")), "err\n");
    let state = shim.state("c1").await.expect("state");
    assert_eq!(state.status.enum_value(), Ok(Status::STOPPED));
    assert_eq!(
        code(&shim.kill("c1", 9).await.expect_err("it has ended")),
        ttrpc::Code::NOT_FOUND
    );
    assert_eq!(shim.delete("c1").await.expect("deleted"), 7);
    assert_eq!(
        code(&shim.state("c1").await.expect_err("gone")),
        ttrpc::Code::NOT_FOUND
    );

    // The same id again after its mounts are gone; and a path that does not exist.
    let missing = serde_json::json!([{
        "destination": "/x", "type": "bind", "source": "/no/such/path", "options": ["rbind"]
    }]);
    let error = shim
        .create("c1", "true", missing)
        .await
        .expect_err("refused");
    assert!(error.to_string().contains("/no/such/path"), "{error}");
    let volume = shim.dir.path().join("volume");
    std::fs::create_dir(&volume).expect("mkdir");
    std::fs::write(volume.join("f"), "of the host\n").expect("write");
    let mounts = serde_json::json!([
        {"destination": "/v", "type": "bind", "source": volume, "options": ["rbind", "ro"]}
    ]);
    shim.create("c2", "cat /v/f; echo x > /v/g || echo denied", mounts)
        .await
        .expect("created");
    shim.start_container("c2").await;
    assert_eq!(shim.wait("c2").await.exit_status, 0);
    let log = std::fs::read(shim.log_path("c2")).expect("log");
    assert_eq!(
        String::from_utf8_lossy(&log_bytes(&log, "stdout")),
        "of the host\ndenied\n"
    );
    assert!(!volume.join("g").exists());
    shim.end().await;
    assert!(common::cgroups_named("boxlite-test-a1").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn killed_vm_is_noticed_within_two_seconds() {
    let shim = Shim::start("b1").await;
    let pid = shim.boot().await;
    shim.run("c1", "echo alive; sleep 1000").await;
    let log = shim.log_path("c1");
    for _ in 0..200 {
        if std::fs::read(&log).is_ok_and(|log| !log.is_empty()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    signal(pid, "-9");
    let began = Instant::now();
    let exit = shim.wait("c1").await;
    let took = began.elapsed();
    assert_eq!(exit.exit_status, 137);
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(shim.status().await.state, "SANDBOX_NOTREADY");
    assert_eq!(
        log_bytes(&std::fs::read(&log).expect("log"), "stdout"),
        b"alive\n"
    );
    assert_eq!(
        code(
            &shim
                .create("c2", "true", serde_json::json!([]))
                .await
                .expect_err("no VM")
        ),
        ttrpc::Code::UNAVAILABLE
    );
    assert_eq!(shim.delete("c1").await.expect("deleted"), 137);
    shim.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn killed_shim_ends_its_vm_and_delete_cleans_up() {
    let shim = Shim::start("c1").await;
    let vmm = shim.boot().await;
    shim.run("c1", "sleep 1000").await;
    let all = processes_with(&shim.id);
    let daemon = all
        .iter()
        .find(|(_, line)| line.contains("-socket"))
        .expect("the daemon runs")
        .0;
    signal(daemon.unsigned_abs(), "-9");
    let began = Instant::now();
    // An exited process has no command line; reaping it is init's task once its parent is gone.
    while std::fs::read(format!("/proc/{vmm}/cmdline")).is_ok_and(|line| !line.is_empty()) {
        assert!(
            began.elapsed() < Duration::from_secs(2),
            "the VM outlives its shim"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shim.delete_action();
    assert_gone(&shim.id).await;
    assert!(!shim.bundle.join("scratch.img").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn boot_without_agent_fails_with_console_and_can_be_retried() {
    let shim = Shim::start("d1").await;
    let mut options = options();
    options.installation.guest = "/bin/busybox".into();
    shim.create_sandbox(&options).await.expect("created");
    let error = shim
        .start_sandbox()
        .await
        .expect_err("no agent")
        .to_string();
    assert!(error.contains("last console lines"), "{error}");
    let again = shim.start_sandbox().await.expect_err("still none");
    assert_ne!(code(&again), ttrpc::Code::FAILED_PRECONDITION, "{again}");
    assert!(!shim.bundle.join("scratch.img").exists());
    shim.end().await;
}

/// Logs 64 MiB of numbered lines across rotations: every byte once, in order. Prints the throughput.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn log_is_complete_across_rotations() {
    const BYTES: usize = 64 << 20;
    const ROTATIONS: usize = 3;
    let shim = Shim::start("e1").await;
    shim.boot().await;
    let volume = shim.dir.path().join("volume");
    std::fs::create_dir(&volume).expect("mkdir");
    let mut expected = Vec::with_capacity(BYTES + 128);
    let mut number = 0u64;
    while expected.len() < BYTES {
        let padding = "x".repeat((number % 97) as usize);
        expected.extend_from_slice(format!("line {number} {padding}\n").as_bytes());
        number += 1;
    }
    std::fs::write(volume.join("lines"), &expected).expect("write");
    let mounts = serde_json::json!([
        {"destination": "/v", "type": "bind", "source": volume, "options": ["rbind", "ro"]}
    ]);
    shim.create("c1", "cat /v/lines", mounts)
        .await
        .expect("created");
    let began = Instant::now();
    shim.start_container("c1").await;
    let path = shim.log_path("c1");
    let mut log = Vec::new();
    for rotation in 0..ROTATIONS {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let rotated = shim.dir.path().join(format!("c1.log.{rotation}"));
        std::fs::rename(&path, &rotated).expect("rotated");
        shim.reopen_log("c1").await;
        log.extend(std::fs::read(&rotated).expect("rotated"));
    }
    assert_eq!(shim.wait("c1").await.exit_status, 0);
    let took = began.elapsed();
    log.extend(std::fs::read(&path).expect("the last"));
    eprintln!(
        "{} MiB of output as {} MiB of log in {} ms",
        expected.len() >> 20,
        log.len() >> 20,
        took.as_millis()
    );
    assert!(
        log_bytes(&log, "stdout") == expected,
        "the log is not the output"
    );
    shim.end().await;
}
