//! Random masks of a task, kept as bits from the pass that drew them to the passes that need them
//! again.
//!
//! Drawing is the dearest instruction there is, and a method that rescales draws each mask in the
//! pass that sums and in the combine. A bit an element is a sixteenth of a bf16 input, so where the
//! memory budget has room the bits are kept. Where it has none a mask is drawn again: the bits are
//! the same either way.

use std::sync::OnceLock;

use super::machine::CHUNK;
use super::{Value, stage};
use crate::kernels::{self, BITS, Level, Real};

/// The bits of one chunk.
type Bits = [u32; CHUNK / BITS];

/// Which mask: its stream, and the bound of its draw.
pub(crate) type MaskName = (u32, u64);

/// The masks of one tensor that have been drawn so far.
#[derive(Debug)]
pub(crate) struct KeptMasks {
    names: Vec<MaskName>,
    /// For each mask, for each chunk of the tensor.
    chunks: Vec<Vec<OnceLock<Box<Bits>>>>,
}

/// Bytes that keeping one chunk of a mask takes: the bits, their cell, the allocator's part.
const CHUNK_BYTES: u64 = (size_of::<Bits>() + size_of::<OnceLock<Box<Bits>>>() + 16) as u64;

/// Bytes that the masks of `values` take over a tensor of `elements`; 0 if each is drawn only once.
pub(crate) fn bytes(values: &[Value], elements: u64) -> u64 {
    names(values).len() as u64 * elements.div_ceil(CHUNK as u64) * CHUNK_BYTES
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
        let count = elements.div_ceil(CHUNK as u64) as usize;
        let empty = |_: &MaskName| std::iter::repeat_with(OnceLock::new).take(count).collect();
        Self { chunks: names.iter().map(empty).collect(), names }
    }

    /// Fills `out` with the mask of the elements from `first` on, at most a chunk of them; `draw`
    /// is called where it was not drawn before.
    pub(crate) fn fill<T: Real>(
        &self,
        level: Level,
        name: MaskName,
        first: u64,
        out: &mut [T],
        draw: impl FnOnce(&mut [T]),
    ) {
        let chunk = CHUNK as u64;
        let mask = self.names.iter().position(|&known| known == name);
        let Some(mask) = mask.filter(|_| first.is_multiple_of(chunk)) else { return draw(out) };
        let kept = &self.chunks[mask][(first / chunk) as usize];
        if let Some(bits) = kept.get() {
            return kernels::unpack_mask(level, &bits[..], out);
        }
        draw(out);
        // A shorter range than the chunk, of a sample say, is not the whole chunk's mask.
        if out.len() == CHUNK {
            let mut bits = Box::new([0; CHUNK / BITS]);
            kernels::pack_mask(level, out, &mut bits[..]);
            // Somebody else may have been faster, with the same bits.
            let _ = kept.set(bits);
        }
    }
}
