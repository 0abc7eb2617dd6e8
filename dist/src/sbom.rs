//! The SBOM: CycloneDX 1.5 JSON with the crates linked into the shipped programs and the files of other projects.
//!
//! Crates are those that `cargo metadata` resolves as normal dependencies for the target; build and test dependencies are not
//! shipped. Without a serial number, so that equal inputs give equal documents.

use crate::checksums;
use crate::error::{DistError, Result};
use boxlite_sys::calendar::rfc3339;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::str::FromStr;

/// Shipped file of another project.
#[derive(Debug, Clone)]
pub(crate) struct ForeignFile {
    name: String,
    version: String,
    license: String,
    path: PathBuf,
}

impl FromStr for ForeignFile {
    type Err = DistError;

    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<_> = text.splitn(4, '=').collect();
        match parts[..] {
            [name, version, license, path] => Ok(Self {
                name: name.into(),
                version: version.into(),
                license: license.into(),
                path: path.into(),
            }),
            _ => Err(DistError::ForeignFile { text: text.into() }),
        }
    }
}

/// Packages and their dependencies.
pub(crate) struct Metadata {
    packages: BTreeMap<String, Package>,
    nodes: BTreeMap<String, Vec<Dependency>>,
    /// SHA-256 by name and version, from Cargo.lock.
    hashes: BTreeMap<(String, String), String>,
}

#[derive(Deserialize)]
struct Document {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    /// `None` for normal dependencies.
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Lock {
    package: Vec<LockedPackage>,
}

#[derive(Deserialize)]
struct LockedPackage {
    name: String,
    version: String,
    checksum: Option<String>,
}

impl Metadata {
    /// Parses the output of `cargo metadata` and Cargo.lock.
    pub(crate) fn parse(metadata: &str, lock: &str) -> Result<Self> {
        let document: Document = serde_json::from_str(metadata).map_err(|e| DistError::Parse {
            name: "output of cargo metadata",
            source: e.into(),
        })?;
        let lock: Lock = toml::from_str(lock).map_err(|e| DistError::Parse {
            name: "Cargo.lock",
            source: e.into(),
        })?;
        let packages = document.packages.into_iter().map(|p| (p.id.clone(), p));
        let nodes = document.resolve.nodes.into_iter().map(|n| (n.id, n.deps));
        let hashes = lock
            .package
            .into_iter()
            .filter_map(|p| Some(((p.name, p.version), p.checksum?)));
        Ok(Self {
            packages: packages.collect(),
            nodes: nodes.collect(),
            hashes: hashes.collect(),
        })
    }

    /// Returns the document for these packages of the workspace.
    pub(crate) fn document(
        &self,
        roots: &[String],
        files: &[ForeignFile],
        version: &str,
        epoch: u64,
    ) -> Result<Value> {
        let shipped = self.reachable(roots)?;
        let mut components: Vec<Value> = shipped.iter().map(|id| self.component(id)).collect();
        for file in files {
            components.push(json!({
                "type": "file",
                "name": file.name,
                "version": file.version,
                "licenses": [{ "expression": file.license }],
                "hashes": [{ "alg": "SHA-256", "content": checksums::of_file(&file.path)? }],
            }));
        }
        let dependencies: Vec<Value> = shipped
            .iter()
            .map(|id| {
                let on = self.normal(id).map(|to| self.purl(to));
                json!({ "ref": self.purl(id), "dependsOn": on.collect::<BTreeSet<_>>() })
            })
            .collect();
        Ok(json!({
            "bomFormat": "CycloneDX",
            "specVersion": "1.5",
            "version": 1,
            "metadata": {
                "timestamp": rfc3339(epoch),
                "component": { "type": "application", "name": "boxlite-cri", "version": version },
            },
            "components": components,
            "dependencies": dependencies,
        }))
    }

