//! The guest's instructions per call, compared with the recorded ones, so that a regression is seen on any machine and under
//! any load.

use crate::bench::life;
use crate::bench::work::counting;
use crate::case;
use crate::context::Backend;
use crate::ensure;
use crate::failure::Result;
use crate::pod::pull;
use crate::runner::{Case, Context};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(calls_execute_no_more_instructions_than_recorded, 120).not_on(
            Backend::Krun,
            "QEMU's plugin counts instructions, KVM has none",
        ),
    ]
}

/// Pods; the smallest number of each call counts, since noise only adds.
const PODS: usize = 2;
/// Tolerance in percent of the recorded number.
const TOLERANCE_PERCENT: u64 = 15;
/// Tolerance of small numbers, in instructions: timer interrupts while a call waits for a busy host.
const TOLERANCE: u64 = 2_000_000;

async fn calls_execute_no_more_instructions_than_recorded(ctx: Context) -> Result {
    let install = counting(&ctx.scratch, &ctx.install)?;
    let node = ctx.node_of(&install, "work", |_| {}).await?;
    pull(&node, &ctx.images.base).await?;
    let mut least = [u64::MAX; life::CALLS.len()];
    for _ in 0..PODS {
        let costs = life::run(&node, &ctx.images.base, true).await?;
        for (least, cost) in least.iter_mut().zip(costs) {
            *least = (*least).min(cost.work.unwrap_or_default().instructions);
        }
    }
    ensure!(
        least[0] > 0,
        "nothing was counted: the guest is not emulated"
    );
    let mut more = Vec::new();
    for ((name, now), recorded) in life::CALLS.iter().zip(least).zip(life::recorded()?) {
        if now > recorded + recorded * TOLERANCE_PERCENT / 100 + TOLERANCE {
            more.push(format!("{name}: {now}, recorded {recorded}"));
        }
    }
    ensure!(
        more.is_empty(),
        "more instructions than e2e/bench/instructions has: {}",
        more.join("; ")
    );
    node.terminate().await
}
