//! Random masks that any thread can compute for any range.
//!
//! A sequential generator would tie a mask to the order in which blocks are visited. Philox4x32-10
//! is a function instead: from a key and a counter it gives four random words, with no state. Its
//! inputs here, fixed by [`GENERATOR_VERSION`]:
//!
//! - key: the seed, low word first;
//! - counter, low word first: two words of the counter's index, then two words of the 64-bit FNV-1a
//!   hash of the output tensor's name, a byte 0xFF (which UTF-8 never contains), and the input's
//!   position as four little-endian bytes.
//!
//! A draw has 32 bits and is kept if it is below round(density·2³²). Its high half nearly always
//! decides that, so a counter gives eight high halves, and the low half, from a counter of its own,
//! is only drawn where the high half equals the bound's. That is half the work of four draws a
//! counter. Which element takes which half is chosen so that the loops need no shuffles: of 512
//! elements in a row, counter `c` of 64 has elements `c`, `c + 64`, …
//!
//! The loop is over counters, with the rounds unrolled inside, so that it vectorises across
//! counters. A word is the low half of 64 bits, where a product with a multiplier needs no
//! unpacking; whatever the rounds leave in the high half is ignored.

use super::level::{Kernel, Level};
use super::mask_bits::{BITS, MaskBits, SPAN, mask_from, unpack_mask};
use super::real::Real;

/// Changes when a mask would.
pub const GENERATOR_VERSION: u32 = 2;

const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;
const LOW_HALF: u64 = 0xFFFF_FFFF;

/// Counters that share out a group of elements among them, one for each word of a span's bits.
const COUNTERS: usize = SPAN / BITS;
/// Halves of a counter's words.
const HALVES: usize = 8;
/// Counters of a span.
const SPAN_COUNTERS: usize = SPAN / HALVES;
/// What sets the counters of the low halves apart: no element's index is so great.
const LOW_HALVES: u64 = 1 << 63;

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

    /// The counter of that index.
    pub const fn counter(&self, index: u64) -> [u32; 4] {
        let [low, high] = words(index);
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

/// The first words of some counters in a row, the second, and so on.
type Words = [[u32; SPAN_COUNTERS]; 4];

struct Draw<'a> {
    key: MaskKey,
    /// Index of the first counter.
    first: u64,
    keep_below: u64,
    bits: &'a mut MaskBits,
}

impl Draw<'_> {
    #[inline(always)]
    fn words(&self, first: u64) -> Words {
        let MaskKey { key, stream } = self.key;
        let stream = stream.map(u64::from);
        let mut words = [[0; SPAN_COUNTERS]; 4];
        for at in 0..SPAN_COUNTERS {
            let index = first + at as u64;
            let drawn = philox(key, [index, index >> 32, stream[0], stream[1]]);
            for (words, drawn) in words.iter_mut().zip(drawn) {
                words[at] = drawn;
            }
        }
        words
    }

    /// Sets the bit of each element whose draw is below `bound`. `draw` is given a word, a counter,
    /// and how far the half is to be shifted.
    #[inline(always)]
    fn mark(&mut self, bound: u32, draw: impl Fn(usize, usize, u32) -> u32) {
        *self.bits = [0; COUNTERS];
        for bit in 0..BITS {
            let (group, half) = (bit / HALVES, bit % HALVES);
            let (word, shift) = (half % 4, 16 * (half / 4) as u32);
            for (counter, bits) in self.bits.iter_mut().enumerate() {
                let keeps = draw(word, group * COUNTERS + counter, shift) < bound;
                *bits |= u32::from(keeps) << bit;
            }
        }
    }
}

/// The draws themselves of a span of elements.
struct Draws<'a> {
    of: Draw<'a>,
    out: &'a mut [u32; SPAN],
}

impl Kernel for Draws<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { of, out } = self;
        let (high, low) = (of.words(of.first), of.words(of.first | LOW_HALVES));
        for (at, out) in out.as_chunks_mut::<COUNTERS>().0.iter_mut().enumerate() {
            let (group, place) = (at / HALVES, at % HALVES);
            let (word, shift) = (place % 4, 16 * (place / 4) as u32);
            for (counter, out) in out.iter_mut().enumerate() {
                let at = group * COUNTERS + counter;
                *out = half(high[word][at], shift) << 16 | half(low[word][at], shift);
            }
        }
    }
}

impl Kernel for Draw<'_> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let high = self.words(self.first);
        let bound = (self.keep_below >> 16) as u32;
        self.mark(bound, |word, at, shift| half(high[word][at], shift));
        let ties = |word: u32| half(word, 0) == bound || half(word, 16) == bound;
        let any_tie = high.as_flattened().iter().fold(false, |any, &word| any | ties(word));
        // No low half is below a bound of zero.
        if any_tie && self.keep_below as u16 > 0 {
            let low = self.words(self.first | LOW_HALVES);
            self.mark(self.keep_below as u32, |word, at, shift| {
                half(high[word][at], shift) << 16 | half(low[word][at], shift)
            });
        }
    }
}

#[inline(always)]
fn half(word: u32, shift: u32) -> u32 {
    (word >> shift) & 0xFFFF
}

/// Marks at random what to keep of the [`SPAN`] elements from `first_index` on: those whose draw is
/// below `keep_below`. A density d asks for round(d·2³²); 2³² keeps all. A first index that is a
/// multiple of a span is the fast case.
///
/// # Panics
///
/// If `keep_below` exceeds 2³².
pub fn random_bits(level: Level, key: &MaskKey, first_index: u64, keep_below: u64) -> MaskBits {
    assert!(keep_below <= 1 << 32, "a draw has 32 bits, so {keep_below} is no bound for it");
    let draw = |first_index: u64| {
        let mut bits = [0; COUNTERS];
        let first = first_index / HALVES as u64;
        level.run(Draw { key: *key, first, keep_below, bits: &mut bits });
        bits
    };
    let skipped = (first_index % SPAN as u64) as usize;
    let start = first_index - skipped as u64;
    if skipped == 0 {
        return draw(start);
    }
    mask_from([&draw(start), &draw(start.wrapping_add(SPAN as u64))], skipped)
}

/// The draws of the elements from `first_index` on: 32 bits each.
///
/// # Panics
///
/// If the indices exceed u64.
pub fn draws(level: Level, key: &MaskKey, first_index: u64, out: &mut [u32]) {
    assert!(first_index.checked_add(out.len() as u64).is_some(), "the indices must fit 64 bits");
    let (mut index, mut rest) = (first_index, out);
    while !rest.is_empty() {
        let skipped = (index % SPAN as u64) as usize;
        let (mut span, mut bits) = ([0; SPAN], [0; COUNTERS]);
        let first = (index - skipped as u64) / HALVES as u64;
        let of = Draw { key: *key, first, keep_below: 0, bits: &mut bits };
        level.run(Draws { of, out: &mut span });
        let (own, others) = rest.split_at_mut(rest.len().min(SPAN - skipped));
        own.copy_from_slice(&span[skipped..skipped + own.len()]);
        (index, rest) = (index + own.len() as u64, others);
    }
}

/// The same for any number of elements, as numbers: `out[i]` is 1 if element `first_index + i` is
/// kept, else 0.
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
    assert!(first_index.checked_add(out.len() as u64).is_some(), "the indices must fit 64 bits");
    for (span, out) in out.chunks_mut(SPAN).enumerate() {
        let first = first_index + (span * SPAN) as u64;
        unpack_mask(level, &random_bits(level, key, first, keep_below), out);
    }
}
