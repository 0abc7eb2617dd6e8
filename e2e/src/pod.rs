//! [`Pod`] and [`Container`]: a kubelet's calls under names that make tests readable.
//!
//! The specs are CRI messages that tests modify before use. It asserts only that calls succeed.

use crate::client::{answer, within};
use crate::failure::Result;
use crate::node::Node;
use crate::poll;
use crate::stream::Streams;
use k8s_cri::v1::*;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static SERIAL: AtomicU32 = AtomicU32::new(1);

/// Deadline of calls that may start processes in a slow guest.
pub(crate) const LONG_TIMEOUT: Duration = Duration::from_secs(120);

/// Deadline of RunPodSandbox, as a kubelet's.
const RUN_TIMEOUT: Duration = Duration::from_secs(240);

/// Hostname of the shared pod (see [`crate::context::TestContext::shared_pod`]).
pub(crate) const SHARED_POD: &str = "common";

/// Returns a sandbox configuration.
pub(crate) fn pod_spec(node: &Node, name: &str) -> PodSandboxConfig {
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: format!("{name}-{serial}"),
            uid: format!("uid-{serial}"),
            namespace: "e2e".into(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: node
            .dir
            .join(format!("logs/{name}-{serial}"))
            .display()
            .to_string(),
        labels: [("e2e".to_owned(), name.to_owned())].into(),
        linux: Some(LinuxPodSandboxConfig {
            sysctls: sysctls(),
            // As a kubelet sets it if a container of the pod is privileged.
            security_context: Some(LinuxSandboxSecurityContext {
                privileged: true,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Returns the sysctls of a pod. In the emulated KVM host QEMU translates a guest's program once per load address:
/// random addresses make a machine slower and slower after some thousands of processes. (VmmKind::Qemu handles that
/// itself.)
fn sysctls() -> HashMap<String, String> {
    let emulated = std::env::var_os("BOXLITE_KVMHOST").is_some();
    let one = ("kernel.randomize_va_space".to_owned(), "0".to_owned());
    emulated.then_some(one).into_iter().collect()
}

/// Returns a container configuration: `argv` in `image`, log file `<name>.log`.
pub(crate) fn container_spec(name: &str, image: &str, argv: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: image.into(),
            ..Default::default()
        }),
        command: argv.iter().map(|&a| a.to_owned()).collect(),
        log_path: format!("{name}.log"),
        labels: [("e2e".to_owned(), name.to_owned())].into(),
        // A kubelet always sets the PID namespace mode; the default would be the pod's.
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A running sandbox.
#[derive(Clone)]
pub(crate) struct Pod {
    /// Node of the sandbox.
    pub node: Arc<Node>,
    /// Sandbox id.
    pub id: String,
    /// Requested configuration.
    pub config: PodSandboxConfig,
}

impl Pod {
    /// Calls RunPodSandbox with the default configuration.
    pub(crate) async fn run(node: &Arc<Node>, name: &str) -> Result<Self> {
        Self::run_with(node, pod_spec(node, name)).await
    }

    /// Calls RunPodSandbox.
    pub(crate) async fn run_with(node: &Arc<Node>, config: PodSandboxConfig) -> Result<Self> {
        Self::run_by(node, config, "").await
    }

    /// Calls RunPodSandbox with a runtime handler.
    pub(crate) async fn run_by(
        node: &Arc<Node>,
        config: PodSandboxConfig,
        handler: &str,
    ) -> Result<Self> {
        // The kubelet creates log directories before each call.
        std::fs::create_dir_all(&config.log_directory)?;
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let id = answer(
            "RunPodSandbox",
            node.cri
                .runtime()
                .run_pod_sandbox(within(RUN_TIMEOUT, request))
                .await,
        )?
        .pod_sandbox_id;
        Ok(Self {
            node: node.clone(),
            id,
            config,
        })
    }

    /// Calls CreateContainer with the default configuration.
    pub(crate) async fn create(&self, name: &str, image: &str, argv: &[&str]) -> Result<Container> {
        self.create_with(container_spec(name, image, argv)).await
    }

    /// Calls CreateContainer.
    pub(crate) async fn create_with(&self, config: ContainerConfig) -> Result<Container> {
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        if let Some(dir) = log.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(self.config.clone()),
        };
        let id = answer(
            "CreateContainer",
            self.node
                .cri
                .runtime()
                .create_container(within(LONG_TIMEOUT, request))
                .await,
        )?
        .container_id;
        Ok(Container {
            pod: self.clone(),
            id,
            config,
        })
    }

    /// Calls CreateContainer and StartContainer with the default configuration.
    pub(crate) async fn start(&self, name: &str, image: &str, argv: &[&str]) -> Result<Container> {
        self.start_with(container_spec(name, image, argv)).await
    }

    /// Calls CreateContainer and StartContainer.
    pub(crate) async fn start_with(&self, config: ContainerConfig) -> Result<Container> {
        let container = self.create_with(config).await?;
        container.start().await?;
        Ok(container)
    }

    /// Runs `sh -c script` to completion and returns its output. Fails unless it exits with 0.
    pub(crate) async fn sh(&self, image: &str, script: &str) -> Result<String> {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let container = self
            .start(&format!("sh{serial}"), image, &["sh", "-c", script])
            .await?;
        let status = container.exited(LONG_TIMEOUT).await?;
        let output = container.output()?;
        crate::ensure!(
            status.exit_code == 0,
            "`{script}` ended with {}: {output}",
            status.exit_code
        );
        container.remove().await?;
        Ok(output)
    }

    /// Calls PodSandboxStatus.
    pub(crate) async fn status(&self) -> Result<PodSandboxStatus> {
        Ok(self.status_verbose(false).await?.status.unwrap_or_default())
    }

    /// Calls PodSandboxStatus and returns the whole response.
    pub(crate) async fn status_verbose(&self, verbose: bool) -> Result<PodSandboxStatusResponse> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose,
        };
        answer(
            "PodSandboxStatus",
            self.node
                .cri
                .runtime()
                .pod_sandbox_status(within(LONG_TIMEOUT, request))
                .await,
        )
    }

    /// Returns the pod's first address.
    pub(crate) async fn ip(&self) -> Result<String> {
        Ok(self.status().await?.network.unwrap_or_default().ip)
    }

    /// Calls PortForward and returns the URL.
    pub(crate) async fn forward_url(&self) -> Result<String> {
        let request = PortForwardRequest {
            pod_sandbox_id: self.id.clone(),
            port: vec![],
        };
        let mut runtime = self.node.cri.runtime();
        Ok(answer("PortForward", runtime.port_forward(request).await)?.url)
    }

    /// Calls StopPodSandbox.
    pub(crate) async fn stop(&self) -> Result {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        answer(
            "StopPodSandbox",
            self.node
                .cri
                .runtime()
                .stop_pod_sandbox(within(LONG_TIMEOUT, request))
                .await,
        )?;
        Ok(())
    }

    /// Calls RemovePodSandbox.
    pub(crate) async fn remove(&self) -> Result {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        answer(
            "RemovePodSandbox",
            self.node
                .cri
                .runtime()
                .remove_pod_sandbox(within(LONG_TIMEOUT, request))
                .await,
        )?;
        Ok(())
    }

    /// Calls StopPodSandbox and RemovePodSandbox. The shared pod is kept, without containers.
    pub(crate) async fn end(&self) -> Result {
        if self.config.hostname == SHARED_POD {
            return self.empty().await;
        }
        self.stop().await?;
        self.remove().await
    }

    /// Removes all containers and their logs.
    pub(crate) async fn empty(&self) -> Result {
        let mut client = self.node.cri.runtime();
        let request = ListContainersRequest {
            filter: Some(ContainerFilter {
                pod_sandbox_id: self.id.clone(),
                ..Default::default()
            }),
        };
        let list = answer("ListContainers", client.list_containers(request).await)?;
        for container in list.containers {
            let request = RemoveContainerRequest {
                container_id: container.id,
            };
            let removed = client.remove_container(within(LONG_TIMEOUT, request)).await;
            answer("RemoveContainer", removed)?;
        }
        // As a kubelet does; an existing log would be appended to.
        std::fs::remove_dir_all(&self.config.log_directory)?;
        std::fs::create_dir_all(&self.config.log_directory)?;
        Ok(())
    }
}

/// A container of a pod.
#[derive(Clone)]
pub(crate) struct Container {
    /// Pod of the container.
    pub pod: Pod,
    /// Container id.
    pub id: String,
    /// Requested configuration.
    pub config: ContainerConfig,
}

impl Container {
    /// Calls StartContainer.
    pub(crate) async fn start(&self) -> Result {
        let request = StartContainerRequest {
            container_id: self.id.clone(),
        };
        answer(
            "StartContainer",
            self.pod
                .node
                .cri
                .runtime()
                .start_container(within(LONG_TIMEOUT, request))
                .await,
        )?;
        Ok(())
    }

    /// Calls StopContainer with a grace period in seconds.
    pub(crate) async fn stop(&self, grace: i64) -> Result {
        let request = StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace,
        };
        answer(
            "StopContainer",
            self.pod
                .node
                .cri
                .runtime()
                .stop_container(within(LONG_TIMEOUT, request))
                .await,
        )?;
        Ok(())
    }

    /// Calls RemoveContainer.
    pub(crate) async fn remove(&self) -> Result {
        let request = RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        answer(
            "RemoveContainer",
            self.pod
                .node
                .cri
                .runtime()
                .remove_container(within(LONG_TIMEOUT, request))
                .await,
        )?;
        Ok(())
    }

    /// Calls ContainerStatus.
    pub(crate) async fn status(&self) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let response = answer(
            "ContainerStatus",
            self.pod
                .node
                .cri
                .runtime()
                .container_status(within(LONG_TIMEOUT, request))
                .await,
        )?;
        Ok(response.status.unwrap_or_default())
    }

    /// Waits for EXITED.
    pub(crate) async fn exited(&self, limit: Duration) -> Result<ContainerStatus> {
        poll::until("the container is EXITED", limit, || async {
            let status = self.status().await?;
            crate::ensure!(
                status.state() == ContainerState::ContainerExited,
                "{:?}",
                status.state()
            );
            Ok(status)
        })
        .await
    }

    /// Calls ExecSync without a timeout.
    pub(crate) async fn exec(&self, argv: &[&str]) -> Result<ExecSyncResponse> {
        answer(&format!("ExecSync {argv:?}"), self.exec_raw(argv, 0).await)
    }

    /// Calls ExecSync and returns the standard output. Fails unless the command exits with 0.
    pub(crate) async fn out(&self, argv: &[&str]) -> Result<String> {
        let response = self.exec(argv).await?;
        let text = String::from_utf8_lossy(&response.stdout).into_owned();
        crate::ensure!(
            response.exit_code == 0,
            "{argv:?} ended with {}: {text}{}",
            response.exit_code,
            String::from_utf8_lossy(&response.stderr)
        );
        Ok(text)
    }

    /// Calls ExecSync with a timeout in seconds and returns the gRPC result.
    pub(crate) async fn exec_raw(
        &self,
        argv: &[&str],
        timeout: i64,
    ) -> std::result::Result<tonic::Response<ExecSyncResponse>, tonic::Status> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: argv.iter().map(|&a| a.to_owned()).collect(),
            timeout,
        };
        self.pod
            .node
            .cri
            .runtime()
            .exec_sync(within(LONG_TIMEOUT, request))
            .await
    }

    /// Calls ContainerStats.
    pub(crate) async fn stats(&self) -> Result<ContainerStats> {
        let request = ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        let response = answer(
            "ContainerStats",
            self.pod
                .node
                .cri
                .runtime()
                .container_stats(within(LONG_TIMEOUT, request))
                .await,
        )?;
        Ok(response.stats.unwrap_or_default())
    }

    /// Calls Exec and returns the URL.
    pub(crate) async fn exec_url(&self, argv: &[&str], streams: Streams) -> Result<String> {
        let request = ExecRequest {
            container_id: self.id.clone(),
            cmd: argv.iter().map(|&a| a.to_owned()).collect(),
            tty: streams.tty,
            stdin: streams.stdin,
            stdout: true,
            stderr: streams.stderr,
        };
        Ok(answer("Exec", self.pod.node.cri.runtime().exec(request).await)?.url)
    }

    /// Calls Attach and returns the URL.
    pub(crate) async fn attach_url(&self, streams: Streams) -> Result<String> {
        let request = AttachRequest {
            container_id: self.id.clone(),
            tty: streams.tty,
            stdin: streams.stdin,
            stdout: true,
            stderr: streams.stderr,
        };
        let mut runtime = self.pod.node.cri.runtime();
        Ok(answer("Attach", runtime.attach(request).await)?.url)
    }

    /// Returns the path of the log file.
    pub(crate) fn log(&self) -> PathBuf {
        PathBuf::from(&self.pod.config.log_directory).join(&self.config.log_path)
    }

    /// Returns the output on both streams so far, from the log file.
    pub(crate) fn output(&self) -> Result<String> {
        Ok(crate::logs::read(&self.log())?
            .iter()
            .map(|l| String::from_utf8_lossy(&l.content).into_owned())
            .collect())
    }

    /// Waits until the log contains this text.
    pub(crate) async fn printed(&self, text: &str, limit: Duration) -> Result {
        poll::until(&format!("the log has {text:?}"), limit, || async {
            let output = self.output()?;
            crate::ensure!(output.contains(text), "{output:?}");
            Ok(())
        })
        .await
    }
}

/// Calls PullImage and returns the image reference.
pub(crate) async fn pull(node: &Node, reference: &str) -> Result<String> {
    pull_with(node, reference, None).await
}

/// Calls PullImage with credentials.
pub(crate) async fn pull_with(
    node: &Node,
    reference: &str,
    auth: Option<AuthConfig>,
) -> Result<String> {
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: reference.into(),
            ..Default::default()
        }),
        auth,
        sandbox_config: None,
    };
    Ok(answer(
        &format!("PullImage {reference}"),
        node.cri
            .image()
            .pull_image(within(LONG_TIMEOUT, request))
            .await,
    )?
    .image_ref)
}
