//! A source whose elements do not lie one after the other in its file: a transposed, cut or expanded
//! view, as torch saves them.
//!
//! Elements that are asked for are cut into boxes, in which each index runs over a range of its own.
//! A box is read along the dimension whose elements lie closest together, in runs of a bounded
//! length, and each run is dealt out. So what a worker takes does not depend on the tensor.

use std::ops::Range;
use std::sync::Arc;

use super::source::{Memory, Source};
use crate::dtype::DType;
use crate::error::Result;
use crate::io::AlignedBuffer;
use crate::plan::Strides;

/// Elements of the file that are read at a time.
const RUN: u64 = 16 << 10;

/// A view of `base`, which is the file from the view's first element on.
#[derive(Debug)]
pub(super) struct StridedSource {
    base: Arc<dyn Source>,
    dimensions: Vec<Dimension>,
}

#[derive(Clone, Copy, Debug)]
struct Dimension {
    extent: u64,
    /// Elements of the file from one index to the next.
    stride: u64,
    /// Elements of the view from one index to the next.
    weight: u64,
}

/// Elements that lie in one direction.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// The first of them in the file, and in what is read.
    file: u64,
    view: u64,
    count: u64,
    /// How far they are apart in the file, and in what is read.
    stride: u64,
    weight: u64,
}

impl StridedSource {
    /// The view that `strides` say. It was checked that all of it lies in the file.
    pub(super) fn new(base: Arc<dyn Source>, strides: &Strides) -> Self {
        let mut weight = 1;
        let mut dimensions: Vec<Dimension> = strides
            .0
            .iter()
            .rev()
            .map(|&(extent, stride)| {
                let dimension = Dimension { extent, stride, weight };
                weight *= extent;
                dimension
            })
            .collect();
        dimensions.reverse();
        Self { base, dimensions }
    }

    /// Reads a box into `out`, of which element 0 is element `first` of the view.
    fn read_box(
        &self,
        ranges: &[Range<u64>],
        first: u64,
        out: &mut [u8],
        read: &mut AlignedBuffer,
    ) -> Result<()> {
        let mut loops: Vec<(Dimension, Range<u64>)> =
            self.dimensions.iter().copied().zip(ranges.iter().cloned()).collect();
        // Those that lie closest together come last; what is there again and again comes first.
        loops.sort_by_key(|(dimension, range)| {
            let is_one = range.end - range.start == 1;
            std::cmp::Reverse(if is_one || dimension.stride == 0 {
                u64::MAX
            } else {
                dimension.stride
            })
        });
        let Some((inner, range)) = loops.pop() else {
            let one = Run { file: 0, view: 0, count: 1, stride: 1, weight: 1 };
            return self.read_run(one, out, read);
        };
        let mut at: Vec<u64> = loops.iter().map(|(_, range)| range.start).collect();
        loop {
            let place = |of: fn(&Dimension) -> u64| -> u64 {
                loops.iter().zip(&at).map(|((dimension, _), index)| of(dimension) * index).sum()
            };
            let Dimension { stride, weight, .. } = inner;
            let run = Run {
                file: place(|dimension| dimension.stride) + stride * range.start,
                view: place(|dimension| dimension.weight) + weight * range.start - first,
                count: range.end - range.start,
                stride,
                weight,
            };
            self.read_run(run, out, read)?;
            // The next indices, as an odometer counts.
            let Some(turned) =
                (0..at.len()).rev().find(|&digit| at[digit] + 1 < loops[digit].1.end)
            else {
                return Ok(());
            };
            at[turned] += 1;
            (turned + 1..at.len()).for_each(|digit| at[digit] = loops[digit].1.start);
        }
    }

    /// Reads a run into `out`, a bounded part of the file at a time.
    fn read_run(&self, run: Run, out: &mut [u8], read: &mut AlignedBuffer) -> Result<()> {
        let Run { file, view, count, stride, weight } = run;
        let size = self.base.dtype().size();
        let at_once = RUN.checked_div(stride).unwrap_or(count).max(1);
        for begin in (0..count).step_by(at_once as usize) {
            let count = at_once.min(count - begin);
            let start = file + begin * stride;
            let bytes = self.base.read(start..start + (count - 1) * stride + 1, read)?;
            if (stride, weight) == (1, 1) {
                let to = (view + begin) as usize * size;
                out[to..to + bytes.len()].copy_from_slice(bytes);
                continue;
            }
            for index in 0..count {
                let from = (index * stride) as usize * size;
                let to = (view + (begin + index) * weight) as usize * size;
                out[to..to + size].copy_from_slice(&bytes[from..from + size]);
            }
        }
        Ok(())
    }
}

impl Source for StridedSource {
    fn dtype(&self) -> DType {
        self.base.dtype()
    }

    fn memory(&self) -> Memory {
        let run = RUN as usize * self.dtype().size();
        Memory { reading: AlignedBuffer::resident(run) as u64, ..self.base.memory() }
    }

    fn read<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        let length = (elements.end - elements.start) as usize * self.dtype().size();
        scratch.grow(length)?;
        let out = &mut scratch.as_mut_slice()[..length];
        let extents: Vec<u64> = self.dimensions.iter().map(|each| each.extent).collect();
        let mut read = AlignedBuffer::default();
        for ranges in boxes(&extents, elements.clone()) {
            self.read_box(&ranges, elements.start, out, &mut read)?;
        }
        Ok(&scratch.as_slice()[..length])
    }
}

/// `elements` of a tensor of these extents as boxes: a range of indices for each dimension.
fn boxes(extents: &[u64], elements: Range<u64>) -> Vec<Vec<Range<u64>>> {
    if elements.is_empty() {
        return Vec::new();
    }
    let Some((_, rest)) = extents.split_first() else { return vec![Vec::new()] };
    let row: u64 = rest.iter().product();
    let within = |index: u64, of: Range<u64>| {
        boxes(rest, of).into_iter().map(move |mut each| {
            each.insert(0, index..index + 1);
            each
        })
    };
    let (first, last) = (elements.start / row, (elements.end - 1) / row);
    if first == last {
        return within(first, elements.start - first * row..elements.end - first * row).collect();
    }
    let head = elements.start - first * row;
    let tail = elements.end - last * row;
    let (begin, end) = (first + u64::from(head > 0), last + u64::from(tail == row));
    let mut found = Vec::new();
    if head > 0 {
        found.extend(within(first, head..row));
    }
    if begin < end {
        let whole = rest.iter().map(|&extent| 0..extent);
        found.push(std::iter::once(begin..end).chain(whole).collect());
    }
    if tail < row {
        found.extend(within(last, 0..tail));
    }
    found
}
