//! Layouts of the output, read back by our own reader.

use std::cmp::Reverse;
use std::fs;

use oxmerge::checkpoint::{Checkpoint, Layout, header, index_json, lay_out};
use oxmerge::dtype::DType;
use oxmerge::error::ErrorKind;
use proptest::prelude::*;

type Tensor = (String, DType, Vec<u64>);

fn tensor(name: &str, dtype: DType, elements: u64) -> Tensor {
    (name.to_owned(), dtype, vec![elements])
}

/// The header of a shard: its tensors by place, of those at one place the empty ones first.
fn header_of(tensors: &[Tensor], layout: &Layout, shard: usize) -> String {
    let mut there: Vec<_> =
        tensors.iter().zip(&layout.places).filter(|(_, place)| place.0 == shard).collect();
    there.sort_by_key(|(tensor, place)| (place.1, bytes(tensor), Reverse(tensor.1.size())));
    header(there.into_iter().map(|(tensor, _)| (&*tensor.0, tensor.1, &*tensor.2))).unwrap()
}

fn bytes(tensor: &Tensor) -> u64 {
    tensor.2.iter().product::<u64>() * tensor.1.size() as u64
}

#[test]
fn one_shard_to_the_letter() {
    let tensors = [
        tensor("half", DType::Bf16, 3),
        ("scalar".to_owned(), DType::F32, vec![]),
        tensor("quo\"te", DType::Bf16, 1),
        ("big".to_owned(), DType::F64, vec![2, 1]),
    ];
    let layout = lay_out(&tensors, 0, "model").unwrap();
    let text = header_of(&tensors, &layout, 0);
    let Layout { shards, places } = layout;
    assert_eq!(shards.len(), 1);
    assert_eq!(shards[0].file_name, "model.safetensors");
    assert_eq!(
        text.trim_end(),
        concat!(
            r#"{"__metadata__":{"format":"pt"},"#,
            r#""big":{"dtype":"F64","shape":[2,1],"data_offsets":[0,16]},"#,
            r#""scalar":{"dtype":"F32","shape":[],"data_offsets":[16,20]},"#,
            r#""half":{"dtype":"BF16","shape":[3],"data_offsets":[20,26]},"#,
            r#""quo\"te":{"dtype":"BF16","shape":[1],"data_offsets":[26,28]}}"#
        )
    );
    assert_eq!((text.len(), shards[0].header_bytes), (4096 - 8, 4096));
    assert_eq!(shards[0].size, 4096 + 28);
    assert_eq!(places, [(0, 4116), (0, 4112), (0, 4122), (0, 4096)]);
}

/// Sizes in bytes, the shard size, and which tensors share a shard.
#[test]
fn shards_are_filled_in_order() {
    let rows: [(&[u64], u64, &[usize]); 7] = [
        (&[5, 5, 5], 10, &[0, 0, 1]),
        (&[5, 5, 5], 9, &[0, 1, 2]),
        (&[5, 50, 5, 5], 10, &[0, 1, 2, 2]),
        (&[50, 5], 10, &[0, 1]),
        (&[0, 50, 0, 0], 10, &[0, 1, 2, 2]),
        (&[10, 0, 0], 10, &[0, 0, 0]),
        (&[5, 5, 5], 0, &[0, 0, 0]),
    ];
    for (sizes, shard_size, expected) in rows {
        let tensors: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(at, &size)| tensor(&at.to_string(), DType::U8, size))
            .collect();
        let layout = lay_out(&tensors, shard_size, "m").unwrap();
        let shards: Vec<_> = layout.places.iter().map(|place| place.0).collect();
        assert_eq!(shards, expected, "{sizes:?}");
    }
}

