//! Tensors in memory as sources and sinks: a second kind beside files.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use oxmerge::dtype::DType;
use oxmerge::engine::source::{Sink, Source};
use oxmerge::error::Result;
use oxmerge::io::AlignedBuffer;
use oxmerge::kernels::{Level, Real, narrow, widen};

/// The bytes of a tensor.
#[derive(Debug)]
pub(crate) struct ArraySource {
    dtype: DType,
    bytes: Vec<u8>,
}

impl ArraySource {
    pub(crate) fn new<T: Real>(values: &[T], dtype: DType) -> Arc<Self> {
        let mut bytes = vec![0; values.len() * dtype.size()];
        narrow(Level::portable(), values, dtype, &mut bytes);
        Arc::new(Self { dtype, bytes })
    }

    /// A tensor of these bytes.
    pub(crate) fn from_bytes(bytes: Vec<u8>, dtype: DType) -> Arc<Self> {
        Arc::new(Self { dtype, bytes })
    }

    /// Its type and bytes.
    pub(crate) fn parts(&self) -> (DType, &[u8]) {
        (self.dtype, &self.bytes)
    }

    pub(crate) fn widened<T: Real>(&self) -> Vec<T> {
        let mut values = vec![T::ZERO; self.bytes.len() / self.dtype.size()];
        widen(Level::portable(), self.dtype, &self.bytes, &mut values);
        values
    }
}

impl Source for ArraySource {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read<'a>(
        &'a self,
        elements: Range<u64>,
        _scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        let size = self.dtype.size();
        Ok(&self.bytes[elements.start as usize * size..elements.end as usize * size])
    }
}

/// Bytes that arrive in any order.
#[derive(Debug)]
pub(crate) struct ArraySink {
    dtype: DType,
    bytes: Mutex<Vec<u8>>,
}

impl ArraySink {
    pub(crate) fn new(elements: usize, dtype: DType) -> Arc<Self> {
        Arc::new(Self { dtype, bytes: Mutex::new(vec![0xEE; elements * dtype.size()]) })
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl Sink for ArraySink {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn takes_any_piece(&self) -> bool {
        true
    }

    fn write(&self, first: u64, buffer: &AlignedBuffer, bytes: Range<usize>) -> Result<()> {
        let start = first as usize * self.dtype.size();
        let mut all = self.bytes.lock().unwrap();
        all[start..start + bytes.len()].copy_from_slice(&buffer.as_slice()[bytes]);
        Ok(())
    }
}
