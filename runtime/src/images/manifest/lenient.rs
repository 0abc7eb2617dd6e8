//! Reads JSON as Go's `encoding/json` reads it into the types of manifests, indexes and configs, because images are tested
//! with tools that are written in Go.
//!
//! Invalid UTF-8 is replaced, null counts as absent (in a list or map as an empty value), and the case of field names does
//! not matter. The depth is limited to serde_json's 128 levels. Types are checked by the caller.

use serde_json::{Map, Value, json};

/// Field names of manifests, indexes and configs, except those of free-form maps.
const FIELDS: [&str; 30] = [
    "schemaVersion",
    "mediaType",
    "manifests",
    "layers",
    "fsLayers",
    "digest",
    "size",
    "platform",
    "os",
    "os.features",
    "architecture",
    "variant",
    "config",
    "rootfs",
    "diff_ids",
    "history",
    "created",
    "author",
    "User",
    "ExposedPorts",
    "Env",
    "Entrypoint",
    "Cmd",
    "Volumes",
    "WorkingDir",
    "Labels",
    "StopSignal",
    "type",
    "empty_layer",
    "created_by",
];
/// Fields with free-form keys and text values.
const TEXT_MAPS: [&str; 2] = ["Labels", "annotations"];
/// Fields with free-form keys and objects as values.
const OBJECT_MAPS: [&str; 2] = ["Volumes", "ExposedPorts"];
/// Lists of texts; all other lists have objects.
const TEXT_LISTS: [&str; 5] = ["Env", "Entrypoint", "Cmd", "diff_ids", "os.features"];

/// A parsed document.
pub(super) struct Parsed {
    /// The normalized document.
    pub value: Value,
    /// Names of its fields, also of those that are null.
    names: Vec<String>,
}

impl Parsed {
    /// Reports whether the document has the field, even if it is null.
    pub(super) fn has(&self, field: &str) -> bool {
        let mut names = self.names.iter();
        names.any(|name| name.eq_ignore_ascii_case(field))
    }
}

/// Parses a document.
pub(super) fn parse(bytes: &[u8]) -> serde_json::Result<Parsed> {
    let mut value: Value = serde_json::from_str(&String::from_utf8_lossy(bytes))?;
    let fields = value.as_object().into_iter().flat_map(Map::keys);
    let names = fields.cloned().collect();
    normalize("", &mut value);
    Ok(Parsed { value, names })
}

/// Normalizes the value of the field `name`.
fn normalize(name: &str, value: &mut Value) {
    match value {
        Value::Object(map) if TEXT_MAPS.contains(&name) => replace_nulls(map, &json!("")),
        Value::Object(map) if OBJECT_MAPS.contains(&name) => replace_nulls(map, &json!({})),
        Value::Object(map) => {
            for (name, mut value) in std::mem::take(map) {
                if value.is_null() {
                    continue;
                }
                let known = FIELDS
                    .iter()
                    .find(|field| field.eq_ignore_ascii_case(&name));
                let name = known.map_or(name, |field| (*field).to_owned());
                normalize(&name, &mut value);
                map.insert(name, value);
            }
        }
        Value::Array(items) => {
            let empty = if TEXT_LISTS.contains(&name) {
                json!("")
            } else {
                json!({})
            };
            for item in items {
                if item.is_null() {
                    *item = empty.clone();
                }
                normalize("", item);
            }
        }
        _ => {}
    }
}

fn replace_nulls(map: &mut Map<String, Value>, empty: &Value) {
    for value in map.values_mut().filter(|value| value.is_null()) {
        *value = empty.clone();
    }
}
