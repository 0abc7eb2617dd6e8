//! The daemon as an operator sees it: `boxlite-cri`'s commands beside `serve`, systemd's readiness protocol, `make install`.

use crate::case;
use crate::client::answer;
use crate::failure::{During, Result};
use crate::node::{Node, NodeOptions};
use crate::runner::{Case, Context};
use crate::{bail, ensure, same};
use k8s_cri::v1::VersionRequest;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::path::Path;
use std::process::Output;
use std::time::Duration;
use tokio::net::UnixDatagram;
use tokio::process::Command;

/// Time limit of a command; `status` gives a daemon that does not answer 10 s.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(status_counts_pods_and_names_the_versions, 60),
        case!(status_of_a_hung_or_absent_daemon_fails, 90),
        case!(check_as_json_agrees_with_its_exit_code, 90),
        case!(dumped_configuration_starts_the_daemon, 90),
        case!(systemd_learns_of_readiness_and_shutdown, 90),
        case!(installation_has_every_path_of_its_configuration, 60),
    ]
}

async fn boxlite(ctx: &Context, args: &[&str]) -> Result<Output> {
    let output = Command::new(&ctx.install.daemon).args(args).output();
    let output = tokio::time::timeout(COMMAND_TIMEOUT, output);
    output.await.during(args.join(" "))?.during(args.join(" "))
}

/// Expects an exit code and returns standard output and standard error.
fn ended(output: &Output, code: i32) -> Result<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    ensure!(
        output.status.code() == Some(code),
        "{} instead of exit code {code}:\n{stdout}{stderr}",
        output.status
    );
    Ok((stdout, stderr))
}

fn config(node: &Node) -> Result<String> {
    let path = node.dir.join("config.toml");
    Ok(path.to_str().unwrap_or_default().to_owned())
}

async fn status_counts_pods_and_names_the_versions(ctx: Context) -> Result {
    let config = config(&ctx.node)?;
    let (version, _) = ended(&boxlite(&ctx, &["version"]).await?, 0)?;
    let version = version.trim().trim_start_matches("boxlite-cri ");
    let (text, _) = ended(&boxlite(&ctx, &["status", "--config", &config]).await?, 0)?;
    for part in [version, "RuntimeReady   true", "1 ready, 0 not ready"] {
        ensure!(text.contains(part), "{part:?} is missing:\n{text}");
    }
    let args = ["status", "--config", &config, "--output", "json"];
    let (text, _) = ended(&boxlite(&ctx, &args).await?, 0)?;
    let json: Value = serde_json::from_str(&text)?;
    same!(json["pods"]["ready"], 1, "pods: the shared one");
    same!(json["client"], version, "version of the program");
    let vmm = json["vmm"].as_str().unwrap_or_default();
    ensure!(vmm.contains(ctx.backend.vmm()), "VMM: {vmm}");
    Ok(())
}

async fn status_of_a_hung_or_absent_daemon_fails(ctx: Context) -> Result {
    let node = ctx.dedicated_node("ohung", |_| {}).await?;
    let config = config(&node)?;
    let pid = node.service().pid().await?;
    kill(Pid::from_raw(pid), Signal::SIGSTOP)?;
    let hung = boxlite(&ctx, &["status", "--config", &config]).await;
    kill(Pid::from_raw(pid), Signal::SIGCONT)?;
    let (_, stderr) = ended(&hung?, 1)?;
    ensure!(stderr.contains("did not answer within"), "{stderr}");
    node.terminate().await?;
    let args = ["status", "--config", &config, "--output", "json"];
    let (stdout, stderr) = ended(&boxlite(&ctx, &args).await?, 1)?;
    same!(stdout, "", "standard output without an answer");
    let socket = node.socket();
    ensure!(
        stderr.contains(&format!("no daemon serves {}: ", socket.display())),
        "{stderr}"
    );
    Ok(())
}

async fn check_as_json_agrees_with_its_exit_code(ctx: Context) -> Result {
    let config = config(&ctx.node)?;
    let args = ["check", "--config", &config, "--output", "json"];
    let (text, _) = ended(&boxlite(&ctx, &args).await?, 0)?;
    let json: Value = serde_json::from_str(&text)?;
    same!(json["ready"], true, "check: {text}");
    same!(json["vmm"]["kind"], ctx.backend.vmm(), "VMM");
    same!(json["network"]["name"], "e2e", "network");

    let node = Node::prepare(&ctx.scratch, &ctx.install, &{
        let mut options = NodeOptions::new("ocheck", ctx.backend.vmm());
        options.guest = Some("/no/such/agent".into());
        options
    })?;
    let config = self::config(&node)?;
    let args = ["check", "--config", &config, "--output", "json"];
    let (text, _) = ended(&boxlite(&ctx, &args).await?, 1)?;
    let json: Value = serde_json::from_str(&text)?;
    same!(json["ready"], false, "check without an agent: {text}");
    Ok(())
}

async fn dumped_configuration_starts_the_daemon(ctx: Context) -> Result {
    let node = ctx.dedicated_node("odump", |_| {}).await?;
    let config = config(&node)?;
    let (dump, _) = ended(
        &boxlite(&ctx, &["config", "dump", "--config", &config]).await?,
        0,
    )?;
    node.terminate().await?;
    std::fs::write(&config, &dump)?;
    ended(
        &boxlite(&ctx, &["config", "check", "--config", &config]).await?,
        0,
    )?;
    let (again, _) = ended(
        &boxlite(&ctx, &["config", "dump", "--config", &config]).await?,
        0,
    )?;
    same!(again, dump, "dump of a dump");
    node.serve().await?;
    node.terminate().await
}

