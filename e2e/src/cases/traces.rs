//! Traces of a pod's start, received by a collector of the test, and the names of the pod in log lines.

use crate::case;
use crate::client::{answer, within};
use crate::collector::{Collector, ExportedSpan};
use crate::failure::{During, Result};
use crate::node::Node;
use crate::pod::{LONG_TIMEOUT, Pod, container_spec, pod_spec, pull};
use crate::process::family;
use crate::runner::{Case, Context};
use crate::{bail, ensure, poll, same};
use boxlite_sys::clock::unix_ns;
use k8s_cri::v1::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tokio::net::TcpListener;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(pod_start_is_one_trace_of_all_processes, 90),
        case!(silent_collector_delays_no_call, 90),
        case!(log_lines_have_the_names_of_the_pod, 30),
        case!(no_exporter_runs_without_an_endpoint, 30),
    ]
}

/// The kubelet's trace.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
/// The kubelet's span.
const SPAN: &str = "00f067aa0ba902b7";
/// Delay of a span in its process.
const EXPORT_DELAY: (&str, &str) = ("OTEL_BSP_SCHEDULE_DELAY", "200");
/// Timeout of an export, longer than any case: a call that waited for the collector would exceed the time limit.
const ENDLESS_EXPORT: (&str, &str) = ("OTEL_EXPORTER_OTLP_TIMEOUT", "600000");
/// Value that no span may have.
const SECRET: &str = "not-for-collectors";

/// Spans of a pod that boots, and of its container, below the kubelet's span; those of a parent by name.
const TREE: &str = "
boxlite-cri: CreateContainer (server)
  boxlite-cri: Task/Create (client)
    containerd-shim-boxlite-v2: Task/Create (server)
      containerd-shim-boxlite-v2: Container/Init (client)
        boxlite-guest: guest container create
          boxlite-guest: guest process
          boxlite-guest: guest rootfs
boxlite-cri: RunPodSandbox (server)
  boxlite-cri: network
  boxlite-cri: ready
    boxlite-cri: Sandbox/StartSandbox (client)
      containerd-shim-boxlite-v2: Sandbox/StartSandbox (server)
        boxlite-guest: guest agent start
        boxlite-guest: guest kernel boot
        containerd-shim-boxlite-v2: Guest/Init (client)
          boxlite-guest: guest init
            boxlite-guest: guest network
            boxlite-guest: guest storage
        containerd-shim-boxlite-v2: init
        containerd-shim-boxlite-v2: net
        containerd-shim-boxlite-v2: ready
        containerd-shim-boxlite-v2: scratch
        containerd-shim-boxlite-v2: share
        containerd-shim-boxlite-v2: spawn
  boxlite-cri: spawn
    boxlite-cri: Sandbox/CreateSandbox (client)
      containerd-shim-boxlite-v2: Sandbox/CreateSandbox (server)
    boxlite-cri: start shim
boxlite-cri: StartContainer (server)
  boxlite-cri: Task/Start (client)
    containerd-shim-boxlite-v2: Task/Start (server)
      containerd-shim-boxlite-v2: Container/Start (client)
        boxlite-guest: guest container start
";

/// Starts a node that exports traces within [`EXPORT_DELAY`].
pub(super) async fn serve(node: &Node, endpoint: &str) -> Result {
    serve_with(node, endpoint, &[]).await
}

async fn serve_with(node: &Node, endpoint: &str, variables: &[(&str, &str)]) -> Result {
    let start = node.serve_with(|command| {
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
        command.envs([EXPORT_DELAY]);
        command.envs(variables.iter().copied());
    });
    start.await
}

/// Returns a kubelet's request with its position in the trace.
fn traced<T>(message: T) -> Result<tonic::Request<T>> {
    let mut request = within(LONG_TIMEOUT, message);
    let position = format!("00-{TRACE}-{SPAN}-01").parse()?;
    request.metadata_mut().insert("traceparent", position);
    Ok(request)
}

