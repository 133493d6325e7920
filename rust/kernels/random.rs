//! Random masks that any thread can compute for any range.
//!
//! A sequential generator would tie a mask to the order in which blocks are visited. Philox4x32-10
//! is a function instead: from a key and a counter it gives four random words, with no state. Its
//! inputs here, fixed by [`GENERATOR_VERSION`]:
//!
//! - key: the seed, low word first;
//! - counter, low word first: two words of element index ÷ 4, then two words of the 64-bit FNV-1a
//!   hash of the output tensor's name, a byte 0xFF (which UTF-8 never contains), and the input's
//!   position as four little-endian bytes.
//!
//! Element i takes word i mod 4 of its counter, and is kept if that word is below
//! round(density·2³²).
//!
//! The loop is over counters, with the rounds unrolled inside, so that it vectorises across
//! counters. A word is the low half of 64 bits, where a product with a multiplier needs no
//! unpacking; whatever the rounds leave in the high half is ignored.

use super::level::{Kernel, Level};
use super::real::Real;

/// Changes when a mask would.
pub const GENERATOR_VERSION: u32 = 1;

const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;
const LOW_HALF: u64 = 0xFFFF_FFFF;

/// Which mask: of one tensor and one input, under one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskKey {
    key: [u32; 2],
    stream: [u32; 2],
}

impl MaskKey {
    /// The mask of the output tensor of that name and the input at that position.
    pub fn new(seed: u64, tensor_name: &str, position: u32) -> Self {
        let bytes = tensor_name.bytes().chain([0xFF]).chain(position.to_le_bytes());
        Self { key: words(seed), stream: words(fnv1a(bytes)) }
    }

    /// The key of the generator.
    pub const fn key(&self) -> [u32; 2] {
        self.key
    }

    /// The counter of the generator that element `index` draws from.
    pub const fn counter(&self, index: u64) -> [u32; 4] {
        let [low, high] = words(index / 4);
        [low, high, self.stream[0], self.stream[1]]
    }
}

const fn words(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// Philox4x32 with ten rounds, on words in low halves.
#[inline(always)]
fn philox(mut key: [u32; 2], counter: [u64; 4]) -> [u32; 4] {
    let mut words = counter;
    for _ in 0..ROUNDS {
        let first = MULTIPLIERS[0] * (words[0] & LOW_HALF);
        let second = MULTIPLIERS[1] * (words[2] & LOW_HALF);
        words = [
            (second >> 32) ^ words[1] ^ u64::from(key[0]),
            second,
            (first >> 32) ^ words[3] ^ u64::from(key[1]),
            first,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    words.map(|word| word as u32)
}

/// The four words of one counter: the generator itself.
pub fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    philox(key, counter.map(u64::from))
}

struct Mask<'a, T> {
    key: MaskKey,
    /// Of the first element, which takes a counter's first word.
    first_index: u64,
    /// The greatest word that keeps.
    greatest: u32,
    out: &'a mut [[T; 4]],
}

impl<T: Real> Kernel for Mask<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let MaskKey { key, stream } = self.key;
        let stream = stream.map(u64::from);
        for (index, out) in (self.first_index / 4..).zip(self.out) {
            let words = philox(key, [index, index >> 32, stream[0], stream[1]]);
            *out = words.map(|word| T::truth(word <= self.greatest));
        }
    }
}

/// Marks at random what to keep: `out[i]` is 1 if the draw of element `first_index + i` is below
/// `keep_below`, else 0. A density d asks for round(d·2³²); 2³² keeps all.
///
/// # Panics
///
/// If `keep_below` exceeds 2³², or the indices exceed u64.
pub fn random_mask<T: Real>(
    level: Level,
    key: &MaskKey,
    first_index: u64,
    keep_below: u64,
    out: &mut [T],
) {
    assert!(keep_below <= 1 << 32, "a draw has 32 bits, so {keep_below} is no bound for it");
    let Some(greatest) = keep_below.checked_sub(1) else { return out.fill(T::ZERO) };
    assert!(first_index.checked_add(out.len() as u64).is_some(), "the indices must fit 64 bits");
    let draw = |index: u64| philox4x32(key.key, key.counter(index))[(index % 4) as usize];
    let keeps = |index: u64| T::truth(u64::from(draw(index)) <= greatest);
    // Elements before the first whole counter, and after the last.
    let before = (first_index.next_multiple_of(4) - first_index).min(out.len() as u64);
    let (head, rest) = out.split_at_mut(before as usize);
    let (whole, tail) = rest.as_chunks_mut();
    let first_index_whole = first_index + before;
    let first_index_tail = first_index_whole + 4 * whole.len() as u64;
    for (index, value) in (first_index..).zip(head) {
        *value = keeps(index);
    }
    for (index, value) in (first_index_tail..).zip(tail) {
        *value = keeps(index);
    }
    let greatest = greatest as u32;
    level.run(Mask { key: *key, first_index: first_index_whole, greatest, out: whole });
}
