//! A source whose rows come from several tensors: a vocabulary in the order of the output's tokens.
//!
//! Nothing is materialised: the rows of a piece are gathered when the piece is read. Means are taken
//! in f64, row by row in listed order, and rounded once to the source's type.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::source::{Memory, Source};
use crate::dtype::DType;
use crate::error::Result;
use crate::io::AlignedBuffer;
use crate::kernels::{Level, narrow, widen};
use crate::plan::{Origin, RowMap};

/// Elements of a part that are looked at at a time, where they are copied or added up.
const CHUNK: u64 = 8192;

/// Rows of `parts`, as `map` says.
#[derive(Debug)]
pub struct RowsSource {
    map: Arc<RowMap>,
    parts: Vec<Arc<dyn Source>>,
    dtype: DType,
    /// Elements of a row.
    width: u64,
    /// The mean of the rows above those that are that mean, once it was needed.
    mean_above: OnceLock<Vec<u8>>,
    /// Held while it is looked for: that takes memory which is counted once.
    search: Mutex<()>,
}

/// What gathering takes besides the buffer that is gathered into.
struct Desk {
    read: AlignedBuffer,
    sums: Vec<f64>,
    terms: Vec<f64>,
}

impl RowsSource {
    /// Bytes that a worker needs besides its buffer while it reads.
    const DESK_BYTES: u64 = CHUNK * 3 * size_of::<f64>() as u64;

    /// The rows of `parts`, of `width` elements each. `map` was checked against the parts.
    pub fn new(map: Arc<RowMap>, parts: Vec<Arc<dyn Source>>, width: u64) -> Self {
        let types: Vec<DType> = parts.iter().map(|part| part.dtype()).collect();
        let dtype = map.dtype(&types);
        let (mean_above, search) = (OnceLock::new(), Mutex::new(()));
        Self { map, parts, dtype, width, mean_above, search }
    }

    /// Bytes that all workers together need to find the mean of rows: sums, the mean, and a chunk.
    fn search_bytes(&self) -> u64 {
        (2 * self.width).saturating_add(CHUNK).saturating_mul(size_of::<f64>() as u64)
    }

    /// What `elements` are, if they are consecutive in one part that can be handed on as it is.
    fn handed_on(&self, elements: &Range<u64>) -> Option<(&dyn Source, Range<u64>)> {
        let row = elements.start.checked_div(self.width)?;
        let (rows, origin) = self.map.runs_from(row).next()?;
        let Origin::Part { part, first } = origin else { return None };
        let part = &*self.parts[*part as usize];
        let taken = self.in_part(elements, rows.start, *first);
        let fits = elements.end <= rows.end * self.width && part.dtype() == self.dtype;
        (fits && !part.is_in_place()).then_some((part, taken))
    }

    /// Where `elements` of a run are in their part.
    fn in_part(&self, elements: &Range<u64>, run: u64, first: u32) -> Range<u64> {
        let at = |element: u64| element - run * self.width + u64::from(first) * self.width;
        at(elements.start)..at(elements.end)
    }

    fn gather(&self, elements: Range<u64>, out: &mut [u8], desk: &mut Desk) -> Result<()> {
        let size = self.dtype.size() as u64;
        for (rows, origin) in self.map.runs_from(elements.start / self.width) {
            let start = elements.start.max(rows.start * self.width);
            let end = elements.end.min(rows.end * self.width);
            if start >= end {
                break;
            }
            let place = |at: u64| ((at - elements.start) * size) as usize;
            match origin {
                Origin::Zero => out[place(start)..place(end)].fill(0),
                Origin::Part { part, first } => {
                    let part = &*self.parts[*part as usize];
                    for piece in pieces(start..end) {
                        let bytes = &mut out[place(piece.start)..place(piece.end)];
                        self.take(part, self.in_part(&piece, rows.start, *first), bytes, desk)?;
                    }
                }
                Origin::Mean(of) => {
                    for piece in self.pieces_of_rows(start..end) {
                        let bytes = &mut out[place(piece.start)..place(piece.end)];
                        self.mean(of, &self.columns(&piece), bytes, desk)?;
                    }
                }
                Origin::MeanAbove => {
                    let mean = self.mean_above(rows.start, desk)?;
                    for piece in self.pieces_of_rows(start..end) {
                        let columns = self.columns(&piece);
                        let at = |column: u64| (column * size) as usize;
                        let bytes = &mut out[place(piece.start)..place(piece.end)];
                        bytes.copy_from_slice(&mean[at(columns.start)..at(columns.end)]);
                    }
                }
            }
        }
        Ok(())
    }

