//! Masks of a task, kept as bits from the pass that found them to the passes that need them again.
//!
//! Drawing is the dearest instruction there is, and ranking is dearer still; a method that rescales
//! needs each mask in the pass that sums and in the combine. A bit an element is a sixteenth of a bf16
//! input, so where the memory budget has room the bits are kept. Where it has none a mask is drawn
//! again, and short rows are ranked again: the bits are the same either way.

use std::array;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::machine::TensorFrame;
use super::{MaskName, Value, stage};
use crate::error::{Error, ErrorKind, Result};
use crate::io::SharedWords;
use crate::kernels::{self, BITS, Level, MaskBits, SPAN};

/// The masks of one tensor that have been drawn so far.
#[derive(Debug)]
pub(crate) struct KeptMasks {
    names: Vec<MaskName>,
    /// Spans that the tensor has.
    spans: usize,
    /// For each mask, for each span: whether it was drawn, and its bits.
    words: SharedWords,
}

/// Elements whose masks are drawn again sooner than memory to keep them is had.
const DRAWN_AGAIN: u64 = 4 * SPAN as u64;
/// Words of one span of a mask.
const SPAN_WORDS: usize = 1 + SPAN / BITS;

/// Bytes that the masks of `values` take over a tensor of `elements`; 0 if each is drawn only once, or
/// none is worth keeping.
pub(crate) fn bytes(values: &[Value], elements: u64) -> u64 {
    if elements <= DRAWN_AGAIN {
        return 0;
    }
    names(values).len() as u64
        * elements.div_ceil(SPAN as u64)
        * (SPAN_WORDS * size_of::<u32>()) as u64
}

/// The masks that more than one pass over the tensor needs: those in what is reduced first.
fn names(values: &[Value]) -> Vec<MaskName> {
    stage::masks_of(&reduced_first(values))
}

/// What passes before the last one compute.
fn reduced_first(values: &[Value]) -> Vec<Value> {
    let waits = stage::unknown(values);
    let reduced = waits.reductions.iter().flat_map(|reduction| stage::operands(reduction));
    let ranked = waits.selections.iter().map(|selection| selection.value.clone());
    reduced.chain(ranked).collect()
}

/// Bytes that the marks of short rows take which more than one pass over the tensor needs.
pub(crate) fn marked_bytes(values: &[Value], frame: &TensorFrame) -> u64 {
    let rankings = stage::unknown(&reduced_first(values)).rankings;
    let short = rankings.iter().filter(|ranking| !frame.stores_marks(ranking.among));
    short.count() as u64 * Marks::bytes(frame.elements)
}

impl KeptMasks {
    /// Room for the masks that `values` need more than once; none if there is no memory for them.
    pub(crate) fn new(values: &[Value], elements: u64) -> Option<Self> {
        let names = names(values);
        let spans = elements.div_ceil(SPAN as u64) as usize;
        let words = SharedWords::new(names.len() * spans * SPAN_WORDS)?;
        Some(Self { names, spans, words })
    }

    /// The mask of the span that begins at element `first`; `draw` is called where it was not drawn
    /// before.
    pub(crate) fn span(
        &self,
        name: MaskName,
        first: u64,
        draw: impl FnOnce() -> MaskBits,
    ) -> MaskBits {
        let mask = self.names.iter().position(|&known| known == name);
        let Some(mask) = mask else { return draw() };
        let span = mask * self.spans + (first / SPAN as u64) as usize;
        let words = &self.words.as_slice()[span * SPAN_WORDS..][..SPAN_WORDS];
        let (is_drawn, kept) = (&words[0], &words[1..]);
        if is_drawn.load(Ordering::Acquire) != 0 {
            return array::from_fn(|word| kept[word].load(Ordering::Relaxed));
        }
        // Others may draw it at the same time: the bits are the same.
        let bits = draw();
        for (word, bits) in kept.iter().zip(bits) {
            word.store(bits, Ordering::Relaxed);
        }
        is_drawn.store(1, Ordering::Release);
        bits
    }
}

/// What is kept of some elements in a row, a bit each, in the spans of the tensor that they touch.
#[derive(Debug)]
pub(crate) struct Marks {
    /// Flat index of the first span's first element.
    first: u64,
    words: SharedWords,
}

/// Words of a span.
const WORDS: usize = SPAN / BITS;
/// Elements of a part of a span from which on they are packed together.
const PACKED: usize = 64;

impl Marks {
    /// Bytes for so many elements, from the tensor's first on.
    pub(crate) fn bytes(elements: u64) -> u64 {
        elements.div_ceil(SPAN as u64) * size_of::<MaskBits>() as u64
    }

    /// None of `elements` is kept yet.
    pub(crate) fn new(elements: &Range<u64>) -> Result<Self> {
        let first = elements.start / SPAN as u64 * SPAN as u64;
        let bytes = Self::bytes(elements.end - first);
        let words = SharedWords::new(bytes as usize / size_of::<u32>()).ok_or_else(|| {
            Error::new(ErrorKind::Memory, "the system has no memory for the marks of a tensor")
                .found(format!("{bytes} bytes"))
        })?;
        Ok(Self { first, words })
    }

    /// Keeps those of the elements from `first` on whose byte is not 0. Others may do so with other
    /// elements at the same time.
    pub(crate) fn keep(&self, level: Level, first: u64, kept: &[u8]) {
        let (mut at, mut rest) = ((first - self.first) as usize, kept);
        while !rest.is_empty() {
            let (own, others) = rest.split_at(rest.len().min(SPAN - at % SPAN));
            if own.len() < PACKED {
                let kept = own.iter().enumerate().filter(|(_, kept)| **kept != 0);
                kept.for_each(|(place, _)| self.set(at + place));
            } else if own.len() == SPAN {
                self.put(at / SPAN, &kernels::pack_mask(level, own), AtomicU32::store);
            } else {
                let mut whole = [0; SPAN];
                whole[at % SPAN..][..own.len()].copy_from_slice(own);
                let bits = kernels::pack_mask(level, &whole);
                self.put(at / SPAN, &bits, |word, bits, order| _ = word.fetch_or(bits, order));
            }
            (at, rest) = (at + own.len(), others);
        }
    }

    /// Keeps one element. In a span the first bits of all words come first.
    fn set(&self, at: usize) {
        let word = &self.words.as_slice()[at / SPAN * WORDS + at % WORDS];
        word.fetch_or(1 << (at % SPAN / WORDS), Ordering::Relaxed);
    }

    fn put(&self, span: usize, bits: &MaskBits, put: impl Fn(&AtomicU32, u32, Ordering)) {
        let words = &self.words.as_slice()[span * WORDS..];
        words.iter().zip(bits).for_each(|(word, &bits)| put(word, bits, Ordering::Relaxed));
    }

    /// Which are kept of the span that begins at element `first`.
    pub(crate) fn bits(&self, first: u64) -> MaskBits {
        let at = (first - self.first) as usize;
        let span = |span: usize| -> MaskBits {
            let words = &self.words.as_slice();
            let word = |at: usize| words.get(at).map_or(0, |word| word.load(Ordering::Relaxed));
            array::from_fn(|index| word(span * WORDS + index))
        };
        match at % SPAN {
            0 => span(at / SPAN),
            skipped => kernels::mask_from([&span(at / SPAN), &span(at / SPAN + 1)], skipped),
        }
    }
}
