//! Metrics of the pool of warm VMs; absent while the pool is off.

use boxlite_runtime::pool::PoolStatus;
use prometheus::{Counter, CounterVec, Gauge, Opts, Registry};

/// Adds the pool's metrics to a scrape.
pub(super) fn add(registry: &Registry, status: &PoolStatus) -> prometheus::Result<()> {
    let oldest = status
        .warm
        .first()
        .map_or(0.0, |(_, age)| age.as_secs_f64());
    for (name, help, value) in [
        (
            "boxlite_pool_size",
            "Configured number of warm VMs",
            status.size as f64,
        ),
        (
            "boxlite_pool_warm_vms",
            "VMs that wait for a pod",
            status.warm.len() as f64,
        ),
        (
            "boxlite_pool_memory_bytes",
            "Memory of the waiting VMs, as measured after their boot",
            status.bytes as f64,
        ),
        (
            "boxlite_pool_oldest_age_seconds",
            "Age of the VM that waits longest; 0 if none waits",
            oldest,
        ),
        (
            "boxlite_pool_held",
            "1 if the pool is not filled for a reason that status names",
            f64::from(u8::from(status.held.is_some())),
        ),
    ] {
        let gauge = Gauge::new(name, help)?;
        gauge.set(value);
        registry.register(Box::new(gauge))?;
    }
    let counters = &status.counters;
    let claims = counter_vec(
        registry,
        "boxlite_pool_claims_total",
        "Pod starts that the pool could serve, by result",
        "result",
    )?;
    for (result, count) in [
        ("hit", counters.hits),
        ("miss", counters.misses),
        ("failed", counters.failed_claims),
    ] {
        claims.with_label_values(&[result]).inc_by(count as f64);
    }
    let fills = counter_vec(
        registry,
        "boxlite_pool_fills_total",
        "Boots of warm VMs, by result",
        "result",
    )?;
    for (result, count) in [("ok", counters.fills), ("failed", counters.failed_fills)] {
        fills.with_label_values(&[result]).inc_by(count as f64);
    }
    let removals = counter_vec(
        registry,
        "boxlite_pool_removals_total",
        "Waiting VMs that were removed unused, by reason",
        "reason",
    )?;
    for (reason, count) in &counters.removals {
        removals
            .with_label_values(&[reason.name()])
            .inc_by(*count as f64);
    }
    let time = Counter::new(
        "boxlite_pool_fill_seconds_total",
        "Time of the boots that succeeded",
    )?;
    time.inc_by(counters.fill_time.as_secs_f64());
    registry.register(Box::new(time))
}

fn counter_vec(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
) -> prometheus::Result<CounterVec> {
    let counters = CounterVec::new(Opts::new(name, help), &[label])?;
    registry.register(Box::new(counters.clone()))?;
    Ok(counters)
}
