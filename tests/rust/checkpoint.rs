//! Sound checkpoints, in every arrangement that is accepted.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::symlink;

use oxmerge::checkpoint::vocabulary::compare;
use oxmerge::checkpoint::{Absent, Checkpoint, weight_files};
use oxmerge::dtype::DType;
use oxmerge::plan::{InputFile, Remote};
use tempfile::TempDir;

use crate::written::file_of;

/// A file whose tensors are single bytes of those names, in that order.
fn file_with(names: &[&str]) -> Vec<u8> {
    let entries: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{}]}}"#, at + 1)
        })
        .collect();
    file_of(&format!("{{{}}}", entries.join(",")), names.len())
}

fn directory_of(files: &[(&str, &[u8])]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    directory
}

fn names(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.tensors().map(|tensor| tensor.name).collect()
}

fn file_names(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.files.iter().map(|file| file.path.file_name().unwrap().to_str().unwrap()).collect()
}

#[test]
fn tensors_come_in_file_order_whatever_the_headers_order() {
    let header = concat!(
        r#"{"z":{"shape":[],"data_offsets":[12,16],"dtype":"F32"},"#,
        r#""empty":{"dtype":"I64","shape":[3,0],"data_offsets":[12,12]},"#,
        r#""__metadata__":{"format":"pt","by":"test"},"#,
        r#""b":{"dtype":"BF16","data_offsets":[0,12],"shape":[2,3]},"#,
        r#""last":{"dtype":"F64","shape":[0],"data_offsets":[16,16]}}   "#
    );
    let directory = directory_of(&[("model.safetensors", &file_of(header, 16))]);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(names(&checkpoint), ["b", "empty", "z", "last"]);
    let data = 8 + header.len() as u64;
    let starts: Vec<_> = checkpoint.tensors().map(|tensor| tensor.start - data).collect();
    assert_eq!(starts, [0, 12, 12, 16]);
    let b = checkpoint.get("b").unwrap();
    assert_eq!((b.dtype, b.shape, b.elements(), b.bytes()), (DType::Bf16, &[2, 3][..], 6, 12));
    assert_eq!(checkpoint.get("z").unwrap().bytes(), 4);
    assert_eq!(checkpoint.get("last").unwrap().bytes(), 0);
    assert!(checkpoint.get("nothing").is_none());
    assert_eq!(checkpoint.bytes(), 16);
    assert!(checkpoint.warnings.is_empty());
    let file = directory.path().join("model.safetensors");
    assert_eq!(checkpoint.files, [InputFile::stat(&file).unwrap()]);
}

#[test]
fn every_type_is_read() {
    for dtype in DType::ALL {
        let header = format!(
            r#"{{"a":{{"dtype":"{dtype}","shape":[3],"data_offsets":[0,{}]}}}}"#,
            3 * dtype.size()
        );
        let directory = directory_of(&[("model.safetensors", &file_of(&header, 3 * dtype.size()))]);
        assert_eq!(Checkpoint::open(directory.path()).unwrap().tensor(0).dtype, dtype);
    }
}