async fn systemd_learns_of_readiness_and_shutdown(ctx: Context) -> Result {
    let node = Node::prepare(
        &ctx.scratch,
        &ctx.install,
        &NodeOptions::new("onotify", ctx.backend.vmm()),
    )?;
    let path = node.dir.join("notify.sock");
    let manager = UnixDatagram::bind(&path)?;
    let serving = node.serve_with(|command| {
        command.env("NOTIFY_SOCKET", &path);
    });
    let (served, ready) = tokio::join!(serving, readiness(&node, &manager, &path));
    served?;
    let ready = ready?;
    ensure!(
        ready.starts_with("READY=1\nSTATUS=serving") && ready.contains(ctx.backend.vmm()),
        "{ready:?}"
    );
    node.terminate().await?;
    let stopping = message(&manager, &path).await?;
    ensure!(stopping.starts_with("STOPPING=1\n"), "{stopping:?}");
    ensure!(!node.socket().exists(), "the CRI socket still exists");
    Ok(())
}

/// Waits for the first message. From then on, systemd starts the units that are ordered after the daemon's.
async fn readiness(node: &Node, manager: &UnixDatagram, path: &Path) -> Result<String> {
    let message = message(manager, path).await?;
    let mut client = node.cri.runtime();
    answer("Version", client.version(VersionRequest::default()).await)?;
    Ok(message)
}

async fn installation_has_every_path_of_its_configuration(ctx: Context) -> Result {
    for prefix in ["/usr/local", "/usr"] {
        let tree = ctx.scratch.join("oinst").join(prefix.replace('/', "-"));
        install(&ctx, &tree, prefix).await?;
        let inside = |path: &str| tree.join(path.trim_start_matches('/'));
        let config = inside("/etc/boxlite/config.toml");
        let parsed: toml::Table = std::fs::read_to_string(&config)?.parse()?;
        let Some(paths) = parsed["paths"].as_table() else {
            bail!("[paths] is no table");
        };
        for (key, path) in paths {
            let path = path.as_str().unwrap_or_default();
            // The distribution's; passt is optional, and absent in Debian 12.
            let file = match key.as_str() {
                "passt" => continue,
                "qemu" => path.into(),
                _ => inside(path),
            };
            ensure!(file.is_file(), "{prefix}: {key} = {path} is not installed");
        }
        // containerd derives this name from the runtime's, io.containerd.boxlite.v2.
        let shim = format!("{prefix}/bin/containerd-shim-boxlite-v2");
        same!(paths["shim"].as_str(), Some(shim.as_str()), "the shim");

        // The installed program finds the same files without a configuration file.
        let daemon = inside(&format!("{prefix}/bin/boxlite-cri"));
        let empty = tree.join("empty.toml");
        std::fs::write(&empty, "")?;
        let dump = Command::new(&daemon)
            .args(["config", "dump", "--config"])
            .arg(&empty)
            .output();
        let dumped: toml::Table = ended(&dump.await?, 0)?.0.parse()?;
        for (key, path) in paths {
            let default = dumped["paths"][key].as_str().unwrap_or_default();
            let expected = match key.as_str() {
                "qemu" | "passt" => path.as_str().unwrap_or_default().into(),
                _ => inside(path.as_str().unwrap_or_default()),
            };
            same!(Path::new(default), expected, "{prefix}: default of {key}");
        }

        let unit = std::fs::read_to_string(inside("/etc/systemd/system/boxlite-cri.service"))?;
        for (key, words) in [("Documentation=file:", 1), ("ExecStart=", 4)] {
            let Some(value) = unit.lines().find_map(|line| line.strip_prefix(key)) else {
                bail!("the unit has no {key}");
            };
            let words: Vec<_> = value.split(' ').take(words).collect();
            for path in words.iter().filter(|word| word.starts_with('/')) {
                ensure!(
                    inside(path).is_file(),
                    "{prefix}: {key} {path} is not installed"
                );
            }
        }

        // An upgrade keeps the operator's configuration.
        std::fs::write(&config, "log_level = 'warn'\n")?;
        install(&ctx, &tree, prefix).await?;
        same!(
            std::fs::read_to_string(&config)?,
            "log_level = 'warn'\n",
            "the configuration"
        );
        std::fs::remove_dir_all(&tree)?;
    }
    Ok(())
}

/// Runs the script of `make install`.
async fn install(ctx: &Context, tree: &Path, prefix: &str) -> Result {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/install");
    let output = Command::new(script)
        .arg(tree)
        .arg(prefix)
        .env("BOXLITE_BIN", ctx.install.daemon.parent().unwrap_or(tree))
        .env("BOXLITE_GUEST", &ctx.install.guest)
        .env("BOXLITE_CACHE", crate::install::cache())
        .output();
    ended(&output.await.during(script)?, 0).map(drop)
}

async fn message(socket: &UnixDatagram, path: &Path) -> Result<String> {
    let mut buffer = [0; 4096];
    let received = tokio::time::timeout(COMMAND_TIMEOUT, socket.recv(&mut buffer));
    let length = received.await.during(path.display())??;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}
