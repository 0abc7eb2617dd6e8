//! Tests of `manifest`: accepted documents and selected index entries.

use super::*;
use serde_json::json;

const AMD64: Platform = Platform {
    os: "linux",
    architecture: "amd64",
};

fn digest(n: u8) -> String {
    Digest::of(&[n]).to_string()
}

fn index(entries: serde_json::Value) -> Vec<u8> {
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
        .to_string()
        .into_bytes()
}

fn entry(n: u8, os: &str, arch: &str, variant: Option<&str>) -> serde_json::Value {
    let mut platform = json!({"os": os, "architecture": arch});
    if let Some(v) = variant {
        platform["variant"] = json!(v);
    }
    json!({"mediaType": OCI_MANIFEST, "digest": digest(n), "size": 7, "platform": platform})
}

fn chosen(entries: serde_json::Value) -> ImageResult<String> {
    match parse("x", None, &index(entries), AMD64)? {
        Document::Index(d) => Ok(d.digest.to_string()),
        Document::Manifest(_) => panic!("an index was read as a manifest"),
    }
}

#[test]
fn choose_selects_entry_of_this_machine() {
    let entries = json!([
        entry(1, "linux", "arm64", Some("v8")),
        entry(2, "unknown", "unknown", None),
        entry(3, "windows", "amd64", None),
        entry(4, "linux", "amd64", Some("v3")),
        entry(5, "linux", "amd64", None),
        entry(6, "linux", "amd64", None),
    ]);
    assert_eq!(chosen(entries).unwrap(), digest(5));
}

#[test]
fn choose_without_match_lists_available_platforms() {
    let error = chosen(json!([
        entry(1, "linux", "arm64", Some("v8")),
        entry(2, "unknown", "unknown", None)
    ]))
    .unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, ImageError::NoPlatform { .. }), "{text}");
    assert!(
        text.contains("linux/amd64")
            && text.contains("linux/arm64/v8")
            && !text.contains("unknown"),
        "{text}"
    );
}

#[test]
fn parse_rejects_ambiguous_and_old_documents() {
    let d = json!({"mediaType": OCI_MANIFEST, "digest": digest(1), "size": 1});
    for document in [
        json!({"schemaVersion": 2, "manifests": [d], "layers": [d], "config": d}),
        json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "layers": [d], "config": d}),
        json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "manifests": [d]}),
        json!({"schemaVersion": 1, "fsLayers": []}),
        json!({"schemaVersion": 2}),
        json!({"schemaVersion": 2, "manifests": null, "config": d}),
        json!({"schemaVersion": 2, "layers": [{"digest": "sha256:../../x", "size": 1}], "config": d}),
        json!([]),
    ] {
        let text = document.to_string();
        let error = parse("x", None, text.as_bytes(), AMD64).expect_err(&text);
        assert!(
            matches!(error, ImageError::InvalidImage { .. }),
            "{text}: {error}"
        );
    }
}

#[test]
fn parse_config_accepts_docker_nulls() {
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z", "docker_version": "27",
        "config": {
            "User": "www-data:1004", "Cmd": ["sh"], "Entrypoint": null, "Volumes": null, "ExposedPorts": {"80/tcp": {}},
            "Labels": null, "OnBuild": null, "Env": ["A=b"], "StopSignal": "SIGQUIT", "Healthcheck": {"Test": ["x"]},
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(1)]}, "history": [{"created_by": "x"}],
    });
    let bytes = config.to_string().into_bytes();
    let (parsed, diff_ids) = parse_config("x", &bytes, 1, AMD64).unwrap();
    assert_eq!(diff_ids[0].as_str(), digest(1));
    assert_eq!(
        parsed.config().as_ref().unwrap().stop_signal().as_deref(),
        Some("SIGQUIT")
    );
    assert!(matches!(
        parse_config("x", &bytes, 2, AMD64),
        Err(ImageError::InvalidImage { .. })
    ));
    let arm = Platform {
        os: "linux",
        architecture: "arm64",
    };
    assert!(matches!(
        parse_config("x", &bytes, 1, arm),
        Err(ImageError::NoPlatform { .. })
    ));
}

#[test]
fn compression_is_detected() {
    assert_eq!(Compression::sniff(&[0x1f, 0x8b, 8]), Compression::Gzip);
    assert_eq!(
        Compression::sniff(&[0x28, 0xb5, 0x2f, 0xfd, 0]),
        Compression::Zstd
    );
    assert_eq!(Compression::sniff(b"etc/"), Compression::Plain);
    assert_eq!(Compression::sniff(b""), Compression::Plain);
}

/// An image without layers, as made by tools that mount volumes into an empty root.
#[test]
fn parse_accepts_image_without_layers() {
    let descriptor = json!({"mediaType": "x", "digest": digest(1), "size": 2});
    for layers in [json!([]), json!(null)] {
        for version in [json!(2), json!(null)] {
            let manifest =
                json!({"schemaVersion": version, "config": descriptor, "layers": layers});
            let text = manifest.to_string();
            match parse("x", Some(OCI_MANIFEST), text.as_bytes(), AMD64) {
                Ok(Document::Manifest(manifest)) => assert!(manifest.layers.is_empty()),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
    let config = json!({"architecture": "amd64", "os": "linux"}).to_string();
    let (_, diff_ids) = parse_config("x", config.as_bytes(), 0, AMD64).unwrap();
    assert!(diff_ids.is_empty());
}

/// containerd's `platforms.Normalize` for other architectures; those of this machine are in `oddities`.
#[test]
fn normalized_of_agrees_with_containerd() {
    let of = |architecture: &str, variant: &str| {
        let found = Normalized::of(&RawPlatform {
            os: String::new(),
            architecture: architecture.into(),
            variant: Some(variant.into()),
            os_features: Vec::new(),
        });
        format!("{}/{}", found.architecture, found.variant)
    };
    for (architecture, variant, expected) in [
        ("aarch64", "8", "arm64/"),
        ("arm64", "v9", "arm64/v9"),
        ("arm64", "9.0", "arm64/v9"),
        ("armel", "", "arm/v6"),
        ("arm", "", "arm/v7"),
        ("arm", "5", "arm/v5"),
        ("RISCV64", "", "riscv64/"),
    ] {
        assert_eq!(of(architecture, variant), expected);
    }
}
