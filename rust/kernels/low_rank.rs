//! What a low-rank product adds to a block of a matrix.
//!
//! `out = out + s·d`, where `d` is the row of the left factor times the column of the right one:
//! `l₀·r₀`, then `+ l₁·r₁`, … in order of the rank, each product and each sum rounded. A column is a
//! lane, so the order within an element is the same at every width; four rows share what is loaded of
//! the right factor. That factor is kept in tiles of [`TILE`] columns, one after the other, so that a
//! tile is read from front to back.

use super::level::{Kernel, Level};
use super::real::Real;

/// Columns of a tile.
pub const TILE: usize = 16;
/// Rows that are computed together: enough sums under way to hide the time that an addition takes.
const ROWS: usize = 4;
/// Tiles that are gone through before the next rows: for small ranks they stay in the nearest cache.
const PANEL: usize = 32;

/// The right factor of a product: for each tile of columns, a line of it for each step of the rank.
#[derive(Clone, Debug, Default)]
pub struct Tiles<T> {
    rank: usize,
    lines: Vec<[T; TILE]>,
}

impl<T: Real> Tiles<T> {
    /// Zeros for so many columns.
    pub fn new(rank: usize, columns: usize) -> Self {
        Self { rank, lines: vec![[T::ZERO; TILE]; rank * columns.div_ceil(TILE)] }
    }

    /// Bytes that so many columns take; as many as a number can say, whatever a file claims.
    pub fn bytes(rank: u64, columns: u64) -> u64 {
        let tiles = columns.div_ceil(TILE as u64);
        tiles.saturating_mul(rank).saturating_mul(size_of::<[T; TILE]>() as u64)
    }

    /// Puts in the number at a step of the rank and a column.
    pub fn put(&mut self, step: usize, column: usize, value: T) {
        self.lines[column / TILE * self.rank + step][column % TILE] = value;
    }

    /// The lines of tile `tile`.
    #[inline(always)]
    fn tile(&self, tile: usize) -> &[[T; TILE]] {
        &self.lines[tile * self.rank..(tile + 1) * self.rank]
    }
}

struct LowRank<'a, T> {
    left: &'a [T],
    right: &'a Tiles<T>,
    first: usize,
    width: usize,
    scale: T,
    out: &'a mut [T],
}

impl<T: Real> LowRank<'_, T> {
    /// Adds to the rows from `row` on, in the columns of one tile.
    #[inline(always)]
    fn add<const N: usize>(&mut self, row: usize, tile: usize) {
        let rank = self.right.rank;
        let mut left = [&self.left[..0]; N];
        for (n, left) in left.iter_mut().enumerate() {
            *left = &self.left[(row + n) * rank..][..rank];
        }
        let Some((first, rest)) = self.right.tile(tile).split_first() else { return };
        // Plain loops over arrays of a fixed size, a line at a time as a copy: so the sums stay in
        // registers. The first product is taken as it is: a sum from +0 would lose a negative zero.
        let mut sums = [[T::ZERO; TILE]; N];
        for n in 0..N {
            for lane in 0..TILE {
                sums[n][lane] = left[n][0] * first[lane];
            }
        }
        for step in 0..rest.len() {
            let line = rest[step];
            for n in 0..N {
                let factor = left[n][1..][step];
                for lane in 0..TILE {
                    sums[n][lane] += factor * line[lane];
                }
            }
        }
        let start = (tile * TILE).max(self.first);
        let end = ((tile + 1) * TILE).min(self.first + self.width);
        for (n, sums) in sums.iter().enumerate() {
            let line =
                &mut self.out[(row + n) * self.width..][start - self.first..end - self.first];
            if let Ok(line) = <&mut [T; TILE]>::try_from(&mut *line) {
                for lane in 0..TILE {
                    line[lane] += self.scale * sums[lane];
                }
            } else {
                let sums = &sums[start - tile * TILE..end - tile * TILE];
                for (value, &sum) in line.iter_mut().zip(sums) {
                    *value += self.scale * sum;
                }
            }
        }
    }
}

impl<T: Real> Kernel for LowRank<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let rows = self.out.len() / self.width;
        let tiles = self.first / TILE..(self.first + self.width).div_ceil(TILE);
        for panel in tiles.clone().step_by(PANEL) {
            let panel = panel..(panel + PANEL).min(tiles.end);
            let whole = rows / ROWS * ROWS;
            for row in (0..whole).step_by(ROWS) {
                for tile in panel.clone() {
                    self.add::<ROWS>(row, tile);
                }
            }
            for row in whole..rows {
                for tile in panel.clone() {
                    self.add::<1>(row, tile);
                }
            }
        }
    }
}

/// `out[i][c] += scale · (left[i][0]·right[0][first + c] + left[i][1]·right[1][first + c] + …)`.
///
/// `out` has rows of `width` elements, `left` a row of the rank for each of them.
///
/// # Panics
///
/// If the factors do not have these sizes.
pub fn low_rank_into<T: Real>(
    level: Level,
    left: &[T],
    right: &Tiles<T>,
    first: usize,
    width: usize,
    scale: T,
    out: &mut [T],
) {
    if right.rank == 0 || width == 0 {
        return;
    }
    assert_eq!(out.len() % width, 0, "the output must have whole rows");
    assert_eq!(left.len(), out.len() / width * right.rank, "the left factor has a row for each");
    let needed = (first + width).div_ceil(TILE) * right.rank;
    assert!(right.lines.len() >= needed, "the right factor must have all columns");
    level.run(LowRank { left, right, first, width, scale, out });
}
