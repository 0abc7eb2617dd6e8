//! Traces of containerd 2.x, which the shim joins.

use super::daemon::Version;
use super::pods::sleeper;
use super::{Case, Context, before};
use crate::case;
use crate::collector::Collector;
use crate::failure::Result;
use crate::{bail, ensure, poll, same};

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    vec![case!(shim_joins_the_trace_of_containerd, 150).unless(
        before(Version::V2),
        "1.x is not configured by the environment",
    )]
}

async fn shim_joins_the_trace_of_containerd(ctx: Context) -> Result {
    let collector = Collector::start()?;
    let environment = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint.clone()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc".to_owned()),
        ("OTEL_BSP_SCHEDULE_DELAY", "200".to_owned()),
    ];
    let daemon = ctx
        .dedicated_daemon("tr", |options| options.environment = environment)
        .await?;
    let (pod, container) = sleeper(&daemon, "traced").await?;
    let name = pod.config.metadata.clone().unwrap_or_default().name;
    poll::until(
        "the shim's span is containerd's",
        ctx.patience(20),
        || async {
            let spans = collector.all_spans();
            let Some(start) = spans.iter().find(|exported| {
                exported.label() == "containerd-shim-boxlite-v2: Task/Start (server)"
                    && exported.attribute("container.id") == container.id
            }) else {
                bail!("no span of the container's start")
            };
            same!(start.attribute("k8s.pod.name"), name, "name of the pod");
            let trace = collector.spans(&start.span.trace_id);
            let parent = trace
                .iter()
                .find(|exported| exported.span.span_id == start.span.parent_span_id);
            let services = (
                parent.map(|exported| exported.service.as_str()),
                start.service.as_str(),
            );
            let expected = (Some("containerd"), "containerd-shim-boxlite-v2");
            same!(services, expected, "services of the call");
            let guest = "boxlite-guest: guest container start";
            let labels: Vec<_> = trace.iter().map(|exported| exported.label()).collect();
            ensure!(labels.iter().any(|label| label == guest), "{labels:?}");
            Ok(())
        },
    )
    .await?;
    pod.end().await
}