async fn pod_start_is_one_trace_of_all_processes(ctx: Context) -> Result {
    let collector = Collector::start()?;
    let node = ctx.unstarted_node("traces")?;
    serve(&node, &collector.endpoint).await?;
    pull(&node, &ctx.images.base).await?;
    let begin = u64::try_from(unix_ns())?;
    let pod = start_pod(&node, &ctx.images.base).await?;
    let end = u64::try_from(unix_ns())?;

    let spans = whole_trace(&ctx, &collector).await?;
    check_times(&spans, (begin, end))?;
    check_attributes(&spans, &pod)?;
    same!(exporters(&pod).await?, 2, "exporters of daemon and shim");

    // These calls come without a parent: each begins a trace.
    pod.end().await?;
    // Exports the last spans.
    node.terminate().await?;
    let at_end = collector.spans(&hex::decode(TRACE)?).len();
    same!(at_end, spans.len(), "spans at the end");
    Ok(())
}

/// Returns the spans of the kubelet's trace when they form [`TREE`].
pub(super) async fn whole_trace(ctx: &Context, collector: &Collector) -> Result<Vec<ExportedSpan>> {
    let id = hex::decode(TRACE)?;
    poll::until("the trace is complete", ctx.patience(20), || async {
        let spans = collector.spans(&id);
        let tree = format!("\n{}", tree(&spans, SPAN, 0));
        ensure!(tree == TREE, "{tree}");
        Ok(spans)
    })
    .await
}

/// Starts a pod with a container, all by one span of a kubelet.
pub(super) async fn start_pod(node: &Arc<Node>, image: &str) -> Result<Pod> {
    let config = pod_spec(node, "traced");
    std::fs::create_dir_all(&config.log_directory)?;
    let mut runtime = node.cri.runtime();
    let request = traced(RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    })?;
    let id = answer("RunPodSandbox", runtime.run_pod_sandbox(request).await)?.pod_sandbox_id;
    let mut container = container_spec("c", image, &["sleep", "1000", SECRET]);
    container.envs = vec![KeyValue {
        key: "PASSWORD".into(),
        value: SECRET.into(),
    }];
    let request = traced(CreateContainerRequest {
        pod_sandbox_id: id.clone(),
        config: Some(container),
        sandbox_config: Some(config.clone()),
    })?;
    let created = runtime.create_container(request).await;
    let request = traced(StartContainerRequest {
        container_id: answer("CreateContainer", created)?.container_id,
    })?;
    answer("StartContainer", runtime.start_container(request).await)?;
    Ok(Pod {
        node: node.clone(),
        id,
        config,
    })
}

/// Returns the spans below a span, one per line, those of a parent by label.
fn tree(spans: &[ExportedSpan], parent: &str, depth: usize) -> String {
    let mut below: Vec<_> = spans
        .iter()
        .filter(|exported| hex::encode(&exported.span.parent_span_id) == parent)
        .map(|exported| (exported.label(), hex::encode(&exported.span.span_id)))
        .collect();
    below.sort();
    let lines = below.iter().map(|(label, id)| {
        let indent = "  ".repeat(depth);
        format!("{indent}{label}\n{}", tree(spans, id, depth + 1))
    });
    lines.collect()
}

/// Checks that each span is within its parent, and those of the kubelet's calls within `whole`.
fn check_times(spans: &[ExportedSpan], whole: (u64, u64)) -> Result {
    let times = |exported: &ExportedSpan| {
        let span = &exported.span;
        (span.start_time_unix_nano, span.end_time_unix_nano)
    };
    let known: HashMap<_, _> = spans
        .iter()
        .map(|exported| (exported.span.span_id.as_slice(), times(exported)))
        .collect();
    for exported in spans {
        let own = times(exported);
        let parent = known.get(exported.span.parent_span_id.as_slice());
        let parent = parent.copied().unwrap_or(whole);
        ensure!(
            parent.0 <= own.0 && own.0 <= own.1 && own.1 <= parent.1,
            "{}: {own:?} is not within {parent:?}",
            exported.label()
        );
    }
    let of = |label: &str| {
        let found = spans.iter().find(|exported| exported.label() == label);
        found.map_or((0, 0), times)
    };
    // The shim limits the guest's times to its own call; these follow from the guest's clock.
    let (spawn, kernel) = (
        of("containerd-shim-boxlite-v2: spawn"),
        of("boxlite-guest: guest kernel boot"),
    );
    let (agent, init) = (
        of("boxlite-guest: guest agent start"),
        of("boxlite-guest: guest init"),
    );
    ensure!(
        spawn.0 < kernel.0 && kernel.0 < kernel.1 && kernel.1 <= agent.1 && agent.1 <= init.1,
        "order of the boot: {spawn:?}, {kernel:?}, {agent:?}, {init:?}"
    );
    Ok(())
}

