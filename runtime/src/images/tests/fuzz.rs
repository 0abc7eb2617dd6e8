//! Fuzz tests of input from registries and clients: references, manifests, indexes and configs.

use crate::images::manifest::{self, Document, Platform};
use crate::images::reference::Reference;
use boxlite_fuzz::Fuzz;

const JSON: [&str; 10] = [
    "null",
    "[]",
    "{}",
    "-1",
    "1e99",
    "\"\"",
    "\"size\":",
    "\"digest\":",
    "\"layers\":",
    "\"platform\":",
];

#[test]
fn fuzz_reference_prints_and_parses_again() {
    let words = [
        "docker.io",
        "localhost:5000/",
        "@sha256:",
        ":",
        "/",
        "[::1]:5000/",
        "__",
        "é",
    ];
    Fuzz::new("reference").words(&words).run(|input| {
        let text = String::from_utf8_lossy(input);
        if let Ok(reference) = Reference::parse(text.trim_end()) {
            let printed = reference.to_string();
            let again = Reference::parse(&printed);
            assert_eq!(again.map(|again| again.to_string()).ok(), Some(printed));
        }
    });
}

#[test]
fn fuzz_manifest_is_read_or_rejected() {
    Fuzz::new("manifest").words(&JSON).run(|input| {
        for media_type in [
            None,
            Some(manifest::OCI_INDEX),
            Some(manifest::OCI_MANIFEST),
        ] {
            if let Ok(Document::Manifest(found)) =
                manifest::parse("a manifest", media_type, input, Platform::host())
            {
                assert!(found.layers.len() <= manifest::MAX_LAYERS);
            }
        }
    });
}

#[test]
fn fuzz_config_is_read_or_rejected() {
    Fuzz::new("config").words(&JSON).run(|input| {
        if let Ok((_, layers)) = manifest::parse_config("a config", input, 1, Platform::host()) {
            assert_eq!(layers.len(), 1);
        }
    });
}
