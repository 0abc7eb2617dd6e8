//! Builder of archives, well-formed or not, byte by byte: the crate tar writes only well-formed ones.

/// A tar stream under construction. Only the GNU headers are from the crate tar.
pub(crate) struct Archive {
    bytes: Vec<u8>,
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new() }
    }

    /// Returns the stream with its end mark.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }

    /// Returns the stream without end mark.
    pub(crate) fn cut(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn entry(
        &mut self,
        name: &str,
        kind: char,
        set: impl FnOnce(&mut tar::Header),
        body: &[u8],
    ) {
        self.raw(name.as_bytes(), kind as u8, set, body);
    }

    /// Adds an entry with any bytes as its name, up to 100 of them.
    pub(crate) fn raw(
        &mut self,
        name: &[u8],
        kind: u8,
        set: impl FnOnce(&mut tar::Header),
        body: &[u8],
    ) {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(body.len() as u64);
        header.set_entry_type(tar::EntryType::new(kind));
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        set(&mut header);
        header.set_cksum();
        self.bytes.extend(header.as_bytes());
        self.body(body);
    }

    pub(crate) fn file(&mut self, name: &str, body: &[u8], set: impl FnOnce(&mut tar::Header)) {
        self.entry(name, '0', set, body);
    }

    pub(crate) fn link(&mut self, name: &str, kind: char, target: &str) {
        self.entry(
            name,
            kind,
            |h| h.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes()),
            b"",
        );
    }

    pub(crate) fn device(&mut self, name: &str, kind: char, major: u32, minor: u32) {
        let set = |h: &mut tar::Header| {
            h.set_device_major(major).unwrap();
            h.set_device_minor(minor).unwrap();
        };
        self.entry(name, kind, set, b"");
    }

    /// Adds a PAX header for the next entry.
    pub(crate) fn pax(&mut self, records: &[(&str, &[u8])]) {
        self.entry("PaxHeaders/x", 'x', |_| {}, &pax_records(records));
    }

    /// Adds a PAX header for all later entries.
    pub(crate) fn global_pax(&mut self, records: &[(&str, &[u8])]) {
        self.entry("pax_global_header", 'g', |_| {}, &pax_records(records));
    }

    /// Adds GNU's long name (`L`) or link target (`K`) of the next entry.
    pub(crate) fn gnu_long(&mut self, kind: u8, text: &[u8]) {
        self.raw(b"././@LongLink", kind, |_| {}, &[text, b"\0"].concat());
    }

    /// Adds a sparse file in GNU's old format, with up to four segments.
    pub(crate) fn old_sparse(&mut self, name: &str, size: u64, pieces: &[(u64, &[u8])]) {
        let body: Vec<u8> = pieces
            .iter()
            .flat_map(|(_, bytes)| bytes.iter().copied())
            .collect();
        let set = |h: &mut tar::Header| {
            let gnu = h.as_gnu_mut().unwrap();
            for (slot, (offset, bytes)) in gnu.sparse.iter_mut().zip(pieces) {
                slot.set_offset(*offset);
                slot.set_length(bytes.len() as u64);
            }
            gnu.set_real_size(size);
        };
        self.entry(name, 'S', set, &body);
    }

    fn body(&mut self, body: &[u8]) {
        self.bytes.extend(body);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }
}

fn pax_records(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        // The length includes itself.
        let bare = key.len() + value.len() + 3;
        let length = (bare..).find(|l| l.to_string().len() + bare == *l).unwrap();
        body.extend(format!("{length} {key}=").as_bytes());
        body.extend(*value);
        body.push(b'\n');
    }
    body
}
