//! Reads all rows at the start. A row that cannot be read does not stop the daemon: it is moved to the table `quarantine`, and
//! its copy, if there is one, takes its place.

use super::copies::Raw;
use super::{BoxRow, ContainerRow, Inner, Kind, PUT_CONTAINER, split_container};
use rusqlite::{Connection, params};
use std::collections::BTreeMap;

/// A row of a table.
trait Row: Sized {
    const KIND: Kind;
    fn decode(record: &str, metadata: Vec<u8>) -> serde_json::Result<Self>;
}

impl Row for BoxRow {
    const KIND: Kind = Kind::Box;

    fn decode(record: &str, metadata: Vec<u8>) -> serde_json::Result<Self> {
        let mut row: Self = serde_json::from_str(record)?;
        row.options.metadata = metadata;
        Ok(row)
    }
}

impl Row for ContainerRow {
    const KIND: Kind = Kind::Container;

    fn decode(record: &str, metadata: Vec<u8>) -> serde_json::Result<Self> {
        let mut row: Self = serde_json::from_str(record)?;
        row.snapshot.metadata = metadata;
        Ok(row)
    }
}

impl Inner {
    /// Returns all boxes with their containers, ordered by id.
    pub(super) fn load(&mut self) -> rusqlite::Result<Vec<(BoxRow, Vec<ContainerRow>)>> {
        // Containers first: quarantining a box deletes its containers, which its copy then has to find in memory.
        let (mut containers, restored) = self.rows::<ContainerRow>()?;
        let (boxes, restored_boxes) = self.rows::<BoxRow>()?;
        for (id, record, metadata) in &restored_boxes {
            let name = boxes.get(id).map_or("", |row| row.options.name.as_str());
            let written = self.connection.execute(
                "INSERT INTO boxes (id, name, record, metadata) VALUES (?1, ?2, ?3, ?4)",
                params![id, name, record, metadata],
            );
            warn_of(written, id);
        }
        for row in containers.values().filter(|row| {
            let restored_box = |(id, ..): &Raw| *id == row.snapshot.box_id;
            let restored_self = |(id, ..): &Raw| *id == row.snapshot.id;
            restored.iter().any(restored_self) || restored_boxes.iter().any(restored_box)
        }) {
            let written = put_container(&self.connection, row);
            warn_of(written, &row.snapshot.id);
        }
        let mut loaded = Vec::with_capacity(boxes.len());
        for (id, row) in boxes {
            let (own, others) = containers
                .into_iter()
                .partition(|(_, container)| container.snapshot.box_id == id);
            containers = others;
            let own: BTreeMap<String, ContainerRow> = own;
            loaded.push((row, own.into_values().collect()));
        }
        Ok(loaded)
    }

    /// Returns the rows of a table and of the copies that are missing in it; the latter also as they were stored.
    fn rows<T: Row>(&mut self) -> rusqlite::Result<(BTreeMap<String, T>, Vec<Raw>)> {
        let mut rows = BTreeMap::new();
        for (id, record, metadata) in self.raw(T::KIND)? {
            match T::decode(&record, metadata) {
                Ok(row) => drop(rows.insert(id, row)),
                Err(error) => self.quarantine(T::KIND, &id, &error.to_string()),
            }
        }
        let mut restored = Vec::new();
        for (id, record, metadata) in self.copies.load(T::KIND) {
            if rows.contains_key(&id) {
                continue;
            }
            let Ok(row) = T::decode(&record, metadata.clone()) else {
                continue;
            };
            tracing::error!(
                kind = T::KIND.name(),
                id,
                "the database has lost a record: restored from its copy"
            );
            self.quarantined += 1;
            rows.insert(id.clone(), row);
            restored.push((id, record, metadata));
        }
        Ok((rows, restored))
    }

    fn raw(&self, kind: Kind) -> rusqlite::Result<Vec<Raw>> {
        let query = format!("SELECT id, record, metadata FROM {}", kind.table());
        let mut statement = self.connection.prepare(&query)?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        rows.collect()
    }

    /// Moves a row to the quarantine, a box with its containers.
    fn quarantine(&mut self, kind: Kind, id: &str, reason: &str) {
        self.quarantined += 1;
        tracing::error!(
            kind = kind.name(),
            id,
            reason,
            "a record of the database cannot be read: moved to the table quarantine"
        );
        let moved = self.connection.transaction().and_then(|transaction| {
            transaction.execute(
                &format!(
                    "INSERT INTO quarantine SELECT ?1, id, ?2, record, metadata FROM {} WHERE id = ?3",
                    kind.table()
                ),
                params![kind.name(), reason, id],
            )?;
            if kind == Kind::Box {
                transaction.execute(
                    "INSERT INTO quarantine SELECT 'container', id, 'of the box', record, metadata
                     FROM containers WHERE box_id = ?1",
                    params![id],
                )?;
            }
            transaction.execute(
                &format!("DELETE FROM {} WHERE id = ?1", kind.table()),
                params![id],
            )?;
            transaction.commit()
        });
        if let Err(error) = moved {
            tracing::error!(id, %error, "failed to move a record to the quarantine");
        }
    }
}

fn put_container(connection: &Connection, row: &ContainerRow) -> rusqlite::Result<usize> {
    let (id, box_id, record, metadata) = split_container(row.clone())
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
    connection.execute(PUT_CONTAINER, params![id, box_id, record, metadata])
}

fn warn_of(written: rusqlite::Result<usize>, id: &str) {
    if let Err(error) = written {
        tracing::error!(id, %error, "failed to write a restored record");
    }
}
