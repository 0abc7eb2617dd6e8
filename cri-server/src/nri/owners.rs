//! Ownership of fields: two plugins that set the same field of the same container conflict, unless the later one
//! removed it first.
//!
//! The keys are NRI's field numbers, so that validating plugins get the owners. The values are merged in
//! [`super::collect`].

use boxlite_proto::nri::v1alpha1::{CompoundFieldOwners, Field, FieldOwners, OwningPlugins};
use std::collections::HashMap;

/// Two plugins set the same field.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("NRI plugins {second} and {first} both set {field:?} {key} of container {container}")]
pub(crate) struct Conflict {
    pub first: String,
    pub second: String,
    pub field: Field,
    pub key: String,
    pub container: String,
}

#[derive(Debug, Clone)]
struct Owner {
    plugin: String,
    /// The plugin removed the field and may set it again.
    cleared: bool,
}

/// Owners by container, field and key within the field ("" for a field with a single value).
#[derive(Debug, Default)]
pub(crate) struct Owners(HashMap<(String, Field, String), Owner>);

impl Owners {
    /// Claims a field for `plugin`.
    pub(crate) fn claim(
        &mut self,
        container: &str,
        field: Field,
        key: &str,
        plugin: &str,
    ) -> Result<(), Conflict> {
        let place = (container.to_owned(), field, key.to_owned());
        if let Some(owner) = self.0.get(&place)
            && !(owner.cleared && owner.plugin == plugin)
        {
            return Err(Conflict {
                first: owner.plugin.clone(),
                second: plugin.to_owned(),
                field,
                key: key.to_owned(),
                container: container.to_owned(),
            });
        }
        let owner = Owner {
            plugin: plugin.to_owned(),
            cleared: false,
        };
        self.0.insert(place, owner);
        Ok(())
    }

    /// Removes the owner of a field on behalf of `plugin`.
    pub(crate) fn clear(&mut self, container: &str, field: Field, key: &str, plugin: &str) {
        let owner = Owner {
            plugin: plugin.to_owned(),
            cleared: true,
        };
        self.0
            .insert((container.to_owned(), field, key.to_owned()), owner);
    }

    /// Returns the owners for validating plugins.
    pub(crate) fn message(&self) -> OwningPlugins {
        let mut message = OwningPlugins::default();
        for ((container, field, key), owner) in &self.0 {
            // A removal is marked by a "-", like names.
            let plugin = match owner.cleared {
                true => format!("-{}", owner.plugin),
                false => owner.plugin.clone(),
            };
            let fields: &mut FieldOwners = message.owners.entry(container.clone()).or_default();
            if compound(*field) {
                let entries: &mut CompoundFieldOwners =
                    fields.compound.entry(*field as i32).or_default();
                entries.owners.insert(key.clone(), plugin);
            } else {
                fields.simple.insert(*field as i32, plugin);
            }
        }
        message
    }
}

/// Returns whether a field is set entry by entry.
fn compound(field: Field) -> bool {
    matches!(
        field,
        Field::Annotations
            | Field::Mounts
            | Field::Devices
            | Field::CdiDevices
            | Field::Env
            | Field::HugepageLimits
            | Field::CgroupsUnified
            | Field::Rlimits
            | Field::Namespace
            | Field::Sysctl
            | Field::LinuxNetDevices
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_owner_conflicts_unless_it_cleared_first() {
        let mut owners = Owners::default();
        owners.claim("c", Field::Env, "A", "00-a").unwrap();
        owners.claim("c", Field::Env, "B", "10-b").unwrap();
        owners.claim("d", Field::Env, "A", "10-b").unwrap();
        let conflict = owners.claim("c", Field::Env, "A", "10-b").unwrap_err();
        assert_eq!(
            conflict.to_string(),
            "NRI plugins 10-b and 00-a both set Env A of container c"
        );
        owners.clear("c", Field::Env, "A", "10-b");
        assert!(owners.claim("c", Field::Env, "A", "20-c").is_err());
        owners.claim("c", Field::Env, "A", "10-b").unwrap();
        assert!(owners.claim("c", Field::Env, "A", "10-b").is_err());
    }

    #[test]
    fn message_has_simple_and_compound_fields() {
        let mut owners = Owners::default();
        owners.claim("c", Field::Args, "", "00-a").unwrap();
        owners.clear("c", Field::Mounts, "/x", "00-a");
        let message = owners.message();
        let fields = &message.owners["c"];
        assert_eq!(fields.simple[&(Field::Args as i32)], "00-a");
        assert_eq!(
            fields.compound[&(Field::Mounts as i32)].owners["/x"],
            "-00-a"
        );
    }
}