/// Checks the names of processes and of the pod, and that the trace has nothing of the container's configuration.
pub(super) fn check_attributes(spans: &[ExportedSpan], pod: &Pod) -> Result {
    let services: BTreeMap<&str, &str> = spans
        .iter()
        .map(|exported| (exported.tracer.as_str(), exported.service.as_str()))
        .collect();
    let (daemon, shim) = ("boxlite-cri", "containerd-shim-boxlite-v2");
    let expected = [(daemon, daemon), ("boxlite-guest", shim), (shim, shim)];
    same!(services, BTreeMap::from(expected), "services by tracer");
    let names = pod.config.metadata.clone().unwrap_or_default();
    for label in [
        "boxlite-cri: RunPodSandbox (server)",
        "boxlite-cri: CreateContainer (server)",
        "boxlite-cri: StartContainer (server)",
        "containerd-shim-boxlite-v2: Sandbox/StartSandbox (server)",
        "containerd-shim-boxlite-v2: Task/Create (server)",
    ] {
        let Some(span) = spans.iter().find(|exported| exported.label() == label) else {
            bail!("no span {label:?}")
        };
        for (key, value) in [
            ("k8s.namespace.name", &names.namespace),
            ("k8s.pod.name", &names.name),
            ("k8s.pod.uid", &names.uid),
        ] {
            same!(span.attribute(key), value, "{key} of {label}");
        }
    }
    let text = format!("{spans:?}");
    ensure!(!text.contains(SECRET), "the trace has a secret: {text}");
    Ok(())
}

async fn silent_collector_delays_no_call(ctx: Context) -> Result {
    // Accepts connections and answers nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let node = ctx.unstarted_node("tsilent")?;
    let variables = [ENDLESS_EXPORT, ("OTEL_BSP_MAX_QUEUE_SIZE", "4")];
    serve_with(&node, &endpoint, &variables).await?;
    pull(&node, &ctx.images.base).await?;
    let pod = Pod::run(&node, "silent").await?;
    same!(
        pod.sh(&ctx.images.base, "echo here").await?,
        "here\n",
        "a container"
    );
    let mut connections = Vec::new();
    // Of the daemon and of the shim.
    for connection in ["first", "second"] {
        let accepted = tokio::time::timeout(ctx.patience(10), listener.accept()).await;
        connections.push(accepted.during(format!("the {connection} connection"))??);
    }
    pod.end().await?;
    node.terminate().await?;

    // Without a listener an export fails at once.
    drop((listener, connections));
    serve_with(&node, &endpoint, &variables).await?;
    pull(&node, &ctx.images.base).await?;
    poll::until("the failed export is logged", ctx.patience(10), || async {
        let log = node.log_tail(20);
        ensure!(
            log.contains("failed to export traces, dropping spans"),
            "{log}"
        );
        Ok(())
    })
    .await?;
    node.terminate().await
}

/// Returns the number of the daemon's and the shim's threads that export traces.
async fn exporters(pod: &Pod) -> Result<usize> {
    let mut count = 0;
    for process in [pod.node.service().pid().await?, family(&pod.id)?.0] {
        for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
            // A thread may have ended.
            let name = std::fs::read_to_string(thread?.path().join("comm")).unwrap_or_default();
            count += usize::from(name.starts_with("OpenTelemetry"));
        }
    }
    Ok(count)
}

async fn no_exporter_runs_without_an_endpoint(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    same!(exporters(&pod).await?, 0, "exporters");
    Ok(())
}

async fn log_lines_have_the_names_of_the_pod(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let metadata = pod.config.metadata.clone().unwrap_or_default();
    let names = format!("namespace={:?} pod={:?}", metadata.namespace, metadata.name);
    let daemon = std::fs::read_to_string(ctx.node.log())?;
    let line = daemon
        .lines()
        .find(|line| line.contains("RunPodSandbox") && line.contains(&names));
    ensure!(line.is_some(), "no call with {names} in the daemon's log");
    let path = ctx.node.dir.join("state/s").join(&pod.id).join("shim.log");
    let shim = std::fs::read_to_string(&path)?;
    let last = shim.lines().last().unwrap_or_default();
    ensure!(last.ends_with(&names), "{}: {last:?}", path.display());
    Ok(())
}
