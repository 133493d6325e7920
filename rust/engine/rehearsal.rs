//! How fast a backend computes: the largest tensor of a plan, from memory to nowhere.

use std::ops::Range;
use std::sync::Arc;

use super::backend::Backend;
use super::control::Control;
use super::files;
use super::source::{Nowhere, Source};
use super::task::Task;
use super::{Settings, run_on};
use crate::dtype::DType;
use crate::error::Result;
use crate::io::AlignedBuffer;
use crate::kernels::{BLOCK, Level, narrow};
use crate::plan::{self, Plan, Tensor};

/// Elements that are computed at the most; rows stay whole.
const MOST_ELEMENTS: u64 = 8 << 20;

/// A block of numbers like weights, over and over.
#[derive(Debug)]
struct Pattern {
    dtype: DType,
    bytes: Vec<u8>,
}

impl Pattern {
    fn new(dtype: DType, seed: u64) -> Self {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
            // The upper bits are the random ones; a sum of two looks a little like a bell.
            let halves = [(state >> 48) as u16, (state >> 32) as u16];
            halves.iter().map(|&half| f64::from(half.cast_signed()) / 3e6).sum()
        };
        let values: Vec<f64> = (0..BLOCK).map(|_| next()).collect();
        let mut bytes = vec![0; BLOCK * dtype.size()];
        narrow(Level::portable(), &values, dtype, &mut bytes);
        Self { dtype, bytes }
    }
}

impl Source for Pattern {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        let length = (elements.end - elements.start) as usize * self.dtype.size();
        scratch.grow(length)?;
        let out = &mut scratch.as_mut_slice()[..length];
        let mut place = elements.start as usize % BLOCK * self.dtype.size();
        let mut done = 0;
        while done < length {
            let part = (length - done).min(self.bytes.len() - place);
            out[done..done + part].copy_from_slice(&self.bytes[place..place + part]);
            (done, place) = (done + part, 0);
        }
        Ok(out)
    }
}

/// Bytes of inputs and output a second. Runs twice: a device is slow the first time.
pub(crate) fn rate(
    backend: &dyn Backend,
    plan: &Plan,
    level: Level,
    workers: usize,
    control: &Control,
) -> Result<f64> {
    let floats = plan.tensors().filter(|tensor| tensor.dtype().is_float());
    let Some(tensor) = floats.max_by_key(|tensor| tensor.elements()) else {
        return Ok(f64::INFINITY);
    };
    let settings = Settings { level, workers, memory: u64::MAX / 2, largest_piece: None };
    run_on(backend, &vec![task(plan, tensor)?], &settings, control)?;
    let task = task(plan, tensor)?;
    let widths = task.sources.iter().map(|source| source.dtype().size());
    let width = widths.sum::<usize>() + tensor.dtype().size();
    let bytes = task.frame.elements as f64 * width as f64;
    let report = run_on(backend, &vec![task], &settings, control)?;
    Ok(bytes / report.seconds)
}

fn task(plan: &Plan, tensor: Tensor<'_>) -> Result<Task> {
    let source = |(seed, source): (u64, plan::Source<'_>)| -> Arc<dyn Source> {
        Arc::new(Pattern::new(source.dtype, seed))
    };
    Ok(Task::new(
        tensor.name(),
        plan.seed,
        &shrunk(tensor.shape()),
        (1..).zip(tensor.sources()).map(source).collect(),
        tensor.sources().map(|source| plan.models[source.model].clone()).collect(),
        vec![Arc::new(Nowhere(tensor.dtype()))],
        files::work(plan, tensor)?,
    )
    .in_f64(plan.in_f64))
}

/// The shape with as many rows as there may be elements of.
fn shrunk(shape: &[u64]) -> Vec<u64> {
    let row = shape.last().copied().unwrap_or(1).clamp(1, MOST_ELEMENTS);
    let rows = shape.iter().product::<u64>() / row;
    vec![rows.clamp(1, MOST_ELEMENTS / row), row]
}
