//! Where a detached task's output goes: `file://` and `binary://` log URIs. FIFOs are what every foreground run has.

use super::daemon::run_args;
use super::{Case, Shared};
use crate::outcome::Result;
use crate::runner::case;
use crate::{ensure, same, wait};
use std::os::unix::fs::PermissionsExt;

/// All of them.
pub fn cases() -> Vec<Case> {
    vec![
        case("log::a_file_takes_both_streams", 60, file),
        case("log::a_program_reads_both_streams", 60, program),
        case("log::a_program_that_fails_is_told", 60, failing_program),
    ]
}

const LINES: &str = "for i in 1 2 3; do echo out-$i; done; echo err-1 >&2";

async fn file(lab: Shared) -> Result {
    // Of this version's own: a log is appended to.
    let path = lab.shared.dir.join("task.log");
    let uri = format!("file://{}", path.display());
    lab.shared
        .ok(&run_args(
            &["-d", "--log-uri", &uri],
            "lf",
            &["sh", "-c", LINES],
        ))
        .await?;
    lab.shared.stopped("lf").await?;
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
    lab.shared.ok(&["task", "delete", "lf"]).await?;
    lab.shared
        .ok(&["container", "delete", "lf"])
        .await
        .map(drop)
}

async fn program(lab: Shared) -> Result {
    let script = lab.scratch.join("logger");
    let into = lab.scratch.join("logged");
    // As containerd documents it: 3 and 4 to read, 5 to close when ready.
    std::fs::write(
        &script,
        "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_NAMESPACE/$CONTAINER_ID $1=$2\" > $2/about\n\
         cat <&4 > $2/err & cat <&3 > $2/out; wait\necho ended >> $2/about\n",
    )?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    std::fs::create_dir_all(&into)?;
    let uri = format!("binary://{}?dir={}", script.display(), into.display());
    lab.shared
        .ok(&run_args(
            &["-d", "--log-uri", &uri],
            "lp",
            &["sh", "-c", LINES],
        ))
        .await?;
    lab.shared.stopped("lp").await?;
    lab.shared.ok(&["task", "delete", "lp"]).await?;
    lab.shared.ok(&["container", "delete", "lp"]).await?;
    wait::until("the program saw the end", lab.patience(10), || async {
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

async fn failing_program(lab: Shared) -> Result {
    let output = lab
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
    lab.shared
        .output(&["container", "delete", "lx"])
        .await
        .map(drop)
}
