//! Files of weights, written without the code under test.

/// A safetensors file with that header text and `data` zero bytes.
pub(crate) fn file_of(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

/// A zip archive of entries that are not compressed.
pub(crate) fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in entries {
        let size = (content.len() as u32).to_le_bytes();
        let length = (name.len() as u16).to_le_bytes();
        // Flags, method, time, date, checksum; sizes; lengths of name and extra field.
        let common = [&[0; 12][..], &size, &size, &length, &[0; 2]].concat();
        let start = (file.len() as u32).to_le_bytes();
        directory.extend([b"PK\x01\x02\0\0\0\0", &common[..], &[0; 10], &start].concat());
        directory.extend(name.as_bytes());
        file.extend([b"PK\x03\x04\0\0", &common[..], name.as_bytes(), content].concat());
    }
    let (start, size) = (file.len() as u32, directory.len() as u32);
    let count = (entries.len() as u16).to_le_bytes();
    file.extend(directory);
    file.extend([b"PK\x05\x06\0\0\0\0", &count[..], &count].concat());
    file.extend([size.to_le_bytes(), start.to_le_bytes()].concat());
    file.extend([0; 2]);
    file
}
