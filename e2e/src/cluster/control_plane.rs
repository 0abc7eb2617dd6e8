//! [`ControlPlane`]: etcd, API server, controller manager and scheduler of a one-node cluster, as processes of this program.

use super::certificates::Authority;
use super::kubectl::Kubectl;
use super::programs::Programs;
use super::{CLUSTER_IP, NODE_IP, SERVICES, until};
use crate::failure::{During, Result};
use crate::service::Service;
use std::path::Path;
use std::time::Duration;
use tokio::process::Command;

const API_PORT: u16 = 6443;
/// Time limit for the API server to create its default objects.
const USABLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Running control plane.
pub(crate) struct ControlPlane {
    /// Certificates and kubeconfigs.
    pub authority: Authority,
    /// kubectl as administrator.
    pub kubectl: Kubectl,
    _services: Vec<Service>,
}

/// Returns the URL of the API server.
pub(crate) fn url() -> String {
    format!("https://{NODE_IP}:{API_PORT}")
}

impl ControlPlane {
    /// Starts the components and waits until the API server is ready.
    pub(crate) async fn start(dir: &Path, programs: &Programs) -> Result<Self> {
        let authority = Authority::create(&dir.join("pki"))?;
        let kubeconfig = authority.kubeconfig("admin", "/O=system:masters/CN=admin", &url())?;
        std::fs::create_dir_all(dir.join("pki/home"))?;
        let kubectl = Kubectl {
            program: programs.program("kubectl"),
            kubeconfig,
            namespace: "default".into(),
        };
        let services = vec![
            etcd(dir, programs).await?,
            api_server(dir, programs, &authority, &kubectl).await?,
            controller_manager(dir, programs, &authority).await?,
            scheduler(dir, programs, &authority).await?,
        ];
        usable(&kubectl).await?;
        Ok(Self {
            authority,
            kubectl,
            _services: services,
        })
    }
}

/// Waits until the objects exist that the API server creates some time after it is ready.
async fn usable(kubectl: &Kubectl) -> Result {
    const DEFAULTS: [[&str; 2]; 3] = [
        ["namespace", "kube-system"],
        ["service", "kubernetes"],
        ["priorityclass", "system-node-critical"],
    ];
    until("the API server is usable", USABLE_TIMEOUT, || async {
        for [kind, name] in DEFAULTS {
            kubectl.run(&["get", kind, name]).await?;
        }
        Ok(())
    })
    .await
}

async fn etcd(dir: &Path, programs: &Programs) -> Result<Service> {
    let mut command = Command::new(programs.program("etcd"));
    command
        .arg("--data-dir")
        .arg(dir.join("etcd"))
        // The data ends with the cluster.
        .args(["--unsafe-no-fsync", "--log-level=warn"])
        .args([
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
        ])
        .args([
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        ])
        .arg("--initial-cluster=default=http://127.0.0.1:2380");
    let service = Service::new("etcd", dir.join("etcd.log"));
    service
        .start(command, || async {
            super::healthy("http://127.0.0.1:2379/health").await
        })
        .await?;
    Ok(service)
}

async fn api_server(
    dir: &Path,
    programs: &Programs,
    authority: &Authority,
    kubectl: &Kubectl,
) -> Result<Service> {
    let names = format!(
        "IP:{NODE_IP},IP:127.0.0.1,IP:{CLUSTER_IP},DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,\
         DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
    );
    let server = authority.issue("apiserver", "/CN=kube-apiserver", &names)?;
    let client = authority.issue("apiserver-kubelet", "/O=system:masters/CN=apiserver", "")?;
    let front = authority.issue("front-proxy", "/CN=front-proxy-client", "")?;
    let mut command = Command::new(programs.program("kube-apiserver"));
    command
        .arg("--etcd-servers=http://127.0.0.1:2379")
        .arg(format!("--secure-port={API_PORT}"))
        .arg(format!("--advertise-address={NODE_IP}"))
        .arg(format!("--service-cluster-ip-range={SERVICES}"))
        .args([
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
        ])
        .args(["--allow-privileged=true", "--profiling=false"])
        // The node's name has no DNS entry.
        .arg("--kubelet-preferred-address-types=InternalIP")
        .arg("--service-account-issuer=https://kubernetes.default.svc.cluster.local")
        .arg("--requestheader-allowed-names=front-proxy-client")
        .args([
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
        ])
        .arg("--requestheader-username-headers=X-Remote-User");
    for (flag, path) in [
        ("client-ca-file", authority.at("ca.crt").into()),
        (
            "requestheader-client-ca-file",
            authority.at("ca.crt").into(),
        ),
        (
            "kubelet-certificate-authority",
            authority.at("ca.crt").into(),
        ),
        (
            "service-account-key-file",
            authority.at("tokens.pub").into(),
        ),
        (
            "service-account-signing-key-file",
            authority.at("tokens.key").into(),
        ),
        ("tls-cert-file", server.certificate),
        ("tls-private-key-file", server.key),
        ("kubelet-client-certificate", client.certificate),
        ("kubelet-client-key", client.key),
        ("proxy-client-cert-file", front.certificate),
        ("proxy-client-key-file", front.key),
    ] {
        path_flag(&mut command, flag, &path);
    }
    let service = Service::new("kube-apiserver", dir.join("apiserver.log"));
    service
        .start(command, || async {
            kubectl.run(&["get", "--raw=/readyz"]).await.map(drop)
        })
        .await?;
    Ok(service)
}

async fn controller_manager(
    dir: &Path,
    programs: &Programs,
    authority: &Authority,
) -> Result<Service> {
    let subject = "/CN=system:kube-controller-manager";
    let kubeconfig = authority.kubeconfig("controller-manager", subject, &url())?;
    let mut command = Command::new(programs.program("kube-controller-manager"));
    command.args([
        "--leader-elect=false",
        "--use-service-account-credentials=true",
    ]);
    for (flag, path) in [
        ("kubeconfig", kubeconfig),
        (
            "service-account-private-key-file",
            authority.at("tokens.key").into(),
        ),
        ("root-ca-file", authority.at("ca.crt").into()),
        ("cluster-signing-cert-file", authority.at("ca.crt").into()),
        ("cluster-signing-key-file", authority.at("ca.key").into()),
    ] {
        path_flag(&mut command, flag, &path);
    }
    certificate_dir(&mut command, dir);
    secure("kube-controller-manager", 10257, dir, command).await
}

async fn scheduler(dir: &Path, programs: &Programs, authority: &Authority) -> Result<Service> {
    let kubeconfig = authority.kubeconfig("scheduler", "/CN=system:kube-scheduler", &url())?;
    let mut command = Command::new(programs.program("kube-scheduler"));
    command.arg("--leader-elect=false");
    path_flag(&mut command, "kubeconfig", &kubeconfig);
    certificate_dir(&mut command, dir);
    secure("kube-scheduler", 10259, dir, command).await
}

/// Starts a component that serves its health over TLS with a self-signed certificate.
async fn secure(name: &'static str, port: u16, dir: &Path, command: Command) -> Result<Service> {
    let service = Service::new(name, dir.join(format!("{name}.log")));
    service
        .start(command, || async {
            super::healthy(&format!("https://127.0.0.1:{port}/healthz")).await
        })
        .await
        .during(name)?;
    Ok(service)
}

fn certificate_dir(command: &mut Command, dir: &Path) {
    path_flag(command, "cert-dir", &dir.join("serving"));
}

fn path_flag(command: &mut Command, flag: &str, path: &Path) {
    command.arg(format!("--{flag}={}", path.display()));
}