    /// Pieces of `elements` each of which is within a row.
    fn pieces_of_rows(&self, elements: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let width = self.width;
        let rows = elements.start / width..elements.end.div_ceil(width);
        let row =
            move |row: u64| elements.start.max(row * width)..elements.end.min((row + 1) * width);
        rows.map(row).flat_map(pieces)
    }

    /// The columns that `elements` of one row are in.
    fn columns(&self, elements: &Range<u64>) -> Range<u64> {
        let row = elements.start / self.width * self.width;
        elements.start - row..elements.end - row
    }

    /// Elements of a part as elements of this source.
    fn take(
        &self,
        part: &dyn Source,
        elements: Range<u64>,
        out: &mut [u8],
        desk: &mut Desk,
    ) -> Result<()> {
        if part.dtype() == self.dtype {
            out.copy_from_slice(part.read(elements, &mut desk.read)?);
            return Ok(());
        }
        let Desk { read, sums, .. } = desk;
        let sums = &mut sums[..(elements.end - elements.start) as usize];
        widen(Level::portable(), part.dtype(), part.read(elements, read)?, sums);
        narrow(Level::portable(), sums, self.dtype, out);
        Ok(())
    }

    /// The mean of some rows, in some columns.
    fn mean(
        &self,
        rows: &[(u32, u32)],
        columns: &Range<u64>,
        out: &mut [u8],
        desk: &mut Desk,
    ) -> Result<()> {
        let Desk { read, sums, terms } = desk;
        let count = (columns.end - columns.start) as usize;
        let (sums, terms) = (&mut sums[..count], &mut terms[..count]);
        sums.fill(0.0);
        for &(part, row) in rows {
            let part = &*self.parts[part as usize];
            let at = |column: u64| u64::from(row) * self.width + column;
            let bytes = part.read(at(columns.start)..at(columns.end), read)?;
            widen(Level::portable(), part.dtype(), bytes, terms);
            sums.iter_mut().zip(&*terms).for_each(|(sum, term)| *sum += *term);
        }
        sums.iter_mut().for_each(|sum| *sum /= rows.len() as f64);
        narrow(Level::portable(), sums, self.dtype, out);
        Ok(())
    }

    /// The mean of the first `rows` rows, found when it is first needed.
    fn mean_above(&self, rows: u64, desk: &mut Desk) -> Result<&[u8]> {
        let _search = self.search.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mean) = self.mean_above.get() {
            return Ok(mean);
        }
        let mut sums = vec![0.0; self.width as usize];
        let mut bytes = vec![0; CHUNK as usize * self.dtype.size()];
        for piece in self.pieces_of_rows(0..rows * self.width) {
            let count = (piece.end - piece.start) as usize;
            let bytes = &mut bytes[..count * self.dtype.size()];
            let column = (piece.start % self.width) as usize;
            self.gather(piece, bytes, desk)?;
            let terms = &mut desk.terms[..count];
            widen(Level::portable(), self.dtype, bytes, terms);
            sums[column..][..count].iter_mut().zip(terms).for_each(|(sum, term)| *sum += *term);
        }
        sums.iter_mut().for_each(|sum| *sum /= rows as f64);
        let mut mean = vec![0; sums.len() * self.dtype.size()];
        narrow(Level::portable(), &sums, self.dtype, &mut mean);
        Ok(self.mean_above.get_or_init(|| mean))
    }
}

impl Source for RowsSource {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn memory(&self) -> Memory {
        let has_mean = self.map.runs().any(|(_, origin)| matches!(origin, Origin::MeanAbove));
        let search = if has_mean { self.search_bytes() } else { 0 };
        let own = Memory { reading: Self::DESK_BYTES, held: 0, shared: search };
        self.parts.iter().map(|part| part.memory()).fold(own, |all, part| Memory {
            reading: all.reading.max(Self::DESK_BYTES.saturating_add(part.reading)),
            held: all.held.saturating_add(part.held),
            shared: all.shared.saturating_add(part.shared),
        })
    }

    fn read<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        if let Some((part, taken)) = self.handed_on(&elements) {
            return part.read(taken, scratch);
        }
        let length = (elements.end - elements.start) as usize * self.dtype.size();
        scratch.grow(length)?;
        let mut desk = Desk {
            read: AlignedBuffer::default(),
            sums: vec![0.0; CHUNK as usize],
            terms: vec![0.0; CHUNK as usize],
        };
        self.gather(elements, &mut scratch.as_mut_slice()[..length], &mut desk)?;
        Ok(&scratch.as_slice()[..length])
    }
}

/// `elements` in pieces that fit a desk.
fn pieces(elements: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = elements.end;
    elements.step_by(CHUNK as usize).map(move |start| start..(start + CHUNK).min(end))
}
