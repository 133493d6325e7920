//! What strangers' bytes are given to: targets of a fuzzer, and the inputs that it found.
//!
//! `tests/fuzz/run` gives a target changed inputs for as long as asked. The test here gives each the
//! inputs that were kept. A new target is a row of [`TARGETS`], with some inputs in a folder of its
//! name.

use std::fs;
use std::path::Path;

use oxmerge::checkpoint::{Checkpoint, header_bytes, vocabulary};
use oxmerge::dtype::DType;
use oxmerge::engine::{files, journal};
use oxmerge::io::{JournalFile, OutputFolder};
use oxmerge::plan::{self, Builder, Plan};

use crate::written::{archive, file_of};

/// Takes any bytes, and must neither panic nor take long.
pub(crate) type Target = fn(&Path, &[u8]);

/// The targets by name. Each gets a folder that it may write to.
pub(crate) const TARGETS: [(&str, Target); 7] = [
    ("weights", weights),
    ("index", index),
    ("journal", journal_of_tensors),
    ("model-config", config),
    ("pickle", pickle),
    ("table", table),
    ("vocabulary", vocabulary),
];

/// A file of weights in any format.
fn weights(folder: &Path, bytes: &[u8]) {
    let file = folder.join("weights");
    fs::write(&file, bytes).unwrap();
    check(Checkpoint::open(&file));
}

/// An index, beside two shards.
fn index(folder: &Path, bytes: &[u8]) {
    let header = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    for name in ["1", "2"] {
        fs::write(folder.join(name), file_of(header, 2)).unwrap();
    }
    fs::write(folder.join("model.safetensors.index.json"), bytes).unwrap();
    check(Checkpoint::open(folder));
}

/// A config, beside weights.
fn config(folder: &Path, bytes: &[u8]) {
    fs::write(folder.join("model.safetensors"), file_of("{}", 0)).unwrap();
    fs::write(folder.join("config.json"), bytes).unwrap();
    check(Checkpoint::open(folder));
}

/// The pickle in a file of torch, beside three storages.
fn pickle(folder: &Path, bytes: &[u8]) {
    let storages = [("a/data/0", &[1; 64][..]), ("a/data/1", &[2; 8]), ("a/data/2", &[])];
    let file = folder.join("weights.bin");
    fs::write(&file, archive(&[&[("a/data.pkl", bytes)], &storages[..]].concat())).unwrap();
    check(Checkpoint::open(&file));
}

/// The table of a saved plan, as the engine reads it.
fn table(_: &Path, bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok((plan, _)) = plan::load(text, header_bytes) else { return };
    let _ = (plan.bytes_read(), plan.bytes_written(), files::problems(&plan));
    plan.tensors().for_each(|tensor| assert!(tensor.sources().len() > 0));
}

/// A tokenizer, as one of two.
fn vocabulary(folder: &Path, bytes: &[u8]) {
    let files = [folder.join("tokenizer.json"), folder.join("other.json")];
    fs::write(&files[0], bytes).unwrap();
    fs::write(&files[1], r#"{"model":{"vocab":{"a":0,"b":1}}}"#).unwrap();
    let _ = vocabulary::compare(&files[..1], &files[1..], 1000);
}

/// A journal of what an interrupted run had finished: the bytes are its lines, then its records, whose
/// checks hold.
fn journal_of_tensors(folder: &Path, bytes: &[u8]) {
    let name = journal::journal_name();
    let file = folder.join(&name);
    let folders = [OutputFolder::open(folder).unwrap()];
    let mut builder = Builder::new(Plan::default());
    for name in ["a", "b"] {
        builder.push(name, DType::F32, &[2], 0, None, [].into_iter());
    }
    let plan = builder.place(&[(0, 0), (0, 8)]).unwrap();
    let check = || match journal::read_digests(&folders, "key", &plan) {
        Ok(digests) => assert!(digests.len() == 2 && digests.iter().all(Option::is_some)),
        Err(error) => assert!(error.to_string().len() < 8000),
    };
    fs::write(&file, bytes).unwrap();
    let _ = journal::journal_key(&folders[0]);
    check();
    fs::remove_file(&file).unwrap();
    let mut written = JournalFile::create(&folders[0], &name, "key").unwrap();
    let lines =
        bytes.split(|&byte| byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    lines.take(20).for_each(|line| written.append(line).unwrap());
    check();
}

/// Checks that the tensors of what was opened lie in its files.
fn check(opened: oxmerge::error::Result<Checkpoint>) {
    match opened {
        Ok(checkpoint) => {
            for tensor in checkpoint.tensors() {
                let end = tensor.start.checked_add(tensor.bytes());
                assert!(end.is_some_and(|end| end <= checkpoint.files[tensor.file].size));
                assert_eq!(checkpoint.get(tensor.name), Some(tensor));
            }
        }
        Err(error) => assert!(error.to_string().len() < 8000),
    }
}

#[test]
fn inputs_that_were_kept() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    for (name, target) in TARGETS {
        let folder = tempfile::tempdir().unwrap();
        let inputs = fs::read_dir(kept.join(name)).unwrap();
        let mut count = 0;
        for input in inputs {
            target(folder.path(), &fs::read(input.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "`{name}` has no inputs");
    }
}
