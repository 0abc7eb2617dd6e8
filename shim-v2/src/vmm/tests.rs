//! Tests of the VMM boundary without a VM: the factory, spec checks, the bounded log.

use super::console::BoundedLog;
use super::{Vmm, VmmCapabilities, VmmFactory, VmmInstance, VmmInstanceImpl, devices};
use crate::jail::HostFiles;
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use boxlite_proto::vmm::{Acceleration, Disk, Installation, InstanceSpec, Nic, VmmKind};
use std::convert::Infallible;
use std::path::PathBuf;

const TOY: VmmCapabilities = VmmCapabilities {
    max_devices: 3,
    base_devices: 1,
};

/// The example of docs/adding-a-vmm.md.
struct ToyVmm;

struct ToyInstance(InstanceSpec);

impl Vmm for ToyVmm {
    fn create(&mut self, spec: InstanceSpec) -> BoxliteResult<VmmInstance> {
        devices::check(&spec, &TOY)?;
        Ok(VmmInstance::new(ToyInstance(spec)))
    }
}

impl VmmInstanceImpl for ToyInstance {
    fn host_files(&self) -> HostFiles {
        HostFiles {
            share: self.0.share_dir.clone(),
            work_dir: self.0.work_dir.clone(),
            ..HostFiles::default()
        }
    }

    fn enter(self: Box<Self>) -> BoxliteResult<Infallible> {
        Err(BoxliteError::Step {
            step: format!("enter the toy of {}", self.0.id),
            source: "it has no engine".into(),
        })
    }
}

pub(super) fn spec(kind: VmmKind) -> InstanceSpec {
    InstanceSpec {
        id: "pod".to_owned(),
        kind,
        vcpus: 1,
        memory_mib: 128,
        acceleration: Acceleration::Tcg,
        installation: Installation {
            guest: PathBuf::from("/nowhere/guest"),
            libkrunfw: PathBuf::from("/nowhere/libkrunfw.so.5"),
            qemu: PathBuf::from("/nowhere/qemu"),
            virtiofsd: PathBuf::from("/nowhere/virtiofsd"),
            vhost_device_vsock: PathBuf::from("/nowhere/vsock"),
            passt: PathBuf::from("/nowhere/passt"),
            cache: PathBuf::from("/nowhere/cache"),
        },
        work_dir: PathBuf::from("/run/vm"),
        share_dir: PathBuf::from("/run/share"),
        disks: Vec::new(),
        nics: Vec::new(),
        netns: None,
        host_network: false,
        passt: false,
        debug_console: false,
        user: None,
    }
}

fn disk(serial: &str) -> Disk {
    Disk {
        path: PathBuf::from("/disk"),
        serial: serial.to_owned(),
        read_only: false,
    }
}

fn nic(tap: &str, mac: &str) -> Nic {
    Nic {
        tap: tap.to_owned(),
        mac: mac.to_owned(),
        mtu: 1500,
    }
}

#[test]
fn factory_register_replaces_the_vmm_of_its_kind() {
    let mut factory = VmmFactory::standard();
    assert_ne!(factory.capabilities(&VmmKind::Qemu), Some(TOY));
    factory.register(VmmKind::Qemu, TOY, || Box::new(ToyVmm));
    assert_eq!(factory.capabilities(&VmmKind::Qemu), Some(TOY));

    // The kind is plain text in the spec that the vmm child reads.
    let json = serde_json::to_string(&spec(VmmKind::Qemu)).expect("a spec is JSON");
    let read: InstanceSpec = serde_json::from_str(&json).expect("and back");
    assert_eq!(read.kind, VmmKind::Qemu);

    let instance = factory
        .make(&read.kind)
        .and_then(|mut vmm| vmm.create(read));
    let instance = instance.expect("the toy takes any small spec");
    assert_eq!(instance.host_files().work_dir, PathBuf::from("/run/vm"));
    let Err(error) = instance.enter();
    assert_eq!(error.to_string(), "failed to enter the toy of pod");
}

