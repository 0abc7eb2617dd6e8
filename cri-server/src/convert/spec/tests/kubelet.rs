//! Fields that a stock kubelet sends, each in the smallest container that failed because of it.

use super::*;

#[test]
fn image_sub_path_of_an_ordinary_volume_is_ignored() {
    let mut config = container();
    config.mounts = vec![Mount {
        container_path: "/data".into(),
        host_path: "/tmp".into(),
        image_sub_path: "dir/file".into(),
        ..Default::default()
    }];
    let spec = made(&config, json!({})).unwrap();
    let mounts = spec["mounts"].as_array().unwrap();
    let volume = mounts.iter().find(|mount| mount["destination"] == "/data");
    assert_eq!(volume.unwrap()["source"], "/tmp");
}

#[test]
fn selinux_options_without_selinux_are_ignored() {
    if std::path::Path::new("/sys/fs/selinux/enforce").exists() {
        return;
    }
    let options = boxlite_proto::cri::v1::SeLinuxOption {
        level: "s0:c4,c5".into(),
        ..Default::default()
    };
    let mut config = container();
    security(&mut config).selinux_options = Some(options.clone());
    made(&config, json!({})).unwrap();
    let mut pod = pod().config.unwrap();
    pod.linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .selinux_options = Some(options);
    PodMetadata::new(pod, String::new()).unwrap();
}

#[test]
fn cpusets_of_the_cpu_manager_do_not_reach_the_guest() {
    let mut config = container();
    config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
        cpu_shares: 2,
        cpuset_cpus: "4-17".into(),
        cpuset_mems: "1".into(),
        ..Default::default()
    });
    let spec = made(&config, json!({})).unwrap();
    assert_eq!(spec["linux"]["resources"]["cpu"], json!({"shares": 2}));
}

#[test]
fn mount_options_are_applied_or_rejected() {
    let mut config = container();
    let volume = |options: &[&str]| Mount {
        container_path: "/data".into(),
        host_path: "/tmp".into(),
        mount_options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    };
    config.mounts = vec![volume(&["noexec", "nodev"])];
    let spec = made(&config, json!({})).unwrap();
    let mounts = spec["mounts"].as_array().unwrap();
    let data = mounts.iter().find(|mount| mount["destination"] == "/data");
    assert_eq!(
        data.unwrap()["options"],
        json!(["rbind", "rprivate", "rw", "noexec", "nodev"])
    );
    config.mounts = vec![volume(&["dirsync"])];
    let error = made(&config, json!({})).unwrap_err().to_string();
    assert!(error.contains("dirsync"), "{error}");
}

/// util-linux 2.41 made such sources of the kubelet's bind mounts for subPath.
#[test]
fn dangling_source_is_rejected_as_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("0");
    std::os::unix::fs::symlink("/proc/nonexistent/fd", &link).unwrap();
    let error = refused(Mount {
        container_path: "/data".into(),
        host_path: link.display().to_string(),
        ..Default::default()
    });
    let link = link.display().to_string();
    assert!(
        error.contains(&link) && error.contains("does not exist") && !error.contains("exists"),
        "{error}"
    );
}