#[test]
fn null_metadata_and_no_tensors_are_accepted() {
    let directory = directory_of(&[("model.safetensors", &file_of(r#"{"__metadata__":null}"#, 0))]);
    assert!(Checkpoint::open(directory.path()).unwrap().is_empty());
}

/// Shards in the order of their names and not of the index; symbolic links are followed.
#[test]
fn shards_come_in_the_order_of_their_names() {
    let index = r#"{"metadata":{"total_size":4},"weight_map":{"d":"m-2.safetensors","a":"m-1.safetensors","c":"m-2.safetensors","b":"m-1.safetensors"}}"#;
    let blobs = directory_of(&[("0badcafe", &file_with(&["b", "a"]))]);
    let directory = directory_of(&[
        ("m-2.safetensors", &file_with(&["d", "c"])),
        ("model.safetensors.index.json", index.as_bytes()),
    ]);
    symlink(blobs.path().join("0badcafe"), directory.path().join("m-1.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(names(&checkpoint), ["b", "a", "d", "c"]);
    assert_eq!(file_names(&checkpoint), ["m-1.safetensors", "m-2.safetensors"]);
    let files: Vec<_> = checkpoint.tensors().map(|tensor| tensor.file).collect();
    assert_eq!(files, [0, 0, 1, 1]);
    let blob = InputFile::stat(&blobs.path().join("0badcafe")).unwrap();
    assert_eq!(checkpoint.files[0].inode, blob.inode);
    assert!(checkpoint.warnings.is_empty());
}

#[test]
fn the_index_decides_and_says_what_it_passes_over() {
    let index = r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#;
    let directory = directory_of(&[
        ("1.safetensors", &file_with(&["a", "b", "x", "y", "z"])),
        ("2.safetensors", &file_with(&["a", "b"])),
        ("3.safetensors", &file_with(&["q"])),
        ("model.safetensors", &file_with(&["a", "b"])),
        ("model.fp16.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", index.as_bytes()),
    ]);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(names(&checkpoint), ["a", "b"]);
    assert_eq!(checkpoint.get("b").unwrap().file, 1);
    assert_eq!(
        checkpoint.warnings,
        [
            "`model.safetensors.index.json` is used; other weights beside it are left out: `model.fp16.safetensors.index.json`, `3.safetensors`, `model.safetensors`",
            "`1.safetensors`: tensors that the index does not place here are left out: `b`, `x`, `y` and 1 more",
            "`2.safetensors`: tensors that the index does not place here are left out: `a`",
        ]
    );
}

/// File names of a directory, the path opened in it, and the files that are read.
#[test]
fn where_the_weights_are() {
    let index = br#"{"weight_map":{"a":"1.safetensors"}}"#;
    let rows: [(&[&str], &str, &str, usize); 9] = [
        (&["model.safetensors"], "", "model.safetensors", 0),
        (&["model.safetensors", "pytorch_model.bin"], "", "model.safetensors", 0),
        (&["model.safetensors", "other.safetensors"], "", "model.safetensors", 1),
        (&["diffusion_pytorch_model.safetensors"], "", "diffusion_pytorch_model.safetensors", 0),
        (&["1.safetensors", "x.safetensors.index.json"], "", "1.safetensors", 0),
        (&["a.safetensors", "b.safetensors"], "b.safetensors", "b.safetensors", 0),
        (
            &["model-00001-of-00002.safetensors"],
            "model-00001-of-00002.safetensors",
            "model-00001-of-00002.safetensors",
            0,
        ),
        (
            &["1.safetensors", "x.safetensors.index.json", "y.safetensors.index.json"],
            "y.safetensors.index.json",
            "1.safetensors",
            0,
        ),
        (&["0badcafe"], "0badcafe", "0badcafe", 0),
    ];
    for (files, opened, read, warnings) in rows {
        let weights = file_with(&["a"]);
        let content = |name: &str| if name.ends_with("json") { &index[..] } else { &weights[..] };
        let files: Vec<_> = files.iter().map(|&name| (name, content(name))).collect();
        let directory = directory_of(&files);
        let checkpoint = Checkpoint::open(directory.path().join(opened)).unwrap();
        assert_eq!(file_names(&checkpoint), [read]);
        assert_eq!(checkpoint.warnings.len(), warnings, "{:?}", checkpoint.warnings);
    }
}

/// A sparse file of a terabyte opens at once, for nothing but its header is read.
#[test]
fn only_the_header_is_read() {
    let header = r#"{"a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}"#;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("model.safetensors");
    fs::write(&path, file_of(header, 0)).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + (1 << 40)).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().bytes(), 1 << 40);
}

/// Of files that are not here the headers will do; they are the files themselves once they are placed.
#[test]
fn files_may_be_elsewhere() {
    let (one, two) = (file_with(&["a", "b"]), file_with(&["c"]));
    let index = br#"{"weight_map":{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#;
    let index: (&str, &[u8]) = ("model.safetensors.index.json", index);
    let whole = directory_of(&[index, ("1.safetensors", &one), ("2.safetensors", &two)]);
    let partial = directory_of(&[index, ("2.safetensors", &two)]);
    let absent = |name: &str, bytes: &[u8], read: usize| {
        let remote = Remote { label: format!("org/name@commit/{name}"), etag: "etag".into() };
        let start = bytes[..read].to_vec();
        (name.to_owned(), Absent { size: bytes.len() as u64, remote, start, rest: None })
    };
    // What is here counts, whatever is said of it.
    let elsewhere = BTreeMap::from([
        absent("1.safetensors", &one, one.len() - 2),
        absent("2.safetensors", b"broken", 6),
        absent("other.bin", b"unread", 0),
    ]);
    let opened = Checkpoint::open_with(partial.path(), &elsewhere).unwrap();
    let same = Checkpoint::open(whole.path()).unwrap();
    assert_eq!(opened.tensors().collect::<Vec<_>>(), same.tensors().collect::<Vec<_>>());
    assert_eq!(file_names(&opened), ["1.safetensors", "2.safetensors"]);
    assert!(opened.files[0].remote.is_some() && opened.files[1].remote.is_none());
    let names = weight_files(partial.path(), &elsewhere).unwrap();
    assert_eq!(names, ["1.safetensors", "2.safetensors"]);
    let file = weight_files(&partial.path().join("1.safetensors"), &elsewhere).unwrap();
    assert_eq!(file, ["1.safetensors"]);

    let place = |path| HashMap::from([("org/name@commit/1.safetensors".to_owned(), path)]);
    let path = whole.path().join("1.safetensors");
    let placed = opened.placed(&place(path.clone())).unwrap();
    assert_eq!(placed.files[0], InputFile::stat(&path).unwrap());
    let error = opened.placed(&place(whole.path().join("2.safetensors"))).unwrap_err();
    assert!(error.to_string().contains("another than the one that was planned with"), "{error}");

    // A header that did not come whole is no header.
    let cut = BTreeMap::from([absent("1.safetensors", &one, 20)]);
    let error = Checkpoint::open_with(partial.path(), &cut).unwrap_err();
    assert!(error.to_string().contains("the header did not come whole"), "{error}");
}

#[test]
fn a_tokenizer_is_bounded_whatever_it_says() {
    let long = tempfile::tempdir().unwrap();
    let path = long.path().join("tokenizer.json");
    fs::File::create(&path).unwrap().set_len(65 << 20).unwrap();
    let small = directory_of(&[("tokenizer.json", br#"{"model":{"vocab":{"a":0}}}"#)]);
    let other = vec![small.path().join("tokenizer.json")];
    let error = compare(&[path], &other, 9).unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");

    let tokens: Vec<_> = (0..=2 << 20).map(|id| format!(r#""{id}":{id}"#)).collect();
    let text = format!("{{{}}}", tokens.join(","));
    let many = directory_of(&[("vocab.json", text.as_bytes())]);
    let files = vec![many.path().join("vocab.json")];
    let error = compare(&files, &other, u64::MAX).unwrap_err();
    assert!(error.to_string().contains("more than 2097152 tokens"), "{error}");
    // Rows that are not there need no memory.
    assert!(compare(&files, &other, 1).unwrap().is_some());
}

#[test]
fn infinities_in_a_config_are_no_damage() {
    let weights = file_with(&["a"]);
    for (config, sound) in [
        (r#"{"limit":[0.0,Infinity,-Infinity, NaN]}"#, true),
        (r#"{"Infinity":"\" NaN","x":[NaN]}"#, true),
        (r#"{"limit":[0.0,1Infinity]}"#, false),
        (r#"{"limit":[NaNNaN]}"#, false),
        (r#"{"limit":[nan]}"#, false),
        (r#"{"limit":"\"#, false),
    ] {
        let directory =
            directory_of(&[("model.safetensors", &weights), ("config.json", config.as_bytes())]);
        assert_eq!(Checkpoint::open(directory.path()).is_ok(), sound, "{config}");
    }
}
