//! Masks as bits, to keep them in little memory.
//!
//! The bits lie so that packing needs no operation across lanes: of `n` words, word `w` has element
//! `w + n·b` as its bit `b`. So one step of either loop is `n` elements by the same bit.

use super::level::{Kernel, Level};
use super::real::Real;

/// Elements that a word holds.
pub const BITS: usize = u32::BITS as usize;

struct Pack<'a, T> {
    mask: &'a [T],
    words: &'a mut [u32],
}

impl<T: Real> Kernel for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.words.fill(0);
        for (bit, mask) in self.mask.chunks(self.words.len().max(1)).enumerate() {
            for (word, &value) in self.words.iter_mut().zip(mask) {
                *word |= if value == T::ZERO { 0 } else { 1 << bit };
            }
        }
    }
}

struct Unpack<'a, T> {
    words: &'a [u32],
    mask: &'a mut [T],
}

impl<T: Real> Kernel for Unpack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (bit, mask) in self.mask.chunks_mut(self.words.len().max(1)).enumerate() {
            for (value, &word) in mask.iter_mut().zip(self.words) {
                *value = T::truth(word & (1 << bit) != 0);
            }
        }
    }
}

/// Packs a mask of ones and zeros: what is not zero gives a 1.
///
/// # Panics
///
/// If the words have no room for the mask.
pub fn pack_mask<T: Real>(level: Level, mask: &[T], words: &mut [u32]) {
    assert!(mask.len() <= BITS * words.len(), "the words must have room for the mask");
    level.run(Pack { mask, words });
}

/// The first elements of a mask that [`pack_mask`] packed into `words`, as ones and zeros.
///
/// # Panics
///
/// If the words hold fewer elements.
pub fn unpack_mask<T: Real>(level: Level, words: &[u32], mask: &mut [T]) {
    assert!(mask.len() <= BITS * words.len(), "the words must hold the mask");
    level.run(Unpack { words, mask });
}
