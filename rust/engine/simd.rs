//! The backend of every CPU: runs code chunk by chunk in [`Machine`]s, fused kernels where there are.

use std::ops::Range;

use super::backend::{
    Arithmetic, Backend, Layout, Output, Program, Step, Tally, fold, max, start_of, steps,
};
use super::fused;
use super::passes::SearchView;
use crate::dtype::DType;
use crate::error::Result;
use crate::formula::ReductionKind;
use crate::formula::code::Code;
use crate::formula::machine::{CHUNK, Machine, TensorFrame};
use crate::formula::masks::KeptMasks;
use crate::formula::selection::{Counted, Interval, Look};
use crate::kernels::{self, BLOCK, Counts, Ends, LANES, Lanes, Level, Real};

/// The kernels of one instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Simd(pub(crate) Level);

impl Backend for Simd {
    fn worker(&self) -> Result<Box<dyn Arithmetic + '_>> {
        Ok(Box::new(*self))
    }
}

impl Arithmetic for Simd {
    fn program<'a>(
        &self,
        frame: &'a TensorFrame,
        code: &'a Code,
        double: bool,
        masks: Option<&'a KeptMasks>,
    ) -> Result<Box<dyn Program + 'a>> {
        Ok(if double {
            Box::new(Machine::<f64>::new(self.0, frame, code, masks))
        } else {
            Box::new(Machine::<f32>::new(self.0, frame, code, masks))
        })
    }
}

impl<T: Real> Program for Machine<'_, T> {
    fn reduce(
        &mut self,
        step: &Step<'_>,
        segment: u64,
        layout: &Layout,
        searches: &[SearchView],
        tally: &mut Tally,
    ) -> Result<()> {
        let level = self.level();
        let pair = fused::pair::<T>(step, layout).filter(|_| searches.is_empty());
        let thinned = fused::thinned::<T>(step, layout).filter(|_| searches.is_empty());
        for segment in steps(step.elements.clone(), segment) {
            let mut lanes: Vec<Lanes> =
                layout.kinds.iter().map(|&(kind, ..)| [start_of(kind); LANES]).collect();
            if let Some(pair) = pair {
                lanes = fused::products(level, step.inputs, pair, &segment);
            } else if let Some(thinned) = &thinned {
                lanes = fused::norms(self, step.inputs, thinned, &segment);
            } else {
                let block = segment.start / BLOCK as u64;
                for chunk in chunks(segment) {
                    self.run(&chunk, step.inputs);
                    accumulate(level, self, layout, &mut lanes);
                    for (at, (view, counted)) in searches.iter().zip(&mut tally.counts).enumerate()
                    {
                        let values = self.chunk(layout.operands + at);
                        count(level, &view.interval, &values, block, counted);
                    }
                }
            }
            for (sums, (lanes, &(kind, ..))) in
                tally.sums.iter_mut().zip(lanes.iter().zip(&layout.kinds))
            {
                sums.push(fold(kind, &mut lanes.to_vec()));
            }
        }
        Ok(())
    }

    fn columns(
        &mut self,
        step: &Step<'_>,
        first: u64,
        layout: &Layout,
        sums: &mut [Vec<f64>],
    ) -> Result<()> {
        for chunk in chunks(step.elements.clone()) {
            self.run(&chunk, step.inputs);
            add_to_columns(self, layout, first + chunk.start - step.elements.start, sums);
        }
        Ok(())
    }

    fn combine(&mut self, step: &Step<'_>, outputs: &mut [Output<'_>]) -> Result<()> {
        let level = self.level();
        if fused::run(self, step, outputs) {
            return Ok(());
        }
        for chunk in chunks(step.elements.clone()) {
            self.run(&chunk, step.inputs);
            for Output { result, dtype, bytes } in &mut *outputs {
                let at = |element: u64| (element - step.elements.start) as usize * dtype.size();
                let out = &mut bytes[at(chunk.start)..at(chunk.end)];
                if *dtype == DType::Bool {
                    kernels::narrow_to_bool(level, &self.chunk(*result), out);
                } else {
                    kernels::narrow(level, &self.chunk(*result), *dtype, out);
                }
            }
        }
        Ok(())
    }

    fn keys(&mut self, step: &Step<'_>) -> Result<Vec<Vec<u64>>> {
        let mut keys = vec![Vec::new(); self.results()];
        for chunk in chunks(step.elements.clone()) {
            self.run(&chunk, step.inputs);
            for (index, keys) in keys.iter_mut().enumerate() {
                keys.extend(self.chunk(index).iter().map(|value| value.key()));
            }
        }
        Ok(keys)
    }
}

fn accumulate<T: Real>(
    level: Level,
    machine: &Machine<'_, T>,
    layout: &Layout,
    lanes: &mut [Lanes],
) {
    for (&(kind, left, right), lanes) in layout.kinds.iter().zip(lanes) {
        let a = machine.chunk(left);
        match kind {
            ReductionKind::Sum => kernels::sum_into(level, &a, lanes),
            ReductionKind::AbsoluteSum => kernels::absolute_sum_into(level, &a, lanes),
            ReductionKind::Max => kernels::max_into(level, &a, lanes),
            ReductionKind::Dot => {
                let b = machine.chunk(right.unwrap_or(left));
                kernels::dot_into(level, &a, &b, lanes);
            }
        }
    }
}

fn add_to_columns<T: Real>(
    machine: &Machine<'_, T>,
    layout: &Layout,
    first: u64,
    sums: &mut [Vec<f64>],
) {
    for (&(kind, left, right), sums) in layout.kinds.iter().zip(sums) {
        let (a, b) = (machine.chunk(left), machine.chunk(right.unwrap_or(left)));
        for (offset, (a, b)) in a.iter().zip(b.iter()).enumerate() {
            let line = sums.len();
            let sum = &mut sums[(first as usize + offset) % line];
            *sum = match kind {
                ReductionKind::Sum => *sum + a.to_f64(),
                ReductionKind::AbsoluteSum => *sum + a.to_f64().abs(),
                ReductionKind::Dot => *sum + a.to_f64() * b.to_f64(),
                ReductionKind::Max => max(*sum, a.to_f64()),
            };
        }
    }
}

fn count<T: Real>(
    level: Level,
    &Interval { low, high, shift, look }: &Interval,
    values: &[T],
    block: u64,
    counted: &mut Counted,
) {
    match look {
        Look::Bins(_) => {
            let bins = &mut counted.bins;
            counted.above += kernels::histogram(level, values, low, high, shift, bins).above;
        }
        Look::Keys if low == high => counted.count(block, |_| {
            let Counts { above, inside } = kernels::count(level, values, low, high);
            Ends { above, high: inside, low: 0 }
        }),
        Look::Keys => counted
            .count(block, |between| kernels::collect(level, values, low, high, shift, between)),
    }
}

fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    steps(range, CHUNK as u64)
}
