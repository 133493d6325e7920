//! What low-rank products add to a block of a matrix, from bytes to bytes.
//!
//! `out = W + s·d`, where `d` is the row of the left factor times the column of the right one, in order
//! of the rank. Each step is a fused multiply-add, which rounds once and is the same everywhere. A
//! column is a lane, so the order within an element is the same at every width.
//!
//! An element takes as many steps as the rank is, so the sums must stay in registers and what they are
//! made of in the nearest cache. A panel of a few rows is widened into a buffer on the stack, products
//! are added there by one kernel, and it is rounded into the output. The kernel goes through tiles of
//! rows and columns that have a register or two for each row. So there is one kernel for all stored
//! types and any number of products, and the columns at the edges need no code of their own: what is
//! computed beyond them is not taken out of the buffer.

use std::ops::Range;

use super::convert::{narrow, widen};
use super::level::{Kernel, Level};
use super::real::Real;
use crate::dtype::DType;

/// Columns of a tile.
pub const TILE: usize = 16;
/// Rows that share what is loaded of the right factor: with one tile, as many sums as hide the time
/// that an addition takes, and as fit the registers of AVX2.
const ROWS: usize = 4;
/// Tiles that a row which is left over is computed in, for the same reason.
const TILES: usize = 4;
/// Tiles of a panel: those of the right factor stay in the nearest cache, for small ranks.
const PANEL: usize = 32;

/// Columns of a panel.
const COLUMNS: usize = PANEL * TILE;

type Panel<T, const N: usize> = [[[T; TILE]; PANEL]; N];

/// The right factor of a product: for each tile of columns, a line of it for each step of the rank.
#[derive(Clone, Debug, Default)]
pub struct Tiles<T> {
    rank: usize,
    lines: Vec<[T; TILE]>,
}

impl<T: Real> Tiles<T> {
    /// Zeros for so many columns.
    pub fn new(rank: usize, columns: usize) -> Self {
        Self { rank, lines: vec![[T::ZERO; TILE]; rank * Self::count(columns as u64) as usize] }
    }

    /// Bytes that so many columns take; as many as a number can say, whatever a file claims.
    pub fn bytes(rank: u64, columns: u64) -> u64 {
        let tiles = Self::count(columns);
        tiles.saturating_mul(rank).saturating_mul(size_of::<[T; TILE]>() as u64)
    }

    /// Tiles that there are: always so many that a row which is left over has its own.
    fn count(columns: u64) -> u64 {
        columns.div_ceil((TILE * TILES) as u64) * TILES as u64
    }

    /// Puts in the number at a step of the rank and a column.
    pub fn put(&mut self, step: usize, column: usize, value: T) {
        self.lines[column / TILE * self.rank + step][column % TILE] = value;
    }
}

/// A product that is added: `scale · left · right`.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a, T> {
    /// A row of the rank for each row of the block.
    pub left: &'a [T],
    /// A column for each column of the matrix.
    pub right: &'a Tiles<T>,
    /// What the sum is multiplied by.
    pub scale: T,
}

/// Adds a product to `N` rows of a panel, in some of its tiles, `M` at a time.
struct LowRank<'a, T, const N: usize, const M: usize> {
    /// The numbers of the rows, for each step of the rank.
    left: &'a [[T; N]],
    /// The lines of the panel's tiles.
    right: &'a [[T; TILE]],
    scale: T,
    tiles: Range<usize>,
    panel: &'a mut Panel<T, N>,
}

impl<T: Real, const N: usize, const M: usize> Kernel for LowRank<'_, T, N, M> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let rank = self.left.len();
        let Some((start, rest)) = self.left.split_first() else { return };
        for tile in self.tiles.step_by(M) {
            let mut right = [self.right; M];
            for (m, lines) in right.iter_mut().enumerate() {
                *lines = &self.right[(tile + m) * rank..][..rank];
            }
            // Plain loops over arrays of a fixed size, by number, lines as copies: so the sums stay in
            // registers, where iterators over tiles take ten times as long. The first product is
            // taken as it is: a sum from +0 would lose a negative zero.
            let mut sums = [[[T::ZERO; TILE]; M]; N];
            for n in 0..N {
                for m in 0..M {
                    for lane in 0..TILE {
                        sums[n][m][lane] = start[n] * right[m][0][lane];
                    }
                }
            }
            for (step, factors) in (1..rank).zip(rest) {
                let mut lines = [[T::ZERO; TILE]; M];
                for m in 0..M {
                    lines[m] = right[m][step];
                }
                for n in 0..N {
                    for m in 0..M {
                        for lane in 0..TILE {
                            sums[n][m][lane] = factors[n].mul_add(lines[m][lane], sums[n][m][lane]);
                        }
                    }
                }
            }
            for (n, row) in self.panel.iter_mut().enumerate() {
                let row = &mut row[tile..][..M];
                for m in 0..M {
                    for lane in 0..TILE {
                        row[m][lane] = self.scale.mul_add(sums[n][m][lane], row[m][lane]);
                    }
                }
            }
        }
    }
}

