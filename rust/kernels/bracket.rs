//! What of a task vector lies above two cuts, and what lies between them, in one go.
//!
//! Where outputs are computed before it is known which elements a selection keeps, three things are
//! asked of each magnitude: whether it is kept for certain, whether it may be kept, and what the
//! search for the cut has to count. Made one by one, each would widen and subtract anew.

use super::convert::{Bf16, F16, F32, Format};
use super::level::{Kernel, Level};
use super::mask_bits::{BITS, MaskBits, SPAN};
use super::order::{Ends, check_task_vector, magnitude};
use super::real::Ordinal;
use crate::dtype::DType;

/// Elements by the same bit of a mask.
const ROW: usize = SPAN / BITS;
/// Elements that are compared together: two AVX-512 registers of f32.
const GROUP: usize = 32;
/// Elements of a group that are looked at one by one if there is something among them to keep.
const PART: usize = 8;
/// Where NaN is among the magnitudes' bits: just above infinity.
const NAN: i32 = 0x7F80_0001;

/// Two cuts of magnitudes, of which the second keeps all that the first does. Keys above that of a cut
/// are kept, and before an element of its own those equal to it.
#[derive(Clone, Copy, Debug)]
pub struct Cuts {
    /// The key of the first.
    pub high: u64,
    /// The key of the second: not above the other.
    pub low: u64,
    /// Before which elements they keep equal ones.
    pub ends: [usize; 2],
}

/// A cut as the loop needs it.
#[derive(Clone, Copy)]
struct Cut {
    key: i32,
    /// What is greater is kept.
    below: i32,
    end: usize,
}

struct Bracket<'a, F: Format, const MIXED: bool> {
    x: &'a [F::Bytes],
    base: &'a [F::Bytes],
    high: Cut,
    low: Cut,
    /// From where offsets of keys are counted.
    origin: i32,
    kept: &'a mut MaskBits,
    between: &'a mut [u8],
    keys: &'a mut Vec<u32>,
}

/// How many elements have the keys of the cuts, for each place in a group.
#[derive(Clone, Copy)]
struct Tallies {
    high: [u32; GROUP],
    low: [u32; GROUP],
}

impl Cut {
    fn new(key: u64, end: usize, count: usize) -> Self {
        // No magnitude has a key below that of zero, or between those of infinity and NaN.
        let key = i32::from_key(key).max(-1);
        if (NAN..i32::MAX).contains(&key) {
            return Self { key: NAN + 1, below: NAN - 1, end };
        }
        let key = key.min(NAN);
        Self { key, below: if end >= count { key - 1 } else { key }, end }
    }

    /// Whether the magnitude of these bits is kept.
    #[inline(always)]
    #[expect(clippy::needless_bitwise_bool, reason = "a short circuit would become a branch")]
    fn keeps<const MIXED: bool>(self, at: usize, bits: i32) -> bool {
        (bits > self.below) | (MIXED & (bits == self.key) & (at < self.end))
    }
}

#[inline(always)]
fn bits<F: Format>(x: F::Bytes, base: F::Bytes) -> i32 {
    (magnitude::<F>(x, base).to_bits() as i32).min(NAN)
}

impl<F: Format, const MIXED: bool> Bracket<'_, F, MIXED> {
    /// Looks at a group of elements, the first of which is `at`. True if one lies between the cuts.
    #[inline(always)]
    #[expect(clippy::needless_bitwise_bool, reason = "a short circuit would become a branch")]
    fn group<const COUNT: usize>(
        &mut self,
        at: usize,
        x: &[F::Bytes; COUNT],
        base: &[F::Bytes; COUNT],
        on: &mut Tallies,
    ) -> bool {
        let (high, low) = (self.high, self.low);
        let (row, flag) = (at % ROW, 1 << (at / ROW));
        // A copy, so that no store to one may change the other.
        let words = &self.kept[row..row + COUNT];
        let mut words: [u32; COUNT] = words.try_into().expect("a slice of that length");
        let mut between = [0_u8; COUNT];
        let mut any = false;
        for place in 0..COUNT {
            let bits = bits::<F>(x[place], base[place]);
            let kept = high.keeps::<MIXED>(at + place, bits);
            let is_between = low.keeps::<MIXED>(at + place, bits) & !kept;
            words[place] = if kept { words[place] | flag } else { words[place] };
            between[place] = u8::from(is_between);
            let (on_high, on_low) = (bits == high.key, bits == low.key);
            on.high[place] += u32::from(on_high);
            on.low[place] += u32::from(on_low);
            any |= is_between & !on_high & !on_low;
        }
        self.kept[row..row + COUNT].copy_from_slice(&words);
        for (all, between) in self.between[at..at + COUNT].iter_mut().zip(between) {
            *all |= between;
        }
        any
    }

    /// Adds the offsets of those that lie between the keys. They are few, so that most parts of a group
    /// have none.
    #[inline(always)]
    #[expect(clippy::needless_bitwise_bool, reason = "a short circuit would become a branch")]
    fn keep(&mut self, x: &[F::Bytes], base: &[F::Bytes]) {
        let (high, low) = (self.high.key.min(NAN), self.low.key);
        let is_between = |bits| (bits > low) & (bits < high);
        for (x, base) in x.chunks(PART).zip(base.chunks(PART)) {
            let (mut found, mut count, mut any) = ([0; PART], 0, false);
            for (&x, &base) in x.iter().zip(base) {
                any |= is_between(bits::<F>(x, base));
            }
            if !any {
                continue;
            }
            for (&x, &base) in x.iter().zip(base) {
                let bits = bits::<F>(x, base);
                found[count % PART] = bits.above(self.origin);
                count += usize::from(is_between(bits));
            }
            self.keys.extend_from_slice(&found[..count]);
        }
    }
}

