//! Arcee fusion on the golden models.

use std::path::{Path, PathBuf};

use oxmerge::checkpoint::Checkpoint;
use oxmerge::dtype::DType;
use oxmerge::formula::Value;
use oxmerge::formula::oracle::Oracle;
use oxmerge::kernels::{Level, widen};

use super::arcee_fusion;
use crate::engine::{ArraySource, merged, settings};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn load(checkpoint: &Checkpoint, name: &str) -> (Vec<u64>, Vec<f32>) {
    let tensor = checkpoint.get(name).unwrap();
    let file = std::fs::read(&checkpoint.files[tensor.file].path).unwrap();
    let start = tensor.start as usize;
    let mut values = vec![0.0; tensor.elements() as usize];
    let bytes = &file[start..start + tensor.bytes() as usize];
    widen(Level::portable(), tensor.dtype, bytes, &mut values);
    (tensor.shape.to_vec(), values)
}

#[test]
fn arcee_fusion_agrees_with_mergekit() {
    let a = Checkpoint::open(golden().join("models/a")).unwrap();
    let b = Checkpoint::open(golden().join("models/b")).unwrap();
    let theirs =
        Checkpoint::open(golden().join("cases/arcee_fusion/expected.safetensors")).unwrap();
    for tensor in theirs.tensors() {
        let (shape, expected) = load(&theirs, tensor.name);
        let inputs = [load(&a, tensor.name).1, load(&b, tensor.name).1];
        let sources = inputs.clone().map(|values| ArraySource::new(&values, DType::F32));
        let (x, y) = (Value::input(0), Value::input(1));
        let formula = arcee_fusion::formula(&x, &y, tensor.elements());
        let bytes = merged(&formula, &shape, &sources, DType::F32, &settings()[0]);
        let ours: &[f32] = bytemuck::cast_slice(&bytes);
        let oracle = Oracle::new(tensor.name, 0, &shape, inputs.to_vec()).evaluate(&formula);
        assert_eq!(ours, oracle, "{}", tensor.name);
        let differing = ours.iter().zip(&expected).filter(|(a, b)| (*a - *b).abs() > 1e-6).count();
        // Elements whose importance rounds to the other side of the threshold.
        assert!(
            differing <= 1 + ours.len() / 500,
            "{}: {differing} of {}",
            tensor.name,
            ours.len()
        );
    }
}
