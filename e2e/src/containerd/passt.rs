//! `ctr run` without a network, on passt.

use super::tasks::succeeded;
use super::{Case, Context};
use crate::case;
use crate::failure::Result;
use crate::uplink::{NAME, Uplink};
use crate::{ensure, same};

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    vec![case!(passt_serves_a_task_without_network, 90)]
}

async fn passt_serves_a_task_without_network(ctx: Context) -> Result {
    let uplink = Uplink::open()?;
    download(&ctx, &uplink).await?;
    uplink.close()
}

async fn download(ctx: &Context, uplink: &Uplink) -> Result {
    let change = |options: &mut super::Options| {
        options.shim = "[network]\nwithout_cni = \"passt\"".to_owned();
    };
    let daemon = ctx.dedicated_daemon("pas", change).await?;
    let script = format!("cat /etc/resolv.conf; wget -qO- http://{NAME}/ | sha256sum");
    let output = daemon.run(&["--rm"], "out", &["sh", "-c", &script]).await?;
    let text = succeeded(&output)?;
    let (servers, sum) = text.split_once('\n').unwrap_or_default();
    same!(servers, "nameserver 203.0.113.2", "resolv.conf");
    ensure!(sum.starts_with(&uplink.sha256), "{text}");
    Ok(())
}