#[test]
fn shard_names_are_numbered() {
    let tensors = [tensor("a", DType::U8, 1), tensor("b", DType::U8, 1)];
    let layout = lay_out(&tensors, 1, "model").unwrap();
    let names: Vec<_> = layout.shards.iter().map(|shard| shard.file_name.as_str()).collect();
    assert_eq!(names, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
}

#[test]
fn no_tensors_make_one_empty_shard() {
    let layout = lay_out::<String, Vec<u64>>(&[], 10, "model").unwrap();
    assert_eq!(layout.shards[0].file_name, "model.safetensors");
    assert_eq!(layout.shards[0].size, 4096);
}

#[test]
fn what_cannot_be_laid_out() {
    let huge = |name: &str| tensor(name, DType::U8, 1 << 63);
    let long = (0..3).map(|at| tensor(&at.to_string().repeat(50_000_000), DType::U8, 0)).collect();
    let rows: [(Vec<Tensor>, ErrorKind, &str); 5] = [
        (
            vec![tensor("a", DType::U8, 1), tensor("a", DType::U8, 1)],
            ErrorKind::Plan,
            "the output cannot have this tensor name, or not twice",
        ),
        (
            vec![tensor("__metadata__", DType::U8, 1)],
            ErrorKind::Plan,
            "the output cannot have this tensor name, or not twice",
        ),
        (
            vec![tensor("a", DType::F64, 1 << 62)],
            ErrorKind::Checkpoint,
            "the tensor's size overflows",
        ),
        (vec![huge("a"), huge("b")], ErrorKind::Plan, "the output's size overflows"),
        (long, ErrorKind::Plan, "a shard's header is longer than the format allows"),
    ];
    for (tensors, kind, message) in rows {
        let error = lay_out(&tensors, 0, "model").unwrap_err();
        assert_eq!((error.kind(), error.message()), (kind, message));
    }
}

#[test]
fn the_index_to_the_letter() {
    let rows = [("b", "m-2", 3), ("a.\"x\"", "m-1", 4)];
    assert_eq!(
        index_json(rows),
        concat!(
            "{\n  \"metadata\": {\n    \"total_size\": 7\n  },\n",
            "  \"weight_map\": {\n    \"a.\\\"x\\\"\": \"m-1\",\n    \"b\": \"m-2\"\n  }\n}\n"
        )
    );
}

fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let tensor = (prop::sample::select(DType::ALL.to_vec()), prop::collection::vec(0..5_u64, 0..4));
    prop::collection::btree_map("[a-z\"\\\\é.]{0,60}", tensor, 0..30).prop_map(|map| {
        map.into_iter().map(|(name, (dtype, shape))| (name, dtype, shape)).collect::<Vec<_>>()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Every layout, written as files of zeros, is a checkpoint of the same tensors in the places
    /// that were promised, none misaligned.
    #[test]
    fn layouts_read_back(tensors in tensors(), shard_size in 0..400_u64) {
        let layout = lay_out(&tensors, shard_size, "model").unwrap();
        let directory = tempfile::tempdir().unwrap();
        for (number, shard) in layout.shards.iter().enumerate() {
            let text = header_of(&tensors, &layout, number);
            prop_assert_eq!(8 + text.len() as u64, shard.header_bytes);
            let data = (shard.size - shard.header_bytes) as usize;
            let file = crate::written::file_of(&text, data);
            fs::write(directory.path().join(&shard.file_name), file).unwrap();
        }
        if layout.shards.len() > 1 {
            let rows = tensors.iter().zip(&layout.places).map(|(tensor, place)| {
                (tensor.0.as_str(), layout.shards[place.0].file_name.as_str(), bytes(tensor))
            });
            fs::write(directory.path().join("model.safetensors.index.json"), index_json(rows)).unwrap();
        }
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        prop_assert!(checkpoint.warnings.is_empty());
        prop_assert_eq!(checkpoint.len(), tensors.len());
        for (tensor, &(shard, start)) in tensors.iter().zip(&layout.places) {
            let read = checkpoint.get(&tensor.0).unwrap();
            prop_assert_eq!((read.dtype, read.shape, read.file, read.start), (tensor.1, &*tensor.2, shard, start));
            prop_assert_eq!(start % tensor.1.size() as u64, 0);
            prop_assert!(layout.shards[shard].header_bytes.is_multiple_of(4096));
        }
    }
}
