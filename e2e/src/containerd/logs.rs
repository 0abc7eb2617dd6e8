//! Output of detached tasks: `file://` and `binary://` log URIs. Foreground runs use FIFOs.

use super::daemon::run_args;
use super::{Case, Context};
use crate::case;
use crate::failure::Result;
use crate::{ensure, poll, same};
use std::os::unix::fs::PermissionsExt;

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(file_uri_receives_both_streams, 60),
        case!(binary_uri_receives_both_streams, 60),
        case!(failing_log_program_is_reported, 60),
    ]
}

const LINES: &str = "for i in 1 2 3; do echo out-$i; done; echo err-1 >&2";

async fn file_uri_receives_both_streams(ctx: Context) -> Result {
    // A file per version, since logs are appended to.
    let path = ctx.shared.dir.join("task.log");
    let uri = format!("file://{}", path.display());
    ctx.shared
        .ok(&run_args(
            &["-d", "--log-uri", &uri],
            "lf",
            &["sh", "-c", LINES],
        ))
        .await?;
    ctx.shared.stopped("lf").await?;
    let mut seen: Vec<_> = std::fs::read_to_string(&path)?
        .lines()
        .map(str::to_owned)
        .collect();
    seen.sort();
    same!(
        seen,
        ["err-1", "out-1", "out-2", "out-3"],
        "the file, once the task is STOPPED"
    );
    ctx.shared.ok(&["task", "delete", "lf"]).await?;
    ctx.shared
        .ok(&["container", "delete", "lf"])
        .await
        .map(drop)
}

async fn binary_uri_receives_both_streams(ctx: Context) -> Result {
    let script = ctx.scratch.join("logger");
    let into = ctx.scratch.join("logged");
    // As documented by containerd: descriptors 3 and 4 to read, 5 to close when ready.
    std::fs::write(
        &script,
        "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_NAMESPACE/$CONTAINER_ID $1=$2\" > $2/about\n\
         cat <&4 > $2/err & cat <&3 > $2/out; wait\necho ended >> $2/about\n",
    )?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    std::fs::create_dir_all(&into)?;
    let uri = format!("binary://{}?dir={}", script.display(), into.display());
    ctx.shared
        .ok(&run_args(
            &["-d", "--log-uri", &uri],
            "lp",
            &["sh", "-c", LINES],
        ))
        .await?;
    ctx.shared.stopped("lp").await?;
    ctx.shared.ok(&["task", "delete", "lp"]).await?;
    ctx.shared.ok(&["container", "delete", "lp"]).await?;
    poll::until("the program saw the end", ctx.patience(10), || async {
        let about = std::fs::read_to_string(into.join("about"))?;
        ensure!(about.ends_with("ended\n"), "{about:?}");
        Ok(())
    })
    .await?;
    let about = std::fs::read_to_string(into.join("about"))?;
    let wanted = format!("default/lp dir={}\nended\n", into.display());
    same!(about, wanted, "environment and arguments");
    same!(
        std::fs::read_to_string(into.join("out"))?,
        "out-1\nout-2\nout-3\n",
        "descriptor 3"
    );
    same!(
        std::fs::read_to_string(into.join("err"))?,
        "err-1\n",
        "descriptor 4"
    );
    Ok(())
}

async fn failing_log_program_is_reported(ctx: Context) -> Result {
    let output = ctx
        .shared
        .run(
            &["-d", "--log-uri", "binary:///no/such/logger"],
            "lx",
            &["true"],
        )
        .await?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && words.contains("/no/such/logger"),
        "{words}"
    );
    ctx.shared
        .output(&["container", "delete", "lx"])
        .await
        .map(drop)
}
