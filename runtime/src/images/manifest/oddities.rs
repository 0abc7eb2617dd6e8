//! Table of odd manifests, indexes and configs, `oddities.json`: fields that the OCI and Docker documents leave optional and
//! fields that tools write wrongly, one row each.
//!
//! The column `containerd` is the result of containerd 2.4.2's own functions (`images.Manifest`, `LimitManifests`,
//! `FilterPlatforms`, `DiffCompression` and its JSON types, for linux/amd64); `refused` also covers images that it pulls but
//! does not unpack. The result here must be the same, except for rows with `here`, whose `why` gives the reason.

use super::*;
use serde_json::{Value, json};

const AMD64: Platform = Platform {
    os: "linux",
    architecture: "amd64",
};

/// Number of the one-byte content that has the digest; the table's digests are made so.
fn number(digest: &Digest) -> i64 {
    let found = (0..=u8::MAX).find(|n| Digest::of(&[*n]) == *digest);
    found.map_or(-1, i64::from)
}

fn read(row: &Value) -> ImageResult<Value> {
    let bytes = match row["text"].as_str() {
        Some(text) if row["latin1"] == true => text.chars().map(|c| c as u8).collect(),
        Some(text) => text.as_bytes().to_vec(),
        None => row["document"].to_string().into_bytes(),
    };
    if row["kind"] == "config" {
        let layers = row["layers"].as_u64().unwrap() as usize;
        let (config, _) = parse_config("x", &bytes, layers, AMD64)?;
        let config = config.config().clone().unwrap_or_default();
        let mut volumes = config.volumes().clone().unwrap_or_default();
        volumes.sort();
        return Ok(json!({
            "user": config.user().clone().unwrap_or_default(),
            "env": config.env().clone().unwrap_or_default(),
            "entrypoint": config.entrypoint().clone().unwrap_or_default(),
            "cmd": config.cmd().clone().unwrap_or_default(),
            "workingDir": config.working_dir().clone().unwrap_or_default(),
            "stopSignal": config.stop_signal().clone().unwrap_or_default(),
            "labels": config.labels().clone().unwrap_or_default(),
            "volumes": volumes,
        }));
    }
    Ok(
        match parse("x", row["mediaType"].as_str(), &bytes, AMD64)? {
            Document::Index(entry) => json!({"chosen": number(&entry.digest)}),
            Document::Manifest(manifest) => {
                let layers: Vec<i64> = manifest.layers.iter().map(|l| number(&l.digest)).collect();
                json!({"layers": layers})
            }
        },
    )
}

#[test]
fn odd_documents_are_read_as_containerd_reads_them() {
    let rows: Vec<Value> = serde_json::from_str(include_str!("oddities.json")).unwrap();
    assert!(rows.len() > 250, "{} rows", rows.len());
    let mut wrong = Vec::new();
    for row in &rows {
        let found = read(row);
        let same = |expected: &Value| match (&found, expected["refused"].as_str()) {
            (Ok(found), None) => found == expected,
            (Err(_), Some(_)) => true,
            _ => false,
        };
        let good = match row.get("here") {
            None => same(&row["containerd"]),
            // A difference that has gone must leave the table.
            Some(here) => {
                let named = here["refused"]
                    .as_str()
                    .is_none_or(|text| found.as_ref().is_err_and(|e| e.to_string().contains(text)));
                same(here) && named && !same(&row["containerd"]) && row["why"].is_string()
            }
        };
        if !good {
            wrong.push(format!(
                "{}: {found:?}, containerd {}",
                row["name"], row["containerd"]
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} rows:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