/// A block of a matrix: what it is made of, and where its columns lie.
struct Block<'a, T> {
    level: Level,
    base: (DType, &'a [u8]),
    products: &'a [Product<'a, T>],
    first: usize,
    width: usize,
    dtype: DType,
}

impl<T: Real> Block<'_, T> {
    /// Makes rows, `N` at a time: those of one panel after the other.
    fn make<const N: usize, const M: usize>(&self, rows: Range<usize>, out: &mut [u8]) {
        // Rows that are computed together have their numbers side by side.
        let beside = |Product { left, right, .. }: &Product<'_, T>| -> Vec<[T; N]> {
            let rank = right.rank;
            let of =
                |row: usize, step: usize| std::array::from_fn(|n| left[(row + n) * rank + step]);
            let mut numbers = Vec::with_capacity(rows.len() / N * rank);
            for row in rows.clone().step_by(N) {
                numbers.extend((0..rank).map(|step| of(row, step)));
            }
            numbers
        };
        let left: Vec<_> = self.products.iter().map(beside).collect();
        let mut panel: Panel<T, N> = [[[T::ZERO; TILE]; PANEL]; N];
        let (mut start, end) = (self.first, self.first + self.width);
        while start < end {
            let tile = start / COLUMNS * PANEL;
            let next = end.min(tile * TILE + COLUMNS);
            let columns = start - tile * TILE..next - tile * TILE;
            let tiles = columns.start / (TILE * M) * M..columns.end.div_ceil(TILE * M) * M;
            let bytes = |row: usize, dtype: DType| {
                let at = row * self.width + start - self.first;
                at * dtype.size()..(at + columns.len()) * dtype.size()
            };
            for (group, row) in rows.clone().step_by(N).enumerate() {
                let (dtype, base) = self.base;
                for (row, line) in (row..).zip(&mut panel) {
                    let line = &mut line.as_flattened_mut()[columns.clone()];
                    widen(self.level, dtype, &base[bytes(row, dtype)], line);
                }
                for (Product { right, scale, .. }, left) in self.products.iter().zip(&left) {
                    let (scale, rank, tiles) = (*scale, right.rank, tiles.clone());
                    let left = &left[group * rank..][..rank];
                    let right = &right.lines[tile * rank..];
                    self.level.run(LowRank::<T, N, M> {
                        left,
                        right,
                        scale,
                        tiles,
                        panel: &mut panel,
                    });
                }
                for (row, line) in (row..).zip(&panel) {
                    let line = &line.as_flattened()[columns.clone()];
                    narrow(self.level, line, self.dtype, &mut out[bytes(row, self.dtype)]);
                }
            }
            start = next;
        }
    }
}

/// `out[i][c] = base[i][c] + scale · (left[i][0]·right[0][first + c] + left[i][1]·right[1][first + c] + …)`
/// of each product, one after the other, rounded to `dtype` in the end.
///
/// `base` and `out` have rows of `width` elements.
///
/// # Panics
///
/// If bytes or factors do not have these sizes, or a type is none that [`widen`] and [`narrow`] take.
pub fn low_rank_bytes<T: Real>(
    level: Level,
    base: (DType, &[u8]),
    products: &[Product<'_, T>],
    first: usize,
    width: usize,
    dtype: DType,
    out: &mut [u8],
) {
    let row = width * dtype.size();
    if row == 0 {
        return;
    }
    let rows = out.len() / row;
    assert_eq!(out.len(), rows * row, "the output must have whole rows");
    assert_eq!(base.1.len(), rows * width * base.0.size(), "the base must have as many");
    for Product { left, right, .. } in products {
        assert_eq!(left.len(), rows * right.rank, "the left factor has a row for each");
        let needed = Tiles::<T>::count((first + width) as u64) as usize * right.rank;
        assert!(right.lines.len() >= needed, "the right factor must have all columns");
    }
    let block = Block { level, base, products, first, width, dtype };
    let whole = rows / ROWS * ROWS;
    block.make::<ROWS, 1>(0..whole, out);
    block.make::<1, TILES>(whole..rows, out);
}
