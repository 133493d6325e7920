//! Exact order statistics in constant memory, without sorting.
//!
//! The k-th largest of a billion values is found by narrowing an interval of order keys (unsigned
//! integers that order as the values do) until it holds a single key:
//!
//! 1. Start with an interval: all keys, or a guess bracketed from a sample.
//! 2. In one pass over the tensor, count the keys above the interval, and put those inside into
//!    at most 2^14 bins of equal width.
//! 3. The bin that holds rank k becomes the interval. If rank k lies outside (a bad guess), start
//!    again with all keys.
//! 4. A single key is the threshold. If all its elements are kept, done. Else find the flat index
//!    of the last one kept, from the counts of equal elements in each block.
//!
//! With bf16 weights realistic differences have few distinct values, a sample names the threshold
//! itself, and one pass does it. With f32 weights two passes do. The result does not depend on
//! the guess: only the number of passes does.

use super::Chosen;
use crate::kernels::{Counts, Real};

/// Bins a histogram has at the most. A bracket from a sample holds some 2^18 keys of f32 values,
/// so that two passes are enough, and each worker's histogram stays in the cache.
const BINS_LOG2: u32 = 14;
/// Bytes of the histograms of one selection: of a worker, and of the search.
pub(crate) const HISTOGRAM_BYTES: u64 = size_of::<u32>() as u64 * (1 << BINS_LOG2);
pub(crate) const SEARCH_BYTES: u64 = size_of::<u64>() as u64 * (1 << BINS_LOG2);

/// A closed interval of order keys that is being narrowed to the key of rank `rank`.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    /// 1 is the largest value.
    rank: u64,
    elements: u64,
    pub(crate) low: u64,
    pub(crate) high: u64,
    largest_key: u64,
    bins: Vec<u64>,
    above: u64,
    /// Elements inside the interval, for each block of the tensor.
    blocks: Vec<u32>,
}

/// Where the last kept equal element lies: the `nth` equal element (from 1) of block `block`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) block: u64,
    pub(crate) nth: u64,
}

/// What a worker counted over some blocks.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    pub(crate) bins: Vec<u32>,
    pub(crate) above: u64,
    /// Elements inside the interval, with the index of the block they lie in.
    pub(crate) blocks: Vec<(u64, u32)>,
}

/// What a finished pass says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Another pass over the tensor is needed.
    Again,
    /// One block has to be looked at again, to find a flat index.
    Locate(Cut),
    /// Found.
    Done(Chosen),
}

impl Search {
    /// Looks for the `count` largest of `elements` values spread over `blocks` blocks.
    pub(crate) fn new<T: Real>(count: u64, elements: u64, blocks: u64) -> Self {
        debug_assert!((1..=elements).contains(&count), "rank {count} of {elements}");
        let mut search = Self {
            rank: count,
            elements,
            low: 0,
            high: T::NAN.key(),
            largest_key: T::NAN.key(),
            bins: Vec::new(),
            above: 0,
            blocks: vec![0; blocks as usize],
        };
        search.reset();
        search
    }

    /// Brackets the answer from the keys of some elements of the tensor.
    pub(crate) fn guess(&mut self, mut sample: Vec<u64>) {
        if sample.is_empty() {
            return;
        }
        sample.sort_unstable_by(|a, b| b.cmp(a));
        let size = sample.len() as f64;
        let share = self.rank as f64 / self.elements as f64;
        let slack = 5.0 * (share * (1.0 - share) * size).sqrt() + 2.0;
        let at = |place: f64| sample[(place.max(0.0) as usize).min(sample.len() - 1)];
        self.high = at(share * size - slack);
        self.low = at(share * size + slack);
        self.reset();
    }

    fn reset(&mut self) {
        let bins = ((self.high - self.low) >> self.shift()) + 1;
        self.bins = vec![0; bins as usize];
        self.above = 0;
        self.blocks.fill(0);
    }

