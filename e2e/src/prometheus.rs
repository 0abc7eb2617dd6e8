//! [`Prometheus`]: Debian's Prometheus, which scrapes a node's metrics page and evaluates the chart's alerts.
//!
//! Opt-in: `make test-collectors` unpacks it and names it by [`DIRECTORY_VARIABLE`].

use crate::bail;
use crate::failure::Result;
use crate::service::{Service, free_address};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokio::process::Command;

/// Variable with the directory of the unpacked package.
const DIRECTORY_VARIABLE: &str = "BOXLITE_E2E_PROMETHEUS";

/// A running Prometheus; killed when dropped. Its data remain in the directory `data` of the package.
pub(crate) struct Prometheus {
    url: String,
    client: reqwest::Client,
    service: Service,
}

/// Returns the directory of the package, if the environment has one.
pub(crate) fn directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY_VARIABLE).map(PathBuf::from)
}

impl Prometheus {
    /// Starts Prometheus on a free port. It scrapes `target` each second with the job of the chart's ServiceMonitor.
    pub(crate) async fn start(
        package: &Path,
        dir: &Path,
        target: &str,
        rules: &Path,
    ) -> Result<Self> {
        let free = free_address().await?;
        let config = dir.join("prometheus.yml");
        let data = package.join("data");
        let _ = std::fs::remove_dir_all(&data);
        std::fs::write(
            &config,
            format!(
                "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
                 rule_files: [{}]\n\
                 scrape_configs:\n\
                 - job_name: boxlite-cri\n  honor_labels: true\n  static_configs: [{{targets: [\"{target}\"]}}]\n",
                rules.display()
            ),
        )?;
        let mut command = Command::new(package.join("usr/bin/prometheus"));
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", data.display()))
            .arg(format!("--web.listen-address={free}"));
        let prometheus = Self {
            url: format!("http://{free}/api/v1/"),
            client: reqwest::Client::builder().no_proxy().build()?,
            service: Service::new("Prometheus", dir.join("prometheus.log")),
        };
        let scrapes = || async {
            match prometheus.has_data("up == 1").await? {
                true => Ok(()),
                false => bail!("no target is up"),
            }
        };
        prometheus.service.start(command, scrapes).await?;
        Ok(prometheus)
    }

    /// Returns whether an expression had a number within the last five minutes.
    pub(crate) async fn has_data(&self, expression: &str) -> Result<bool> {
        let now = boxlite_sys::clock::unix_ns() / 1_000_000_000;
        let (start, end) = ((now - 300).to_string(), now.to_string());
        let parameters = [
            ("query", expression),
            ("start", start.as_str()),
            ("end", end.as_str()),
            ("step", "1"),
        ];
        let answer = self.get("query_range", &parameters).await?;
        let series = answer["result"].as_array().cloned().unwrap_or_default();
        let mut numbers = series
            .iter()
            .filter_map(|series| series["values"].as_array())
            .flatten()
            .filter_map(|sample| sample[1].as_str()?.parse::<f64>().ok());
        Ok(numbers.any(f64::is_finite))
    }

    /// Returns the names of the alerts that Prometheus evaluates without an error.
    pub(crate) async fn healthy_alerts(&self) -> Result<Vec<String>> {
        let answer = self.get("rules", &[]).await?;
        let groups = answer["groups"].as_array().cloned().unwrap_or_default();
        let rules = groups.iter().filter_map(|group| group["rules"].as_array());
        let healthy = rules.flatten().filter(|rule| rule["health"] == "ok");
        let names = healthy.filter_map(|rule| rule["name"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    async fn get(&self, path: &str, parameters: &[(&str, &str)]) -> Result<Value> {
        let url = reqwest::Url::parse_with_params(&format!("{}{path}", self.url), parameters)?;
        let mut answer: Value = self.client.get(url).send().await?.json().await?;
        if answer["status"] != "success" {
            bail!("Prometheus answers {answer}")
        }
        Ok(answer["data"].take())
    }
}
