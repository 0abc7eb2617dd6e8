//! Opt-in cases with programs that take minutes to build or fetch: the OpenTelemetry Collector, and Prometheus with the queries of
//! the chart's dashboard and alerts. `make test-collectors` runs them.

use super::pool::waiting;
use super::traces::{check_attributes, serve, start_pod, whole_trace};
use crate::client::{answer, within};
use crate::collector::Collector;
use crate::failure::Result;
use crate::node::Node;
use crate::otel_collector::{self, OtelCollector};
use crate::pod::{LONG_TIMEOUT, Pod, pull};
use crate::process::{family, kill};
use crate::prometheus::{self, Prometheus};
use crate::runner::{Case, Context};
use crate::{bail, case, ensure, poll, same};
use k8s_cri::v1::*;
use serde_json::Value;
use std::path::Path;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    if otel_collector::program().is_some() {
        cases.push(case!(opentelemetry_collector_receives_the_trace, 90));
    }
    if prometheus::directory().is_some() {
        cases.push(case!(prometheus_has_data_for_every_panel, 180));
    }
    cases
}

/// Directory of the dashboard and the alerts.
const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/boxlite/files");

async fn opentelemetry_collector_receives_the_trace(ctx: Context) -> Result {
    let Some(program) = otel_collector::program() else {
        bail!("no collector is configured")
    };
    let destination = Collector::start()?;
    let node = ctx.unstarted_node("totel")?;
    let collector = OtelCollector::start(&program, &node.dir, &destination.endpoint).await?;
    serve(&node, &collector.endpoint).await?;
    pull(&node, &ctx.images.base).await?;
    let pod = start_pod(&node, &ctx.images.base).await?;
    let spans = whole_trace(&ctx, &destination).await?;
    check_attributes(&spans, &pod)?;
    pod.end().await?;
    node.terminate().await
}

async fn prometheus_has_data_for_every_panel(ctx: Context) -> Result {
    let Some(package) = prometheus::directory() else {
        bail!("no Prometheus is configured")
    };
    let pool = "idle_seconds = 1\nsize = 1".to_owned();
    let node = ctx
        .dedicated_node("panels", |o| o.pool = Some(pool))
        .await?;
    pull(&node, &ctx.images.base).await?;
    let rules = Path::new(FILES).join("rules.yaml");
    let prometheus = Prometheus::start(&package, &node.dir, &node.metrics, &rules).await?;
    lose_warm_vm(&ctx, &node).await?;
    let kept = Pod::run(&node, "kept").await?;
    for name in ["first", "second"] {
        let pod = Pod::run(&node, name).await?;
        same!(
            pod.sh(&ctx.images.base, "echo here").await?,
            "here\n",
            "output"
        );
        pod.end().await?;
    }
    let container = kept
        .start("c", &ctx.images.base, &["sleep", "1000"])
        .await?;
    same!(
        container.out(&["echo", "exec"]).await?,
        "exec\n",
        "output of an exec"
    );
    let unknown = within(
        LONG_TIMEOUT,
        StartContainerRequest {
            container_id: "no-such-container".to_owned(),
        },
    );
    let refused = node.cri.runtime().start_container(unknown).await;
    ensure!(
        answer("StartContainer", refused).is_err(),
        "started nothing"
    );

    let dashboard = std::fs::read_to_string(Path::new(FILES).join("dashboard.json"))?;
    let expressions = expressions(&serde_json::from_str(&dashboard)?);
    ensure!(expressions.len() > 20, "{} expressions", expressions.len());
    poll::until("every panel has data", ctx.patience(30), || async {
        let mut empty = Vec::new();
        for (panel, expression) in &expressions {
            if !prometheus.has_data(expression).await? {
                empty.push(format!("{panel}: {expression}"));
            }
        }
        ensure!(empty.is_empty(), "no data: {empty:#?}");
        Ok(())
    })
    .await?;
    let alerts = std::fs::read_to_string(&rules)?
        .matches("- alert: ")
        .count();
    poll::until("all alerts are evaluated", ctx.patience(30), || async {
        same!(prometheus.healthy_alerts().await?.len(), alerts, "alerts");
        Ok(())
    })
    .await?;
    kept.end().await?;
    node.terminate().await
}

/// Kills a warm VM and waits until another is ready.
async fn lose_warm_vm(ctx: &Context, node: &Node) -> Result {
    let victim = waiting(ctx, node, 1).await?.pop_first().unwrap_or_default();
    for pid in family(&victim)?.1 {
        // The first one takes the others with it.
        let _ = kill(pid);
    }
    poll::until("the dead VM is removed", ctx.patience(30), || async {
        let removed = node
            .metric("boxlite_pool_removals_total{reason=\"died\"}")
            .await?;
        same!(removed, 1, "removals");
        Ok(())
    })
    .await?;
    waiting(ctx, node, 1).await.map(drop)
}

/// Returns the expressions of the dashboard with the titles of their panels, for all nodes and namespaces.
fn expressions(dashboard: &Value) -> Vec<(String, String)> {
    let panels = dashboard["panels"].as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for panel in &panels {
        let title = panel["title"].as_str().unwrap_or_default();
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        for target in &targets {
            let expression = target["expr"].as_str().unwrap_or_default();
            let expression = expression
                .replace("$__rate_interval", "10s")
                .replace("$instance", ".*")
                .replace("$namespace", ".*");
            found.push((title.to_owned(), expression));
        }
    }
    found
}