    /// Bits of the key that a bin does not tell apart.
    pub(crate) fn shift(&self) -> u32 {
        let width = u64::BITS - (self.high - self.low).leading_zeros();
        width.saturating_sub(BINS_LOG2)
    }

    pub(crate) fn bins(&self) -> usize {
        self.bins.len()
    }

    pub(crate) fn add(&mut self, counted: &Histogram) {
        self.above += counted.above;
        for (bin, count) in self.bins.iter_mut().zip(&counted.bins) {
            *bin += u64::from(*count);
        }
        for &(block, count) in &counted.blocks {
            self.blocks[block as usize] += count;
        }
    }

    /// Takes stock after a pass over the whole tensor.
    pub(crate) fn advance(&mut self) -> Progress {
        let inside: u64 = self.bins.iter().sum();
        if self.rank <= self.above || self.rank > self.above + inside {
            (self.low, self.high) = (0, self.largest_key);
            self.reset();
            return Progress::Again;
        }
        let (bin, wanted) = self.bin_of_rank();
        if self.low == self.high {
            return self.cut_equals(wanted);
        }
        let (shift, equals) = (self.shift(), self.bins[bin]);
        self.low += (bin as u64) << shift;
        // The last bin may reach beyond the greatest number: keys of f64 are of 64 bits.
        self.high = self.high.min(self.low.saturating_add((1_u64 << shift) - 1));
        if self.low == self.high && wanted == equals {
            return Progress::Done(Chosen { threshold: self.low, equals_end: u64::MAX });
        }
        self.reset();
        Progress::Again
    }

    /// The bin that holds the rank, and how many of that bin belong to the kept.
    fn bin_of_rank(&self) -> (usize, u64) {
        let mut wanted = self.rank - self.above;
        for (bin, &count) in self.bins.iter().enumerate().rev() {
            if wanted <= count {
                return (bin, wanted);
            }
            wanted -= count;
        }
        unreachable!("the rank was checked to lie inside the interval")
    }

    fn cut_equals(&self, wanted: u64) -> Progress {
        let mut nth = wanted;
        for (block, &count) in self.blocks.iter().enumerate() {
            if nth <= u64::from(count) {
                if wanted == self.bins[0] {
                    break;
                }
                return Progress::Locate(Cut { block: block as u64, nth });
            }
            nth -= u64::from(count);
        }
        Progress::Done(Chosen { threshold: self.low, equals_end: u64::MAX })
    }

    /// The end: `index` is the flat index of the element that [`Progress::Locate`] asked for.
    pub(crate) fn located(&self, index: u64) -> Chosen {
        Chosen { threshold: self.low, equals_end: index + 1 }
    }
}

impl Histogram {
    pub(crate) fn new(bins: usize) -> Self {
        Self { bins: vec![0; bins], ..Self::default() }
    }

    pub(crate) fn count(&mut self, block: u64, counts: Counts) {
        self.above += counts.above;
        if counts.inside > 0 {
            match self.blocks.last_mut() {
                Some((last, count)) if *last == block => *count += counts.inside as u32,
                _ => self.blocks.push((block, counts.inside as u32)),
            }
        }
    }
}

/// The ordinal that an order key stands for: of f64 if `double`, else of f32.
pub(crate) fn ordinal_of_key(key: u64, double: bool) -> i64 {
    if double { key.wrapping_sub(1 << 63).cast_signed() } else { key.cast_signed() - (1 << 31) }
}

/// The value whose order key is `key`, in f64 if `double`, else in f32.
pub(crate) fn value_of_key(key: u64, double: bool) -> f64 {
    let ordinal = ordinal_of_key(key, double);
    let bits = ordinal.unsigned_abs();
    let magnitude =
        if double { f64::from_bits(bits) } else { f64::from(f32::from_bits(bits as u32)) };
    if ordinal < 0 { -magnitude } else { magnitude }
}
