//! The engine against the oracle: same bytes for any threads, pieces and instruction set.

mod adapted;
mod ahead;
mod arrays;
mod digests;
mod formulas;
mod memory_io;
mod model_wide;
mod programs;
mod rankings;
mod rows;
mod selections;

pub(crate) use memory_io::{ArraySink, ArraySource};

use std::sync::Arc;

use oxmerge::dtype::DType;
use oxmerge::engine::control::Control;
use oxmerge::engine::memory::resident;
use oxmerge::engine::source::{Sink, Source};
use oxmerge::engine::task::{Task, Work};
use oxmerge::engine::{Report, Settings, run};
use oxmerge::error::{ErrorKind, Result};
use oxmerge::formula::Value;
use oxmerge::formula::oracle::Oracle;
use oxmerge::kernels::{Level, Real, narrow};

const SEED: u64 = 17;
const NAME: &str = "model.layers.0.mlp.up_proj.weight";

/// Ways to run that must not change a byte: instruction set, threads, blocks a piece.
pub(crate) fn settings() -> Vec<Settings> {
    let mut all = Vec::new();
    for level in Level::available() {
        for (workers, largest_piece) in [(1, Some(1)), (2, None), (5, Some(2))] {
            all.push(Settings { level, workers, memory: 1 << 30, largest_piece });
        }
    }
    all
}

/// Runs with the least budget that is not refused, within 256 KiB.
pub(crate) fn run_in_least_memory<R>(mut run: impl FnMut(&Settings) -> Result<R>) -> R {
    for spare in (0..).map(|step| step * (256 << 10)) {
        let memory = resident() + spare;
        let level = Level::detect();
        match run(&Settings { level, workers: 3, memory, largest_piece: None }) {
            Err(error) if error.kind() == ErrorKind::Memory => {}
            outcome => return outcome.unwrap(),
        }
    }
    unreachable!("some budget is enough")
}

pub(crate) fn sources(inputs: &[Arc<ArraySource>]) -> Vec<Arc<dyn Source>> {
    inputs.iter().map(|input| Arc::clone(input) as Arc<dyn Source>).collect()
}

/// What the engine makes of `formula`.
pub(crate) fn merged(
    formula: &Value,
    shape: &[u64],
    inputs: &[Arc<ArraySource>],
    dtype: DType,
    settings: &Settings,
) -> Vec<u8> {
    try_merged(formula, shape, inputs, dtype, settings).unwrap().0
}

/// What the engine makes of several formulas in one go.
pub(crate) fn all_merged(
    formulas: &[Value],
    shape: &[u64],
    inputs: &[Arc<ArraySource>],
    dtype: DType,
    settings: &Settings,
) -> Vec<Vec<u8>> {
    run_formulas(formulas, shape, inputs, dtype, settings).unwrap().0
}

/// The same of one, with the report, or why it does not run.
pub(crate) fn try_merged(
    formula: &Value,
    shape: &[u64],
    inputs: &[Arc<ArraySource>],
    dtype: DType,
    settings: &Settings,
) -> Result<(Vec<u8>, Report)> {
    let formulas = std::slice::from_ref(formula);
    let (mut outputs, report) = run_formulas(formulas, shape, inputs, dtype, settings)?;
    Ok((outputs.remove(0), report))
}

fn run_formulas(
    formulas: &[Value],
    shape: &[u64],
    inputs: &[Arc<ArraySource>],
    dtype: DType,
    settings: &Settings,
) -> Result<(Vec<Vec<u8>>, Report)> {
    let elements: u64 = shape.iter().product();
    let sinks: Vec<_> = formulas.iter().map(|_| ArraySink::new(elements as usize, dtype)).collect();
    let task = Task::new(
        NAME,
        SEED,
        shape,
        sources(inputs),
        vec!["a".to_owned(); inputs.len()],
        sinks.iter().map(|sink| Arc::clone(sink) as Arc<dyn Sink>).collect(),
        Work::Formulas(formulas.to_vec()),
    );
    let report = run(vec![task], settings, &Control::default())?;
    Ok((sinks.iter().map(|sink| sink.bytes()).collect(), report))
}

/// What it should be.
pub(crate) fn expected<T: Real>(
    formula: &Value,
    shape: &[u64],
    inputs: &[Arc<ArraySource>],
    dtype: DType,
) -> Vec<u8> {
    let inputs = inputs.iter().map(|input| input.widened::<T>()).collect();
    let values = Oracle::new(NAME, SEED, shape, inputs).evaluate(formula);
    let mut bytes = vec![0; values.len() * dtype.size()];
    narrow(Level::portable(), &values, dtype, &mut bytes);
    bytes
}

/// Checks `formula` under all settings, and in the least memory.
pub(crate) fn check<T: Real>(
    formula: &Value,
    shape: &[u64],
    inputs: &[Arc<ArraySource>],
    dtype: DType,
) {
    let expected = expected::<T>(formula, shape, inputs, dtype);
    for settings in settings() {
        let merged = merged(formula, shape, inputs, dtype, &settings);
        let first = merged.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(first, None, "byte {first:?} differs: {shape:?} {settings:?} {formula:?}");
    }
    let (merged, _) =
        run_in_least_memory(|settings| try_merged(formula, shape, inputs, dtype, settings));
    assert!(merged == expected, "bytes differ in the least memory: {shape:?} {formula:?}");
}

/// Numbers like weights: mostly small, with zeros of both signs, repeats and a few large ones.
pub(crate) fn weights(elements: u64, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..elements)
        .map(|_| match next() % 16 {
            0 => 0.0,
            1 => -0.0,
            2 => 0.0625,
            3 => (next() % 1000) as f64 - 500.0,
            _ => ((next() % 4096) as f64 - 2048.0) / 65_536.0,
        })
        .collect()
}

/// `count` such tensors.
pub(crate) fn inputs(count: u64, elements: u64, dtype: DType) -> Vec<Arc<ArraySource>> {
    (1..=count).map(|seed| ArraySource::new::<f64>(&weights(elements, seed), dtype)).collect()
}
