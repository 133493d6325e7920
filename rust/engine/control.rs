//! What the caller and the workers tell each other while a merge runs. Atomics only.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Progress out, cancellation in.
#[derive(Debug, Default)]
pub struct Control {
    cancelled: AtomicBool,
    read: AtomicU64,
    written: AtomicU64,
    tensors: AtomicU64,
    current: Mutex<String>,
}

/// Where a merge stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes of inputs read, re-reads included.
    pub bytes_read: u64,
    /// Bytes of output tensors computed and handed to the writer.
    pub bytes_written: u64,
    /// Output tensors finished.
    pub tensors: u64,
    /// The tensor that was begun last.
    pub current: String,
}

impl Control {
    /// Asks the workers to stop after the piece in hand.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether the caller asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            bytes_read: self.read.load(Ordering::Relaxed),
            bytes_written: self.written.load(Ordering::Relaxed),
            tensors: self.tensors.load(Ordering::Relaxed),
            current: self.current.lock().map(|name| name.clone()).unwrap_or_default(),
        }
    }

    pub(crate) fn add_read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn finish_tensor(&self) {
        self.tensors.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn begin_tensor(&self, name: &str) {
        if let Ok(mut current) = self.current.lock() {
            current.clear();
            current.push_str(name);
        }
    }
}
