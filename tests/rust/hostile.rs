//! Broken and malicious checkpoints: a few bytes each, each with its exact error.
//!
//! In the expected text `FILE` stands for the path of the file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use oxmerge::checkpoint::{Absent, Checkpoint, Header};
use oxmerge::error::{Error, ErrorKind};
use oxmerge::plan::Remote;
use proptest::prelude::*;

use crate::written::file_of;

/// What is advised where nothing more precise is.
const DAMAGED: &str = "; the file is damaged: download it again, or save the model anew";

/// `expected` with that advice, unless it has one.
fn advised(expected: &str) -> String {
    let advice = if expected.contains("; ") { "" } else { DAMAGED };
    format!("{expected}{advice}")
}

/// The text of the error that opening `path` gives, with `directory` taken out of it.
fn message(path: &Path, directory: &Path) -> String {
    let text = Checkpoint::open(path).unwrap_err().to_string();
    text.replace(&format!("{}/", directory.display()), "")
        .replace(directory.to_str().unwrap(), "DIRECTORY")
}

/// Whole files.
const FILES: &[(&[u8], &str)] = &[
    (b"", "the file is too short to be a safetensors file: expected at least 8 bytes, found 0"),
    (
        b"1234567",
        "the file is too short to be a safetensors file: expected at least 8 bytes, found 7",
    ),
    (
        b"\0\0\0\0\0\0\0\0",
        "the header is not valid JSON: EOF while parsing a value at line 1 column 0",
    ),
    (
        b"\x01\xe1\xf5\x05\0\0\0\0{}",
        "not a safetensors file, or its header is too long: expected at most 100000000 bytes of header, found 100000001",
    ),
    (
        b"\xff\xff\xff\xff\xff\xff\xff\xff{}",
        "not a safetensors file, or its header is too long: expected at most 100000000 bytes of header, found 18446744073709551615",
    ),
    (
        b"\0\xe1\xf5\x05\0\0\0\0{}",
        "the file ends inside its header: expected at least 100000008 bytes, found 10 bytes; it looks like a truncated download: download it again",
    ),
    (
        b"\x03\0\0\0\0\0\0\0{}",
        "the file ends inside its header: expected at least 11 bytes, found 10 bytes; it looks like a truncated download: download it again",
    ),
    (b"\x02\0\0\0\0\0\0\0\xff\xfe", "the header is not valid UTF-8"),
    (
        b"version https://git-lfs.github.com/spec/v1\n",
        "not a safetensors file: found a Git LFS pointer, not the weights; fetch the weights with `git lfs pull`",
    ),
    (
        b"<!DOCTYPE html>",
        "not a safetensors file: found a web page, not the weights; download it again",
    ),
    (
        b"merge_method: linear\n",
        "not a safetensors file: found text; name a folder of a model, or its file of weights",
    ),
];