    /// Ids of the packages that are linked into programs of `roots`.
    fn reachable(&self, roots: &[String]) -> Result<BTreeSet<&str>> {
        let mut queue = Vec::new();
        for name in roots {
            let package = self.packages.values().find(|p| p.name == *name);
            let package =
                package.ok_or_else(|| DistError::PackageNotFound { name: name.clone() })?;
            queue.push(package.id.as_str());
        }
        let mut found = BTreeSet::new();
        while let Some(id) = queue.pop() {
            if found.insert(id) {
                queue.extend(self.normal(id));
            }
        }
        Ok(found)
    }

    /// Normal dependencies of a package.
    fn normal(&self, id: &str) -> impl Iterator<Item = &str> {
        let dependencies = self.nodes.get(id).into_iter().flatten();
        dependencies
            .filter(|d| d.dep_kinds.iter().any(|k| k.kind.is_none()))
            .map(|d| d.pkg.as_str())
    }

    fn purl(&self, id: &str) -> String {
        self.packages.get(id).map_or_else(
            || id.to_owned(),
            |p| format!("pkg:cargo/{}@{}", p.name, p.version.replace('+', "%2B")),
        )
    }

    fn component(&self, id: &str) -> Value {
        let Some(package) = self.packages.get(id) else {
            return json!({ "type": "library", "name": id });
        };
        let mut component = json!({
            "type": "library",
            "bom-ref": self.purl(id),
            "name": package.name,
            "version": package.version,
            "purl": self.purl(id),
        });
        if let Some(license) = &package.license {
            // The form of old manifests, `MIT/Apache-2.0`, is not an SPDX expression.
            let expression = license.replace('/', " OR ");
            component["licenses"] = json!([{ "expression": expression }]);
        }
        let key = (package.name.clone(), package.version.clone());
        if let Some(hash) = self.hashes.get(&key) {
            component["hashes"] = json!([{ "alg": "SHA-256", "content": hash }]);
        }
        component
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METADATA: &str = r#"{
        "packages": [
            {"id": "p", "name": "program", "version": "0.1.0", "license": "Apache-2.0"},
            {"id": "l", "name": "library", "version": "1.0.0+meta", "license": "MIT/Apache-2.0"},
            {"id": "b", "name": "builder", "version": "2.0.0", "license": null}
        ],
        "resolve": {"nodes": [
            {"id": "p", "deps": [
                {"pkg": "l", "dep_kinds": [{"kind": null}, {"kind": "dev"}]},
                {"pkg": "b", "dep_kinds": [{"kind": "build"}]}
            ]},
            {"id": "l", "deps": []},
            {"id": "b", "deps": []}
        ]}
    }"#;
    const LOCK: &str =
        "[[package]]\nname = \"library\"\nversion = \"1.0.0+meta\"\nchecksum = \"ab\"\n";

    #[test]
    fn document_has_linked_crates_with_hash_and_spdx_license() {
        let metadata = Metadata::parse(METADATA, LOCK).expect("metadata");
        let document = metadata.document(&["program".into()], &[], "0.1.0", 0);
        let document = document.expect("a document");
        let components = document["components"].as_array().expect("components");
        let names: Vec<_> = components.iter().map(|c| &c["name"]).collect();
        assert_eq!(names, ["library", "program"]);
        assert_eq!(components[0]["hashes"][0]["content"], "ab");
        assert_eq!(
            components[0]["licenses"][0]["expression"],
            "MIT OR Apache-2.0"
        );
        assert_eq!(
            document["dependencies"][1]["dependsOn"][0],
            "pkg:cargo/library@1.0.0%2Bmeta"
        );
    }

    #[test]
    fn document_of_an_unknown_package_names_it() {
        let metadata = Metadata::parse(METADATA, LOCK).expect("metadata");
        let error = metadata.document(&["absent".into()], &[], "1", 0);
        let error = error.expect_err("an error").to_string();
        assert!(error.contains("absent"), "{error}");
    }

    #[test]
    fn foreign_file_without_path_is_refused() {
        let error = ForeignFile::from_str("a=1=MIT").expect_err("an error");
        assert!(error.to_string().contains("a=1=MIT"), "{error}");
    }
}
