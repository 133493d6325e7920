//! The journal file: what is cut off, what is refused.

use std::fs;
use std::path::Path;

use oxmerge::error::{ErrorKind, Result};
use oxmerge::io::{JournalFile, OutputFolder};
use proptest::prelude::*;

const NAME: &str = "journal";

fn write(folder: &Path, records: &[String]) -> Vec<u8> {
    let folder = OutputFolder::open(folder).unwrap();
    let mut file = JournalFile::create(&folder, NAME, &records[0]).unwrap();
    records[1..].iter().for_each(|record| file.append(record).unwrap());
    fs::read(folder.path_of(NAME)).unwrap()
}

/// The records of a file with these bytes.
fn read(folder: &Path, bytes: &[u8]) -> Result<Vec<String>> {
    fs::write(folder.join(NAME), bytes).unwrap();
    let mut records = Vec::new();
    JournalFile::open(&OutputFolder::open(folder)?, NAME, |record| {
        records.push(record.to_owned());
        Ok(())
    })?;
    Ok(records)
}

fn some_records() -> Vec<String> {
    ["{\"key\": 1}", "", "a record with ünicode", "the last one"].map(str::to_owned).to_vec()
}

#[test]
fn a_file_that_ends_anywhere_has_the_records_that_are_whole() {
    let folder = tempfile::tempdir().unwrap();
    let records = some_records();
    let bytes = write(folder.path(), &records);
    for end in 0..=bytes.len() {
        let whole = bytes[..end].split(|&byte| byte == b'\n').count() - 1;
        assert_eq!(read(folder.path(), &bytes[..end]).unwrap(), records[..whole]);
    }
}

#[test]
fn a_record_goes_on_behind_the_last_whole_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut records = some_records();
    let bytes = write(folder.path(), &records);
    for torn in [&b"half"[..], &[0; 5000], b"\n\n", b"0123456789abcdef no check\n"] {
        fs::write(folder.path().join(NAME), [&bytes, torn].concat()).unwrap();
        let opened = OutputFolder::open(folder.path()).unwrap();
        let mut file = JournalFile::open(&opened, NAME, |_| Ok(())).unwrap().unwrap();
        file.append("more").unwrap();
        drop(file);
        records.push("more".to_owned());
        let bytes = fs::read(folder.path().join(NAME)).unwrap();
        assert_eq!(read(folder.path(), &bytes).unwrap(), records);
        records.pop();
    }
}

#[test]
fn damage_before_a_whole_record_is_refused_and_damage_to_the_last_cuts_it_off() {
    let folder = tempfile::tempdir().unwrap();
    let records = some_records();
    let bytes = write(folder.path(), &records);
    let last = bytes.len() - bytes.rsplit(|&byte| byte == b'\n').nth(1).unwrap().len() - 1;
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        let found = read(folder.path(), &damaged);
        if at == last - 1 {
            // The last two records are one line now, which is not whole.
            assert_eq!(found.unwrap(), records[..records.len() - 2]);
        } else if at < last {
            assert_eq!(found.unwrap_err().kind(), ErrorKind::Output, "byte {at}");
        } else {
            assert_eq!(found.unwrap(), records[..records.len() - 1], "byte {at}");
        }
    }
}

#[test]
fn nothing_is_written_to_what_is_no_journal() {
    let folder = tempfile::tempdir().unwrap();
    let opened = OutputFolder::open(folder.path()).unwrap();
    let open = || JournalFile::open(&opened, NAME, |_| Ok(()));
    assert!(open().unwrap().is_none());
    fs::create_dir(folder.path().join(NAME)).unwrap();
    assert!(open().is_err());
    fs::remove_dir(folder.path().join(NAME)).unwrap();
    fs::write(folder.path().join("precious"), "mine").unwrap();
    std::os::unix::fs::symlink("precious", folder.path().join(NAME)).unwrap();
    assert!(open().is_err());
    fs::remove_file(folder.path().join(NAME)).unwrap();
    fs::hard_link(folder.path().join("precious"), folder.path().join(NAME)).unwrap();
    assert!(open().is_err());
    assert_eq!(fs::read(folder.path().join("precious")).unwrap(), b"mine");
}

proptest! {
    #[test]
    fn any_bytes_give_records_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let folder = tempfile::tempdir().unwrap();
        // No one hits a check by chance.
        prop_assert_eq!(read(folder.path(), &bytes).unwrap(), Vec::<String>::new());
    }
}