/// A header, the number of data bytes after it, and the error.
const HEADERS: &[(&str, usize, &str)] = &[
    ("{", 0, "the header is not valid JSON: EOF while parsing an object at line 1 column 1"),
    ("{} x", 0, "the header is not valid JSON: trailing characters at line 1 column 4"),
    (
        "[]",
        0,
        "the header is not as it should be: invalid type: sequence, expected an object of tensors at line 1 column 0",
    ),
    (
        r#"{"__metadata__":{"format":1}}"#,
        0,
        "the header is not as it should be: invalid type: integer `1`, expected a string at line 1 column 27",
    ),
    (
        r#"{"__metadata__":{},"__metadata__":{}}"#,
        0,
        "the header is not as it should be: duplicate field `__metadata__` at line 1 column 37",
    ),
    (
        r#"{"a":["U8",[1],[0,1]]}"#,
        1,
        "tensor `a`: the header is not as it should be: invalid type: sequence, expected an object with `dtype`, `shape` and `data_offsets` at line 1 column 5",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[1]}}"#,
        1,
        "tensor `a`: the header is not as it should be: missing field `data_offsets` at line 1 column 31",
    ),
    (
        r#"{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#,
        1,
        "tensor `a`: the header is not as it should be: duplicate field `dtype` at line 1 column 31",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"scale":2}}"#,
        1,
        "tensor `a`: the header is not as it should be: unknown field `scale`, expected one of `dtype`, `shape`, `data_offsets` at line 1 column 59",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#,
        1,
        "tensor `a`: the header is not as it should be: invalid value: integer `-1`, expected u64 at line 1 column 30",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}"#,
        1,
        "tensor `a`: the header is not as it should be: invalid type: floating point `1.5`, expected u64 at line 1 column 31",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1e0]}}"#,
        1,
        "tensor `a`: the header is not as it should be: invalid type: floating point `1.0`, expected u64 at line 1 column 52",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}"#,
        1,
        "tensor `a`: the header is not as it should be: `data_offsets` must be two numbers at line 1 column 54",
    ),
    (
        r#"{"a":{"dtype":"Q4_K","shape":[1],"data_offsets":[0,1]}}"#,
        1,
        "tensor `a`: the tensor's type is unknown: found `Q4_K`; save the model in a type that merges: BF16, F16, F32 or F64",
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
        0,
        "tensor `a`: the tensor's size overflows: found F32 [4294967296, 4294967296]",
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}}"#,
        4,
        "tensor `a`: the tensor's size overflows: found F32 [18446744073709551615]",
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
        8,
        "tensor `a`: the tensor ends before it begins: found [8, 0]",
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,7]}}"#,
        7,
        "tensor `a`: the tensor's offsets do not fit its shape: expected 8 bytes for F32 [2], found 7",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#,
        1,
        "tensor `a`: the tensor's offsets overflow: found 18446744073709551615",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
        2,
        "tensor `a`: the header has two tensors of this name",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
        3,
        "tensor `b`: the tensor overlaps the tensor before it: expected offset 2, found 1",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}}"#,
        5,
        "tensor `b`: the tensor leaves a hole after what is before it: expected offset 2, found 3",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
        3,
        "tensor `a`: the tensor leaves a hole after what is before it: expected offset 0, found 1",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
        1,
        "the file is shorter than its header says: expected 63 bytes, found 62 bytes; it looks like a truncated download: download it again",
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
        3,
        "the file is longer than its header says: expected 63 bytes, found 64 bytes",
    ),
    ("{}", 1, "the file is longer than its header says: expected 10 bytes, found 11 bytes"),
];

#[test]
fn broken_files() {
    for (bytes, expected) in FILES {
        check_file(bytes, expected);
    }
}

#[test]
fn broken_headers() {
    for &(header, data, expected) in HEADERS {
        check_file(&file_of(header, data), expected);
    }
}

/// What a broken file is called is the same where only its first bytes are here.
#[test]
fn broken_files_elsewhere() {
    let headers = HEADERS.iter().map(|&(header, data, expected)| (file_of(header, data), expected));
    let files = FILES.iter().map(|&(bytes, expected)| (bytes.to_vec(), expected));
    for (start, expected) in files.chain(headers) {
        let directory = tempfile::tempdir().unwrap();
        let remote = Remote { label: "label".into(), etag: "etag".into() };
        let absent = Absent { size: start.len() as u64, remote, start, rest: None };
        let absent = BTreeMap::from([("model.safetensors".to_owned(), absent)]);
        let error = Checkpoint::open_with(directory.path(), &absent).unwrap_err().to_string();
        let file = format!("{}/", directory.path().display());
        assert_eq!(error.replace(&file, ""), format!("`model.safetensors`: {}", advised(expected)));
    }
}

/// Texts that would exhaust the stack or the memory if they were believed.
#[test]
fn endless_headers() {
    let entry = "tensor `a`: the header is not as it should be: ";
    check_file(
        &file_of(&"[".repeat(100_000), 0),
        "the header is not as it should be: invalid type: sequence, expected an object of tensors at line 1 column 0",
    );
    check_file(
        &file_of(&format!(r#"{{"a":{}"#, r#"{"dtype":"#.repeat(100_000)), 0),
        &format!("{entry}invalid type: map, expected a string at line 1 column 14"),
    );
    check_file(
        &file_of(&format!(r#"{{"a":{{"shape":[{}1]}}}}"#, "1,".repeat(64)), 1),
        &format!("{entry}more than 64 numbers at line 1 column 145"),
    );
}

fn check_file(bytes: &[u8], expected: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("FILE");
    fs::write(&path, bytes).unwrap();
    assert_eq!(message(&path, directory.path()), format!("`FILE`: {}", advised(expected)));
}

#[test]
fn types_that_are_recognised_and_refused() {
    let advice = "; dequantise it to BF16 first";
    let directory = tempfile::tempdir().unwrap();
    for (dtype, what, advice) in [
        ("F8_E4M3", "8-bit float weights (FP8)", advice),
        ("F8_E5M2", "8-bit float weights (FP8)", advice),
        ("F8_E8M0", "8-bit float weights (FP8)", advice),
        ("F8_E4M3FNUZ", "8-bit float weights (FP8)", advice),
        ("F6_E2M3", "6-bit float weights (FP6)", advice),
        ("F4", "4-bit float weights (FP4)", advice),
        ("C64", "complex numbers", "; leave the model out: only real numbers can be merged"),
    ] {
        let path = directory.path().join("FILE");
        let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,1]}}}}"#);
        fs::write(&path, file_of(&header, 1)).unwrap();
        assert_eq!(Checkpoint::open(&path).unwrap_err().kind(), ErrorKind::Unsupported);
        let expected =
            format!("`FILE`: tensor `a`: {what} cannot be merged: found `{dtype}`{advice}");
        assert_eq!(message(&path, directory.path()), expected);
    }
}

