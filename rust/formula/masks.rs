//! Random masks of a task, kept as bits from the pass that drew them to the passes that need them
//! again.
//!
//! Drawing is the dearest instruction there is, and a method that rescales draws each mask in the
//! pass that sums and in the combine. A bit an element is a sixteenth of a bf16 input, so where the
//! memory budget has room the bits are kept. Where it has none a mask is drawn again: the bits are
//! the same either way.

use std::sync::OnceLock;

use super::{Value, stage};
use crate::kernels::{MaskBits, SPAN};

/// Which mask: its stream, and the bound of its draw.
pub(crate) type MaskName = (u32, u64);

/// The masks of one tensor that have been drawn so far.
#[derive(Debug)]
pub(crate) struct KeptMasks {
    names: Vec<MaskName>,
    /// For each mask, for each span of the tensor.
    spans: Vec<Box<[OnceLock<MaskBits>]>>,
}

/// Bytes that keeping one span of a mask takes.
const SPAN_BYTES: u64 = size_of::<OnceLock<MaskBits>>() as u64;

/// Bytes that the masks of `values` take over a tensor of `elements`; 0 if each is drawn only once.
pub(crate) fn bytes(values: &[Value], elements: u64) -> u64 {
    names(values).len() as u64 * elements.div_ceil(SPAN as u64) * SPAN_BYTES
}

/// The masks that more than one pass over the tensor needs: those in what is reduced first.
fn names(values: &[Value]) -> Vec<MaskName> {
    let waits = stage::unknown(values);
    let reduced = waits.reductions.iter().flat_map(|reduction| stage::operands(reduction));
    let ranked = waits.selections.iter().map(|selection| selection.value.clone());
    stage::masks_of(&reduced.chain(ranked).collect::<Vec<_>>())
}

impl KeptMasks {
    /// Room for the masks that `values` need more than once.
    pub(crate) fn new(values: &[Value], elements: u64) -> Self {
        let names = names(values);
        let count = elements.div_ceil(SPAN as u64) as usize;
        let empty = |_: &MaskName| std::iter::repeat_with(OnceLock::new).take(count).collect();
        Self { spans: names.iter().map(empty).collect(), names }
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
        *self.spans[mask][(first / SPAN as u64) as usize].get_or_init(draw)
    }
}
