//! Ranks within vectors, and what is kept for them.
//!
//! Each vector is sorted once: by order key from the largest down, equal keys by index. Key and index
//! are the halves of one integer, so that the sort moves and compares nothing else. An element's place
//! in the order says whether it is among the largest, or what its draw must be below.
//!
//! A vector that is too long to be sorted at once is gone through again and again ([`Descent`]): each
//! time the largest elements that are left are taken, so many as can be held.
//!
//! Where keys are of 32 bits and the vector is not short, it is sorted digit by digit: a third of the
//! time of a sort that compares.

/// Elements from which on a vector is sorted digit by digit.
const SORTED_BY_DIGITS: usize = 512;
/// Bits of a digit, and where the digits of the upper half begin.
const DIGIT: u32 = 11;
const DIGITS: [u32; 3] = [32, 43, 54];

/// What is kept of a vector, by rank.
#[derive(Clone, Copy, Debug)]
pub enum Picked<'a> {
    /// So many of the largest.
    Largest(u64),
    /// At random, with a probability that goes from that of the smallest to that of the largest in
    /// even steps; the mean of both for a vector of one element. `draws` has one for each element.
    Random {
        /// The probability of the smallest.
        lowest: f64,
        /// The probability of the largest.
        highest: f64,
        /// Random words, in the order of the keys.
        draws: &'a [u32],
    },
}

/// Writes 1 into `kept` for each element that is picked of its vector, else 0.
///
/// `keys` has the order keys of `stride` vectors, which lie interleaved: the first elements of all,
/// the second ones, and so on. The last elements of some may be missing.
///
/// # Panics
///
/// If `kept` or the draws are not as many as the keys.
pub fn pick_by_rank(keys: &[u64], stride: usize, picked: Picked<'_>, kept: &mut [u8]) {
    assert_eq!(keys.len(), kept.len(), "there must be as many marks as keys");
    let narrow = u64::from(u32::MAX);
    let are_narrow = keys.len() as u64 <= narrow && keys.iter().all(|&key| key <= narrow);
    let (mut order, mut spare) = (Vec::new(), Vec::new());
    for first in 0..stride.min(keys.len()) {
        let vector = keys[first..].iter().step_by(stride).enumerate();
        if are_narrow {
            order.clear();
            order.extend(vector.map(|(at, &key)| (narrow - key) << 32 | at as u64));
            sort(&mut order, &mut spare);
            mark(order.iter().map(|&each| (each & narrow) as usize), first, stride, picked, kept);
        } else {
            let mut order: Vec<u128> =
                vector.map(|(at, &key)| u128::from(!key) << 64 | at as u128).collect();
            order.sort_unstable();
            mark(order.iter().map(|&each| each as usize), first, stride, picked, kept);
        }
    }
}

/// Sorts by the upper half; what is equal there is in order already.
fn sort(order: &mut Vec<u64>, spare: &mut Vec<u64>) {
    if order.len() < SORTED_BY_DIGITS {
        order.sort_unstable();
        return;
    }
    let mut counts = vec![[0_u32; 1 << DIGIT]; DIGITS.len()];
    for &each in order.iter() {
        for (counts, shift) in counts.iter_mut().zip(DIGITS) {
            counts[digit(each, shift)] += 1;
        }
    }
    spare.resize(order.len(), 0);
    for (places, shift) in counts.iter_mut().zip(DIGITS) {
        if places[digit(order[0], shift)] as usize == order.len() {
            continue;
        }
        let mut next = 0;
        for place in places.iter_mut() {
            next += std::mem::replace(place, next);
        }
        for &each in order.iter() {
            let place = &mut places[digit(each, shift)];
            spare[*place as usize] = each;
            *place += 1;
        }
        std::mem::swap(order, spare);
    }
}

fn digit(each: u64, shift: u32) -> usize {
    (each >> shift) as usize % (1 << DIGIT)
}

/// Marks what is picked of one vector, whose elements come in `order`, the largest first.
fn mark(
    order: impl ExactSizeIterator<Item = usize>,
    first: usize,
    stride: usize,
    picked: Picked<'_>,
    kept: &mut [u8],
) {
    let last = order.len() as u64 - 1;
    let own = order.map(|at| first + at * stride);
    match picked {
        Picked::Largest(count) => {
            for (place, at) in (0..).zip(own) {
                kept[at] = u8::from(place < count);
            }
        }
        Picked::Random { lowest, highest, draws } => {
            for (place, at) in (0..).zip(own) {
                kept[at] =
                    u8::from(u64::from(draws[at]) < bound(last - place, last, lowest, highest));
            }
        }
    }
}

/// The elements of one vector from the largest down, so many at a time.
#[derive(Debug)]
pub struct Descent {
    most: usize,
    /// Those that were given before come up to this one in the order, which is by key and index.
    done: Option<u128>,
    /// No later one is among the largest that are left.
    last: u128,
    held: Vec<u128>,
    place: u64,
}

impl Descent {
    /// Gives `most` elements at a time.
    ///
    /// # Panics
    ///
    /// If that is none.
    pub fn new(most: usize) -> Self {
        assert!(most > 0, "a descent goes down by some elements at a time");
        let held = Vec::with_capacity(2 * most);
        Self { most, done: None, last: u128::MAX, held, place: 0 }
    }

    /// Takes what it needs of the elements from `first` on, which have these order keys.
    pub fn take(&mut self, first: u64, keys: &[u64]) {
        for (index, &key) in (first..).zip(keys) {
            let each = u128::from(!key) << 64 | u128::from(index);
            if each > self.last || self.done.is_some_and(|done| each <= done) {
                continue;
            }
            if self.held.len() == 2 * self.most {
                self.last = *self.held.select_nth_unstable(self.most - 1).1;
                self.held.truncate(self.most);
                if each > self.last {
                    continue;
                }
            }
            self.held.push(each);
        }
    }

    /// The next elements, when all of the vector were taken: index and place of each, in the order of
    /// their indices. None if there are no more.
    pub fn next_down(&mut self) -> Vec<(u64, u64)> {
        self.held.sort_unstable();
        self.held.truncate(self.most);
        self.done = self.held.last().copied().or(self.done);
        let mut next: Vec<(u64, u64)> =
            self.held.iter().zip(self.place..).map(|(&each, place)| (each as u64, place)).collect();
        next.sort_unstable();
        self.place += next.len() as u64;
        self.last = u128::MAX;
        self.held.clear();
        next
    }
}

/// What a draw must be below for the element of a rank, counted from the smallest, to be kept.
pub fn bound(rank: u64, last: u64, lowest: f64, highest: f64) -> u64 {
    let share = if last == 0 { 0.5 } else { rank as f64 / last as f64 };
    // Truncation is the floor: it is not negative.
    ((lowest + (highest - lowest) * share) * 4_294_967_296.0 + 0.5) as u64
}