const A: &str = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;

#[test]
fn broken_indexes() {
    let endless = format!(r#"{{"x":{}"#, "[".repeat(100_000));
    let rows = [
        ("{", "the index is not valid JSON: EOF while parsing an object at line 1 column 1"),
        (
            "[]",
            "the index is not as it should be: invalid type: sequence, expected an object at line 1 column 0",
        ),
        ("{}", "the index has no key `weight_map`"),
        (r#"{"weight_map":3}"#, "`weight_map` in the index is not an object of file names"),
        (r#"{"weight_map":["a"]}"#, "`weight_map` in the index is not an object of file names"),
        (r#"{"weight_map":{"a":3}}"#, "`weight_map` in the index is not an object of file names"),
        (r#"{"weight_map":{}}"#, "the index names no tensor"),
        (&endless, "the index is not valid JSON: EOF while parsing a list at line 1 column 100005"),
        (
            r#"{"weight_map":{"a":"1.safetensors"},"weight_map":{"a":"1.safetensors"}}"#,
            "the index has two keys `weight_map`",
        ),
        (
            r#"{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}"#,
            "tensor `a`: the index names the tensor twice",
        ),
        (
            r#"{"weight_map":{"a":"../1.safetensors"}}"#,
            "tensor `a`: the index names a file that is not a plain name in its directory: found `../1.safetensors`; get the checkpoint from where it was first published",
        ),
        (
            r#"{"weight_map":{"a":"/etc/passwd"}}"#,
            "tensor `a`: the index names a file that is not a plain name in its directory: found `/etc/passwd`; get the checkpoint from where it was first published",
        ),
        (
            r#"{"weight_map":{"a":".."}}"#,
            "tensor `a`: the index names a file that is not a plain name in its directory: found `..`; get the checkpoint from where it was first published",
        ),
        (
            r#"{"weight_map":{"a":"x\\y"}}"#,
            r"tensor `a`: the index names a file that is not a plain name in its directory: found `x\\y`; get the checkpoint from where it was first published",
        ),
        (
            r#"{"weight_map":{"a":"\u0000"}}"#,
            r"tensor `a`: the index names a file that is not a plain name in its directory: found `\0`; get the checkpoint from where it was first published",
        ),
        (
            r#"{"weight_map":{"a":""}}"#,
            "tensor `a`: the index names a file that is not a plain name in its directory: found ``; get the checkpoint from where it was first published",
        ),
        (
            r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors","c":"3.safetensors"}}"#,
            "shards that the index names are missing: found no `2.safetensors`, `3.safetensors`; download the checkpoint again, whole",
        ),
    ];
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("1.safetensors"), file_of(A, 2)).unwrap();
    let index = directory.path().join("model.safetensors.index.json");
    for (text, expected) in rows {
        fs::write(&index, text).unwrap();
        let expected = format!("`model.safetensors.index.json`: {}", advised(expected));
        assert_eq!(message(directory.path(), directory.path()), expected);
        assert_eq!(message(&index, directory.path()), expected);
    }
    fs::write(&index, r#"{"weight_map":{"a":"1.safetensors","b":"1.safetensors"}}"#).unwrap();
    assert_eq!(
        message(directory.path(), directory.path()),
        "`1.safetensors`: the shard lacks tensors that the index places in it: found no `b`; index and shards are not of one checkpoint: download it again"
    );
}

/// File names, and the error of a directory that holds them (all of them with the tensor `a`).
#[test]
fn directories_without_clear_weights() {
    let rows: [(&[&str], &str); 10] = [
        (
            &["pytorch_model-00001-of-00002.bin"],
            "the checkpoint has shards but no index: expected `pytorch_model.bin.index.json`: found `pytorch_model-00001-of-00002.bin`; download the index too",
        ),
        (
            &["a.bin", "b.pt", "c.ckpt.index.json", "training_args.bin", "d.ckpt.index.json"],
            "it is not clear which file holds the weights: found `c.ckpt.index.json`, `d.ckpt.index.json`; give the path of the file instead of the directory",
        ),
        (
            &[],
            "the directory holds no weights: expected `model.safetensors` or `model.safetensors.index.json`; name the directory that they are in, or download them",
        ),
        (
            &["README.md", "._model.safetensors"],
            "the directory holds no weights: expected `model.safetensors` or `model.safetensors.index.json`; name the directory that they are in, or download them",
        ),
        (
            &["training_args.bin", "optimizer.pt"],
            "the directory holds no weights: expected `model.safetensors` or `model.safetensors.index.json`; name the directory that they are in, or download them",
        ),
        (
            &["a.safetensors", "b.safetensors"],
            "it is not clear which file holds the weights: found `a.safetensors`, `b.safetensors`; give the path of the file instead of the directory",
        ),
        (
            &["a.safetensors.index.json", "b.safetensors.index.json"],
            "it is not clear which file holds the weights: found `a.safetensors.index.json`, `b.safetensors.index.json`; give the path of the file instead of the directory",
        ),
        (
            &["model-00001-of-00002.safetensors"],
            "the checkpoint has shards but no index: expected `model.safetensors.index.json`: found `model-00001-of-00002.safetensors`; download the index too",
        ),
        (
            &["adapter_model.bin"],
            "this is an adapter (LoRA), not a model: found `adapter_model.bin`; write it behind its model: `model+adapter`; to make one adapter of several, list adapters alone, and use `oxmerge merge`",
        ),
        (
            &["adapter_model.safetensors"],
            "this is an adapter (LoRA), not a model: found `adapter_model.safetensors`; write it behind its model: `model+adapter`; to make one adapter of several, list adapters alone, and use `oxmerge merge`",
        ),
    ];
    for (names, expected) in rows {
        let directory = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(directory.path().join(name), file_of(A, 2)).unwrap();
        }
        let expected = format!("`DIRECTORY`: {}", expected.replace("`: found", "`, found"));
        assert_eq!(message(directory.path(), directory.path()), expected);
    }
}

/// File names, what is found, and how the advice ends.
#[test]
fn weights_in_other_formats_are_told_how_to_be_converted() {
    let gguf = ".save_pretrained(sys.argv[3])\" DIRECTORY a.gguf a.converted";
    let download = "download the model's weights in safetensors or PyTorch format";
    let rows: [(&[&str], &str, &str); 3] = [
        (&["a.gguf", "b.onnx", "optimizer.pt"], "`a.gguf`, `b.onnx`", gguf),
        (&["x.h5"], "`x.h5`", download),
        // Each holds a part of every tensor.
        (
            &["consolidated.00.pth", "consolidated.01.pth"],
            "`consolidated.00.pth`, `consolidated.01.pth`",
            download,
        ),
    ];
    for (names, found, advice) in rows {
        let directory = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(directory.path().join(name), b"PK").unwrap();
        }
        let told = message(directory.path(), directory.path());
        let what = format!("the weights are in a format that is not read: found {found}; ");
        assert!(told.starts_with(&format!("`DIRECTORY`: {what}")), "{told}");
        assert!(told.ends_with(advice), "{told}");
    }
    for (begins, is, advice) in [
        (
            &b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."[..],
            "the file is in the format of torch before 1.6; with torch and safetensors installed",
            "'FI LE.safetensors' 'FI LE.x'",
        ),
        (
            b"GGUF\x03\0\0\0",
            "not a safetensors file: found a GGUF file; take the 16-bit weights",
            "DIRECTORY 'FI LE.x' 'FI LE.converted'",
        ),
        (
            b"\x80\x02}q\0(X\x01\0\0\0",
            "not a safetensors file: found a pickle, and no file of torch; save the tensors",
            "`safetensors.torch.save_file`",
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("FI LE.x");
        fs::write(&path, begins).unwrap();
        let told = message(&path, directory.path());
        assert!(told.starts_with(&format!("`FI LE.x`: {is}")), "{told}");
        assert!(told.ends_with(advice), "{told}");
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("FILE");
    let tar = [&[b'x'; 257][..], b"ustar\x0000", &[0; 249]].concat();
    fs::write(&path, tar).unwrap();
    let told = message(&path, directory.path());
    let what = "`FILE`: the file is a tar archive, as torch wrote before 0.2; take the weights in";
    assert!(told.starts_with(what), "{told}");
}

#[test]
fn what_a_file_says_is_cut_to_a_few_lines() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("FILE");
    let long = "é".repeat(100_000);
    for header in [
        format!(r#"{{"a":{{"dtype":"{long}","shape":[],"data_offsets":[0,0]}}}}"#),
        format!(r#"{{"a":{{"{long}":1}}}}"#),
        format!(r#"{{"a":"{long}"}}"#),
    ] {
        fs::write(&path, file_of(&header, 0)).unwrap();
        let told = message(&path, directory.path());
        assert!(told.len() < 1000 && told.contains("éé...éé"), "{told}");
    }
}

#[test]
fn a_path_that_is_not_utf8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(OsStr::from_bytes(b"\xffmodel"));
    fs::create_dir(&path).unwrap();
    fs::write(path.join("model.safetensors"), file_of(A, 2)).unwrap();
    assert_eq!(
        message(&path, directory.path()),
        "`\u{fffd}model`: the path is not valid UTF-8; rename what it names, or make a link to it whose path is"
    );
}

#[test]
fn a_path_that_leads_nowhere() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nothing");
    assert_eq!(
        message(&path, directory.path()),
        "`nothing`: failed to open the checkpoint: No such file or directory (os error 2)"
    );
}

/// Tensors (name, type), and the packing they give away.
#[test]
fn packed_tensors_are_recognised() {
    let rows: [(&[(&str, &str)], &str); 7] = [
        (&[("a.qweight", "I32"), ("a.qzeros", "I32"), ("a.g_idx", "I32")], "GPTQ"),
        (&[("a.qweight", "I32"), ("a.qzeros", "I32"), ("a.scales", "F16")], "AWQ or GPTQ"),
        (&[("a.weight", "U8"), ("a.weight.absmax", "F32")], "bitsandbytes 4-bit"),
        (&[("a.weight", "I8"), ("a.SCB", "F32")], "bitsandbytes 8-bit"),
        (&[("a.weight", "I8"), ("a.weight_scale", "F32")], "compressed-tensors 8-bit"),
        (&[("a.weight_packed", "I32"), ("a.weight_scale", "F32")], "compressed-tensors"),
        (&[("a_blocks", "U8"), ("a_scales", "U8")], "MXFP4"),
    ];
    for (tensors, method) in rows {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("FILE");
        let entries: Vec<_> = tensors
            .iter()
            .map(|(name, dtype)| {
                format!(r#""{name}":{{"dtype":"{dtype}","shape":[0],"data_offsets":[0,0]}}"#)
            })
            .collect();
        fs::write(&path, file_of(&format!("{{{}}}", entries.join(",")), 0)).unwrap();
        let name = tensors[0].0;
        let expected = format!(
            "`FILE`: tensor `{name}`: the checkpoint is quantised ({method}); dequantise it to BF16 first"
        );
        assert_eq!(message(&path, directory.path()), expected);
    }
}

#[test]
fn a_declared_quantisation_is_refused() {
    let rows = [
        (r#"{"quantization_config":{"quant_method":"gptq","bits":4}}"#, Some("gptq")),
        (r#"{"quantization_config":{"quant_method":"mxfp4"}}"#, Some("mxfp4")),
        (r#"{"quantization_config":{"load_in_8bit":true}}"#, Some("bitsandbytes")),
        (r#"{"quantization_config":{}}"#, Some("an unnamed method")),
        (r#"{"text_config":{"quantization_config":{"quant_method":"awq"}}}"#, Some("awq")),
        (r#"{"quantization_config":null}"#, None),
        (r#"{"model_type":"llama"}"#, None),
        ("[]", None),
    ];
    for (config, method) in rows {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config.json"), config).unwrap();
        fs::write(directory.path().join("model.safetensors"), file_of(A, 2)).unwrap();
        let Some(method) = method else {
            Checkpoint::open(directory.path()).unwrap();
            continue;
        };
        let expected = format!(
            "`config.json`: the checkpoint is quantised ({method}); dequantise it to BF16 first; if it is, remove `quantization_config` from config.json"
        );
        assert_eq!(message(directory.path(), directory.path()), expected);
    }
}

#[test]
fn a_broken_config_is_named() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("config.json"), "{").unwrap();
    assert_eq!(
        message(directory.path(), directory.path()),
        format!(
            "`config.json`: the file is not valid JSON: EOF while parsing an object at line 1 column 1{DAMAGED}"
        )
    );
}

/// What a header must be when it is accepted, whatever text it came from.
fn check_accepted(header: &Header, text: usize, size: u64) {
    let mut end = 8 + text as u64;
    for tensor in &header.tensors {
        assert_eq!(tensor.start, end);
        end += tensor.shape.iter().product::<u64>() * tensor.dtype.size() as u64;
    }
    assert_eq!(end, size);
}

fn parse(text: &[u8], size: u64) -> Result<Header, Error> {
    let header = Header::parse(text, size, 0)?;
    check_accepted(&header, text.len(), size);
    Ok(header)
}

const SOUND: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},"c":{"dtype":"I64","shape":[0],"data_offsets":[16,16]}}"#;

const INDEX: &str = r#"{"metadata":{"total_size":2},"weight_map":{"a":"1.safetensors"}}"#;

/// Fragments from which wild but often well-formed headers are made.
fn fragment() -> impl Strategy<Value = String> {
    let numbers = prop_oneof![0..20_u64, Just(u64::MAX), Just(1 << 32), any::<u64>()];
    let dtype = prop::sample::select(vec!["U8", "BF16", "F32", "I64", "F8_E4M3", "X"]);
    ("[a-c]", dtype, prop::collection::vec(numbers.clone(), 0..4), numbers.clone(), numbers)
        .prop_map(|(name, dtype, shape, begin, end)| {
            format!(
                r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#
            )
        })
}

proptest! {
    #[test]
    fn random_bytes_never_panic(text in prop::collection::vec(any::<u8>(), 0..200), size: u64) {
        let _ = parse(&text, size);
    }

    #[test]
    fn random_entries_never_panic(entries in prop::collection::vec(fragment(), 0..5), size in 0..2000_u64) {
        let _ = parse(format!("{{{}}}", entries.join(",")).as_bytes(), size);
    }

    #[test]
    fn mutated_headers_never_panic(
        changes in prop::collection::vec((0..SOUND.len(), any::<u8>()), 0..4),
        cut in 0..=SOUND.len(),
        data in 0..40_u64,
    ) {
        let mut text = SOUND.as_bytes().to_vec();
        for (at, byte) in changes {
            text[at] = byte;
        }
        let _ = parse(&text, 8 + text.len() as u64 + data);
        let _ = parse(&text[..cut], 8 + cut as u64 + data);
    }

    #[test]
    fn mutated_indexes_never_panic(
        changes in prop::collection::vec((0..INDEX.len(), any::<u8>()), 0..3),
        cut in 0..=INDEX.len(),
    ) {
        let mut text = INDEX.as_bytes().to_vec();
        for (at, byte) in changes {
            text[at] = byte;
        }
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("1.safetensors"), file_of(A, 2)).unwrap();
        let path = directory.path().join("model.safetensors.index.json");
        for text in [&text[..], &text[..cut]] {
            fs::write(&path, text).unwrap();
            if let Ok(checkpoint) = Checkpoint::open(&path) {
                assert_eq!(checkpoint.files.len(), 1);
                assert_eq!(checkpoint.len(), 1);
            }
        }
    }

    #[test]
    fn files_of_random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), len in 0..80_u64) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, [&len.to_le_bytes(), &bytes[..]].concat()).unwrap();
        let _ = Checkpoint::open(&path);
        fs::write(&path, bytes).unwrap();
        let _ = Checkpoint::open(&path);
    }
}

#[test]
fn the_sound_header_is_accepted() {
    parse(SOUND.as_bytes(), 8 + SOUND.len() as u64 + 16).unwrap();
}
