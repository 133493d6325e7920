//! Where elements come from and go to. Nothing else in the engine knows files or offsets.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::digest::Digester;
use crate::dtype::DType;
use crate::error::Result;
use crate::io::AlignedBuffer;

/// What a source needs besides the buffers that it is read into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Memory {
    /// Bytes in each worker, while it reads: one source after the other.
    pub reading: u64,
    /// Bytes in each worker as long as it works on the tensor.
    pub held: u64,
    /// Bytes in all, as long as the tensor is under way.
    pub shared: u64,
}

/// A tensor that can be read by ranges of flat indices.
///
/// A byte range of a file is one kind; an array in memory, a decoded format, a permutation of rows
/// are others.
pub trait Source: Debug + Send + Sync {
    /// The element type of what [`read`](Self::read) gives.
    fn dtype(&self) -> DType;

    /// The same as elements of `dtype`, each rounded once, if it computes what it gives: then nothing
    /// is computed in vain, where that is all that is wanted.
    fn rounded(&self, dtype: DType) -> Option<Arc<dyn Source>> {
        let _ = dtype;
        None
    }

    /// Whether long reads are used where the bytes lie: in memory, or in a map of a file, which makes
    /// memory resident around the piece as well.
    fn is_in_place(&self) -> bool {
        false
    }

    /// What reading takes besides the caller's buffer.
    fn memory(&self) -> Memory {
        Memory::default()
    }

    /// Bytes that reading so many elements takes from files: none of what another source of the task
    /// reads too.
    fn stored_bytes(&self, elements: u64) -> u64 {
        elements * self.dtype().size() as u64
    }

    /// Whether reading `elements` would wait for a device, since they are in no cache.
    fn is_far(&self, elements: Range<u64>) -> bool {
        let _ = elements;
        false
    }

    /// As [`read`](Self::read), for elements that will not be read again: keeps no copy behind.
    fn read_once<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        self.read(elements, scratch)
    }

    /// A hint that `elements` will be read soon. Never fails, never waits.
    fn prefetch(&self, elements: Range<u64>) {
        let _ = elements;
    }

    /// The little-endian bytes of `elements`, in place or in `scratch`.
    fn read<'a>(&'a self, elements: Range<u64>, scratch: &'a mut AlignedBuffer)
    -> Result<&'a [u8]>;

    /// A hint that `elements` will not be read again soon.
    fn release(&self, elements: Range<u64>) {
        let _ = elements;
    }
}

/// Elements that memory is handed out by; divides a block. Where an output is an input too, as many
/// are computed at a time: they and those they are made of fit the cache nearest by.
pub const GRAIN: usize = 8192;

/// The bytes of a part of an output, to be computed where they belong.
#[derive(Debug)]
pub struct Place<'a>(pub &'a mut [u8]);

/// A tensor that is written by ranges of flat indices, each element once, in any order.
pub trait Sink: Debug + Send + Sync {
    /// The element type it takes.
    fn dtype(&self) -> DType;

    /// Where in an aligned buffer the bytes of element `first` have to begin.
    fn buffer_offset(&self, first: u64) -> usize {
        let _ = first;
        0
    }

    /// The memory of `elements` itself, whole grains but for the tensor's end, where the output lies in
    /// memory. Each element is handed out once.
    fn place(&self, elements: &Range<u64>) -> Option<Place<'_>> {
        let _ = elements;
        None
    }

    /// Whether no source of the task has that memory too. Else an element may be written only when
    /// nobody uses it any more.
    fn is_apart(&self) -> bool {
        true
    }

    /// What is told of the elements before they are written, where a digest is wanted.
    fn digester(&self) -> Option<&Digester> {
        None
    }

    /// Whether pieces may begin anywhere, not only with a block.
    fn takes_any_piece(&self) -> bool {
        false
    }

    /// Takes the elements from `first` on: `bytes` of `buffer`.
    fn write(&self, first: u64, buffer: &AlignedBuffer, bytes: Range<usize>) -> Result<()>;

    /// Called once, when every element was written.
    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

/// Takes everything and keeps nothing. Its type has a say in what the arithmetic is done in, also
/// for a task without an output.
#[derive(Debug)]
pub struct Nowhere(pub DType);

impl Sink for Nowhere {
    fn dtype(&self) -> DType {
        self.0
    }

    fn write(&self, _first: u64, _buffer: &AlignedBuffer, _bytes: Range<usize>) -> Result<()> {
        Ok(())
    }
}