impl<F: Format, const MIXED: bool> Kernel for Bracket<'_, F, MIXED> {
    type Output = Ends;

    #[inline(always)]
    fn run(mut self) -> Ends {
        let (x, base) = (self.x, self.base);
        let mut on = Tallies { high: [0; GROUP], low: [0; GROUP] };
        let (groups, rest) = x.as_chunks::<GROUP>();
        let (of_groups, of_rest) = base.as_chunks::<GROUP>();
        let mut any = 0_u64;
        for (at, (x, base)) in groups.iter().zip(of_groups).enumerate() {
            any |= u64::from(self.group(at * GROUP, x, base, &mut on)) << at;
        }
        while any != 0 {
            let at = any.trailing_zeros() as usize;
            self.keep(&groups[at], &of_groups[at]);
            any &= any - 1;
        }
        for (at, (&x, &base)) in (groups.len() * GROUP..).zip(rest.iter().zip(of_rest)) {
            if self.group(at, &[x], &[base], &mut on) {
                self.keep(&[x], &[base]);
            }
        }
        let sum = |tallies: [u32; GROUP]| u64::from(tallies.iter().sum::<u32>());
        let high = sum(on.high);
        let low = if self.low.key == self.high.key { 0 } else { sum(on.low) };
        let kept: u32 = self.kept.iter().map(|word| word.count_ones()).sum();
        let equals = if MIXED {
            let end = self.high.end.min(x.len());
            let each = x[..end].iter().zip(base);
            each.filter(|&(&x, &base)| bits::<F>(x, base) == self.high.key).count() as u64
        } else if self.high.below < self.high.key {
            high
        } else {
            0
        };
        Ends { above: u64::from(kept) - equals, high, low }
    }
}

/// Looks where the magnitudes of a stored task vector, x − base, rounded to f32, lie beside two cuts. Up to
/// a span of elements.
///
/// `between[i]` becomes 1 for what only the second cut keeps, and is left as it is elsewhere. The offsets of
/// the keys between those of the cuts are added to `keys`, from the lower one, in order. Gives what the first
/// cut keeps, and how many keys are above those of the cuts and on them.
///
/// # Panics
///
/// If the slices differ in length or have more elements than a span, the type is not BF16, F16 or F32,
/// the first cut has the lesser key, or one is no key.
pub fn bracket(
    level: Level,
    dtype: DType,
    x: &[u8],
    base: &[u8],
    cuts: Cuts,
    between: &mut [u8],
    keys: &mut Vec<u32>,
) -> (MaskBits, Ends) {
    fn go<F: Format>(
        level: Level,
        (x, base): (&[F::Bytes], &[F::Bytes]),
        Cuts { high, low, ends }: Cuts,
        between: &mut [u8],
        keys: &mut Vec<u32>,
    ) -> (MaskBits, Ends) {
        let mut bits = [0; _];
        let (origin, kept) = (i32::from_key(low), &mut bits);
        let [high, low] = [(high, ends[0]), (low, ends[1])];
        let [high, low] = [high, low].map(|(key, end)| Cut::new(key, end, x.len()));
        let found = if ends.iter().all(|&end| end == 0 || end >= x.len()) {
            level.run(Bracket::<F, false> { x, base, high, low, origin, kept, between, keys })
        } else {
            level.run(Bracket::<F, true> { x, base, high, low, origin, kept, between, keys })
        };
        (bits, found)
    }
    let count = check_task_vector(dtype, x, base);
    assert!(count <= SPAN, "a mask has the bits of a span");
    assert_eq!(count, between.len(), "the marks must have as many elements as the input");
    assert!(cuts.low <= cuts.high, "the second cut keeps less than the first");
    assert!(cuts.high <= <i32 as Ordinal>::MAX_KEY, "the cut {} is no key", cuts.high);
    match dtype {
        DType::Bf16 => {
            go::<Bf16>(level, (Bf16::elements(x), Bf16::elements(base)), cuts, between, keys)
        }
        DType::F16 => {
            go::<F16>(level, (F16::elements(x), F16::elements(base)), cuts, between, keys)
        }
        _ => go::<F32>(level, (F32::elements(x), F32::elements(base)), cuts, between, keys),
    }
}
