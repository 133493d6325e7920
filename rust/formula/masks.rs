//! Random masks of a task, kept as bits from the pass that drew them to the passes that need them
//! again.
//!
//! Drawing is the dearest instruction there is, and a method that rescales draws each mask in the
//! pass that sums and in the combine. A bit an element is a sixteenth of a bf16 input, so where the
//! memory budget has room the bits are kept. Where it has none a mask is drawn again: the bits are
//! the same either way.

use std::array;
use std::sync::atomic::Ordering;

use super::{MaskName, Value, stage};
use crate::io::SharedWords;
use crate::kernels::{BITS, MaskBits, SPAN};

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
    let waits = stage::unknown(values);
    let reduced = waits.reductions.iter().flat_map(|reduction| stage::operands(reduction));
    let ranked = waits.selections.iter().map(|selection| selection.value.clone());
    stage::masks_of(&reduced.chain(ranked).collect::<Vec<_>>())
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
