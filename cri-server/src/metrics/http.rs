//! HTTP server of the metrics: `/metrics` and `/healthz`.

use super::Metrics;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use boxlite_runtime::BoxliteRuntime;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

#[derive(Clone)]
struct Source {
    metrics: Arc<Metrics>,
    runtime: BoxliteRuntime,
}

/// Serves until `stop`.
///
/// # Errors
/// If the listener fails.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    runtime: BoxliteRuntime,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .with_state(Source { metrics, runtime });
    axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn page(State(source): State<Source>) -> impl IntoResponse {
    match source.metrics.page(&source.runtime) {
        Ok(page) => (
            StatusCode::OK,
            // Version of Prometheus' text exposition format.
            [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
            page,
        ),
        Err(error) => {
            tracing::error!(%error, "failed to build the metrics page");
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                [(header::CONTENT_TYPE, "text/plain")],
                format!("{error}\n"),
            )
        }
    }
}