#[test]
fn factory_standard_has_every_kind() {
    let factory = VmmFactory::standard();
    for kind in VmmKind::ALL {
        assert!(factory.make(&kind).is_ok(), "{kind}");
        assert_eq!(kind.name().parse(), Ok(kind));
    }
    assert!("bhyve".parse::<VmmKind>().is_err());
    let error = VmmFactory::empty()
        .make(&VmmKind::Krun)
        .map(drop)
        .expect_err("nothing is registered");
    assert_eq!(error.to_string(), "VMM krun not found");
}

#[test]
fn check_accepts_a_pod_up_to_the_last_slot() {
    let factory = VmmFactory::standard();
    for kind in [VmmKind::Krun, VmmKind::Qemu] {
        let capabilities = factory.capabilities(&kind).expect("standard");
        let mut pod = spec(kind);
        pod.disks.push(disk("scratch"));
        pod.nics.push(nic("tap0", "02:00:00:00:00:01"));
        devices::check(&pod, &capabilities).expect("scratch disk and NIC fit");
        // Fill all slots, then add one more.
        let free = capabilities.max_devices - capabilities.base_devices - 2;
        pod.disks
            .extend((0..free).map(|index| disk(&format!("more{index}"))));
        devices::check(&pod, &capabilities).expect("every slot can be used");
        pod.disks.push(disk("toomany"));
        let error = devices::check(&pod, &capabilities).expect_err("no free slot");
        let text = error.to_string();
        assert!(text.contains("toomany") && text.contains("tap0"), "{text}");
    }
}

#[test]
fn check_invalid_spec_names_the_field() {
    type Spoil = fn(&mut InstanceSpec);
    let cases: [(&str, Spoil); 9] = [
        ("vcpus", |spec| spec.vcpus = 0),
        ("memory_mib", |spec| spec.memory_mib = 63),
        ("disks.serial", |spec| spec.disks.push(disk(""))),
        ("disks.serial", |spec| {
            spec.disks.push(disk("a,readonly=off"))
        }),
        ("disks.serial", |spec| {
            spec.disks.push(disk(&"x".repeat(21)))
        }),
        ("disks.path", |spec| {
            spec.disks.push(disk("d"));
            spec.disks[0].path = PathBuf::from("/a,file=/etc/shadow");
        }),
        ("nics.tap", |spec| {
            spec.nics.push(nic("a/b", "02:00:00:00:00:01"))
        }),
        ("nics.mac", |spec| {
            spec.nics.push(nic("tap0", "02:00:00:00:00:0"))
        }),
        ("nics.mac", |spec| {
            spec.nics.push(nic("tap0", "03:00:00:00:00:01"))
        }),
    ];
    for (expected, spoil) in cases {
        let mut spec = spec(VmmKind::Qemu);
        spoil(&mut spec);
        match devices::check(&spec, &TOY) {
            Err(BoxliteError::InvalidSpec { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn log_keeps_tail_in_memory_and_head_on_disk() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("console.log");
    let line = format!("\u{1b}[31m{}\n", "x".repeat(4000));
    let text = line.repeat(600) + "last words";
    let log = BoundedLog::default();
    let created = std::fs::File::create(&file).expect("a file");
    log.follow(text.as_bytes(), Some(created));

    let kept = std::fs::metadata(&file).expect("it was written").len();
    assert_eq!(kept, 1 << 20, "only the first MiB is kept");
    let head = std::fs::read_to_string(&file).expect("ASCII");
    assert!(head.starts_with("\\x1b[31mxxx"), "escaped on disk");
    let tail = log.tail(2);
    assert_eq!(tail[1], "last words");
    assert!(
        tail[0].starts_with("[31mxxx") && tail[0].len() <= 512,
        "{}",
        tail[0].len()
    );
    assert!(log.tail(usize::MAX).len() <= 201);
}
